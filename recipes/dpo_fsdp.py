"""Teach a Llama to prefer some answers over others by DPO, with LoRA or all weights, under FSDP2.

    python recipes/dpo_fsdp.py --model DIR --output-dir out/one --data.path pairs.jsonl --data.val-fraction 0.1
    torchrun --nproc_per_node 4 recipes/dpo_fsdp.py --model DIR --output-dir out/four --method full --dpo.precompute \\
        --data.path pairs.jsonl --data.val-path held_out.jsonl

DIR is a folder in Hugging Face's format or Meta's, or ORG/NAME of the Hugging Face hub, best of a model that was tuned to
chat; rows have a prompt, a chosen answer and a rejected one. The reference is the model as it was before: with LoRA the
base, or with --lora.from that adapter; --dpo.loss simpo has none. Leaves OUTPUT_DIR/adapter in PEFT's format, or with
--method full OUTPUT_DIR/model in Hugging Face's, a line a step in metrics.jsonl, and loss.png. All flags: --help.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from minillama.adapters.lora import LoraConfig, apply_lora, lora_off, lora_plus
from minillama.adapters.merge import merge_adapter
from minillama.adapters.peft import (
    check_adapter,
    continue_adapter,
    load_adapter_weights,
    peft_config,
    save_adapter,
    vllm_refusals,
)
from minillama.data.datasets import PreferenceConfig
from minillama.errors import UserError
from minillama.formats.hf import check_weights, load_weights, read_config
from minillama.formats.hf_export import save_pretrained
from minillama.formats.hub import model_name
from minillama.formats.quantized import Quantize, quantize_base
from minillama.hardware.kernels import compile_blocks
from minillama.help import filled
from minillama.model.llama import Llama
from minillama.model.quant import quantized_layers
from minillama.parallel.failures import user_errors
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.processes import on_rank_zero, process_group, quiet_but_on_rank_zero, say
from minillama.parallel.sharding import shard
from minillama.training.config import RunConfig, saved_flags
from minillama.training.dpo import DpoConfig, DpoLoss, FrozenWeights, adapter_fingerprint, precompute
from minillama.training.loop import training_loop
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.run import finish_run, prepare_run, resolve
from minillama.training.step import train_step


@dataclass(frozen=True)
class LoraFlags(LoraConfig):
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder of a LoRA in PEFT's format to start from, which is the reference too; its rank, alpha and targets are taken."""
    quantize: Quantize = "none"
    """Hold the linear layers of the blocks in 4 bits a weight (nf4, QLoRA's) or 8 (int8); embedding, norms and head stay
    as they are. none: as the model's folder has them."""
    plus_ratio: float = 1.0
    """The learning rate of B over that of A (LoRA+, https://arxiv.org/abs/2402.12354), which is --optim.lr. The paper
    recommends 16."""
    merge: bool = False
    """At the end, also write base and LoRA as one Hugging Face folder, OUTPUT_DIR/model."""
    dropout: float = 0.0
    """Dropout on the input of the added branch only; it would blur the comparison with the reference."""
    ranks: tyro.conf.Suppress[dict[str, int]] = field(default_factory=dict)
    alphas: tyro.conf.Suppress[dict[str, float]] = field(default_factory=dict)  # both: of --lora.from only

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.plus_ratio < math.inf:
            raise UserError(f"--lora.plus-ratio {self.plus_ratio}: must be a finite number above 0")


@dataclass(frozen=True)
class Config(RunConfig):
    """Teach a Llama to prefer some answers over others by DPO, with LoRA or all weights, under FSDP2."""

    method: Literal["lora", "full"] = "lora"
    """lora: train an adapter. full: train all weights."""
    data: PreferenceConfig = PreferenceConfig()
    optim: OptimConfig = OptimConfig(lr=5e-6)
    dpo: DpoConfig = DpoConfig()
    lora: LoraFlags = LoraFlags()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.freeze_layers:
            raise UserError("--train.freeze-layers is for full_fsdp.py: leave it out")
        if self.estimate:
            raise UserError(
                "--estimate knows no DPO: give it to lora_fsdp.py or full_fsdp.py, whose step is the nearest"
            )
        if self.method == "full" and self.lora != LoraFlags():
            raise UserError("--method full trains all weights and has no --lora flags: leave them, or --method, out")


def main(config: Config) -> None:
    with process_group(config.device, config.fsdp.timeout_minutes, config.fsdp.lost_seconds) as device:
        config, checkpoint, precision = resolve(config, device)
        with torch.device("meta"):
            model = Llama(read_config(config.model))
        model.requires_grad_(config.method == "full")
        weights = check_weights(model, config.model)
        quantize_base(model, weights, config.lora.quantize)
        if config.method == "full" and quantized_layers(model):
            raise UserError(f"{config.model} is quantised, and its weights cannot be trained: leave --method full out")
        if start_from := config.lora.from_:
            config = replace(config, lora=continue_adapter(config.lora, start_from))
        reference = on_rank_zero(lambda: adapter_fingerprint(start_from))
        if checkpoint and checkpoint.content["fingerprints"].get("reference", "") != reference:
            raise UserError(
                f"{checkpoint.folder}: give the --lora.from that this run began with, or none if it had none: it is the "
                "reference"
            )
        if config.method == "lora":
            apply_lora(model, config.lora)
        if start_from:
            check_adapter(model, start_from, base=config.model)
        run = prepare_run(config, model, weights, device, checkpoint, precision)
        run = replace(run, fingerprints=run.fingerprints | {"reference": reference})

        shard(model, run.mesh, run.fsdp)
        if config.kernels.compile:
            compile_blocks(model)
        materialise(model, run.parameter_device)
        loaded = load_weights(model, config.model)
        if start_from:
            loaded |= load_adapter_weights(model, start_from)
            say(f"adapter     starts from {start_from}{', the reference' if config.dpo.has_reference else ''}")
        initialise(model, config.seed, loaded=loaded)
        if config.dpo.precompute:
            run = precompute(run, model, config.eval.batch_size)
        as_reference = lora_off
        changes = config.method == "full" or start_from  # what the reference has
        if changes and config.dpo.has_reference and not config.dpo.precompute:
            as_reference = FrozenWeights(model)
        dpo_loss = DpoLoss(config.dpo, as_reference, device)
        optimizer = make_optimizer(model.parameters(), config.optim, lora_plus(model, config.lora.plus_ratio))

        clip_norm = config.train.clip_norm
        with training_loop(config, run, model, optimizer, dpo_loss) as loop:
            for step, batches in loop.steps():
                with loop.profiler.step(batches):
                    loss, norm = train_step(
                        model, optimizer, batches, clip_norm=clip_norm, scaler=loop.scaler, loss_function=dpo_loss
                    )
                loop.after(step, loss, norm, batches)

        if config.method == "lora":
            adapter = config.output_dir / "adapter"
            save_adapter(model, adapter, config.lora, model_name(config.model.resolve()))
            say(f"adapter: {adapter}, in PEFT's format")
            for refusal in vllm_refusals(peft_config(config.lora, "", 0)):
                say(f"vLLM: {refusal}")
            if config.lora.merge:
                merge_adapter(config.model, adapter, config.output_dir / "model", config.tokenizer)
                say(f"model: {config.output_dir / 'model'}, base and LoRA in one, in Hugging Face's format")
        else:
            save_pretrained(model, config.output_dir / "model", config.model, config.tokenizer, unchanged=set())
            say(f"model: {config.output_dir / 'model'}, in Hugging Face's format")
        finish_run(config)


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            flags = tyro.cli(filled(Config), default=saved_flags(Config))
        main(flags)
