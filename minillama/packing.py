"""Documents -> packs of at most context_length tokens -> batches.

Packing puts many documents into a pack. Padding makes each document a pack of its own and batches those of like length.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minillama.datasets import DataConfig, Documents
from minillama.errors import UserError
from minillama.loss import IGNORE

Pack = list[int]
"""The documents of one pack, by number, in order."""


BUCKET = 64
"""Padded documents of like length that follow each other in an epoch."""


@dataclass(frozen=True)
class Packed:
    """Documents, in packs, and how an epoch goes through these."""

    batching: Literal["packing", "padding"]
    documents: Documents
    packs: list[Pack]
    context_length: int
    dropped: int = 0
    """Documents longer than the context, which no pack holds."""
    truncated: int = 0
    """Documents that were longer than the context; `documents` has what is left of them."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (packs,): tokens in each pack"""
        starts = np.cumsum([0, *map(len, self.packs[:-1])])
        return np.add.reduceat(self.documents.lengths[list(chain.from_iterable(self.packs))], starts)

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same tokens in the same packs, wherever they were read from."""
        documents = self.documents
        arrays = [documents.tokens, documents.trained, documents.offsets, self.lengths]
        digest = hashlib.sha256(self.batching.encode())
        for array in [*arrays, np.fromiter(chain.from_iterable(self.packs), np.int64)]:
            digest.update(str((array.dtype, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def efficiency(self) -> float:
        """Tokens over the places that the packs have for them."""
        return self.tokens / (len(self.packs) * self.context_length)

    def padded_efficiency(self, batch_size: int, world_size: int, accumulate: int) -> float:
        """Tokens over the places of an epoch's batches, each as wide as its longest row."""
        order, window = self.order(0, 0), batch_size * world_size * accumulate
        places = 0
        for cursor in range(0, len(order), window):
            # all full steps fall into the same micro-batches whoever takes them: one rank is quicker to go through
            for rows in self.micro_batches(order[cursor : cursor + window], batch_size, 0, 1):
                places += len(rows) * int(self.lengths[rows].max())
        return self.tokens / places

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order (packs,) in which an epoch goes through the packs.

        It depends on no batch size and no number of ranks: all ranks agree on it, and so does a resumed run on others.
        """
        random = np.random.default_rng((seed, epoch))
        if self.batching == "packing":
            return random.permutation(len(self.packs))
        # The noise gives a document other neighbours in each epoch; sorted by bare length, a small set would make much
        # the same steps again and again.
        by_length = np.argsort(self.lengths * random.uniform(1, 1.1, len(self.packs)), kind="stable")
        buckets = np.split(by_length, range(BUCKET, len(by_length), BUCKET))
        random.shuffle(buckets)
        return np.concatenate(buckets)

    def micro_batches(self, window: np.ndarray, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
        """The micro-batches of one rank for the packs of one step, at most batch_size packs each.

        All ranks get equally many; where the packs do not go round, some are smaller, or empty. Padded documents are
        dealt out by length: little padding, and ranks that wait for each other have much the same to do.
        """
        if self.batching == "padding":
            window = window[np.argsort(self.lengths[window], kind="stable")]
        rounds = -(-len(window) // (batch_size * world_size))
        return np.array_split(window, rounds * world_size)[rank::world_size]


def batch_documents(documents: Documents, config: DataConfig, seed: int) -> Packed:
    """The documents as --data.batching has them. Raises UserError if the context length leaves nothing to train on."""
    if config.batching == "packing":
        return pack(documents, config.context_length, seed)
    return pad(documents, config.context_length)


def pack(documents: Documents, context_length: int, seed: int) -> Packed:
    """Best fit, longest first: each document goes whole into the fullest pack that still has room for it.

    Within a pack documents are in random order. Raises UserError if every document is longer than the context.
    """
    lengths = documents.lengths
    fitting = np.flatnonzero(lengths <= context_length)
    if len(fitting) == 0:
        raise UserError(
            f"all {len(lengths)} rows are longer than --data.context-length {context_length} (the shortest has "
            f"{lengths.min()} tokens): raise it"
        )
    random = np.random.default_rng(seed)
    packs: list[Pack] = []
    with_room: list[list[int]] = [[] for _ in range(context_length + 1)]  # packs, by the room they have left
    rooms = 0  # the set of r for which with_room[r] is not empty, as the bits of an integer
    for document in fitting[np.argsort(-lengths[fitting], kind="stable")].tolist():
        length = int(lengths[document])
        wide_enough = rooms >> length
        if wide_enough:
            room = length + (wide_enough & -wide_enough).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = context_length, len(packs)
            packs.append([])
        packs[chosen].append(document)
        with_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    packs = [random.permutation(p).tolist() for p in packs]
    return Packed("packing", documents, packs, context_length, dropped=len(lengths) - len(fitting))


def pad(documents: Documents, context_length: int) -> Packed:
    """Each document alone in a pack, truncated to the context.

    Raises UserError if no document has a trained token left.
    """
    lengths, offsets = documents.lengths, documents.offsets
    too_long = np.flatnonzero(lengths > context_length)
    keep = np.ones(offsets[-1], np.bool_)
    for i in too_long:
        keep[offsets[i] + context_length : offsets[i + 1]] = False
    kept = Documents(
        documents.tokens[keep],
        documents.trained[keep],
        np.concatenate(([0], np.cumsum(np.minimum(lengths, context_length)))),
    )
    if not kept.trained.any():
        raise UserError(
            f"no row has a token to train among its first --data.context-length {context_length} (the longest has "
            f"{lengths.max()} tokens): raise it"
        )
    return Packed("padding", kept, [[i] for i in range(len(kept))], context_length, truncated=len(too_long))


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank. What the host needs to know of it stays there: asking a device would wait for it."""

    tokens: Tensor
    """(B, T) int64, on the device"""
    positions: Tensor
    """(B, T) int64, on the device: restarts at 0 with each document"""
    labels: Tensor
    """(B, T) int64, on the host: the next token where that is trained, -100 elsewhere"""
    document_ids: Tensor
    """(B, T) int64, on the host: which document of its row a token is of; the padding at a row's end is one more"""
    count: int
    """Tokens, without padding"""
    trained: int
    """Labels"""
    squares: int
    """Sum of the squares of the documents' lengths: what their attention costs"""


def collate(packed: Packed, packs: np.ndarray | list[int], pad_id: int, device: torch.device | str) -> Batch:
    """Lays packs side by side, padded to the longest. No packs: a batch of one padding token and no label."""
    documents = packed.documents
    rows = [packed.packs[i] for i in packs]
    width = max((int(documents.lengths[row].sum()) for row in rows), default=1)
    shape = (max(1, len(rows)), width)
    tokens = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    document_ids = np.full(shape, -1, np.int64)
    positions = np.zeros(shape, np.int64)
    squares = 0
    for r, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            ids, trained = documents[document]
            end = start + len(ids)
            tokens[r, start:end] = ids
            # the shift: a document's last token predicts nothing, and its first is predicted by nothing
            labels[r, start : end - 1] = np.where(trained[1:], ids[1:], IGNORE)
            document_ids[r, start:end] = number
            positions[r, start:end] = np.arange(len(ids))
            squares += len(ids) ** 2
            start = end

    def on_device(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor

    return Batch(
        on_device(tokens),
        on_device(positions),
        torch.from_numpy(labels),
        torch.from_numpy(document_ids),
        count=int((document_ids >= 0).sum()),
        trained=int((labels != IGNORE).sum()),
        squares=squares,
    )
