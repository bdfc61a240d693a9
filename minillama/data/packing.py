"""Documents -> packs of at most context_length tokens -> batches.

Packing puts many documents into a pack. Padding makes each document its own pack, and batches those of similar length.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from minillama.data.documents import Documents
from minillama.data.permutation import permuted
from minillama.errors import UserError

BUCKET = 64
"""So many padded documents of similar length follow each other in an epoch."""
SORTED_TOGETHER = 64 * BUCKET
"""So many padded documents are sorted into buckets together."""
PACKED_TOGETHER = 65_536
"""So many documents are packed together."""

TooLong = Literal["drop", "truncate", "split"]


@dataclass(frozen=True, eq=False)
class Packed:
    """Documents, or pieces of them, in packs, and the order of an epoch. The arrays may be memory-mapped."""

    batching: Literal["packing", "padding"]
    context_length: int
    documents: Documents
    starts: np.ndarray
    """int64 (pieces,): where in the documents' tokens each piece starts; the pieces of a pack are contiguous"""
    sizes: np.ndarray
    """int64 (pieces,): tokens in each piece"""
    firsts: np.ndarray
    """int64 (packs + 1,): pack p holds the pieces firsts[p]:firsts[p + 1]"""
    lengths: np.ndarray
    """int64 (packs,): tokens in each pack"""
    long: dict[str, int] = field(default_factory=dict)
    """How many documents longer than the context were dropped, truncated, or split, and how many of their pieces have no
    token to train and were left out ("untrained")"""
    fingerprint: str = ""
    """A hash of the tokens and packs, whatever files they were read from"""
    folder: Path | None = None
    """Where they lie in the data cache"""
    reference: np.ndarray | None = None
    """float32 (N,): of each label among the documents' tokens, its log-probability by the model before training"""
    collator: Callable[[list[dict[str, list[int]]]], dict[str, Tensor]] | None = None
    """The user's own function, from documents to a padded batch"""

    def __len__(self) -> int:
        """Packs"""
        return len(self.firsts) - 1

    @property
    def tokens(self) -> int:
        return int(self.sizes.sum())

    def labels(self, packs: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where in the documents' tokens the labels of some packs stand, in their order: int64 (labels,)."""
        places = [np.empty(0, np.int64)]
        for p in packs:
            for piece in range(self.firsts[p], self.firsts[p + 1]):
                start, end = self.starts[piece] + 1, self.starts[piece] + self.sizes[piece]
                places.append(start + np.flatnonzero(self.documents.trained[start:end]))
        return np.concatenate(places)

    def efficiency(self, batch_size: int = 1, world_size: int = 1, accumulate: int = 1) -> float:
        """Tokens divided by the positions of the packs.

        Under padding: by the positions of batches, each as wide as its longest row, over about the first 10,000 rows of an
        epoch.
        """
        if self.batching == "packing":
            return self.tokens / (len(self) * self.context_length)
        packs_per_step = batch_size * world_size * accumulate
        tokens = places = 0
        for cursor in range(0, min(len(self), 10_000), packs_per_step):
            # full steps are the same micro-batches on any number of ranks: computed for one rank, which is faster
            for rows in self.micro_batches(self.order(0, 0, cursor, cursor + packs_per_step), batch_size, 0, 1):
                tokens += int(self.lengths[rows].sum())
                places += len(rows) * int(self.lengths[rows].max())
        return tokens / places

    def order(self, seed: int, epoch: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The packs from start to stop in the order of an epoch.

        It does not depend on the batch size or the number of ranks, so all ranks agree, and so does a run that resumes on
        another number of ranks.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        if self.batching == "packing":
            return permuted(np.arange(start, stop), len(self), seed, epoch)
        first = start - start % SORTED_TOGETHER
        parts = [self._by_length(seed, epoch, place) for place in range(first, stop, SORTED_TOGETHER)]
        return np.concatenate(parts)[start - first : stop - first]

    def _by_length(self, seed: int, epoch: int, place: int) -> np.ndarray:
        """The padded documents at SORTED_TOGETHER places from `place` on, in buckets of like length."""
        random = np.random.default_rng((seed, epoch, place))
        places = np.arange(place, min(place + SORTED_TOGETHER, len(self)))
        rows = permuted(places, len(self), seed, epoch)
        # The noise gives a document other neighbours in each epoch. Sorted by length alone, the steps of a small data set
        # would be almost the same in each epoch.
        rows = rows[np.argsort(self.lengths[rows] * random.uniform(1, 1.1, len(rows)), kind="stable")]
        buckets = np.split(rows, range(BUCKET, len(rows), BUCKET))
        random.shuffle(buckets)
        return np.concatenate(buckets)

    def micro_batches(self, packs: np.ndarray, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
        """The micro-batches of one rank for the packs of one step, at most batch_size packs each.

        All ranks get the same number; if the packs cannot be divided evenly, some are smaller or empty. Padded documents
        are distributed by length: there is little padding, and ranks have about the same work.
        """
        if self.batching == "padding":
            packs = packs[np.argsort(self.lengths[packs], kind="stable")]
        rounds = -(-len(packs) // (batch_size * world_size))
        return np.array_split(packs, rounds * world_size)[rank::world_size]


@dataclass(frozen=True)
class Part:
    """Some documents, and what to do with those that are longer than the context."""

    rows: np.ndarray
    """int64 (n,): numbers of documents; one may come more than once"""
    too_long: TooLong
    """split: into pieces that overlap by one token; a piece's first is not predicted, so each token is predicted once"""


def pack(documents: Documents, context_length: int, seed: int, parts: Sequence[Part] = ()) -> Packed:
    """Best fit, longest first: each piece goes whole into the fullest pack that still has room for it.

    parts: which documents; by default all, and those longer than the context are dropped. Documents that are neighbours in
    the file, perhaps of one source, come into different packs. Raises UserError if nothing is left to train on.
    """
    starts, sizes, long = _pieces(documents, context_length, parts or [Part(np.arange(documents.rows), "drop")])
    mixed = permuted(np.arange(len(sizes)), len(sizes), seed)
    orders, counts = [], [np.zeros(1, np.int64)]
    for some in np.array_split(mixed, -(-len(mixed) // PACKED_TOGETHER)):
        packs = _best_fit(sizes[some].sum(1), context_length)
        orders.append(some[np.concatenate([np.sort(p) for p in packs])])
        counts.append(np.array([len(p) for p in packs]))
    order, firsts = np.concatenate(orders), np.cumsum(np.concatenate(counts))
    return _packed("packing", context_length, documents, starts[order], sizes[order], firsts, long)


def pad(documents: Documents, context_length: int, parts: Sequence[Part] = ()) -> Packed:
    """Each piece alone in a pack. parts as for `pack`, but by default long documents are truncated.

    Raises UserError if nothing is left to train on.
    """
    starts, sizes, long = _pieces(documents, context_length, parts or [Part(np.arange(documents.rows), "truncate")])
    return _packed("padding", context_length, documents, starts, sizes, np.arange(len(starts) + 1), long)


def _packed(batching, context_length: int, documents: Documents, starts, sizes, firsts, long: dict[str, int]) -> Packed:
    """starts, sizes: (pieces, documents a row); firsts: into these"""
    starts, sizes, firsts = starts.ravel(), sizes.ravel(), firsts * documents.per_row
    digest = hashlib.blake2b(f"{batching} {documents.fingerprint}".encode(), digest_size=16)
    for array in (starts, sizes, firsts):
        digest.update(np.ascontiguousarray(array).data)
    lengths = np.add.reduceat(sizes, firsts[:-1])
    return Packed(batching, context_length, documents, starts, sizes, firsts, lengths, long, digest.hexdigest())


def _pieces(
    documents: Documents, context_length: int, parts: Sequence[Part]
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Where the pieces start in the documents' tokens and how many they have, and Packed.long.

    Both are int64 (pieces, documents a row): what stands in a row stays together. A pair that is truncated loses the end of
    the longer one, down to half of the context; then of both.
    """
    together = documents.per_row
    found, rows = [], 0
    long = {"dropped": 0, "truncated": 0, "split": 0, "untrained": 0}
    shortest = None
    for part in parts:
        numbers = part.rows[:, None] * together + np.arange(together)
        starts = documents.offsets[numbers]
        sizes = documents.offsets[numbers + 1] - starts
        whole = sizes.sum(1)
        cut = whole > context_length
        rows += len(sizes)
        if len(sizes):
            shortest = min(int(whole.min()), shortest or int(whole.min()))
        long[{"drop": "dropped", "truncate": "truncated", "split": "split"}[part.too_long]] += int(cut.sum())
        found.append(np.stack((starts[~cut], sizes[~cut])))
        if part.too_long == "drop" or not cut.any():
            continue
        starts, sizes = starts[cut], sizes[cut]
        if part.too_long == "truncate":
            sizes = np.minimum(sizes, np.maximum(context_length // together, context_length - sizes.min(1))[:, None])
        else:
            assert together == 1, "a pair has no pieces"
            starts, sizes = starts[:, 0], sizes[:, 0]
            pieces = -(-(sizes - 1) // (context_length - 1))  # each but the first token is predicted once
            number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            ends = np.repeat(starts + sizes, pieces)
            starts = (np.repeat(starts, pieces) + number * (context_length - 1))[:, None]
            sizes = np.minimum(ends[:, None] - starts, context_length)
        spans = zip(starts.ravel().tolist(), (starts + sizes).ravel().tolist(), strict=True)
        pieces_trained = np.array([documents.trained[start + 1 : end].any() for start, end in spans])
        trained = pieces_trained.reshape(-1, together).all(1)
        long["untrained"] += int((~trained).sum())
        found.append(np.stack((starts[trained], sizes[trained])))
    starts, sizes = np.concatenate(found, axis=1)
    if len(starts) == 0:
        if long["dropped"] == rows:
            problem = (
                f"all {rows} rows are longer than --data.context-length {context_length} (the shortest has {shortest} "
            )
            problem += "tokens)"
        else:
            problem = f"no row has a token to train among its first --data.context-length {context_length}"
        raise UserError(f"{problem}: raise it")
    return starts, sizes, long


def _best_fit(sizes: np.ndarray, context_length: int) -> list[list[int]]:
    """Packs of indices into sizes (n,), none of which is above context_length."""
    packs: list[list[int]] = []
    context_length = min(context_length, int(sizes.sum()))  # more room than that no pack needs, and it costs memory
    with_room: list[list[int]] = [[] for _ in range(context_length + 1)]  # packs, by the room they have left
    rooms = 0  # the set of r for which with_room[r] is not empty, as the bits of an integer
    by_size = np.argsort(-sizes, kind="stable")
    for piece, size in zip(by_size.tolist(), sizes[by_size].tolist(), strict=True):
        wide_enough = rooms >> size
        if wide_enough:
            room = size + (wide_enough & -wide_enough).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = context_length, len(packs)
            packs.append([])
        packs[chosen].append(piece)
        with_room[room - size].append(chosen)
        rooms |= 1 << (room - size)
    return packs
