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

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from minillama.adapters import (
    check_adapter,
    continue_adapter,
    load_adapter_weights,
    peft_config,
    save_adapter,
    vllm_refusals,
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
from minillama.lora import LoraConfig, apply_lora
from minillama.memory import out_of_memory_explained
from minillama.merge import merge_adapter
from minillama.metrics import Metrics
from minillama.model import Llama
from minillama.optim import LossScaler, learning_rate, make_optimizer
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
class LoraFlags(LoraConfig):
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder of a LoRA to start from, in PEFT's format; its rank, alpha, targets and dropout are taken too."""
    merge: bool = False
    """At the end, also write base and LoRA as one Hugging Face folder, OUTPUT_DIR/model."""
    ranks: tyro.conf.Suppress[dict[str, int]] = field(default_factory=dict)
    alphas: tyro.conf.Suppress[dict[str, float]] = field(default_factory=dict)  # both: of --lora.from only


@dataclass(frozen=True)
class Config(RunConfig):
    """Fine-tune a Llama with LoRA under FSDP2."""

    lora: LoraFlags = LoraFlags()


def main(config: Config) -> None:
    if config.train.freeze_layers:
        raise UserError("--train.freeze-layers is for full_fsdp.py: under LoRA the whole base is frozen")
    with process_group(config.device, config.fsdp.timeout_minutes) as device:
        config = replace(config, model=find_model(config.model))
        checkpoint = find_start(config)
        config, precision = resolve_precision(config, device, checkpoint)
        config = replace(config, data=with_date(config.data, checkpoint))
        with torch.device("meta"):
            model = Llama(read_config(config.model))
            model.requires_grad_(False)
        weights = check_weights(model, config.model)
        if config.lora.from_:
            config = replace(config, lora=continue_adapter(config.lora, config.lora.from_))
        apply_lora(model, config.lora)
        if config.lora.from_:
            check_adapter(model, config.lora.from_)
            warn_of_other_base(config.model, config.lora.from_)
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
        if config.lora.from_:
            loaded |= load_adapter_weights(model, config.lora.from_)
            say(f"adapter     starts from {config.lora.from_}")
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

        save_adapter(model, config.output_dir / "adapter", config.lora, model_name(config.model.resolve()))
        say(f"adapter: {config.output_dir / 'adapter'}, in PEFT's format")
        for refusal in vllm_refusals(peft_config(config.lora, "", 0)):
            say(f"vLLM: {refusal}")
        if config.lora.merge:
            merge_adapter(config.model, config.output_dir / "adapter", config.output_dir / "model", config.tokenizer)
            say(f"model: {config.output_dir / 'model'}, base and LoRA in one, in Hugging Face's format")
        finish_run(config)


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            flags = tyro.cli(filled(Config), default=saved_flags(Config))
        main(flags)
