"""Files -> rows, one after another: JSON, JSONL, CSV, Parquet, or a folder of these.

A row comes with its place, such as "train.jsonl, line 3", for messages that name it.
"""

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillama.errors import UserError

Rows = Iterator[tuple[str, Any]]
"""(place, row); lines and rows are counted from 1"""


def read_rows(path: Path) -> Rows:
    """The rows of a file, or of all such files in a folder and its subfolders, in the order of their names.

    Hidden files are passed over. Raises UserError for what cannot be read: the path, a file's kind, a line.
    """
    if not path.exists():
        raise UserError(f"data file {path} does not exist: give {KINDS}, or a folder of such files")
    if path.is_file() and path.suffix.lower() not in READERS:
        raise UserError(f"{path}: unknown format '{path.suffix}': give {KINDS}")
    for file in [path] if path.is_file() else _files_in(path):
        yield from READERS[file.suffix.lower()](file)


def _files_in(folder: Path) -> list[Path]:
    """Files of one kind: a folder that mixes kinds may well hold something else beside the data."""
    visible = [p for p in sorted(folder.rglob("*")) if not any(s.startswith(".") for s in p.relative_to(folder).parts)]
    files = [p for p in visible if p.is_file() and p.suffix.lower() in READERS]
    if not files:
        raise UserError(f"data folder {folder} has no file ending in {', '.join(READERS)}")
    if len(kinds := sorted({file.suffix.lower() for file in files})) > 1:
        raise UserError(f"data folder {folder} has files of different kinds ({', '.join(kinds)}): leave one kind in it")
    return files


def shown(value: Any) -> str:
    """The beginning of a value for a message, as JSON has it: null and not None."""
    return json.dumps(value, default=str)[:80]


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, cut at \\n only as editors count them (str.splitlines also cuts at U+2028)."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.removeprefix(BOM_UTF8 if number == 1 else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error}): save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _json_rows(path: Path) -> Rows:
    try:
        rows = json.loads("".join(_lines(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): a file of one object a line must end in .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} must be a list of objects, found {shown(rows)}")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _jsonl_rows(path: Path) -> Rows:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                problem = f"not JSON ({getattr(error, 'msg', error)}{where})"
                raise UserError(f"{path}, line {number}: {problem}: put one object on each line") from error
            yield f"{path}, line {number}", row


def _csv_rows(path: Path) -> Rows:
    limit = csv.field_size_limit(2**31 - 1)  # its own, 128 KiB, is short for a document
    # strict, else a quote left open takes the rest of the file for one field
    reader = csv.reader(_lines(path), strict=True)
    rows, line = [], 1
    try:
        for values in reader:
            rows.append((line, values))
            line = reader.line_num + 1  # a quoted field may span lines: name the row's first
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not CSV ({error}): mend the quotes of this row") from error
    finally:
        csv.field_size_limit(limit)  # the limit is the whole process's
    rows = [(line, values) for line, values in rows if values]  # csv gives [] for a blank line
    header = rows[0][1] if rows else []
    if len(set(header)) < len(header):
        raise UserError(f"{path}: the header names a field twice ({', '.join(header)})")
    for line, values in rows[1:]:
        if len(values) != len(header):
            raise UserError(
                f"{path}, line {line}: {len(values)} fields, the header has {len(header)} "
                f"({', '.join(header)}): put quotes around a field with commas or line breaks"
            )
        yield f"{path}, line {line}", dict(zip(header, values, strict=True))


def _parquet_rows(path: Path) -> Rows:
    """A few thousand rows at a time, whatever the size of the file."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f'{path}: reading Parquet needs a package: pip install -e ".[parquet]"') from None

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error}): write it anew") from error


READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
KINDS = "a file ending in " + ", ".join(READERS)
