"""Fine-tune all weights of a Llama, or all but the first blocks, under FSDP2.

    python recipes/full_fsdp.py --model DIR --output-dir out/one                                one process
    torchrun --nproc_per_node 8 recipes/full_fsdp.py --model DIR --output-dir out/eight \\
        --data.dataset alpaca --data.path alpaca_data.json --fsdp.recompute full                eight GPUs

DIR is a folder in Hugging Face's format or Meta's, or ORG/NAME of the Hugging Face hub. Leaves such a folder with
the trained weights in OUTPUT_DIR/model, a line a step in metrics.jsonl, and loss.png. All flags: --help.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

from dataclasses import dataclass

import torch
import tyro

from minillama.errors import UserError
from minillama.formats.hf import check_weights, load_weights, quantization, read_config
from minillama.formats.hf_export import save_pretrained
from minillama.formats.meta import Weights
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
class Config(RunConfig):
    """Fine-tune all weights of a Llama, or all but the first blocks, under FSDP2."""

    optim: OptimConfig = OptimConfig(lr=2e-5)


def freeze_first(model: Llama, count: int) -> None:
    """Freezes the first `count` blocks and, unless that is 0, the embedding (and a tied head with it)."""
    blocks = model.model.layers
    if count > len(blocks):
        raise UserError(f"--train.freeze-layers {count}: the model has {len(blocks)} layers")
    for module in (model.model.embed_tokens, *blocks[:count]) if count else ():
        module.requires_grad_(False)


def build(config: Config) -> tuple[Llama, Weights | None]:
    """The model on the meta device, with what is frozen frozen; and its weights, if it is to run."""
    with torch.device("meta"):
        model = Llama(read_config(config.model))
    if quantization(config.model):
        raise UserError(
            f"{config.model} is quantised, and its weights cannot be trained: give the plain model, or train an adapter "
            "on it with recipes/lora_fsdp.py"
        )
    freeze_first(model, config.train.freeze_layers)
    return model, None if config.estimate else check_weights(model, config.model)


def main(config: Config) -> None:
    if config.estimate:
        return say(estimate_run(config, build))
    with process_group(config.device, config.fsdp.timeout_minutes, config.fsdp.lost_seconds) as device:
        config, checkpoint, precision = resolve(config, device)
        model, weights = build(config)
        run = prepare_run(config, model, weights, device, checkpoint, precision)
        if config.train.freeze_layers:
            head = " with the tied head" if model.config.tie_word_embeddings else ""
            say(f"frozen      the first {config.train.freeze_layers} blocks, and the embedding{head}")

        shard(model, run.mesh, run.fsdp)
        if config.kernels.compile:
            compile_blocks(model)
        materialise(model, run.parameter_device)
        initialise(model, config.seed, loaded=load_weights(model, config.model))
        optimizer = make_optimizer(model.parameters(), config.optim)

        clip_norm = config.train.clip_norm
        with training_loop(config, run, model, optimizer) as loop:
            for step, batches in loop.steps():
                with loop.profiler.step(batches):
                    loss, norm = train_step(model, optimizer, batches, clip_norm=clip_norm, scaler=loop.scaler)
                loop.after(step, loss, norm, batches)

        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        save_pretrained(model, config.output_dir / "model", config.model, config.tokenizer, unchanged=frozen)
        say(f"model: {config.output_dir / 'model'}, in Hugging Face's format")
        finish_run(config)


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            flags = tyro.cli(filled(Config), default=saved_flags(Config))
        main(flags)
