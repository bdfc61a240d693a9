"""minillama as a contender of tools/bench.py: the recipes' own step, and generation."""

import contextlib
import time

import torch
from torch import Tensor
from work import CLIP_NORM, LR, Job, Work, compute_dtype, fill, make_model, parameter_value

from minillama.data.batch import Batch
from minillama.formats.hf import from_pretrained
from minillama.hardware.kernels import KernelsConfig, choose_kernels, compile_blocks
from minillama.inference.generate import generate
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.model.quant import dequantize, quantized_layers
from minillama.parallel.initialise import materialise
from minillama.parallel.processes import process_group
from minillama.parallel.sharding import FsdpConfig, choose_strategy, local, make_mesh, set_dtypes, shard
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.step import train_step


class Ours:
    """A recipe's own step, from `build on meta` on. Random numbers are filled in where a recipe loads a checkpoint."""

    def __init__(self, job: Job, stack: contextlib.ExitStack) -> None:
        self.device = stack.enter_context(process_group(job["device"]))
        model = make_model(job)
        self.dtype, self.times = compute_dtype(job), 2 if job["recompute"] == "none" else 3
        fsdp = FsdpConfig(precision=job["precision"], recompute=job["recompute"])
        set_dtypes(model, fsdp)
        fsdp = choose_strategy(model, fsdp, self.device)
        mesh = make_mesh(fsdp, self.device)
        choose_kernels(model, KernelsConfig(compile=job["compile"]), fsdp.compute_dtype, self.device)
        shard(model, mesh, fsdp)
        if job["compile"]:
            compile_blocks(model)
        materialise(model, self.device)
        width = model.config.hidden_size
        self.layers = quantized_layers(model)
        fill(((n, local(p)) for n, p in model.named_parameters() if n not in self.layers), width)
        for name, layer in self.layers.items():
            whole = torch.empty(layer.out_features, layer.in_features, device=self.device)
            layer.fill(parameter_value(name, whole, width))
        self.optimizer = make_optimizer(model.parameters(), OptimConfig(lr=LR))
        self.model = model.train()

    def step(self, work: Work) -> tuple[Tensor, Tensor]:
        numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in work.lengths]
        batch = Batch(
            work.tokens.to(self.device, non_blocking=True),
            work.positions.to(self.device, non_blocking=True),
            work.labels,
            torch.stack(numbers),
            count=work.tokens.numel(),
            trained=work.trained,
            squares=work.squares,
        )
        return train_step(self.model, self.optimizer, [batch], clip_norm=CLIP_NORM)

    @torch.no_grad()
    def dequantising_seconds(self) -> float:
        """Of all layers, as often as a step does it."""
        synchronise = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        began = time.perf_counter()
        for layer in list(self.layers.values()) * self.times:
            dequantize(layer.weight, layer.in_features, layer.tables, self.dtype)
        synchronise()
        return time.perf_counter() - began


class OursGenerating:
    def __init__(self, job: Job, stack: contextlib.ExitStack) -> None:
        self.job = job
        if job["model"]:
            self.model = from_pretrained(job["model"], device=job["device"], dtype=compute_dtype(job))
        else:
            with torch.device(job["device"]):
                self.model = Llama(LlamaConfig(**job["config"])).to(compute_dtype(job))
            fill(self.model.named_parameters(), self.model.config.hidden_size)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        return generate(self.model, prompt, max_new_tokens=count)
