"""The one exception for what a user can cause, and what to say when a disk fails."""

import errno
import json
from pathlib import Path


class UserError(Exception):
    """A mistake in flags, files or data. The text names the thing and the remedy; recipes print only the text.

    Not a ValueError: parsers of flags catch those, and would print it once for each rank.
    """


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, an exhausted quota, and a file at its size limit"""
REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "see to its permissions, and those of the folders above it"),
    **dict.fromkeys(FULL, "make room on its disk"),
    errno.EROFS: "name a place that can be written",
}


def disk_error(error: BaseException) -> OSError | None:
    """The error if REMEDIES knows it, also behind PyTorch's own, which does not say why a file could not be written."""
    if isinstance(error, RuntimeError) and ("unexpected pos" in str(error) or "PytorchStreamWriter" in str(error)):
        return OSError(errno.ENOSPC, "the disk is full, or fails")
    return error if isinstance(error, OSError) and error.errno in REMEDIES else None


def disk_text(error: OSError, path: Path | str | None = None, what: str = "") -> str:
    """ "FILE cannot be written (why): what to do". path: where the error itself does not know; what: "cannot be read"."""
    name, reason = path or error.filename or "a file, or what is printed,", error.strerror or str(error)
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        reason = "a file is where a folder should be"
    full = error.errno in (*FULL, errno.EROFS)
    what = what or ("cannot be written" if full else "cannot be used")
    return ": ".join(filter(None, (f"{name} {what} ({reason})", REMEDIES.get(error.errno or 0))))


def json_problem(text: str, error: Exception) -> str:
    """What is wrong with a text that json.loads refused with this error: empty, truncated, or something else."""
    if not text.strip():
        return "empty, not JSON"
    if isinstance(error, json.JSONDecodeError):
        unterminated = error.msg.startswith("Unterminated string")  # which is said of where it begins
        if unterminated or error.pos >= len(text.rstrip()):
            end = text.count("\n", 0, len(text.rstrip())) + 1
            return f"truncated, line {end} is not its last ({error.msg})"
    return f"not JSON ({error})"
