"""Waits for what other processes do, and compares the losses of runs."""

import time
from collections.abc import Callable
from math import isfinite
from typing import Any

TOLERANCE = 1e-4


def until(condition: Callable[[], Any], what: str, seconds: float = 300) -> float:
    """Waits for it; returns the time.monotonic() at which it came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.05)
    return time.monotonic()


def difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The largest relative difference of losses, of steps and evaluations; infinite if steps are missing or it is NaN."""

    def losses(lines: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
        return {(line["step"], key): line[key] for line in lines for key in ("loss", "eval_loss") if key in line}

    a, b = losses(one), losses(other)
    if a.keys() != b.keys() or len(one) != len(other):
        return float("inf")
    differences = [abs(a[key] - b[key]) / abs(a[key]) for key in a]
    return max(differences) if all(map(isfinite, differences)) else float("inf")  # max passes over NaN
