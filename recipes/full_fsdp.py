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

from dataclasses import dataclass, replace

import torch
import tyro

from minillama.checkpoint import Checkpoints
from minillama.distributed import (
    choose_strategy,
    initialise,
    make_mesh,
    materialise,
    process_group,
    quiet_but_on_rank_zero,
    rank,
    say,
    set_dtypes,
    shard,
)
from minillama.errors import UserError
from minillama.faults import user_errors
from minillama.help import filled
from minillama.hf import check_weights, load_weights, read_config, save_pretrained
from minillama.hub import find_model
from minillama.kernels import compile_blocks
from minillama.memory import out_of_memory_explained
from minillama.metrics import Metrics
from minillama.model import Llama
from minillama.optim import LossScaler, OptimConfig, learning_rate, make_optimizer
from minillama.packing import Batch, collate
from minillama.precision import compact_base
from minillama.profiling import profiled
from minillama.run import (
    RunConfig,
    find_start,
    finish_run,
    load_data,
    resolve_kernels,
    resolve_precision,
    saved_flags,
    start_run,
    summary,
    with_date,
)
from minillama.train import Step, count_steps, eval_batches, evaluate, prefetched, steps, train_step


@dataclass(frozen=True)
class Config(RunConfig):
    """Fine-tune all weights of a Llama, or all but the first blocks, under FSDP2."""

    optim: OptimConfig = OptimConfig(lr=2e-5)


def freeze_first(model: Llama, count: int) -> None:
    """Freezes the first `count` blocks and, unless that is 0, the embedding (and so the head that is its twin)."""
    blocks = model.model.layers
    if count > len(blocks):
        raise UserError(f"--train.freeze-layers {count}: the model has {len(blocks)} layers")
    for module in (model.model.embed_tokens, *blocks[:count]) if count else ():
        module.requires_grad_(False)


def main(config: Config) -> None:
    with process_group(config.device, config.fsdp.timeout_minutes) as device:
        config = replace(config, model=find_model(config.model))
        checkpoint = find_start(config)
        config, precision = resolve_precision(config, device, checkpoint)
        config = replace(config, data=with_date(config.data, checkpoint))
        with torch.device("meta"):
            model = Llama(read_config(config.model))
        weights = check_weights(model, config.model)
        freeze_first(model, config.train.freeze_layers)
        set_dtypes(model, config.fsdp)
        fsdp = choose_strategy(model, config.fsdp, device)
        mesh = make_mesh(fsdp, device)
        precision += compact_base(model, weights, fsdp, mesh)
        attention = resolve_kernels(config, model, fsdp, device, checkpoint)

        tokenizer, train, validation = load_data(config, model)
        start = start_run(config, train, checkpoint)
        say(summary(config, fsdp, mesh, precision, attention, model, train, validation, start.progress.window))
        if config.train.freeze_layers:
            head = " with the tied head" if model.config.tie_word_embeddings else ""
            say(f"frozen      the first {config.train.freeze_layers} blocks, and the embedding{head}")

        shard(model, mesh, fsdp)
        if config.kernels.compile:
            compile_blocks(model)
        materialise(model, "cpu" if fsdp.cpu_offload else device)
        initialise(model, config.seed, loaded=load_weights(model, config.model))
        optimizer = make_optimizer(model.parameters(), config.optim)
        scaler = LossScaler() if fsdp.precision == "fp16" else None
        total = count_steps(train, config.train, start.progress.window)
        metrics = Metrics(config, model, device, total, start.progress)

        torch.manual_seed(config.seed + rank())  # dropout differs between ranks
        with (
            Checkpoints(config, start, model, optimizer, scaler, device) as checkpoints,
            out_of_memory_explained(config, fsdp, model, optimizer, metrics),
            profiled(config.profile, metrics) as profiler,
        ):

            def run_evaluation(done: int) -> None:
                if validation:
                    batches = eval_batches(validation, config.eval, tokenizer.pad_id, device, rank(), mesh.size())
                    with metrics.paused():
                        result = evaluate(model, batches, checkpoints.stopping)
                    metrics.evaluation(done, result)

            if start.progress.evaluate:
                run_evaluation(start.progress.step)
            checkpoints.leave_if_stopping(metrics)

            def load(step: Step) -> list[Batch]:
                return [collate(train, packs, tokenizer.pad_id, device) for packs in step.micro_batches]

            model.train()
            own_steps = steps(train, config.train, config.seed, rank(), mesh.size(), start.progress)
            for step, ready in prefetched(own_steps, load):
                with metrics.waiting():
                    batches = ready.result()
                lr = learning_rate(step.number, step.epoch, total, config.optim)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with profiler.step(batches):
                    loss, norm = train_step(model, optimizer, batches, clip_norm=config.train.clip_norm, scaler=scaler)
                metrics.step(step, lr, loss, norm, batches)
                if config.eval.due(step):
                    run_evaluation(step.number + 1)
                checkpoints.after(step, metrics)
        metrics.close()

        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        save_pretrained(model, config.output_dir / "model", config.model, config.tokenizer, unchanged=frozen)
        say(f"model: {config.output_dir / 'model'}, in Hugging Face's format")
        finish_run(config)


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            flags = tyro.cli(filled(Config), default=saved_flags(Config))
        main(flags)
