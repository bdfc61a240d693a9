"""The data of a run: built once on each machine, opened by every rank, and compared across ranks."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minillama.data.cache import open_packed, prepare, prepare_evaluation
from minillama.data.datasets import DataConfig, check_vocabulary, load_collator
from minillama.data.packing import Packed
from minillama.errors import UserError
from minillama.parallel.processes import all_reduce, on_each_node, say


def load_data(
    config: DataConfig, tokenizer: Any, vocab_size: int, seed: int, *, validation: bool
) -> tuple[Packed, Packed | None]:
    """What to train on, and if `validation` what to evaluate on; every rank must call it.

    Raises UserError for what is wrong with the data, and for a tokenizer that is not a model's of this vocabulary.
    """
    check_vocabulary(tokenizer, vocab_size)
    collator = load_collator(config, tokenizer)
    processes = config.workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    folders = on_each_node(lambda: prepare(config, tokenizer, seed, validation=validation, processes=processes))
    train, held_out = (_open_everywhere(folder, collator) if folder else None for folder in folders)
    assert train
    source = config.mixture or config.path or ("" if ".py" in config.dataset else "the bundled set")
    say(f"data        {config.dataset}{f', {source}' if source else ''}; tokenized in {folders[0].parent}")
    return train, held_out


def load_evaluation_data(data: DataConfig, tokenizer: Any, vocab_size: int, seed: int) -> Packed:
    """The data to evaluate an existing model on; every rank must call it.

    Raises UserError for what is wrong with the data, and for a tokenizer that is not a model's of this vocabulary.
    """
    check_vocabulary(tokenizer, vocab_size)
    collator = load_collator(data, tokenizer)
    processes = data.workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return _open_everywhere(on_each_node(lambda: prepare_evaluation(data, tokenizer, seed, processes)), collator)


def _open_everywhere(folder: Path, collator: Callable[[Any], Any] | None) -> Packed:
    packed = replace(open_packed(folder), collator=collator)
    number = float(
        int.from_bytes(hashlib.blake2b(packed.fingerprint.encode(), digest_size=6).digest())
    )  # exact in fp64
    least, most = all_reduce([-number, number], "max")
    if -least != most:
        raise UserError("the machines have different data: give all of them the same files")
    return packed
