"""A message that names a file which was cut short while it was mapped; the system only sends SIGBUS."""

import ctypes
import os
import signal
from collections.abc import Callable
from mmap import PAGESIZE
from pathlib import Path

_handler = None  # kept, as C keeps no reference


def tell_of_cut_files(end: Callable[[str], object]) -> None:
    """Makes SIGBUS call end(message) and end the process with code 1.

    A Python handler would never run: it waits until the failing instruction has ended.
    """
    global _handler
    if _handler is None and hasattr(signal, "SIGBUS"):

        def on_bus_error(number: int) -> None:
            try:
                names = ", ".join(cut_files()) or "a file that is being read"
                end(f"{names} was cut short while it was read, or its disk has failed: write it again")
            finally:
                os._exit(1)

        _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_bus_error)
        set_handler = ctypes.CDLL(None).signal
        set_handler.restype = ctypes.c_void_p
        set_handler(int(signal.SIGBUS), _handler)


def cut_files() -> list[str]:
    """The mapped files that are shorter than their mapping."""
    found: dict[str, None] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, allowed, offset, _, inode, *path = line.split(maxsplit=5)
        if not path or not path[0].startswith("/") or allowed[0] != "r":  # gaps of libraries
            continue
        start, end = (int(address, 16) for address in addresses.split("-"))
        try:
            there = os.stat(path[0])
        except OSError:
            continue
        whole_pages = -(-there.st_size // PAGESIZE) * PAGESIZE
        if there.st_ino == int(inode) and int(offset, 16) + end - start > whole_pages:
            found[path[0]] = None
    return list(found)
