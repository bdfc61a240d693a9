"""Rows -> tokenized documents, each token marked as trained or not, and where rows come from.

A dataset is one function from a row (a dict) to the row's token ids and, for each id, whether it is trained.
The prompts are llama-recipes' letter for letter, so that weights and losses compare with runs made there.
"""

import datetime
import hashlib
import json
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from minillama.chat import REASONING
from minillama.errors import UserError
from minillama.files import DEPTH, is_deep, misfit, read_any_json
from minillama.loss import IGNORE
from minillama.rows import Progress, Rows, content_hash, data_files, read_rows, shown, without_absent

BUNDLED = Path(__file__).parent / "data"

LONGEST_PART = 2**20
"""Characters of a text that are tokenized at once"""
HUB = "hub:"


class Encoded(NamedTuple):
    ids: Sequence[int] | np.ndarray
    trained: Sequence[bool] | np.ndarray
    had_ends: bool = False
    """Its text began with BOS, or ended with EOS"""


Split = Literal["train", "validation"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    dataset: str = "samsum"
    """Which format the rows have: samsum, alpaca, grammar, chat or text; or FILE.py:FUNCTION, your own."""
    path: Path | None = None
    """Training rows: a .json, .jsonl, .csv, .parquet or .txt file, a folder of them, or hub:ORG/NAME[/CONFIG][:SPLIT].
    None: a small set that comes with minillama, to try things on."""
    val_path: Path | None = None
    """Rows to evaluate on. Alpaca without one holds out the first twentieth of --data.path, as llama-recipes does."""
    val_fraction: float = 0.0
    """Instead of a --data.val-path: hold out this part of the training rows, chosen at random by --seed."""
    mixture: Path | None = None
    """Instead of a --data.path: a JSON file, a list of {"dataset", "path", "weight", "columns"}. An epoch has each row of
    a source weight times (default 1; 0.5: half of the rows, chosen at random by --seed). Paths are relative to the file.
    A dataset may be FILE.py:FUNCTION, and what is in that file runs: give a mixture of others only if you trust it."""
    columns: tuple[str, ...] = ()
    """What the fields of the format are called in the rows, such as dialogue=text summary=tldr."""
    date: str | None = None
    """The day that a chat template which asks for it is told, such as Llama 3.2's: 2025-01-31. None: today; a run that
    resumes keeps its own."""
    train_on: Literal["answers", "all"] = "answers"
    """all: train on prompts, and on what users say in a chat, too."""
    batching: Literal["packing", "padding"] = "packing"
    """packing: rows share packs, whole and without seeing each other. padding: rows of like length share a batch."""
    context_length: int = 4096
    """Tokens in a pack, or in a padded row."""
    too_long: Literal["auto", "drop", "truncate", "split"] = "auto"
    """Rows longer than the context; their number is printed. auto: text is split, else packing drops and padding
    truncates."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used ends the run with its place and what is wrong, or is left out; their number is printed."""
    workers: int = 1
    """Processes that tokenize, for each training process. Only large sets take more than one."""
    cache_dir: Path | None = None
    """Where tokenized and packed data is kept for the next run. None: minillama in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise UserError(f"--data.context-length {self.context_length}: must be at least 2")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--data.val-fraction {self.val_fraction}: must be at least 0 and below 1")
        if self.workers < 1:
            raise UserError(f"--data.workers {self.workers}: must be at least 1")
        if self.val_fraction and self.val_path:
            raise UserError("--data.val-fraction and --data.val-path exclude each other: give one")
        if self.mixture and self.path:
            raise UserError("--data.mixture and --data.path exclude each other: name the path in the mixture's file")
        try:
            self.day  # noqa: B018
        except ValueError:
            raise UserError(f"--data.date {self.date}: give a day as year-month-day, such as 2025-01-31") from None
        for column in self.columns:
            if not re.fullmatch("[^=]+=[^=]+", column):
                raise UserError(f"--data.columns {column}: give FIELD=COLUMN, such as {FIELDS['samsum'][0]}=text")

    @property
    def day(self) -> datetime.date | None:
        return datetime.date.fromisoformat(self.date) if self.date else None


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokenized documents end to end; document i is the span offsets[i]:offsets[i + 1]. The arrays may lie on the disk."""

    tokens: np.ndarray
    """int32 (N,)"""
    trained: np.ndarray
    """bool (N,): the token itself is a label, to be predicted from what stands before it in its document."""
    offsets: np.ndarray
    """int64 (n + 1,), from 0 to N"""
    fingerprint: str = ""
    """The same for the same tokens, wherever they were read from"""
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
        """Gives back the memory that parts of the files take which were read; they stay in the system's cache.

        Else a process that goes through all of a large set would seem to hold all of it.
        """
        for array in (self.tokens, self.trained):
            if isinstance(array.base, np.memmap):
                cast(mmap.mmap, array.base.base).madvise(mmap.MADV_DONTNEED)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (n,)"""
        return np.diff(self.offsets)


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError if the tokenizer cannot be that of a model with `vocab_size` rows of embedding.

    Checkpoints pad the embedding to a round number, so a few rows too many are right; ids beyond it never are.
    """
    if not 0 <= vocab_size - tokenizer.vocab_size <= vocab_size // 8:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}: they do not belong together; give the "
            "model's own with --tokenizer"
        )


# --- sources: where rows come from


@dataclass(frozen=True)
class Source:
    """Rows of one format."""

    dataset: str
    path: Path | None
    """None: the bundled set of that split, or the user's function decides"""
    split: Split
    columns: Mapping[str, str] = field(default_factory=dict)
    """What the format's fields are called in the rows"""
    weight: float = 1.0
    """How often an epoch has each row"""

    def __post_init__(self) -> None:
        if self.dataset not in ENCODERS and not _OWN.fullmatch(self.dataset):
            raise UserError(
                f"--data.dataset {self.dataset} is unknown: choose one of {', '.join(ENCODERS)}, or FILE.py:FUNCTION"
            )
        if unknown := self.columns.keys() - set(FIELDS.get(self.dataset, self.columns)):
            raise UserError(
                f"--data.columns {min(unknown)}={self.columns[min(unknown)]}: {self.dataset} has no field {min(unknown)}, "
                f"only {', '.join(FIELDS[self.dataset])}"
            )

    @property
    def name(self) -> str:
        return str(self.path or self.dataset)

    @property
    def is_own(self) -> bool:
        """Whether the rows come from the user's own function."""
        return _OWN.fullmatch(self.dataset) is not None

    def rows(self, config: DataConfig, tokenizer: Any, progress: Progress = lambda count: None) -> Rows:
        """Raises UserError for what cannot be read."""
        if function := _own_function(self.dataset):
            made = function(config, tokenizer, self.split)
            if not isinstance(made, Iterable):
                raise UserError(f"{self.dataset} must return rows, a list or a generator, not {shown(made)}")
            read = without_absent if hasattr(made, "features") else _itself  # a datasets.Dataset holds Arrow's rows
            for number, row in enumerate(made, 1):
                yield f"{self.dataset}, row {number}", partial(read, row)
        elif (found := self._hub()) is not None:
            for number in range(len(found)):
                progress(1)
                yield f"{self.path}, row {number + 1}", partial(_of_hub, found, number)
        else:
            yield from read_rows(self._file(), progress)

    def content(self, config: DataConfig, tokenizer: Any) -> str:
        """The same for the same rows. Reads local files, and runs the user's own function, to their end."""
        if self.is_own:
            digest = hashlib.blake2b(digest_size=16)
            for _, row in self.rows(config, tokenizer):
                digest.update(json.dumps(row(), default=_plain).encode())
            return digest.hexdigest()
        if (found := self._hub()) is not None:
            return found._fingerprint
        return content_hash(self._file())

    def size(self) -> int | None:
        """How much `rows` will tell to `progress` in all; None: unknown."""
        if self.is_own:
            return None
        if (found := self._hub()) is not None:
            return len(found)
        return sum(file.stat().st_size for file in data_files(self._file()))

    def _file(self) -> Path:
        if self.path:
            return self.path
        if self.dataset == "text":
            raise UserError("--data.dataset text has no small set of its own: give --data.path")
        return BUNDLED / f"{self.dataset}_{self.split}{'.csv' if self.dataset == 'grammar' else '.jsonl'}"

    def _hub(self) -> Any:
        return _from_hub(str(self.path), self.split) if str(self.path).startswith(HUB) else None


def training_sources(config: DataConfig) -> list[Source]:
    """What --data.dataset and --data.path, or --data.mixture, name. Raises UserError for a mixture that is none."""
    if config.mixture is None:
        return [Source(config.dataset, config.path, "train", _columns(config))]
    try:
        listed = read_any_json(config.mixture)
    except UserError as error:
        raise UserError(f"--data.mixture: {error}") from None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"--data.mixture {config.mixture}: must be a list of sources, found {shown(listed)}")
    sources = []
    for number, entry in enumerate(listed, 1):
        where = f"--data.mixture {config.mixture}, source {number}"
        kinds: dict[str, Any] = {"dataset": str, "path": str, "weight": float, "columns": {...: str}}
        if not isinstance(entry, dict) or "dataset" not in entry or entry.keys() - kinds.keys():
            raise UserError(f"{where}: needs 'dataset', and may have 'path', 'weight', 'columns'; found {shown(entry)}")
        if problem := misfit(entry, {name: kinds[name] for name in entry}):
            raise UserError(f"{where}: {problem}")
        if not 0 < entry.get("weight", 1) < 1000:
            raise UserError(f"{where}: weight must be above 0 and below 1000, found {entry['weight']}")
        path = entry.get("path")
        if path is not None:
            path = Path(path) if path.startswith(HUB) else config.mixture.parent / path
        elif entry["dataset"].partition(":")[0].endswith(".py"):
            entry["dataset"] = str(config.mixture.parent / entry["dataset"])
        try:
            sources.append(
                Source(entry["dataset"], path, "train", entry.get("columns", {}), float(entry.get("weight", 1)))
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return sources


def validation_source(config: DataConfig) -> Source | None:
    """The rows to evaluate on; None where they are a part of the training rows. Raises UserError if there are none."""
    if config.val_path or _OWN.fullmatch(config.dataset):
        if config.val_path and config.path is None and config.mixture is None and config.dataset in ENCODERS:
            raise UserError(
                f"--data.val-path {config.val_path} is given without --data.path: give the file to train on too"
            )
        return None if config.val_fraction else Source(config.dataset, config.val_path, "validation", _columns(config))
    if config.val_fraction or (config.dataset == "alpaca" and config.path):
        return None
    if given := config.mixture or config.path:
        raise UserError(
            f"{given} is given without rows to evaluate on: give --data.val-path or --data.val-fraction, or switch "
            "evaluation off with --eval.no-enabled"
        )
    return Source(config.dataset, None, "validation")


def load_collator(config: DataConfig, tokenizer: Any) -> Callable[[Any], Any] | None:
    """What get_data_collator(tokenizer) in the user's own file returns, None without one.

    Raises UserError if the batches are packs, which it could not make.
    """
    if not (own := _OWN.fullmatch(config.dataset)):
        return None
    make = getattr(_module(own[1]), "get_data_collator", None)
    if make and config.batching == "packing":
        raise UserError(f"{own[1]} has a get_data_collator, which is for --data.batching padding: give that")
    collator = make and make(tokenizer)
    if make and not callable(collator):
        raise UserError(f"{own[1]}: get_data_collator must return a function, not {shown(collator)}")
    return collator


def _columns(config: DataConfig) -> dict[str, str]:
    return {name: column for name, _, column in (text.partition("=") for text in config.columns)}


_OWN = re.compile(r"(.+\.py)(?::(\w+))?")
"""FILE.py:FUNCTION"""


def _own_function(dataset: str) -> Callable[[DataConfig, Any, Split], Iterable[Any]] | None:
    if not (own := _OWN.fullmatch(dataset)):
        return None
    function = getattr(_module(own[1]), own[2] or "get_custom_dataset", None)
    if not callable(function):
        raise UserError(f"--data.dataset {dataset}: {own[1]} has no function {own[2] or 'get_custom_dataset'}")
    return function


@cache
def _module(file: str) -> ModuleType:
    """The user's file, run once."""
    if not Path(file).is_file():
        raise UserError(f"--data.dataset {file}: no such file")
    name = f"minillama_own_{Path(file).stem}"
    spec = spec_from_file_location(name, file)
    assert spec and spec.loader
    sys.modules[name] = module = module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@cache
def _from_hub(path: str, split: Split) -> Any:
    """The `datasets.Dataset` that hub:ORG/NAME[/CONFIG][:SPLIT], or hub:FOLDER[:SPLIT], names."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'{path} needs a package: pip install -e ".[hub]"') from None
    name, _, given = path.removeprefix(HUB).partition(":")
    if not name.strip("/"):
        raise UserError(f"{path} names no data set: give hub:ORG/NAME")
    config = None
    if not Path(name).exists() and name.count("/") > 1:
        name, _, config = name.rpartition("/")
    try:
        return datasets.load_dataset(name, config, split=given or split)
    except Exception as error:  # a wrong name, split or configuration, no connection: each has a type of its own
        raise UserError(f"{path}: {error}") from error


def _of_hub(found: Any, number: int) -> Any:
    return without_absent(found[number])


# --- formats: one row -> ids and mask. Their errors lack the place, `encode_rows` adds it.


def encode_samsum(row: dict[str, Any], tokenizer: Any) -> Encoded:
    prompt = f"Summarize this dialog:\n{_text(row, 'dialogue')}\n---\nSummary:\n"
    return _prompt_answer(prompt, _answer(row, "summary"), tokenizer)


def encode_alpaca(row: dict[str, Any], tokenizer: Any) -> Encoded:
    has_input = row.get("input") not in (None, "")
    prompt = "Below is an instruction that describes a task"
    if has_input:
        prompt += ", paired with an input that provides further context"
    prompt += ". Write a response that appropriately completes the request.\n\n"
    prompt += f"### Instruction:\n{_text(row, 'instruction')}\n\n"
    if has_input:
        prompt += f"### Input:\n{_text(row, 'input')}\n\n"
    # llama-recipes tokenizes prompt and output in one go. There ":" can merge with the output's first word,
    # and the prompt alone, as at generation, has other ids than in training. Two calls keep them the same.
    # An output may be empty: some in the published set are, and llama-recipes trains their eos.
    return _prompt_answer(prompt + "### Response:", _text(row, "output"), tokenizer)


def encode_grammar(row: dict[str, Any], tokenizer: Any) -> Encoded:
    prompt = f"Correct this to standard English: {_text(row, 'input')}\n---\nCorrected: "
    return _prompt_answer(prompt, _answer(row, "target"), tokenizer)


def encode_chat(row: dict[str, Any], tokenizer: Any) -> Encoded:
    """OpenAI's messages, ShareGPT's conversations, or a prompt with a response."""
    if "conversations" in row and "messages" not in row:
        messages = [_from_sharegpt(number, turn) for number, turn in enumerate(_list(row, "conversations"), 1)]
    elif "prompt" in row and "messages" not in row:
        messages = [
            {"role": "user", "content": _text(row, "prompt")},
            {"role": "assistant", "content": _answer(row, "response")},
        ]
    else:
        messages = [_checked(number, message) for number, message in enumerate(_list(row, "messages"), 1)]
    if row.get("system") not in (None, "") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(row, "system")}, *messages]
    for number, message in enumerate(messages, 1):
        others = any(message.get(key) for key in ("tool_calls", *REASONING))
        if message["role"] == "assistant" and not others and not message["content"].strip():
            raise UserError(f"message {number}, the assistant's, is empty, so nothing to train on: drop the row")
    tools = tools_of(row)
    ids, mask = tokenizer.encode_chat(messages, tools) if tools else tokenizer.encode_chat(messages)
    if not any(mask):
        said = any(message["role"] == "assistant" for message in messages)
        why = "the chat template trains nothing of it" if said else "no message has the role 'assistant'"
        raise UserError(f"{why}, so nothing to train on: drop the row")
    return Encoded(ids, mask)


def encode_text(row: dict[str, Any], tokenizer: Any) -> Encoded:
    text = _answer(row, "text")
    # Lists of Python's integers take ten times the room of an array: a book goes in parts, cut at ends of lines.
    parts: list[np.ndarray] = []
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + LONGEST_PART) + 1 if len(text) - start > LONGEST_PART else len(text)
        end = end or start + LONGEST_PART
        parts.append(np.array(_part(tokenizer, text[start:end], start > 0), np.int32))
        start = end
    begun = len(parts[0]) and parts[0][0] == tokenizer.bos_id
    ended = len(parts[-1]) and parts[-1][-1] == tokenizer.eos_id and sum(map(len, parts)) > begun
    if tokenizer.bos_id is not None and not begun:
        parts.insert(0, np.array([tokenizer.bos_id], np.int32))
    if not ended:
        parts.append(np.array([tokenizer.eos_id], np.int32))
    ids = np.concatenate(parts)
    return Encoded(ids, np.ones(len(ids), np.bool_), bool(begun or ended))


def _part(tokenizer: Any, text: str, goes_on: bool) -> list[int]:
    """Ids of a part of a text, that which goes on without the space that sentencepiece begins a text with."""
    if not (goes_on and getattr(tokenizer, "puts_space", False)):
        return tokenizer.encode(text)
    line_end = tokenizer.encode("\n")
    ids = tokenizer.encode("\n" + text)
    return ids[len(line_end) :] if ids[: len(line_end)] == line_end else tokenizer.encode(text)


def encode_own(row: dict[str, Any], tokenizer: Any) -> Encoded:
    """What a user's own function gives: ids and labels as for llama-recipes, or a row of the formats chat and text."""
    if "input_ids" not in row:
        return encode_text(row, tokenizer) if "text" in row else encode_chat(row, tokenizer)
    try:
        ids, labels = (np.asarray(_field(row, name)) for name in ("input_ids", "labels"))
    except ValueError as error:  # lists of unlike lengths
        raise UserError(f"input_ids and labels must be lists of integers ({error})") from None
    for name, values in (("input_ids", ids), ("labels", labels)):
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer) or not 0 < len(values) == len(ids):
            raise UserError(f"field '{name}' must be a list of integers, of one length with input_ids")
    trained = labels != IGNORE
    if not (ids.min() >= 0 and ids.max() < tokenizer.vocab_size and (ids == labels)[trained].all()):
        raise UserError(
            f"input_ids must be from 0 to {tokenizer.vocab_size - 1}, and each of the labels {IGNORE} or the id itself"
        )
    if not trained[1:].any():  # nothing stands before the first, to predict it from
        raise UserError(f"all labels but the first are {IGNORE}, so nothing to train on: give labels, or drop the row")
    return Encoded(ids, trained)


ENCODERS: dict[str, Callable[[dict[str, Any], Any], Encoded]] = {
    "samsum": encode_samsum,
    "alpaca": encode_alpaca,
    "grammar": encode_grammar,
    "chat": encode_chat,
    "text": encode_text,
}
FIELDS = {
    "samsum": ("dialogue", "summary"),
    "alpaca": ("instruction", "input", "output"),
    "grammar": ("input", "target"),
    "chat": ("messages", "conversations", "system", "prompt", "response", "tools"),
    "text": ("text",),
}


def encode_rows(
    rows: Sequence[tuple[str, Callable[[], Any]]],
    source: Source,
    tokenizer: Any,
    train_on: Literal["answers", "all"] = "answers",
) -> tuple[Documents, list[str]]:
    """The documents that rows, as `read_rows` gives them, become, and for each that cannot be used its place and why."""
    encode, tokens, trained, offsets, refused = ENCODERS.get(source.dataset, encode_own), [], [], [0], []
    had_ends = 0
    for place, read in rows:
        try:
            row = read()
            if is_deep(row):
                raise UserError(f"more than {DEPTH} lists and objects inside each other: drop the row")
            if not isinstance(row, dict):
                raise UserError(f"a row must be an object, found {shown(row)}")
            ids, mask, own_ends = encode(_renamed(row, source.columns), tokenizer)
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, UTF-8 cannot
            refused.append(f"{place}: text that is not Unicode ({error}): mend or drop the row")
        except UserError as error:
            refused.append(f"{place}: {error}")
        else:
            tokens.append(np.asarray(ids, np.int32))
            trained.append(np.ones(len(ids), np.bool_) if train_on == "all" else np.asarray(mask, np.bool_))
            offsets.append(offsets[-1] + len(ids))
            had_ends += own_ends
    empty = np.empty(0, np.int32)
    return Documents(
        np.concatenate([empty, *tokens]),
        np.concatenate([empty.astype(np.bool_), *trained]),
        np.array(offsets),
        had_ends=had_ends,
    ), refused


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for name, column in columns.items():
        if column not in row:
            raise UserError(
                f"field '{column}', to be {name}, is missing, the fields are {', '.join(map(repr, row)) or 'none'}: "
                "mend --data.columns or the row"
            )
    return {**row, **{name: row[column] for name, column in columns.items()}} if columns else row


def _from_sharegpt(number: int, turn: Any) -> dict[str, str]:
    """{"from": "human", "value": "Hi"} -> {"role": "user", "content": "Hi"}"""
    said = turn if isinstance(turn, dict) else {}
    sender = said.get("from")
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None or not isinstance(said.get("value"), str):
        raise UserError(
            f"turn {number} needs 'from', one of {', '.join(SHAREGPT_ROLES)}, and the text 'value', found {shown(turn)}"
        )
    return {"role": role, "content": said["value"]}


SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def _checked(number: int, message: Any) -> dict[str, Any]:
    fields = message if isinstance(message, dict) else {}
    calls = fields.get("tool_calls") and fields.get("content") is None  # with which there may be no text
    if not isinstance(fields.get("role"), str) or not (isinstance(fields.get("content"), str) or calls):
        raise UserError(f"message {number} needs the texts 'role' and 'content', found {shown(message)}")
    return {"content": None, **message}


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The functions that a conversation may call, as JSON schemas; as text in what comes from Parquet or Arrow."""
    tools = row.get("tools")
    with suppress(ValueError, RecursionError):
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"field 'tools' must be a list of JSON schemas, or that as JSON, found {shown(tools)}")
    return tools or None


def _prompt_answer(prompt: str, answer: str, tokenizer: Any) -> Encoded:
    before = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)  # some checkpoints have no BOS
    after = tokenizer.encode(answer, eos=True)
    ended = after[-2:] == [tokenizer.eos_id] * 2
    after = after[:-1] if ended else after
    return Encoded(before + after, [False] * len(before) + [True] * len(after), ended)


def _field(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise UserError(
            f"field '{name}' is missing, the fields are {', '.join(map(repr, row)) or 'none'}: "
            f"name the right one with --data.columns {name}=COLUMN, or choose the --data.dataset that has these"
        )
    return row[name]


def _text(row: dict[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise UserError(f"field '{name}' must be text, found {shown(value)}: mend or drop the row")
    return value


def _answer(row: dict[str, Any], name: str) -> str:
    value = _text(row, name)
    if not value or value.isspace():
        raise UserError(f"field '{name}' is empty ({shown(value)}), so nothing to train on: drop the row")
    return value


def _list(row: dict[str, Any], name: str) -> list[Any]:
    value = _field(row, name)
    if not isinstance(value, list) or not value:
        raise UserError(f"field '{name}' must be a list of messages, found {shown(value)}")
    return value


def _itself(row: Any) -> Any:
    return row


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
