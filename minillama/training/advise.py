"""Which settings fit a number of GPUs, the fastest first; and the fewest GPUs that any fit."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minillama.model.llama import Llama
from minillama.parallel.sharding import FsdpConfig
from minillama.training.alive import Peak, Work
from minillama.training.estimate import CARDS, GIB, Estimate, estimate

DEPTHS, BATCHES = (2, 3), (1, 2)
"""Layers and rows of the steps that are taken; those of deeper models and larger micro-batches follow from them, as all
blocks are alike: every number grows along a line."""
LARGEST_BATCH, SHOWN = 64, 6


@dataclass(frozen=True)
class Choice:
    """Settings, and what a step of them needs."""

    fsdp: FsdpConfig
    batch_size: int
    found: Estimate
    tokens_per_s: float
    """Of all GPUs, at the mean of the two least times: with communication hidden, and with none hidden"""

    @property
    def flags(self) -> str:
        fsdp = self.fsdp
        text = f"--fsdp.strategy {fsdp.strategy} --fsdp.recompute {fsdp.recompute} --train.batch-size {self.batch_size}"
        return text + " --fsdp.cpu-offload" * fsdp.cpu_offload


@dataclass(frozen=True)
class Adviser:
    """Asks for estimates of a model of any depth on a card."""

    build: Callable[[int], Llama]
    """From a number of layers"""
    layers: int
    card: str
    network: float
    settings: dict[str, Any]
    """Of every estimate: optim, context_length, machine"""

    def choices(self, world_size: int, precision: FsdpConfig) -> list[Choice]:
        """The SHOWN fastest that fit, the fastest first; with offloading only where nothing else fits.

        precision: an FsdpConfig with the precision to compute in.
        """
        strategies = ["full-shard", "shard-grad-op", "no-shard"] if world_size > 1 else ["full-shard", "no-shard"]
        if world_size > self.settings["machine"] and world_size % self.settings["machine"] == 0:
            strategies.append("hybrid-shard")
        for offload in (False, True):
            found: list[Choice] = []
            for strategy in strategies:
                for recompute in ("none", "selective", "full"):
                    fsdp = replace(precision, strategy=strategy, recompute=recompute, cpu_offload=offload)  # type: ignore[arg-type]
                    found += self._fitting(fsdp, world_size)
            fitting: list[Choice] = []
            for choice in sorted(found, key=lambda choice: -choice.tokens_per_s):
                # what grows with the rows is a line for large numbers of them, and less steep for small ones
                corners = self._corners(choice.fsdp, world_size, (choice.batch_size,))
                if self.fits(exact := between(corners, self.layers, choice.batch_size)):
                    fitting.append(self._choice(exact, choice.batch_size))
                if len(fitting) == SHOWN:
                    break
            if fitting:
                return fitting
            strategies = ["full-shard"]
        return []

    def fewest(self, precision: FsdpConfig, most: int = 4096) -> int:
        """GPUs, of 1, 2, 4, 8 and so on, on which a step with the least memory fits without offloading; 0: none of them."""
        fsdp = replace(precision, strategy="full-shard", recompute="full")
        world_size = 1
        while world_size <= most:
            if self.fits(between(self._corners(fsdp, world_size, (1,)), self.layers, 1)):
                return world_size
            world_size *= 2
        return 0

    def estimate(self, layers: int, batch_size: int, world_size: int, fsdp: FsdpConfig) -> Estimate:
        memory = CARDS[self.card].memory * GIB
        return estimate(
            lambda: self.build(layers), world_size, fsdp=fsdp, batch_size=batch_size, memory=memory, **self.settings
        )

    def _choice(self, found: Estimate, batch_size: int) -> Choice:
        seconds = sum(found.seconds(CARDS[self.card], self.network)) / 2
        return Choice(replace(found.fsdp, shard_size=0), batch_size, found, found.tokens / seconds)

    def fits(self, found: Estimate) -> bool:
        return found.allowed_for() <= CARDS[self.card].memory * GIB

    def _corners(self, fsdp: FsdpConfig, world_size: int, rows: Sequence[int]) -> dict[tuple[int, int], Estimate]:
        return {(depth, n): self.estimate(depth, n, world_size, fsdp) for depth in DEPTHS for n in rows}

    def _fitting(self, fsdp: FsdpConfig, world_size: int) -> Iterator[Choice]:
        corners = self._corners(fsdp, world_size, BATCHES)
        batch_size = 1
        while batch_size <= LARGEST_BATCH and self.fits(found := between(corners, self.layers, batch_size)):
            yield self._choice(found, batch_size)
            batch_size *= 2


def between(corners: dict[tuple[int, int], Estimate], layers: int, batch_size: int) -> Estimate:
    """The estimate of these layers and rows, on the lines through those of the corners, (layers, rows)."""

    def along(ends: list[int], value: int) -> dict[int, float]:
        if len(ends) == 1:
            return {ends[0]: 1.0}
        part = (value - ends[0]) / (ends[1] - ends[0])
        return {ends[0]: 1 - part, ends[1]: part}

    depths = along(sorted({depth for depth, _ in corners}), layers)
    batches = along(sorted({batch for _, batch in corners}), batch_size)
    weighed = [(depths[depth] * batches[batch], found) for (depth, batch), found in corners.items()]

    def mean(number: Callable[[Estimate], float]) -> float:
        return sum(weight * number(found) for weight, found in weighed)

    first = weighed[0][1]
    sent = Counter({key: int(mean(lambda e, key=key: e.work.sent[key])) for key in first.work.sent})  # type: ignore[misc]
    return replace(
        first,
        peaks={phase: Peak(int(mean(lambda e, p=phase: e.peaks[p].size)), {}) for phase in first.peaks},  # type: ignore[misc]
        state={kind: int(mean(lambda e, k=kind: e.state[k])) for kind in first.state},  # type: ignore[misc]
        host=int(mean(lambda e: e.host)),
        checkpoint=int(mean(lambda e: e.checkpoint)),
        tokens=round(mean(lambda e: e.tokens)),
        needed=mean(lambda e: e.needed),
        work=Work(mean(lambda e: e.work.flops), mean(lambda e: e.work.moved), sent),
    )
