"""Progress of long work: a bar on a terminal; in a log, where nothing can be redrawn, a line every half minute."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from minillama.parallel.failures import rank

SECONDS = 30.0
"""Seconds between two lines in a log"""


class Lines(tqdm):
    """tqdm that draws nothing: a line every SECONDS and, with leave, one at the end."""

    disable: bool
    last_print_t: float

    def __init__(self, *args: Any, leave: bool = False, unit: str = "", **settings: Any) -> None:
        settings["bar_format"] = "{desc} {n_fmt}/{total_fmt}{unit}{postfix}, after {elapsed}, {remaining} to go"
        super().__init__(*args, leave=leave, unit=unit, **settings)

    def update(self, n: float | None = 1) -> bool | None:
        if self.disable:
            return None
        self.n += n or 0
        self.last_print_n = self.n  # iterating counts from here
        if due := self._time() - self.last_print_t >= SECONDS:
            self.last_print_t = self._time()
            self._print()
        return due

    def close(self) -> None:
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)
        if self.leave:
            self._print()

    def _print(self) -> None:
        self.fp.write(f"{self}\n")
        self.fp.flush()

    def _nothing(self, *args: Any, **settings: Any) -> None:
        """Replaces the methods that draw: changes are in the next line."""

    refresh = clear = display = moveto = _nothing


def bar_class() -> type[tqdm]:
    """tqdm, or Lines if stderr is not a terminal."""
    return tqdm if sys.stderr.isatty() else Lines


def progress(items: Iterable[Any] | None = None, *, disable: bool = False, **settings: Any) -> tqdm:
    """tqdm(items, ...) on rank 0, silent on others. leave: whether it stays when it is closed."""
    return bar_class()(items, disable=disable or rank() != 0, **settings)
