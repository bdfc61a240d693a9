"""Which settings fit a number of GPUs, the fastest first; and the fewest GPUs that any fit."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minillama.model.llama import Llama
from minillama.parallel.sharding import FsdpConfig
from minillama.training.alive import Peak, Work
from minillama.training.estimate import CARDS, GIB, Estimate, estimate

DEPTHS, BATCHES = (3, 4), (1, 2)
"""Layers and rows of the steps that are taken; those of deeper models and larger micro-batches follow from them, as all
blocks are alike: every number grows along a line. With two layers a peak can be elsewhere in the step than with more."""
LARGEST_BATCH, SHOWN, MOST = 64, 6, 4096


@dataclass(frozen=True)
class Choice:
    """Settings, and what a step of them needs."""

    fsdp: FsdpConfig
    batch_size: int
    found: Estimate
    tokens_per_s: float
    """Of all GPUs, at the mean of the two least times: with communication hidden, and with none hidden"""


@dataclass(frozen=True)
class Adviser:
    """Asks for estimates of a model of any depth on a card. None is made twice, whatever the card."""

    build: Callable[[int], Llama]
    """From a number of layers"""
    layers: int
    card: str
    network: float
    settings: dict[str, Any]
    """Of every estimate: optim, context_length, machine"""
    known: dict[Any, Estimate] = field(default_factory=dict)

    def choices(self, world_size: int, precision: FsdpConfig) -> list[Choice]:
        """Of the strategies and recomputations that fit, each with its largest micro-batch, the SHOWN fastest, the fastest
        first; with offloading only where nothing else fits.

        precision: an FsdpConfig with the precision to compute in.
        """
        strategies = ["full-shard", "shard-grad-op", "no-shard"] if world_size > 1 else ["full-shard", "no-shard"]
        if world_size > self.settings["machine"]:
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
                rows = choice.batch_size
                while rows and not self.fits(exact := self.whole(choice.fsdp, world_size, rows)):
                    rows //= 2
                if rows:
                    fitting.append(self._choice(exact, rows))
                if len(fitting) == SHOWN:
                    break
            if fitting:
                return fitting
            strategies = ["full-shard"]
        return []

    def fewest(self, precision: FsdpConfig) -> int:
        """GPUs on which a step with the least memory fits without offloading: a power of two in one machine, or whole
        machines; 0: not even MOST of them."""
        machine = self.settings["machine"]
        if not self.fits(self.whole(least_memory(precision), MOST // machine * machine)):
            return 0
        for count in [2**n for n in range(machine.bit_length()) if 2**n < machine]:
            if self.fits(self.whole(least_memory(precision), count)):
                return count
        machines = 1
        while not self.fits(self.whole(least_memory(precision), machines * machine)):
            machines = min(2 * machines, MOST // machine)
        low, high = machines // 2, machines  # the more, the less each holds
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.fits(self.whole(least_memory(precision), middle * machine))
            low, high = (low, middle) if fits else (middle, high)
        return high * machine

    def whole(self, fsdp: FsdpConfig, world_size: int, batch_size: int = 1) -> Estimate:
        """Of the whole depth, on a line."""
        return between(self._corners(fsdp, world_size, (batch_size,)), self.layers, batch_size)

    def estimate(self, layers: int, batch_size: int, world_size: int, fsdp: FsdpConfig) -> Estimate:
        key = layers, batch_size, world_size, fsdp
        if key not in self.known:
            self.known[key] = estimate(
                lambda: self.build(layers), world_size, fsdp=fsdp, batch_size=batch_size, **self.settings
            )
        return self.known[key]

    def fits(self, found: Estimate) -> bool:
        return found.allowed_for() <= CARDS[self.card].memory * GIB

    def tokens_per_s(self, found: Estimate) -> float:
        return found.tokens / (sum(found.seconds(CARDS[self.card], self.network)) / 2)

    def _choice(self, found: Estimate, batch_size: int) -> Choice:
        return Choice(replace(found.fsdp, shard_size=0), batch_size, found, self.tokens_per_s(found))

    def _corners(self, fsdp: FsdpConfig, world_size: int, rows: Sequence[int]) -> dict[tuple[int, int], Estimate]:
        depths = DEPTHS if self.layers > max(DEPTHS) else (self.layers,)
        return {(depth, n): self.estimate(depth, n, world_size, fsdp) for depth in depths for n in rows}

    def _fitting(self, fsdp: FsdpConfig, world_size: int) -> list[Choice]:
        corners = self._corners(fsdp, world_size, BATCHES)
        fitting: list[Choice] = []
        batch_size = 1
        while batch_size <= LARGEST_BATCH and self.fits(found := between(corners, self.layers, batch_size)):
            fitting = [self._choice(found, batch_size)]
            batch_size *= 2
        return fitting


def least_memory(precision: FsdpConfig) -> FsdpConfig:
    """How a step takes the least memory without offloading."""
    return replace(precision, strategy="full-shard", recompute="full")


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
