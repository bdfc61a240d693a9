"""Files -> rows, one after another: JSON, JSONL, CSV, Parquet, plain text, or a folder of these.

A row comes with its place, such as "train.jsonl, line 3", for messages. Only a part of a file is in memory. Processes
that share the work all read through the file; only the process that a row belongs to decodes it.
"""

import csv
import hashlib
import json
import os
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from minillama.errors import UserError, disk_text, json_problem

Rows = Iterator[tuple[str, Callable[[], Any]]]
"""(place, function that returns the row or raises UserError); lines and rows are counted from 1"""
Progress = Callable[[int], Any]
"""Called with how many more bytes of the files have been read"""

PART = 2**20
"""Bytes of a JSON list that are read at a time"""


def read_rows(path: Path, progress: Progress = lambda count: None) -> Rows:
    """The rows of a file, or of all such files in a folder and its subfolders, in the order of their names.

    Hidden files are skipped. Raises UserError for what cannot be read: the path, a file's kind, a line.
    """
    for file in data_files(path):
        try:
            yield from READERS[file.suffix.lower()](file, progress)
        except OSError as error:
            raise UserError(disk_text(error, file, "cannot be read")) from error


def data_files(path: Path) -> list[Path]:
    """The files that `read_rows` reads, of one kind: a folder with several kinds probably holds other things besides the
    data. Raises UserError if there are none."""
    if not path.exists():
        raise UserError(f"data file {path} does not exist: give {KINDS}, or a folder of such files")
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a pipe or a device: give {KINDS}, or a folder of such files")
    if path.is_file() and path.suffix.lower() not in READERS:
        raise UserError(f"{path}: unknown format '{path.suffix}': give {KINDS}")
    if path.is_file():
        return [path]
    os.scandir(path).close()  # rglob skips what it may not read
    visible = [p for p in sorted(path.rglob("*")) if not any(s.startswith(".") for s in p.relative_to(path).parts)]
    files = [p for p in visible if p.is_file() and p.suffix.lower() in READERS]
    if not files:
        raise UserError(f"data folder {path} has no file ending in {', '.join(READERS)}")
    if len(kinds := sorted({file.suffix.lower() for file in files})) > 1:
        raise UserError(f"data folder {path} has files of different kinds ({', '.join(kinds)}): leave one kind in it")
    return files


def content_hash(path: Path) -> str:
    """A hash of the files' contents in order, whatever their names."""
    digest = hashlib.blake2b(digest_size=16)
    for file in data_files(path):
        try:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16))
        except OSError as error:
            raise UserError(disk_text(error, file, "cannot be read")) from error
        digest.update(file.suffix.lower().encode() + content.digest())
    return digest.hexdigest()


def shown(value: Any) -> str:
    """The beginning of a value for a message, as JSON: null and not None."""
    return json.dumps(value, default=str)[:80]


def _lines(path: Path, progress: Progress) -> Generator[str, None, None]:
    """Lines with their ends, cut at \\n only as editors count them (str.splitlines also cuts at U+2028)."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                progress(len(line))
                yield line.removeprefix(BOM_UTF8 if number == 1 else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error}): save the file as UTF-8") from error


def _json_rows(path: Path, progress: Progress) -> Rows:
    try:
        with path.open("rb") as file:
            for number, row in enumerate(_items(file, progress), 1):
                yield f"{path}, row {number}", partial(itself, row)
    except (ValueError, RecursionError):
        # Parsing the whole file tells what is wrong, and in which line.
        text = "".join(_lines(path, lambda count: None))
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem, by_line = json_problem(text, error), text.lstrip().startswith("{") and "Extra data" in str(error)
            remedy = "one object a line is for .jsonl" if by_line else "give a whole list of objects"
            raise UserError(f"{path}: {problem}: {remedy}") from error
        raise UserError(f"{path} must be a list of objects, found {shown(rows)}") from None


def _items(file: BinaryIO, progress: Progress) -> Iterator[Any]:
    """The items of a JSON list, decoded one by one. Raises ValueError if it is no list."""
    decode, utf8 = json.JSONDecoder().raw_decode, getincrementaldecoder("utf-8-sig")()
    text, at, part = "", 0, PART

    def more() -> bool:
        nonlocal text, at
        content = file.read(part)
        progress(len(content))
        text, at = text[at:] + utf8.decode(content, final=not content), 0
        return bool(content)

    def next_character() -> str:
        """After white space; "" at the end"""
        nonlocal at
        while True:
            while at < len(text) and text[at] in " \t\n\r":
                at += 1
            if at < len(text):
                return text[at]
            if not more():
                return ""

    def expect(characters: str) -> str:
        nonlocal at
        if (found := next_character()) not in characters or not found:
            raise ValueError(f"expected one of {characters}")
        at += 1
        return found

    expect("[")
    if next_character() == "]":
        at += 1
    else:
        while True:
            next_character()
            try:
                item, at = decode(text, at)
            except ValueError:
                part *= 2  # an item longer than what was read, or not JSON: read on, at most to the end
                if not more():
                    raise
                continue
            part = PART
            yield item
            if expect(",]") == "]":
                break
    if next_character():
        raise ValueError("something stands after the list")


def _jsonl_rows(path: Path, progress: Progress) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            progress(len(line))
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            if line.strip():
                yield f"{path}, line {number}", partial(_parsed, line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error}): save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        problem = f"not JSON ({getattr(error, 'msg', error)}{where})"
        raise UserError(f"{problem}: put one object on each line") from error


def _csv_rows(path: Path, progress: Progress) -> Rows:
    with closing(_lines(path, progress)) as lines:
        # strict: else an open quote makes the rest of the file one field
        reader, header = csv.reader(lines, strict=True), None
        limit = csv.field_size_limit()
        while True:
            line = reader.line_num + 1  # a quoted field may span lines: name the row's first line
            csv.field_size_limit(2**31 - 1)  # for the whole process; Python's 128 KiB is short for a document
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{path}, line {line}: not CSV ({error}): correct the quotes of this row") from error
            finally:
                csv.field_size_limit(limit)
            if values is None:
                return
            if not values:  # a blank line
                continue
            if header is None:
                header = values
                if len(set(header)) < len(header):
                    raise UserError(f"{path}: the header names a field twice ({', '.join(header)})")
                if len(header) == 1 and any(other in header[0] for other in ";\t|"):
                    raise UserError(f"{path}: the header is one field, {shown(header[0])}: separate fields by commas")
                continue
            yield f"{path}, line {line}", partial(_by_name, header, values)


def _by_name(header: list[str], values: list[str]) -> dict[str, str]:
    if len(values) != len(header):
        raise UserError(
            f"{len(values)} fields, the header has {len(header)} ({', '.join(header)}): put quotes around a field with "
            "commas or line breaks"
        )
    return dict(zip(header, values, strict=True))


def _parquet_rows(path: Path, progress: Progress) -> Rows:
    """A few hundred rows at a time, whatever the size of the file."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f'{path}: reading Parquet needs a package: pip install -e ".[parquet]"') from None

    number, size = 0, path.stat().st_size
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=500):
                progress(size * len(batch) // file.metadata.num_rows)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", partial(without_absent, row)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error}): write it again") from error


def without_absent(row: Any) -> Any:
    """A row of Parquet or Arrow without the keys that are None inside a column.

    There each object has the keys of all others in its column, so a call of one tool would have the arguments of the
    others. A column that is None stays.
    """
    return {name: _without_none(value) for name, value in row.items()} if isinstance(row, dict) else row


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _text_rows(path: Path, progress: Progress) -> Rows:
    """The whole file is one document."""
    progress(path.stat().st_size)
    yield str(path), partial(_text, path)


def _text(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    try:
        return {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"line {line}: not UTF-8 ({error}): save the file as UTF-8") from error


def itself(row: Any) -> Any:
    return row


READERS = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
KINDS = "a file ending in " + ", ".join(READERS)
