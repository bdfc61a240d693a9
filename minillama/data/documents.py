"""Tokenized rows, end to end."""

import mmap
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokenized documents end to end; document i is the span offsets[i]:offsets[i + 1]. The arrays may lie on the disk."""

    tokens: np.ndarray
    """int32 (N,)"""
    trained: np.ndarray
    """bool (N,): the token itself is a label, to be predicted from the tokens before it in its document."""
    offsets: np.ndarray
    """int64 (n + 1,), from 0 to N"""
    fingerprint: str = ""
    """A hash of the tokens, whatever file they were read from"""
    refused: int = 0
    """Rows that could not be used, left out by --data.bad-rows skip"""
    had_ends: int = 0
    """Rows whose text began with BOS, or ended with EOS, and so was given no second one"""
    per_row: int = 1
    """Documents that each row of the data has become: 2 of preference data, the chosen answer and the rejected one"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def rows(self) -> int:
        return len(self) // self.per_row

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (T,) and trained (T,) of document i, as views."""
        i = range(len(self))[i]  # negative indices, and the IndexError that ends a for loop
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[span], self.trained[span]

    def release(self) -> None:
        """Releases the mapped pages that were read; they stay in the system's cache.

        Else the resident memory of a process that reads a large data set would grow to all of it.
        """
        for array in (self.tokens, self.trained):
            if isinstance(array.base, np.memmap):
                cast(mmap.mmap, array.base.base).madvise(mmap.MADV_DONTNEED)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (n,)"""
        return np.diff(self.offsets)
