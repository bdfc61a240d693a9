"""Fine-tune a Llama with LoRA under FSDP2.

    python recipes/lora_fsdp.py --model DIR --output-dir out/one                                one process
    torchrun --nproc_per_node 4 recipes/lora_fsdp.py --model DIR --output-dir out/four \\
        --data.dataset alpaca --data.path alpaca_data.json --fsdp.recompute full                four GPUs

DIR is a folder in Hugging Face's format or Meta's, or ORG/NAME of the Hugging Face hub. Leaves the adapter,
in PEFT's format, in OUTPUT_DIR/adapter, a line a step in metrics.jsonl, and loss.png. All flags: --help.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from minillama.adapters.lora import LoraConfig, apply_lora, lora_plus
from minillama.adapters.merge import merge_adapter
from minillama.adapters.peft import (
    check_adapter,
    continue_adapter,
    load_adapter_weights,
    peft_config,
    save_adapter,
    vllm_refusals,
)
from minillama.errors import UserError
from minillama.formats.hf import check_weights, load_weights, quantization, read_config
from minillama.formats.hub import model_name
from minillama.formats.meta import Weights
from minillama.formats.quantized import Quantize, quantize_base
from minillama.hardware.kernels import compile_blocks
from minillama.help import filled
from minillama.model.llama import Llama
from minillama.parallel.failures import user_errors
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.processes import process_group, quiet_but_on_rank_zero, say
from minillama.parallel.sharding import shard
from minillama.training.config import RunConfig, saved_flags
from minillama.training.estimate import estimate_run
from minillama.training.loop import training_loop
from minillama.training.optim import make_optimizer
from minillama.training.run import finish_run, prepare_run, resolve
from minillama.training.step import train_step


@dataclass(frozen=True)
class LoraFlags(LoraConfig):
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder of a LoRA to start from, in PEFT's format; its rank, alpha, targets and dropout are taken too."""
    quantize: Quantize = "none"
    """Hold the linear layers of the blocks in 4 bits a weight (nf4, QLoRA's) or 8 (int8); embedding, norms and head stay
    as they are. none: as the model's folder has them."""
    plus_ratio: float = 1.0
    """The learning rate of B over that of A (LoRA+, https://arxiv.org/abs/2402.12354), which is --optim.lr. The paper
    recommends 16."""
    merge: bool = False
    """At the end, also write base and LoRA as one Hugging Face folder, OUTPUT_DIR/model."""
    ranks: tyro.conf.Suppress[dict[str, int]] = field(default_factory=dict)
    alphas: tyro.conf.Suppress[dict[str, float]] = field(default_factory=dict)  # both: of --lora.from only

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.plus_ratio < math.inf:
            raise UserError(f"--lora.plus-ratio {self.plus_ratio}: must be a finite number above 0")


@dataclass(frozen=True)
class Config(RunConfig):
    """Fine-tune a Llama with LoRA under FSDP2."""

    lora: LoraFlags = LoraFlags()


def build(config: Config) -> tuple[Llama, Weights | None]:
    """The model on the meta device, its base frozen, with LoRA; and the base's weights, if it is to run."""
    with torch.device("meta"):
        model = Llama(read_config(config.model))
    model.requires_grad_(False)
    weights = None if config.estimate else check_weights(model, config.model)
    quantize_base(model, weights or quantization(config.model), config.lora.quantize)
    return apply_lora(model, config.lora), weights


def main(config: Config) -> None:
    if config.train.freeze_layers:
        raise UserError("--train.freeze-layers is for full_fsdp.py: under LoRA the whole base is frozen")
    if start_from := config.lora.from_:
        config = replace(config, lora=continue_adapter(config.lora, start_from))
    if config.estimate:
        return say(estimate_run(config, build))
    with process_group(config.device, config.fsdp.timeout_minutes, config.fsdp.lost_seconds) as device:
        config, checkpoint, precision = resolve(config, device)
        model, weights = build(config)
        if start_from:
            check_adapter(model, start_from, base=config.model)
        run = prepare_run(config, model, weights, device, checkpoint, precision)

        shard(model, run.mesh, run.fsdp)
        if config.kernels.compile:
            compile_blocks(model)
        materialise(model, run.parameter_device)
        loaded = load_weights(model, config.model)
        if start_from:
            loaded |= load_adapter_weights(model, start_from)
            say(f"adapter     starts from {start_from}")
        initialise(model, config.seed, loaded=loaded)
        optimizer = make_optimizer(model.parameters(), config.optim, lora_plus(model, config.lora.plus_ratio))

        clip_norm = config.train.clip_norm
        with training_loop(config, run, model, optimizer) as loop:
            for step, batches in loop.steps():
                with loop.profiler.step(batches):
                    loss, norm = train_step(model, optimizer, batches, clip_norm=clip_norm, scaler=loop.scaler)
                loop.after(step, loss, norm, batches)

        adapter = config.output_dir / "adapter"
        save_adapter(model, adapter, config.lora, model_name(config.model.resolve()))
        say(f"adapter: {adapter}, in PEFT's format")
        for refusal in vllm_refusals(peft_config(config.lora, "", 0)):
            say(f"vLLM: {refusal}")
        if config.lora.merge:
            merge_adapter(config.model, adapter, config.output_dir / "model", config.tokenizer)
            say(f"model: {config.output_dir / 'model'}, base and LoRA in one, in Hugging Face's format")
        finish_run(config)


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            flags = tyro.cli(filled(Config), default=saved_flags(Config))
        main(flags)
