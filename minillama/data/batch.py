"""Packs to tensors: the micro-batch that a step computes."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minillama.data.packing import Packed
from minillama.errors import UserError
from minillama.model.attention import document_lengths
from minillama.model.loss import IGNORE, Targets, find_targets
from minillama.model.transfer import to_device


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank. What the host needs stays on the host: reading it from a device would wait."""

    tokens: Tensor
    """(B, T) int64, on the device"""
    positions: Tensor
    """(B, T) int64, on the device: restarts at 0 with each document"""
    labels: Tensor
    """(B, T) int64, on the host: the next token where that is trained, -100 elsewhere"""
    document_ids: Tensor
    """(B, T) int64, on the host: which document of its row a token is of; padding is -1"""
    count: int
    """Tokens, without padding"""
    trained: int
    """Labels"""
    squares: int
    """Sum of the squares of the documents' lengths, to which the cost of attention is proportional"""
    reference: Tensor | None = None
    """(N,) fp32, on the device: what Packed.reference holds of the labels, row after row"""

    @cached_property
    def lengths(self) -> list[int]:
        """Lengths of the documents and the runs of padding, row after row"""
        return document_lengths(self.document_ids)

    @cached_property
    def targets(self) -> Targets:
        """The labels, on the device"""
        return find_targets(self.labels, self.tokens.device)

    @cached_property
    def labels_of_documents(self) -> Tensor:
        """How many labels each document has, (documents,) int64 on the device"""
        starts = np.cumsum([0, *self.lengths[:-1]])
        counts = np.add.reduceat(self.labels.flatten().numpy() != IGNORE, starts, dtype=np.int64)
        known = self.document_ids.flatten().numpy()[starts] >= 0
        return to_device(torch.from_numpy(counts[known]), self.tokens.device)


def collate(packed: Packed, packs: np.ndarray | list[int], pad_id: int, device: torch.device | str) -> Batch:
    """Packs as the rows of a batch, padded to the longest. No packs: a batch of one padding token and no label."""
    documents = packed.documents
    spans = [range(packed.firsts[p], packed.firsts[p + 1]) for p in packs]
    if packed.collator and spans:
        return _collated(packed, [span[0] for span in spans], device)
    shape = (max(1, len(packs)), max((int(packed.lengths[p]) for p in packs), default=1))
    tokens = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    document_ids = np.full(shape, -1, np.int64)
    positions = np.zeros(shape, np.int64)
    squares = 0
    for r, span in enumerate(spans):
        start = 0
        for number, piece in enumerate(span):
            begin, size = int(packed.starts[piece]), int(packed.sizes[piece])
            ids, trained = documents.tokens[begin : begin + size], documents.trained[begin : begin + size]
            end = start + size
            tokens[r, start:end] = ids
            # the shift: a document's last token predicts nothing, and its first is predicted by nothing
            labels[r, start : end - 1] = np.where(trained[1:], ids[1:], IGNORE)
            document_ids[r, start:end] = number
            positions[r, start:end] = np.arange(size)
            squares += size**2
            start = end
    documents.release()
    reference = None if packed.reference is None else packed.reference[packed.labels(packs)]
    return _batch(tokens, positions, labels, document_ids, squares, device, reference)


def _collated(packed: Packed, pieces: list[int], device: torch.device | str) -> Batch:
    """The batch that the user's collator makes of these documents, labels shifted. Raises UserError if it is invalid."""
    rows = []
    for piece in pieces:
        span = slice(packed.starts[piece], packed.starts[piece] + packed.sizes[piece])
        ids, trained = packed.documents.tokens[span], packed.documents.trained[span]
        labels = np.where(trained, ids, IGNORE).tolist()
        rows.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels})
    made = packed.collator(rows)  # type: ignore[misc]
    missing = [name for name in ("input_ids", "labels") if name not in made]
    if missing or made["labels"].shape != made["input_ids"].shape:
        raise UserError("the collator must return tensors input_ids and labels of one shape (batch, tokens)")
    tokens, labels = (made[name].numpy().astype(np.int64) for name in ("input_ids", "labels"))
    known = made["attention_mask"].numpy() > 0 if "attention_mask" in made else np.ones(tokens.shape, np.bool_)
    shifted = np.full(tokens.shape, IGNORE, np.int64)
    shifted[:, :-1] = np.where(known[:, 1:] & known[:, :-1], labels[:, 1:], IGNORE)
    positions = np.maximum(known.cumsum(1) - 1, 0)
    squares = int((known.sum(1) ** 2).sum())
    return _batch(tokens, positions, shifted, np.where(known, 0, -1), squares, device)


def _batch(
    tokens,
    positions,
    labels,
    document_ids,
    squares: int,
    device: torch.device | str,
    reference: np.ndarray | None = None,
) -> Batch:
    batch = Batch(
        to_device(torch.from_numpy(tokens), device),
        to_device(torch.from_numpy(positions), device),
        torch.from_numpy(labels),
        torch.from_numpy(document_ids),
        count=int((document_ids >= 0).sum()),
        trained=int((labels != IGNORE).sum()),
        squares=squares,
        reference=None if reference is None else to_device(torch.from_numpy(reference), device),
    )
    _ = batch.lengths, batch.targets  # here, in the thread that makes batches ahead, not in the step
    return batch
