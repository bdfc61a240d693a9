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

from minillama.adapters import (
    check_adapter,
    continue_adapter,
    load_adapter_weights,
    save_adapter,
    warn_of_other_base,
)
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
from minillama.hf import check_weights, load_weights, read_config
from minillama.hub import find_model, model_name
from minillama.kernels import compile_blocks
from minillama.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
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
class AdapterFlags(LlamaAdapterConfig):
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder of a llama-adapter to start from, in PEFT's format; its prompt_len and layers are taken too."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Fine-tune a Llama with llama-adapter under FSDP2."""

    adapter: AdapterFlags = AdapterFlags()
    optim: OptimConfig = OptimConfig(lr=5e-3)


def main(config: Config) -> None:
    if config.train.freeze_layers:
        raise UserError("--train.freeze-layers is for full_fsdp.py: under llama-adapter the whole base is frozen")
    with process_group(config.device, config.fsdp.timeout_minutes) as device:
        config = replace(config, model=find_model(config.model))
        checkpoint = find_start(config)
        config, precision = resolve_precision(config, device, checkpoint)
        config = replace(config, data=with_date(config.data, checkpoint))
        with torch.device("meta"):
            model = Llama(read_config(config.model))
            model.requires_grad_(False)
        weights = check_weights(model, config.model)
        if config.adapter.from_:
            config = replace(config, adapter=continue_adapter(config.adapter, config.adapter.from_))
        apply_llama_adapter(model, config.adapter)
        if config.adapter.from_:
            check_adapter(model, config.adapter.from_)
            warn_of_other_base(config.model, config.adapter.from_)
        set_dtypes(model, config.fsdp)
        fsdp = choose_strategy(model, config.fsdp, device)
        mesh = make_mesh(fsdp, device)
        precision += compact_base(model, weights, fsdp, mesh)
        attention = resolve_kernels(config, model, fsdp, device, checkpoint)

        tokenizer, train, validation = load_data(config, model)
        start = start_run(config, train, checkpoint)
        say(summary(config, fsdp, mesh, precision, attention, model, train, validation, start.progress.window))

        shard(model, mesh, fsdp)
        if config.kernels.compile:
            compile_blocks(model)
        materialise(model, "cpu" if fsdp.cpu_offload else device)
        loaded = load_weights(model, config.model)
        if config.adapter.from_:
            loaded |= load_adapter_weights(model, config.adapter.from_)
            say(f"adapter     starts from {config.adapter.from_}")
        initialise(model, config.seed, loaded=loaded)
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

        save_adapter(model, config.output_dir / "adapter", config.adapter, model_name(config.model.resolve()))
        say(f"adapter: {config.output_dir / 'adapter'}, in PEFT's format")
        finish_run(config)


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            flags = tyro.cli(filled(Config), default=saved_flags(Config))
        main(flags)
