"""A checkpoint's Jinja template, rendered as transformers renders it, but within limits: templates are not trusted.

A template is code. It reaches only the values it is given, and it is stopped when it computes too long, takes too much
memory or makes too long a text. On request, it also marks where each turn of its loops begins and ends in the text.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache, lru_cache, wraps
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from minillama.errors import UserError

SECONDS, SECONDS_A_CHARACTER = 2.0, 1e-6
"""CPU time of one rendering, and more for each character of its input; MEMORY and LENGTH likewise"""
MEMORY, MEMORY_A_CHARACTER = 2**27, 64
"""Bytes it may take"""
LENGTH, LENGTH_A_CHARACTER = 2**24, 16
"""Characters of a text, or items of a list, that it may create"""
LONGEST = 2**17
"""Characters of a template: those in use have up to 2**15, and to compile one takes up to 14 seconds a million"""
BITS = 10_000
"""Bits of a whole number that it may compute with"""
UNBOUNDED = ("lipsum", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""Of Jinja, what is for web pages or can take long without a loop in the template; it is removed"""

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Around a mark in the text. Unicode keeps both for such uses: no character of a text."""


class _TooMuch(Exception):
    """The template has exceeded a limit."""


class _Limits(threading.local):
    """The limits of the rendering in this thread"""

    patience = math.inf
    """time.monotonic() before which time.thread_time(), which is slow, is not called"""
    seconds = SECONDS
    deadline = math.inf
    """thread_time() at which it is stopped: CPU time, so a busy machine does not count"""
    length: float = math.inf
    marked: Mapping[int, int] | None = None
    """id() of each message -> its number, where turns are to be marked"""
    now: datetime | None = None


_limits = _Limits()
_one_at_a_time = threading.Lock()
"""The memory limit applies to the whole process"""
_hopeless: dict[str, str] = {}
"""Templates that have exceeded a limit, or cannot be compiled, and why: not tried again for each row of a data set"""


def render(
    template: str, variables: Mapping[str, Any], *, now: datetime, where: Path, marked: Mapping[int, int] | None = None
) -> str:
    """The text that a template makes of variables, which are plain JSON values.

    now: what strftime_now shows. marked: id() of objects -> number. In each loop whose variable is one of them, and that
    writes straight into the text, the text has OPEN, the loop's number, ":", the object's number, CLOSE where its turn
    begins, and OPEN, the loop's number, CLOSE after the loop. Without these marks it is the unmarked text. A
    {% generation %} block is always between OPEN "g" CLOSE and OPEN "/g" CLOSE.

    Raises UserError, which names `where`, for anything that goes wrong in the template.
    """
    if not (problem := _hopeless.get(template)):
        size = _characters(variables)
        _limits.seconds = SECONDS + SECONDS_A_CHARACTER * size
        _limits.patience, _limits.deadline = time.monotonic() + _limits.seconds, math.inf
        _limits.length = LENGTH + LENGTH_A_CHARACTER * size
        _limits.marked, _limits.now = marked, now
        compiled = None
        try:
            with _bounded_memory(MEMORY + MEMORY_A_CHARACTER * size):
                compiled = _compile(template)
                return _join(compiled.generate(variables))
        except _TooMuch as error:
            problem = _hopeless[template] = _stopped(str(error))
        except (MemoryError, SystemError):  # SystemError: Python's C code failed without an exception
            problem = _hopeless[template] = _stopped(f"takes more than {MEMORY >> 20} MiB of memory")
        except RecursionError:
            problem = "it calls itself without end, or what it is given is nested too deeply"
        except TemplateError as error:
            problem = str(error)
        except Exception as error:  # it is code: anything that Python's operators, methods and filters raise
            problem = f"{type(error).__name__}: {error}"
        finally:
            _limits.patience = _limits.length = math.inf
            _limits.marked = None
        if template not in _hopeless:
            problem = f"fails{' on this conversation' if compiled else ''}: {problem}"
        if compiled is None:
            _hopeless[template] = problem
    raise UserError(f"{where}: the chat template {problem}")


def has_generation(template: str, where: Path) -> bool:
    """Whether it marks what is trained with {% generation %}. Raises UserError if it is no template."""
    if "generation" not in template:
        return False
    try:
        with _bounded_memory(MEMORY):
            blocks = _parsed(template).find_all(nodes.CallBlock)
            return any(isinstance(block.call.node, nodes.ExtensionAttribute) for block in blocks)
    except Exception as error:
        raise UserError(f"{where}: the chat template fails: {error or type(error).__name__}") from None


def _stopped(why: str) -> str:
    return f"is stopped, as it {why}: put a chat_template.jinja that comes to an end beside the tokenizer's files"


def _characters(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_characters(key) + _characters(item) for key, item in value.items())
    return len(value) if isinstance(value, str) else sum(map(_characters, value)) if isinstance(value, list) else 8


def _join(chunks: Iterator[str]) -> str:
    found, length = [], 0
    for chunk in chunks:
        found.append(chunk)
        length += len(chunk)
        if length > _limits.length:
            raise _TooMuch(_long("text", length))
    return "".join(found)


@contextmanager
def _bounded_memory(size: int) -> Iterator[None]:
    """Inside, Python raises MemoryError beyond so many bytes more than the process has. Only on Linux."""
    try:
        import resource  # not on Windows, where only CUDA is of use

        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except (ImportError, OSError):
        yield
        return
    with _one_at_a_time:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * os.sysconf("SC_PAGE_SIZE") + size
        given = [value for value in (soft, hard) if value != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([limit, *given]), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _tick() -> None:
    if time.monotonic() > _limits.patience:
        if _limits.deadline == math.inf:
            _limits.deadline = time.thread_time() + _limits.seconds
        elif time.thread_time() > _limits.deadline:
            raise _TooMuch(f"computes for more than {_limits.seconds:.2g} seconds")


def _sized(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > _limits.length:
        raise _TooMuch(_long(value, len(value)))
    if isinstance(value, int) and value.bit_length() > BITS:
        raise _TooMuch("computes with whole numbers of thousands of digits")
    return value


def _long(value: Any, length: int) -> str:
    return f"makes a text of {length:,} characters" if isinstance(value, str) else f"makes a list of {length:,} items"


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        _tick()
        return _sized(function(*args, **kwargs))

    return timed


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of transformers' apply_chat_template, with limits: templates of the hub work unchanged."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        for name in UNBOUNDED:
            self.filters.pop(name, None)
            self.globals.pop(name, None)
        self.filters |= {"tojson": _tojson, "round": _round(self.filters["round"])}
        tables: tuple[dict[str, Any], ...] = (self.filters, self.tests)
        for table in tables:
            table.update({name: _timed(function) for name, function in table.items()})
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(obj, "__self__", None) is self:  # turn or turns_end, without the sandbox's checks
            return obj(*args)
        _tick()
        return _sized(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _tick()
        if operator == "*":
            for times, value in ((left, right), (right, left)):
                if (
                    isinstance(times, int)
                    and isinstance(value, str | list | tuple)
                    and len(value) * times > _limits.length
                ):
                    raise _TooMuch(_long(value, len(value) * times))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _sized(1 << min(max(0, left.bit_length() * right), BITS + 1))
        return _sized(super().call_binop(context, operator, left, right))

    def turn(self, loop: int | None, *variables: Any) -> str:
        """Inserted at the beginning of the body of each loop"""
        _tick()
        if _limits.marked and loop is not None:
            for variable in variables:
                if (number := _limits.marked.get(id(variable))) is not None:
                    return f"{OPEN}{loop}:{number}{CLOSE}"
        return ""

    def turns_end(self, loop: int) -> str:
        return f"{OPEN}{loop}{CLOSE}" if _limits.marked else ""


class _GenerationTag(Extension):
    """A scope of its own, as in transformers: variables set in it stay in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

    def _shown(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}g{CLOSE}{caller()}{OPEN}/g{CLOSE}" if _limits.marked is not None else caller()


class _Turns(NodeTransformer):
    """Puts `turn` into each loop, and `turns_end` after the loops that write directly into the text."""

    loops = buffers = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        loop = nodes.Const(None if self.buffers else self.loops)
        self.loops += 1
        names = [name.name for name in (node.target, *node.target.find_all(nodes.Name)) if isinstance(name, nodes.Name)]
        self.generic_visit(node)
        node.body.insert(0, self._say("turn", loop, *(nodes.Name(name, "load") for name in names)))
        return [node] if self.buffers else [node, self._say("turns_end", loop)]

    def buffered(self, node: nodes.Node) -> nodes.Node:
        """Nodes whose text may be filtered, compared or dropped, so that a mark in it could change the result"""
        self.buffers += 1
        self.generic_visit(node)
        self.buffers -= 1
        return node

    visit_Macro = visit_CallBlock = visit_FilterBlock = visit_AssignBlock = buffered

    def _say(self, method: str, *args: nodes.Expr) -> nodes.Node:
        return nodes.Output([nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)])


@cache
def _environment() -> _Environment:
    return _Environment()


def _parsed(template: str) -> nodes.Template:
    if len(template) > LONGEST:
        raise _TooMuch(f"has more than {LONGEST:,} characters")
    return _environment().parse(template)


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    parsed = _Turns().visit(_parsed(template))
    parsed.set_environment(_environment())
    return _environment().from_string(parsed)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return (_limits.now or datetime.now()).strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja's own tojson escapes HTML


def _round(function: Callable[..., Any]) -> Callable[..., Any]:
    def rounded(value: Any, precision: int = 0, method: str = "common") -> Any:
        if abs(precision) > sys.float_info.max_10_exp:
            raise _TooMuch("computes with whole numbers of thousands of digits")
        return function(value, precision, method)

    return rounded


class _Dict:
    """`dict` without its attributes"""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Without attributes that lead into Python"""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")
