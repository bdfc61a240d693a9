"""Which packs each step trains on: a function of seed and progress alone."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from minillama.data.batch import Batch, collate
from minillama.data.packing import Packed
from minillama.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and on how much at a time."""

    epochs: int = 3
    """Times through the training set."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0: after the epochs."""
    batch_size: int = 4
    """Packs (padding: rows of data) that each process takes at a time."""
    accumulate: int = 1
    """Micro-batches whose gradients are added up to one step, of batch-size x accumulate x processes packs."""
    clip_norm: float = 0.0
    """Scale the gradient down to this norm if its norm is larger; 0: never."""
    freeze_layers: int = 0
    """Full fine-tuning: keep this many of the first blocks, and the embedding, as they are."""

    def __post_init__(self) -> None:
        least_values = {"epochs": 1, "max_steps": 0, "batch_size": 1, "accumulate": 1, "clip_norm": 0}
        for name, least in (least_values | {"freeze_layers": 0}).items():
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"--train.{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")

    def begin(self, world_size: int) -> "Progress":
        """The progress at the start of a run on so many ranks, unless it resumes."""
        return Progress(packs_per_step=self.batch_size * self.accumulate * world_size)


@dataclass(frozen=True)
class EvalConfig:
    """Loss on held-out rows."""

    enabled: bool = True
    """Evaluate before training, at the end, and as --eval.every says."""
    every: int = 0
    """Steps between evaluations; 0: after each epoch."""
    max_steps: int = 0
    """Batches per process in an evaluation, as many as the run has when it first starts; 0: all. When it goes on with
    fewer or more processes, they share the same rows."""
    batch_size: int = 1
    """Packs (padding: rows of data) that each process evaluates at a time."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("max_steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--eval.{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")

    def due(self, step: "Step") -> bool:
        """Whether to evaluate once this step is made."""
        return step.is_last or ((step.number + 1) % self.every == 0 if self.every else step.ends_epoch)


@dataclass(frozen=True)
class Progress:
    """How far a run has come: all that decides what its next step trains on, on any number of ranks."""

    packs_per_step: int
    """Packs a step"""
    step: int = 0
    """Optimizer steps made"""
    epoch: int = 0
    cursor: int = 0
    """Packs of this epoch's order that were trained on, over all ranks"""
    tokens: int = 0
    """Trained on so far"""
    unlogged: Sequence[float] = (0.0, 0.0, 0, 0, 0)
    """Since the last line of metrics.jsonl, over all ranks: losses times trained tokens, seconds, tokens, trained tokens,
    squares of the documents' lengths, and what the loss has added up"""
    evaluate: bool = True
    """Whether an evaluation is due before the next step"""


@dataclass(frozen=True)
class Step:
    """One optimizer step to be made."""

    number: int
    """Counted from 0"""
    epoch: int
    """Counted from 0"""
    cursor: int
    """Packs of this epoch's order that are done when this step is"""
    progress: float
    """Epochs done when this step is, like 1.25"""
    ends_epoch: bool
    is_last: bool
    """Of the run"""
    micro_batches: list[np.ndarray]
    """The packs of each micro-batch of this rank"""


def count_steps(packed: Packed, config: TrainConfig, packs_per_step: int) -> int:
    """Optimizer steps of a run that takes `packs_per_step` packs a step."""
    per_epoch = -(-len(packed) // packs_per_step)
    return min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)


def steps(
    packed: Packed, config: TrainConfig, seed: int, rank: int, world_size: int, start: Progress
) -> Iterator[Step]:
    """What each step from `start` on trains on.

    Every epoch takes every pack once, in its own order; its last step may be short. A step's packs do not depend on the
    number of ranks: each rank takes its share of them, in as many micro-batches of config.batch_size as needed.
    """
    packs, packs_per_step, number = len(packed), start.packs_per_step, start.step
    total = count_steps(packed, config, packs_per_step)
    for epoch in range(start.epoch, config.epochs):
        for cursor in range(start.cursor if epoch == start.epoch else 0, packs, packs_per_step):
            if number >= total:
                return
            taken = packed.order(seed, epoch, cursor, cursor + packs_per_step)
            mine = packed.micro_batches(taken, config.batch_size, rank, world_size)
            end = min(cursor + packs_per_step, packs)
            yield Step(number, epoch, end, epoch + end / packs, end == packs, number + 1 == total, mine)
            number += 1


def prefetched(
    steps: Iterable[Step], load: Callable[[Step], list[Batch]]
) -> Iterator[tuple[Step, Future[list[Batch]]]]:
    """Each step with a future of load(step), which a thread computes during the step before. It raises what load did."""
    # a new thread starts on the first GPU, whichever the process uses
    place = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_initialized() else None
    with ThreadPoolExecutor(1, initializer=place) as thread:
        waiting = None
        for step in steps:
            coming = step, thread.submit(load, step)
            if waiting:
                yield waiting
            waiting = coming
        if waiting:
            yield waiting


def eval_batches(
    packed: Packed,
    config: EvalConfig,
    pad_id: int,
    device: torch.device | str,
    rank: int,
    world_size: int,
    first_size: int = 0,
) -> Iterator[Batch]:
    """The validation packs of this rank, each pack once over all ranks; the same number of batches on every rank.

    config.max_steps takes the same random sample of them each time, whatever the run's seed.
    first_size: the number of ranks of which it takes so many batches, by default that of now.
    """
    packs_per_step = config.batch_size * world_size
    most = config.max_steps * config.batch_size * (first_size or world_size)
    end = min(len(packed), most or len(packed))
    for cursor in range(0, end, packs_per_step):
        taken = packed.order(0, 0, cursor, min(cursor + packs_per_step, end))
        [packs] = packed.micro_batches(taken, config.batch_size, rank, world_size)
        yield collate(packed, packs, pad_id, device)
