"""--help: docstrings filled to the terminal's width. tyro breaks their sentences where the source does."""

import ast
import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

from minillama.errors import UserError

F = TypeVar("F")


def filled(flags: F) -> F:
    """`flags`, a dataclass or a function with "Args:" in its docstring, to be given to tyro.cli.

    Raises UserError for an argument that is empty, which as a path would mean the current folder.
    """
    for flag, value in pairwise(sys.argv):
        if value.startswith("--") and value.endswith("="):
            flag, value = value[:-1], ""
        if not value and flag not in ("--prompt", "--system"):
            flag = flag if flag.startswith("--") else "an argument"
            raise UserError(f"{flag} is empty, perhaps a variable that is not set: give a value")
    if {"-h", "--help"} & {*sys.argv}:  # reading the source takes a while
        _fill(flags)
    return flags


def _fill(flags: Any) -> None:
    flags.__doc__ = _joined(flags.__doc__ or "")
    for kind in flags.__mro__[:-1] if isinstance(flags, type) else ():
        docs = _field_docs(kind)
        for field in fields(kind):
            if field.name in docs:
                field.metadata = MappingProxyType({**field.metadata, "help": _joined(docs[field.name])})
    for hint in get_type_hints(flags).values():
        if is_dataclass(hint):
            _fill(hint)


def _field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a class, by the field's name."""
    body = next(node.body for node in _classes(inspect.getfile(kind)) if node.name == kind.__name__)
    return {
        field.target.id: str(text.value.value)
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


@cache
def _classes(file: str) -> list[ast.ClassDef]:
    return [node for node in ast.parse(Path(file).read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]


def _joined(docstring: str) -> str:
    """Each paragraph, and each argument, as one line."""
    return re.sub(r"(?<!\n)\n(?!\n|Args:\n| {4}\w+: )\s*", " ", inspect.cleandoc(docstring))
