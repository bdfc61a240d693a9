"""minillama as a contender of tools/bench.py: the recipes' own step, and generation."""

import contextlib

import torch
from torch import Tensor
from work import CLIP_NORM, LR, Job, Work, compute_dtype, fill, make_model

from minillama.data.batch import Batch
from minillama.formats.hf import from_pretrained
from minillama.hardware.kernels import KernelsConfig, choose_kernels, compile_blocks
from minillama.inference.generate import generate
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
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
        fsdp = FsdpConfig(precision=job["precision"], recompute=job["recompute"])
        set_dtypes(model, fsdp)
        fsdp = choose_strategy(model, fsdp, self.device)
        mesh = make_mesh(fsdp, self.device)
        choose_kernels(model, KernelsConfig(compile=job["compile"]), fsdp.compute_dtype, self.device)
        shard(model, mesh, fsdp)
        if job["compile"]:
            compile_blocks(model)
        materialise(model, self.device)
        fill(((name, local(p)) for name, p in model.named_parameters()), model.config.hidden_size)
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
