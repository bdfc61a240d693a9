"""Shows what a training run would be fed: samples with their trained tokens marked, lengths, packing, refused rows.

python tools/inspect_data.py --model MODEL_FOLDER --data.dataset chat --data.path rows.jsonl

Takes the recipes' --data flags. Rows that cannot be used are listed and do not end it. What it tokenizes stays in the
cache, where a run with --data.bad-rows skip finds it.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from minillama.data.cache import open_packed, prepare, refused_rows
from minillama.data.datasets import AnyDataConfig, training_sources
from minillama.data.encoders import FIELDS
from minillama.data.packing import Packed
from minillama.data.permutation import permuted
from minillama.formats.hub import find_model
from minillama.help import filled
from minillama.parallel.failures import user_errors
from minillama.parallel.processes import say
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training.config import check_seed

BARS = 12
WIDTH = 50


@dataclass(frozen=True)
class Config:
    """What to look at."""

    model: Path
    """Folder of the model, or its tokenizer's file, or ORG/NAME of the hub."""
    data: AnyDataConfig = AnyDataConfig()
    samples: int = 3
    """Documents to show; of preference data pairs of them."""
    refused: int = 10
    """Refused rows to show."""
    seed: int = 42
    """The seed of the run: decides which rows are held out, and which documents are shown."""

    def __post_init__(self) -> None:
        check_seed(self.seed)


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Lines: the range of lengths, a bar, how many."""
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, BARS + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    for low, high, count in zip(edges[:-1], edges[1:] - 1, counts, strict=True):
        yield f"{low:>9,} to {high:<7,} {'█' * round(WIDTH * count / counts.max()):{WIDTH}} {count:,}"


def described(packed: Packed) -> Iterator[str]:
    documents = packed.documents
    trained = sum(
        int(documents.trained[start + 1 : start + size].sum())
        for start, size in zip(packed.starts.tolist(), packed.sizes.tolist(), strict=True)
    )
    pairs = "" if documents.per_row == 1 else f"{len(packed.sizes) // documents.per_row:,} pairs, "
    yield f"{pairs}{len(packed.sizes):,} documents, {packed.tokens:,} tokens, {trained / packed.tokens:.1%} of them trained"
    if packed.batching == "packing":
        yield f"{len(packed):,} pack{'s' * (len(packed) != 1)} of {packed.context_length}, {packed.efficiency():.2%} full"
    else:
        yield f"batches of 4 are {packed.efficiency(4):.2%} full"
    if count := documents.had_ends:
        yield f"{count:,} had BOS or EOS in their text, and were given no second one"
    for what, count in packed.long.items():
        if count:
            left_out = "pieces without a trained token, left out"
            yield f"{count:,} {left_out if what == 'untrained' else f'longer than {packed.context_length}, {what}'}"
    quantiles = np.quantile(packed.sizes, (0.5, 0.9, 0.99, 1)).astype(int)
    yield "tokens in a document: half have up to {:,}, 90% {:,}, 99% {:,}, all {:,}".format(*quantiles)
    yield from histogram(np.asarray(packed.sizes))


def sample(packed: Packed, piece: int, tokenizer: Any, marks: bool) -> str:
    """The piece as text, what is trained in green, or between ⟦ and ⟧."""
    span = slice(packed.starts[piece], packed.starts[piece] + packed.sizes[piece])
    ids, trained = packed.documents.tokens[span].tolist(), packed.documents.trained[span].tolist()
    trained[0] = False  # there is nothing before it to predict it from
    text = ""
    for learn, run in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        said = tokenizer.decode([token for token, _ in run])
        if learn or not marks:
            begin, end = ("⟦", "⟧") if marks else ("\033[1;32m" if learn else "\033[2m", "\033[0m")
            said = begin + said + end
        text += said
    return text


def main(config: Config) -> None:
    tokenizer = load_tokenizer(find_model(config.model, weights=False), day=config.data.day)
    data = replace(config.data, bad_rows="skip").seen(tokenizer, "train")
    held_out = bool(data.val_path or data.val_fraction or data.path is data.mixture is None or data.dataset == "alpaca")
    processes = data.workers
    folders = prepare(data, tokenizer, config.seed, validation=held_out, processes=processes)
    for source in training_sources(data):
        _, read = next(source.rows(data, tokenizer))
        row = read()
        known = {source.columns.get(name, name) for name in FIELDS.get(source.dataset, row)}
        say(f"{source.name}: {source.dataset}; fields not used: {', '.join(sorted(row.keys() - known)) or 'none'}")
    for name, folder in zip(("training", "validation"), folders, strict=True):
        if folder is None:
            continue
        packed = open_packed(folder)
        say(f"\n{name}: {folder}")
        for line in described(packed):
            say(f"  {line}")
        refused = refused_rows(folder)
        if name == "validation" and folder.parent == folders[0].parent:  # a part of the same rows
            continue
        say(f"  rows refused: {len(refused):,}")
        for line in refused[: config.refused]:
            say(f"    {line}")
    train = open_packed(folders[0])
    marks = not sys.stdout.isatty()
    names = [""] if train.documents.per_row == 1 else [", chosen", ", rejected"]
    count = len(train.sizes) // len(names)
    rows = permuted(np.arange(min(config.samples, count)), count, config.seed, 1)
    for number, row in enumerate(rows.tolist(), 1):
        for piece, name in enumerate(names, row * len(names)):
            told = f"{train.sizes[piece]} tokens, {'between ⟦ and ⟧' if marks else 'green'} is trained"
            say(f"\nsample {number}{name}: {told}")
            say(sample(train, piece, tokenizer, marks))


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(filled(Config), description=__doc__))
