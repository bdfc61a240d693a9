"""Fine-tune a Llama with LoRA under FSDP2.

    python recipes/lora_fsdp.py --model DIR --output-dir out/one                                one process
    torchrun --nproc_per_node 4 recipes/lora_fsdp.py --model DIR --output-dir out/four \\
        --data.dataset alpaca --data.path alpaca_data.json --fsdp.recompute full                four GPUs

DIR is a local folder in Hugging Face's format: config.json, *.safetensors, tokenizer files. Leaves the adapter,
in PEFT's format, in OUTPUT_DIR/adapter, a line a step in metrics.jsonl, and loss.png. All flags: --help.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from minillama.datasets import DataConfig, check_vocabulary, load_datasets
from minillama.distributed import (
    Device,
    FsdpConfig,
    initialise,
    materialise,
    process_group,
    quiet_but_on_rank_zero,
    rank,
    say,
    set_dtypes,
    shard,
    user_errors,
)
from minillama.errors import UserError
from minillama.hf import check_weights, load_weights, read_config, save_adapter
from minillama.lora import LoraConfig, apply_lora
from minillama.metrics import LogConfig, Metrics, plot_loss, saved_flags, start_run, summary
from minillama.model import Llama
from minillama.optim import OptimConfig, learning_rate, make_optimizer
from minillama.packing import collate, pack
from minillama.tokenizer import load_tokenizer
from minillama.train import EvalConfig, TrainConfig, count_steps, eval_batches, evaluate, steps, train_step


@dataclass(frozen=True)
class Config:
    """Fine-tune a Llama with LoRA under FSDP2."""

    model: Path
    """Folder of the base model, in Hugging Face's format."""
    output_dir: Path
    """Folder for what the run leaves; made if need be."""
    tokenizer: Path | None = None
    """Folder or file of the tokenizer; None: the model's folder."""
    seed: int = 42
    """Decides the adapter's start, the order of the data and the dropout."""
    device: Device = "auto"
    """auto: CUDA if there is one."""
    config: Path | None = None
    """The run.json of an earlier run: its flags are the defaults of this one."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    fsdp: FsdpConfig = FsdpConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: must be at least 0 and below 2^32")


def main(config: Config) -> None:
    with process_group(config.device) as mesh:
        device, world_size = mesh.device_type, mesh.size()

        with torch.device("meta"):
            model = Llama(read_config(config.model)).requires_grad_(False)
        check_weights(model, config.model)
        apply_lora(model, config.lora)
        set_dtypes(model, config.fsdp)

        tokenizer = load_tokenizer(config.tokenizer or config.model)
        check_vocabulary(tokenizer, model.config.vocab_size)
        rows, val_rows = load_datasets(config.data, tokenizer, validation=config.eval.enabled)
        train = pack(rows, config.data.context_length, config.seed)
        validation = pack(val_rows, config.data.context_length, config.seed) if val_rows else None
        last = count_steps(len(train.packs), config.train, world_size)
        start_run(config.output_dir, config)
        say(summary(model, train, validation, last, config.fsdp.precision, mesh, config.output_dir))

        shard(model, mesh, config.fsdp)
        materialise(model, device)
        initialise(model, config.seed, loaded=load_weights(model, config.model))
        optimizer = make_optimizer(model.parameters(), config.optim)
        metrics = Metrics(config.output_dir, config.log, config, model, device, config.fsdp.compute_dtype, last)

        def run_evaluation(step: int) -> None:
            if validation:
                batches = eval_batches(validation, config.eval, tokenizer.pad_id, device, rank(), world_size)
                started = time.perf_counter()
                loss, tokens = evaluate(model, batches)
                metrics.evaluation(step, loss, tokens, seconds=time.perf_counter() - started)

        run_evaluation(0)
        model.train()
        torch.manual_seed(config.seed + rank())  # dropout differs between ranks
        for step in steps(len(train.packs), config.train, config.seed, rank(), world_size):
            started = time.perf_counter()
            batches = [collate(train, packs, tokenizer.pad_id, device) for packs in step.micro_batches]
            waited = time.perf_counter() - started
            lr = learning_rate(step.number, step.epoch, last, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, norm = train_step(model, optimizer, batches, clip_norm=config.train.clip_norm)
            done = step.number + 1
            metrics.step(done, step.progress, lr, loss, norm, batches, waited)
            if done == last or (done % config.eval.every == 0 if config.eval.every else step.ends_epoch):
                run_evaluation(done)
        metrics.close()

        save_adapter(model, config.output_dir / "adapter", config.lora, str(config.model.resolve()))
        if rank() == 0:
            plot_loss(config.output_dir / "metrics.jsonl", config.output_dir / "loss.png")
        say(f"adapter: {config.output_dir / 'adapter'}, in PEFT's format")


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            flags = tyro.cli(Config, default=saved_flags(Config))
        main(flags)
