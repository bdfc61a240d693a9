"""Files of rows -> tokenized documents, each token marked as trained or not.

A dataset is one function from a row (a dict) to the row's token ids and, for each id, whether it is trained.
The prompts are llama-recipes' letter for letter, so that weights and losses compare with runs made there.
"""

from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minillama.errors import UserError
from minillama.rows import read_rows, shown

BUNDLED = Path(__file__).parent / "data"

Encoded = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    dataset: str = "samsum"
    """Which format the rows have: samsum, alpaca, grammar or chat."""
    path: Path | None = None
    """Training rows: a .json, .jsonl, .csv or .parquet file, or a folder of them. None: a small set that comes with
    minillama, to try things on."""
    val_path: Path | None = None
    """Rows to evaluate on. Alpaca without one holds out the first twentieth of --data.path, as llama-recipes does."""
    batching: Literal["packing", "padding"] = "packing"
    """packing: rows share packs, whole and without seeing each other. padding: rows of like length share a batch."""
    context_length: int = 4096
    """Tokens in a pack, or in a padded row. Packing drops longer rows, padding truncates them; the count is printed."""

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise UserError(f"--data.context-length {self.context_length}: must be at least 2")


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokenized documents end to end; document i is the span offsets[i]:offsets[i + 1]."""

    tokens: np.ndarray
    """int32 (N,)"""
    trained: np.ndarray
    """bool (N,): the token itself is a label, to be predicted from what stands before it in its document."""
    offsets: np.ndarray
    """int64 (n + 1,), from 0 to N"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (T,) and trained (T,) of document i, as views."""
        i = range(len(self))[i]  # negative indices, and the IndexError that ends a for loop
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[span], self.trained[span]

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


def load_datasets(config: DataConfig, tokenizer: Any, *, validation: bool) -> tuple[Documents, Documents | None]:
    """The training documents and, if `validation`, those to evaluate on.

    No path: the bundled sets. Alpaca is published as one file, so of a `path` alone its first 5% of rows are
    held out, as llama-recipes does. Raises UserError for any other missing file and for every bad row.
    """
    dataset, path, val_path = config.dataset, config.path, config.val_path
    _encoder(dataset)  # a wrong name is the first thing to say
    if path is None and val_path is not None:
        raise UserError(f"--data.val-path {val_path} is given without --data.path: give the file to train on too")
    if not validation:
        return load_documents(dataset, path, "train", tokenizer), None
    if path is None or val_path is not None:
        train = load_documents(dataset, path, "train", tokenizer)
        return train, load_documents(dataset, val_path, "validation", tokenizer)
    if dataset != "alpaca":
        raise UserError(
            f"--data.path {path} is given without a file to evaluate on: "
            "give --data.val-path, or switch evaluation off with --eval.no-enabled"
        )
    both = load_documents(dataset, path, "train", tokenizer)
    held_out = len(both) // 20
    if held_out == 0:
        raise UserError(
            f"{path}: of {len(both)} rows a twentieth, to evaluate on, is none: "
            "give --data.val-path, or switch evaluation off with --eval.no-enabled"
        )
    return _part(both, held_out, len(both)), _part(both, 0, held_out)


def load_documents(
    dataset: str, path: str | Path | None, split: Literal["train", "validation"], tokenizer: Any
) -> Documents:
    """All rows of the file or folder `path`, or without one the bundled set of that split.

    Raises UserError naming the file and the line or row for what is wrong with it.
    """
    encode = _encoder(dataset)
    if path is None:
        path = BUNDLED / f"{dataset}_{split}{'.csv' if dataset == 'grammar' else '.jsonl'}"
    path = Path(path)
    tokens, trained, offsets = array("i"), bytearray(), array("q", [0])
    for place, row in read_rows(path):
        try:
            if not isinstance(row, dict):
                raise UserError(f"a row must be an object, found {shown(row)}")
            ids, mask = encode(row, tokenizer)
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, UTF-8 cannot
            raise UserError(f"{place}: text that is not Unicode ({error}): mend or drop the row") from error
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        tokens.extend(ids)
        trained.extend(mask)
        offsets.append(len(tokens))
    if len(offsets) == 1:
        raise UserError(f"{path} has no rows: give a file with at least one")
    return Documents(
        np.frombuffer(tokens, np.int32), np.frombuffer(trained, np.bool_), np.frombuffer(offsets, np.int64)
    )


def _part(documents: Documents, start: int, stop: int) -> Documents:
    offsets = documents.offsets[start : stop + 1]
    span = slice(offsets[0], offsets[-1])
    return Documents(documents.tokens[span], documents.trained[span], offsets - offsets[0])


# --- formats: one row -> ids and mask. Their errors lack the place, load_documents adds it.


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
    messages = _field(row, "messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"field 'messages' must be a list of messages, found {shown(messages)}")
    for number, message in enumerate(messages, 1):
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise UserError(f"message {number} needs the texts 'role' and 'content', found {shown(message)}")
    ids, mask = tokenizer.encode_chat(messages)
    if not any(mask):
        raise UserError("no message has the role 'assistant', so nothing to train on: drop the row")
    return ids, mask


ENCODERS = {
    "samsum": encode_samsum,
    "alpaca": encode_alpaca,
    "grammar": encode_grammar,
    "chat": encode_chat,
}


def _encoder(dataset: str):
    if dataset not in ENCODERS:
        raise UserError(f"--data.dataset {dataset} is unknown: choose one of {', '.join(ENCODERS)}")
    return ENCODERS[dataset]


def _prompt_answer(prompt: str, answer: str, tokenizer: Any) -> Encoded:
    before = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)  # some checkpoints have no BOS
    after = tokenizer.encode(answer, eos=True)
    return before + after, [False] * len(before) + [True] * len(after)


def _field(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise UserError(
            f"field '{name}' is missing, the fields are {', '.join(map(repr, row)) or 'none'}: "
            "rename one, or choose the --data.dataset that has these"
        )
    return row[name]


def _text(row: dict[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise UserError(f"field '{name}' must be text, found {shown(value)}: mend or drop the row")
    return value


def _answer(row: dict[str, Any], name: str) -> str:
    value = _text(row, name)
    if not value.strip():
        raise UserError(f"field '{name}' is empty ({shown(value)}), so nothing to train on: drop the row")
    return value
