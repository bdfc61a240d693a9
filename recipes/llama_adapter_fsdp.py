"""Fine-tune a Llama with llama-adapter (https://arxiv.org/abs/2303.16199) under FSDP2.

    python recipes/llama_adapter_fsdp.py --model DIR --output-dir out/one                       one process
    torchrun --nproc_per_node 4 recipes/llama_adapter_fsdp.py --model DIR --output-dir out/four four GPUs

DIR is a folder in Hugging Face's format or Meta's, or ORG/NAME of the Hugging Face hub. Trains a prompt and
a gate in the top layers' attention. Leaves them, as PEFT's AdaptionPrompt, in OUTPUT_DIR/adapter, a line a step in
metrics.jsonl, and loss.png. All flags: --help.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.peft import check_adapter, continue_adapter, load_adapter_weights, save_adapter
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
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.run import finish_run, prepare_run, resolve
from minillama.training.step import train_step


@dataclass(frozen=True)
class AdapterFlags(LlamaAdapterConfig):
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder of a llama-adapter to start from, in PEFT's format; its prompt_len and layers are taken too."""
    quantize: Quantize = "none"
    """Hold the linear layers of the blocks in 4 bits a weight (nf4, QLoRA's) or 8 (int8); embedding, norms and head stay
    as they are. none: as the model's folder has them."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Fine-tune a Llama with llama-adapter under FSDP2."""

    adapter: AdapterFlags = AdapterFlags()
    optim: OptimConfig = OptimConfig(lr=5e-3)


def build(config: Config) -> tuple[Llama, Weights | None]:
    """The model on the meta device, its base frozen, with llama-adapter; and the base's weights, if it is to run."""
    with torch.device("meta"):
        model = Llama(read_config(config.model))
    model.requires_grad_(False)
    weights = None if config.estimate else check_weights(model, config.model)
    quantize_base(model, weights or quantization(config.model), config.adapter.quantize)
    return apply_llama_adapter(model, config.adapter), weights


def main(config: Config) -> None:
    if config.train.freeze_layers:
        raise UserError("--train.freeze-layers is for full_fsdp.py: under llama-adapter the whole base is frozen")
    if start_from := config.adapter.from_:
        config = replace(config, adapter=continue_adapter(config.adapter, start_from))
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
        optimizer = make_optimizer(model.parameters(), config.optim)

        clip_norm = config.train.clip_norm
        with training_loop(config, run, model, optimizer) as loop:
            for step, batches in loop.steps():
                with loop.profiler.step(batches):
                    loss, norm = train_step(model, optimizer, batches, clip_norm=clip_norm, scaler=loop.scaler)
                loop.after(step, loss, norm, batches)

        adapter = config.output_dir / "adapter"
        save_adapter(model, adapter, config.adapter, model_name(config.model.resolve()))
        say(f"adapter: {adapter}, in PEFT's format")
        finish_run(config)


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            flags = tyro.cli(filled(Config), default=saved_flags(Config))
        main(flags)
