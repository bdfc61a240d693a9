"""What fine-tuning a Llama needs, memory, links and time, on any number of GPUs: without one, and without its weights.

python tools/estimate.py --model llama3-8b --method lora --gpu h100-80 --gpus 8 --fsdp.recompute selective
python tools/estimate.py --model llama3-70b --method full --gpu h100-80 --gpus 64 --advise
python tools/estimate.py --model llama3-405b --method lora --gpu h100-80 --advise                  the fewest GPUs
python tools/estimate.py --model llama3-8b --compare rtx4090-24 h100-80 8xh100-80                  every method, as a table

Takes one step of the recipe on tensors that have shapes and no memory, among processes that are not there. A row is one
document of --context-length tokens, all of them trained: the most that attention and loss can cost.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import re
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.errors import UserError
from minillama.files import read_json
from minillama.formats.hf import quantization, read_config
from minillama.formats.hub import find_model
from minillama.formats.quantized import Quantize, quantize_base
from minillama.help import filled
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.parallel.failures import user_errors
from minillama.parallel.sharding import FsdpConfig
from minillama.training.advise import MOST, Adviser, least_memory
from minillama.training.estimate import CARDS, GIB, NETWORK, described, estimate
from minillama.training.optim import OptimConfig

SIZES = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, tie_word_embeddings
    "llama3.2-1b": (2048, 8192, 16, 32, True),
    "llama3.2-3b": (3072, 8192, 28, 24, True),
    "llama3-8b": (4096, 14336, 32, 32, False),
    "llama3-70b": (8192, 28672, 80, 64, False),
    "llama3-405b": (16384, 53248, 126, 128, False),
}
HUB = {
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama3-8b": "meta-llama/Llama-3.1-8B",
    "llama3-70b": "meta-llama/Llama-3.1-70B",
    "llama3-405b": "meta-llama/Llama-3.1-405B",
}
"""What a command needs that has weights"""
RECIPES = {"full": "full_fsdp.py", "lora": "lora_fsdp.py", "llama-adapter": "llama_adapter_fsdp.py"}
GROUPS = {"lora": "lora", "llama-adapter": "adapter"}
"""Where a recipe has the flags of its method"""


@dataclass(frozen=True)
class LoraFlags(LoraConfig):
    ranks: tyro.conf.Suppress[dict[str, int]] = field(default_factory=dict)
    alphas: tyro.conf.Suppress[dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimFlags(OptimConfig):
    lr: float | None = None  # type: ignore[assignment]
    """The highest learning rate, for the command alone; None: the recipe's own."""

    def __post_init__(self) -> None:
        self.config  # noqa: B018

    @property
    def config(self) -> OptimConfig:
        return OptimConfig(**asdict(self) | ({"lr": OptimConfig.lr} if self.lr is None else {}))


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
    compare: tuple[str, ...] = ()
    """Cards by name, of which the fewest are found, or so many of them, as 8xh100-80: a table of all methods on these cards,
    each with the least memory: full-shard, everything recomputed, one row a process."""
    context_length: int = 4096
    """Tokens of a row."""
    batch_size: int = 4
    """Rows that each process takes at a time. --advise chooses it."""
    accumulate: int = 1
    """Micro-batches of a step."""
    fsdp: FsdpConfig = FsdpConfig(precision="mixed")
    optim: OptimFlags = OptimFlags()
    quantize: Quantize = "none"
    """Hold the linear layers of a frozen base in 4 bits a weight (nf4, QLoRA's) or 8 (int8)."""
    lora: LoraFlags = LoraFlags()
    adapter: LlamaAdapterConfig = LlamaAdapterConfig()

    def __post_init__(self) -> None:
        least = {"gpus": 0, "gpus_per_machine": 1, "context_length": 2, "batch_size": 1, "accumulate": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {value}")
        if self.quantize != "none" and self.method == "full":
            raise UserError(f"--quantize {self.quantize} is for a frozen base: give --method lora or llama-adapter")
        machine = self.gpus_per_machine
        for gpus in (self.gpus, *(int(number or 0) for number, _ in self.compared)):
            if gpus > machine and gpus % machine:
                raise UserError(
                    f"--gpus {gpus} are no whole machines of {machine}: give {gpus // machine * machine} or "
                    f"{-(-gpus // machine) * machine}, or another --gpus-per-machine"
                )
        if self.fsdp.precision == "fp16" and self.optim.kind == "anyprecision":
            raise UserError("--fsdp.precision fp16 is not for --optim.kind anyprecision: give mixed or bf16")
        if self.network <= 0:
            raise UserError(f"--network {self.network}: must be above 0")
        chosen = replace(self.fsdp, precision="mixed", timeout_minutes=FsdpConfig().timeout_minutes) != FsdpConfig(
            precision="mixed"
        )
        if chosen and (self.advise or self.compare):
            raise UserError(
                f"{'--advise' if self.advise else '--compare'} chooses --fsdp.strategy, .recompute and .cpu-offload itself: "
                "leave those flags out"
            )
        if self.compare and (self.advise or self.gpus or self.quantize != "none"):
            raise UserError(
                "--compare tries all methods and says how many GPUs: leave out --advise, --gpus and --quantize"
            )
        if self.fsdp.precision == "auto":
            raise UserError("--fsdp.precision auto: the GPU is not here to be asked; give mixed, bf16, fp16 or fp32")

    @property
    def compared(self) -> list[tuple[str, str]]:
        """Of each of --compare, how many ("": the fewest), and the card."""
        found = []
        for text in self.compare:
            match = re.fullmatch(r"(?:([1-9]\d*)x)?(.+)", text)
            if not match or match[2] not in CARDS:
                raise UserError(
                    f"--compare {text}: give a card, or how many of it, as 8xh100-80; of {', '.join(CARDS)}"
                )
            found.append((match[1] or "", match[2]))
        return found


def shapes(model: str) -> tuple[LlamaConfig, dict[str, Any]]:
    """The config and the quantization_config of a model by name, folder, file or hub id. Raises UserError for what is none
    of them."""
    if model in SIZES:
        hidden, intermediate, layers, heads, tied = SIZES[model]
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            tie_word_embeddings=tied,
        )
        return config, {}
    if Path(model).is_file() and Path(model).suffix == ".json":
        return LlamaConfig.from_dict(read_json(Path(model))), quantization(Path(model))
    folder = find_model(model, weights=False)
    if not folder.exists():
        raise UserError(
            f"--model {model} is not here: give {', '.join(SIZES)}, a model's folder, its config.json, or ORG/NAME of the "
            "Hugging Face hub"
        )
    return read_config(folder), quantization(folder)


def build(flags: Config, config: LlamaConfig, stored: dict[str, Any]) -> Llama:
    """The model on the meta device, as the method's recipe builds it. stored: how its folder is quantised."""
    with torch.device("meta"):
        model = Llama(config)
    if flags.method == "full":
        return model
    quantize_base(model.requires_grad_(False), stored, flags.quantize)
    return apply_lora(model, flags.lora) if flags.method == "lora" else apply_llama_adapter(model, flags.adapter)


def command(flags: Config, gpus: int, fsdp: FsdpConfig, batch_size: int) -> str:
    """To type on every machine, $HEAD being the first of several."""
    machines = -(-gpus // flags.gpus_per_machine)
    where = f" --nnodes {machines} --rdzv-backend c10d --rdzv-endpoint $HEAD:29500" if machines > 1 else ""
    start = f"torchrun --nproc_per_node {min(gpus, flags.gpus_per_machine)}{where}" if gpus > 1 else "python"
    model = HUB.get(flags.model, flags.model)
    if Path(model).is_file():
        model = str(Path(model).parent)
    words = ["--model", model, "--output-dir", "out"]
    words += ["--train.batch-size", str(batch_size), "--train.accumulate", str(flags.accumulate)]
    words += ["--data.context-length", str(flags.context_length)]
    if flags.quantize != "none":
        words += [f"--{GROUPS[flags.method]}.quantize", flags.quantize]
    groups = [("fsdp", fsdp, FsdpConfig()), ("optim", flags.optim, OptimFlags())]
    if group := GROUPS.get(flags.method):
        own = getattr(flags, group)
        groups.append((group, own, type(own)()))
    for group, given, default in groups:
        for name in (entry.name for entry in fields(given)):
            value = getattr(given, name)
            if value == getattr(default, name):
                continue
            flag = f"--{group}.{name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(flag)
            else:
                words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return f"{start} recipes/{RECIPES[flags.method]} {shlex.join(words)}"


def settings_of(fsdp: FsdpConfig, batch_size: int) -> str:
    offload = " --fsdp.cpu-offload" * fsdp.cpu_offload
    return f"--fsdp.strategy {fsdp.strategy} --fsdp.recompute {fsdp.recompute}{offload} --train.batch-size {batch_size}"


def adviser_of(flags: Config, config: LlamaConfig, stored: dict[str, Any]) -> Adviser:
    return Adviser(
        lambda layers: build(flags, replace(config, num_hidden_layers=layers), stored),
        config.num_hidden_layers,
        flags.gpu,
        flags.network,
        {
            "optim": flags.optim.config,
            "context_length": flags.context_length,
            "accumulate": flags.accumulate,
            "machine": flags.gpus_per_machine,
        },
    )


def advise(flags: Config, config: LlamaConfig, stored: dict[str, Any]) -> None:
    adviser = adviser_of(flags, config, stored)
    gpus = flags.gpus
    choices = adviser.choices(gpus, flags.fsdp) if gpus else []
    if not choices:
        asked, gpus = gpus, adviser.fewest(flags.fsdp)
        if not gpus:
            raise UserError(f"no number of {flags.gpu} up to {MOST:,} holds a step: give a larger --gpu")
        print(f"{f'nothing fits {asked} of them; ' if asked else ''}the fewest {flags.gpu} that hold a step: {gpus}")
        choices = adviser.choices(gpus, flags.fsdp)
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
        memory = choice.found.allowed_for() / GIB
        print(f"{choice.tokens_per_s:<11,.0f} {memory:<7.1f} {settings_of(choice.fsdp, choice.batch_size)}")
    print(f"\nthe first:\n{found}\n{described(found, flags.gpu, flags.network)}")
    print(f"command     {command(flags, gpus, best.fsdp, best.batch_size)}")


def compare(flags: Config, config: LlamaConfig, stored: dict[str, Any]) -> None:
    """Prints a table: a method a row, a card a column."""
    print(f"| {flags.model}, {flags.context_length} tokens | " + " | ".join(flags.compare) + " |")
    print("|---" * (1 + len(flags.compare)) + "|")
    methods: dict[str, dict[str, Any]] = {"LoRA": {"method": "lora"}}
    if not stored:
        methods = {"full": {"method": "full"}} | methods
        methods |= {f"LoRA, {kind}": {"method": "lora", "quantize": kind} for kind in ("int8", "nf4")}
    for name, changes in methods.items():
        own = replace(flags, compare=(), **changes)
        try:
            build(own, replace(config, num_hidden_layers=1), stored)
        except UserError as error:  # what it cannot quantise
            print(f"| {name} | " + " | ".join([f"not possible: {error}"] + ["-"] * (len(flags.compare) - 1)) + " |")
            continue
        adviser = adviser_of(own, config, stored)
        cells = []
        for number, card in flags.compared:
            on_card = replace(adviser, card=card)
            gpus = int(number) if number else on_card.fewest(flags.fsdp)
            if not gpus:
                cells.append(f"more than {MOST:,}")
                continue
            found = on_card.whole(least_memory(flags.fsdp), gpus)
            size = f"{found.allowed_for() / GIB:.1f} GiB"
            if on_card.fits(found):
                size = f"**{size}**, {on_card.tokens_per_s(found):,.0f} tokens/s"
            cells.append(size if number else f"{gpus}: {size}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main(flags: Config) -> None:
    config, stored = shapes(flags.model)
    if stored and flags.method == "full" and not flags.compare:
        raise UserError(f"{flags.model} is quantised, and its weights cannot be trained: give --method lora")
    if flags.advise:
        return advise(flags, config, stored)
    if flags.compare:
        return compare(flags, config, stored)
    gpus = flags.gpus or 1
    found = estimate(
        lambda: build(flags, config, stored),
        gpus,
        fsdp=flags.fsdp,
        optim=flags.optim.config,
        batch_size=flags.batch_size,
        context_length=flags.context_length,
        accumulate=flags.accumulate,
        machine=flags.gpus_per_machine,
        memory=CARDS[flags.gpu].memory * GIB,
    )
    print(f"{found}\n{described(found, flags.gpu, flags.network)}")
    print(f"command     {command(flags, gpus, replace(flags.fsdp, strategy=found.fsdp.strategy), flags.batch_size)}")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(filled(Config)))
