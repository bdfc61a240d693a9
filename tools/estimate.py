"""What fine-tuning a Llama needs, memory, links and time, on any number of GPUs: without one, and without its weights.

python tools/estimate.py --model llama3-8b --method lora --gpu h100-80 --gpus 8 --fsdp.recompute selective
python tools/estimate.py --model llama3-70b --method full --gpu h100-80 --gpus 64 --advise
python tools/estimate.py --model llama3-405b --method lora --gpu h100-80 --advise                  the fewest GPUs

Takes one step of the recipe on tensors that have shapes and no memory, among processes that are not there. A row is one
document of --context-length tokens, all of them trained: the most that attention and loss can cost.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.errors import UserError
from minillama.files import read_json
from minillama.formats.hf import read_config
from minillama.formats.hub import find_model
from minillama.formats.quantized import Quantize, quantize_base
from minillama.help import filled
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.parallel.failures import user_errors
from minillama.parallel.sharding import FsdpConfig
from minillama.training.advise import Adviser
from minillama.training.estimate import CARDS, GIB, NETWORK, described, estimate, refuse_quantised
from minillama.training.optim import OptimConfig

SIZES = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, tie_word_embeddings
    "llama3.2-1b": (2048, 8192, 16, 32, True),
    "llama3.2-3b": (3072, 8192, 28, 24, True),
    "llama3-8b": (4096, 14336, 32, 32, False),
    "llama3-70b": (8192, 28672, 80, 64, False),
    "llama3-405b": (16384, 53248, 126, 128, False),
}
RECIPES = {"full": "full_fsdp.py", "lora": "lora_fsdp.py", "llama-adapter": "llama_adapter_fsdp.py"}


@dataclass(frozen=True)
class Config:
    """What to estimate."""

    model: str
    """llama3.2-1b, llama3.2-3b, llama3-8b, llama3-70b, llama3-405b; or a model's folder, its config.json, or ORG/NAME of
    the Hugging Face hub, of which only the config is downloaded."""
    method: Literal["full", "lora", "llama-adapter"] = "lora"
    """What is trained: all weights, or an adapter."""
    gpu: Literal[tuple(CARDS)] = "h100-80"  # type: ignore[valid-type]
    """The card, by name and GB."""
    gpus: int = 0
    """How many, each with one process; 0: one, or with --advise the fewest that hold a step."""
    gpus_per_machine: int = 8
    """Those that NVLink, or PCIe, connects."""
    network: float = NETWORK
    """GB/s that each GPU sends to other machines, and receives."""
    advise: bool = False
    """Try strategies, recomputation, offloading and micro-batches, and rank those that fit by tokens per second."""
    context_length: int = 4096
    """Tokens of a row."""
    batch_size: int = 4
    """Rows that each process takes at a time. --advise chooses it."""
    accumulate: int = 1
    """Micro-batches of a step."""
    fsdp: FsdpConfig = FsdpConfig(precision="mixed")
    optim: OptimConfig = OptimConfig()
    quantize: Quantize = "none"
    """Hold the linear layers of a frozen base in 4 bits a weight (nf4, QLoRA's) or 8 (int8)."""
    lora: LoraConfig = LoraConfig()
    adapter: LlamaAdapterConfig = LlamaAdapterConfig()

    def __post_init__(self) -> None:
        least = {"gpus": 0, "gpus_per_machine": 1, "context_length": 2, "batch_size": 1, "accumulate": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {value}")
        if self.quantize != "none" and self.method == "full":
            raise UserError(f"--quantize {self.quantize} is for a frozen base: give --method lora or llama-adapter")
        if self.network <= 0:
            raise UserError(f"--network {self.network}: must be above 0")
        if self.advise and self.fsdp != FsdpConfig(precision=self.fsdp.precision):
            raise UserError(
                "--advise chooses --fsdp.strategy, .recompute and .cpu-offload itself: leave those flags out"
            )
        if self.fsdp.precision == "auto":
            raise UserError("--fsdp.precision auto: the GPU is not here to be asked; give mixed, bf16, fp16 or fp32")


def shapes(model: str) -> LlamaConfig:
    """The config of a model by name, folder, file or hub id. Raises UserError for what is none of them."""
    if model in SIZES:
        hidden, intermediate, layers, heads, tied = SIZES[model]
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            tie_word_embeddings=tied,
        )
    if Path(model).is_file() and Path(model).suffix == ".json":
        return LlamaConfig.from_dict(read_json(Path(model)))
    folder = find_model(model, weights=False)
    refuse_quantised(folder)
    return read_config(folder)


def build(flags: Config, config: LlamaConfig) -> Llama:
    """The model on the meta device, as the method's recipe builds it."""
    with torch.device("meta"):
        model = Llama(config)
    if flags.method == "full":
        return model
    quantize_base(model.requires_grad_(False), None, flags.quantize)
    return apply_lora(model, flags.lora) if flags.method == "lora" else apply_llama_adapter(model, flags.adapter)


def command(flags: Config, gpus: int, chosen: str) -> str:
    """To type on every machine, $HEAD being the first of several."""
    machines = -(-gpus // flags.gpus_per_machine)
    where = f" --nnodes {machines} --rdzv-backend c10d --rdzv-endpoint $HEAD:29500" if machines > 1 else ""
    start = f"torchrun --nproc_per_node {min(gpus, flags.gpus_per_machine)}{where}" if gpus > 1 else "python"
    group = {"lora": "lora", "llama-adapter": "adapter"}.get(flags.method)
    chosen += f" --{group}.quantize {flags.quantize}" if flags.quantize != "none" else ""
    return (
        f"{start} recipes/{RECIPES[flags.method]} --model {flags.model} --output-dir out {chosen} "
        f"--train.accumulate {flags.accumulate} --data.context-length {flags.context_length} "
        f"--fsdp.precision {flags.fsdp.precision}"
    )


def advise(flags: Config, config: LlamaConfig) -> None:
    settings = {"optim": flags.optim, "context_length": flags.context_length, "accumulate": flags.accumulate}
    adviser = Adviser(
        lambda layers: build(flags, replace(config, num_hidden_layers=layers)),
        config.num_hidden_layers,
        flags.gpu,
        flags.network,
        settings | {"machine": flags.gpus_per_machine},
    )
    gpus, precision = flags.gpus, FsdpConfig(precision=flags.fsdp.precision)
    choices = adviser.choices(gpus, precision) if gpus else []
    if not choices:
        asked, gpus = gpus, adviser.fewest(precision)
        if not gpus:
            raise UserError(f"no number of {flags.gpu} up to 4,096 holds a step: give a larger --gpu")
        print(f"{f'nothing fits {asked} of them; ' if asked else ''}the fewest {flags.gpu} that hold a step: {gpus}")
        choices = adviser.choices(gpus, precision)
    while choices:  # the lines are not quite straight: the whole depth decides
        best = choices[0]
        found = adviser.estimate(config.num_hidden_layers, best.batch_size, gpus, best.fsdp)
        if adviser.fits(found):
            break
        choices = choices[1:]
    else:
        raise UserError(f"what seemed to fit {gpus} {flags.gpu} does not at full depth: give --gpus {2 * gpus}")
    print("tokens/s    GiB     settings")
    for choice in choices:
        print(f"{choice.tokens_per_s:<11,.0f} {choice.found.allowed_for() / GIB:<7.1f} {choice.flags}")
    print(f"\nthe first:\n{found}\n{described(found, flags.gpu, flags.network)}")
    print(f"command     {command(flags, gpus, best.flags)}")


def main(flags: Config) -> None:
    config = shapes(flags.model)
    if flags.advise:
        return advise(flags, config)
    found = estimate(
        lambda: build(flags, config),
        flags.gpus or 1,
        fsdp=flags.fsdp,
        optim=flags.optim,
        batch_size=flags.batch_size,
        context_length=flags.context_length,
        accumulate=flags.accumulate,
        machine=flags.gpus_per_machine,
        memory=CARDS[flags.gpu].memory * GIB,
    )
    print(f"{found}\n{described(found, flags.gpu, flags.network)}")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(filled(Config)))
