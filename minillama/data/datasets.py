"""Where rows come from: files, mixtures, data sets of the hub, the user's own functions."""

import datetime
import hashlib
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from minillama.data.encoders import ENCODERS, FIELDS
from minillama.data.rows import Progress, Rows, content_hash, data_files, itself, read_rows, shown, without_absent
from minillama.errors import UserError
from minillama.files import misfit, open_file, read_any_json

BUNDLED = Path(__file__).parents[1] / "bundled"
HUB = "hub:"


Split = Literal["train", "validation"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    dataset: str = "samsum"
    """The format of the rows: samsum, alpaca, grammar, chat or text; or FILE.py:FUNCTION, your own."""
    path: Path | None = None
    """Training rows: a .json, .jsonl, .csv, .parquet or .txt file, a folder of them, or hub:ORG/NAME[/CONFIG][:SPLIT].
    None: a small data set that comes with minillama, to try things."""
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
    """The date, such as 2025-01-31, for chat templates that ask for it, as Llama 3.2's does. None: today; a resumed run
    keeps its date."""
    train_on: Literal["answers", "all"] = "answers"
    """all: train on prompts, and on what users say in a chat, too."""
    batching: Literal["packing", "padding"] = "packing"
    """packing: whole rows share a pack, and do not attend to each other. padding: rows of similar length share a batch."""
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

    @property
    def pairs(self) -> bool:
        """Whether rows are of preference data"""
        return False

    def __post_init__(self) -> None:
        if not self.mixture:
            _check_pairs(self, self.dataset)
        if self.pairs and self.train_on != "answers":
            raise UserError(f"--data.train-on {self.train_on}: of a pair only the answers count: leave it out")
        if self.pairs and self.too_long == "split":
            raise UserError("--data.too-long split: a pair cannot be split: give drop or truncate")
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
    def is_own(self) -> bool:
        """Whether the rows come from the user's own function."""
        return _OWN.fullmatch(self.dataset) is not None

    @property
    def day(self) -> datetime.date | None:
        return datetime.date.fromisoformat(self.date) if self.date else None


@dataclass(frozen=True)
class PreferenceConfig(DataConfig):
    """Which pairs of answers to learn from."""

    dataset: str = "preference"
    """preference: rows with prompt, chosen and rejected; or FILE.py:FUNCTION, your own, which returns such rows."""
    path: Path | None = None
    """Training rows: a .json, .jsonl, .csv, .parquet or .txt file, a folder of them, or hub:ORG/NAME[/CONFIG][:SPLIT]."""

    @property
    def pairs(self) -> bool:
        return True


@dataclass(frozen=True)
class AnyDataConfig(DataConfig):
    """Which rows to look at."""

    dataset: str = "samsum"
    """The format of the rows: samsum, alpaca, grammar, chat, text or preference; or FILE.py:FUNCTION, your own."""

    @property
    def pairs(self) -> bool:
        return self.dataset == "preference"

    def seen(self, tokenizer: Any, split: Split) -> DataConfig:
        """As PreferenceConfig if the first row of that split, by the user's own function, has two answers."""
        if not self.is_own or self.mixture:
            return self
        try:
            row = next((read() for _, read in Source(self.dataset, self.path, split).rows(self, tokenizer)), None)
        except UserError:  # of a bad row, which is said with the others, or skipped
            return self
        columns = _columns(self)
        both = {columns.get(name, name) for name in ("chosen", "rejected")}
        return PreferenceConfig(**vars(self)) if isinstance(row, dict) and both <= row.keys() else self


def _check_pairs(config: DataConfig, dataset: str) -> None:
    if config.pairs and dataset in ENCODERS and dataset != "preference":
        raise UserError(f"--data.dataset {dataset} has no pairs of answers: give preference, or FILE.py:FUNCTION")
    if not config.pairs and dataset == "preference":
        raise UserError("--data.dataset preference has two answers a row, which only recipes/dpo_fsdp.py trains on")


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError if the tokenizer has more ids than the embedding has rows, `vocab_size`, or far fewer.

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
            with _own_code(self.dataset.rpartition(".py")[0] + ".py"):
                made = function(config, tokenizer, self.split)
                if not isinstance(made, Iterable):
                    raise UserError(f"{self.dataset} must return rows, a list or a generator, not {shown(made)}")
                read = without_absent if hasattr(made, "features") else itself  # a datasets.Dataset holds Arrow's rows
                for number, row in enumerate(made, 1):
                    yield f"{self.dataset}, row {number}", partial(read, row)
        elif (found := self._hub()) is not None:
            for number in range(len(found)):
                progress(1)
                yield f"{self.path}, row {number + 1}", partial(_of_hub, found, number)
        else:
            yield from read_rows(self.file(), progress)

    def content(self, config: DataConfig, tokenizer: Any) -> str:
        """The same for the same rows. Reads local files, and runs the user's own function, to their end."""
        if self.is_own:
            digest = hashlib.blake2b(digest_size=16)
            for _, row in self.rows(config, tokenizer):
                digest.update(json.dumps(row(), default=_plain).encode())
            return digest.hexdigest()
        if (found := self._hub()) is not None:
            return found._fingerprint
        return content_hash(self.file())

    def size(self) -> int | None:
        """The total of what `rows` will report to `progress`; None: unknown."""
        if self.is_own:
            return None
        if (found := self._hub()) is not None:
            return len(found)
        return sum(file.stat().st_size for file in data_files(self.file()))

    def file(self) -> Path:
        """The rows, if they are in a file or folder. Raises UserError for a format without a small set of its own."""
        if self.path:
            return self.path
        if self.dataset in ("text", "preference"):
            raise UserError(f"--data.dataset {self.dataset} has no small set of its own: give --data.path")
        return BUNDLED / f"{self.dataset}_{self.split}{'.csv' if self.dataset == 'grammar' else '.jsonl'}"

    def _hub(self) -> Any:
        return _from_hub(str(self.path), self.split) if str(self.path).startswith(HUB) else None


def training_sources(config: DataConfig) -> list[Source]:
    """The sources that --data.dataset and --data.path, or --data.mixture, name. Raises UserError for an invalid mixture."""
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
            _check_pairs(config, entry["dataset"])
            sources.append(
                Source(entry["dataset"], path, "train", entry.get("columns", {}), float(entry.get("weight", 1)))
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return sources


def validation_source(config: DataConfig) -> Source | None:
    """The rows to evaluate on; None if they are a part of the training rows. Raises UserError if there are none."""
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

    Raises UserError if the batches are packs: a collator cannot make those.
    """
    if not (own := _OWN.fullmatch(config.dataset)):
        return None
    make = getattr(_module(own[1]), "get_data_collator", None)
    if make and config.pairs:
        raise UserError(f"{own[1]} has a get_data_collator, which cannot be used for pairs of answers: remove it")
    if make and config.batching == "packing":
        raise UserError(f"{own[1]} has a get_data_collator, which is for --data.batching padding: give that")
    with _own_code(own[1]):
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
    open_file(Path(file)).close()
    name = f"minillama_own_{Path(file).stem}"
    spec = spec_from_file_location(name, file)
    assert spec and spec.loader
    sys.modules[name] = module = module_from_spec(spec)  # dataclasses look up their module there
    with _own_code(file):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _own_code(file: str) -> Iterator[None]:
    """Around code of the user's file: an error there becomes a UserError with its place."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)
        own = next((number for number, place in enumerate(places) if place.filename == file), 0)
        trace = "".join(traceback.format_list(places[own:]) + traceback.format_exception_only(error))
        what = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
        raise UserError(f"--data.dataset {file} fails ({what}): correct it there\n{trace.rstrip()}") from None


@cache
def _from_hub(path: str, split: Split) -> Any:
    """The `datasets.Dataset` that hub:ORG/NAME[/CONFIG][:SPLIT], or hub:FOLDER[:SPLIT], names."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'{path} needs a package: pip install -e ".[hub]"') from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they would fill a log with redraws
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


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
