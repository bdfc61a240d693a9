"""Packing, order and batches: nothing lost, nothing twice, labels where they belong."""

import numpy as np
import pytest
import torch

from minillama.datasets import Documents
from minillama.errors import UserError
from minillama.packing import collate, epoch_order, pack, split_window
from minillama.train import TrainConfig, count_steps, steps


def documents_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = random.integers(0, 500, offsets[-1]).astype(np.int32)
    return Documents(tokens, random.random(offsets[-1]) < 0.5, offsets)


@pytest.mark.parametrize("seed", range(5))
def test_every_document_that_fits_is_in_one_pack(seed):
    random = np.random.default_rng(seed)
    context = int(random.integers(5, 200))
    lengths = random.integers(1, context * 5 // 4, 300)
    packed = pack(documents_of(lengths), context, seed)
    held = sorted(i for p in packed.packs for i in p)
    assert held == np.flatnonzero(lengths <= context).tolist()
    assert packed.dropped == (lengths > context).sum()
    assert all(0 < lengths[p].sum() <= context for p in packed.packs)
    assert packed.tokens == lengths[lengths <= context].sum()
    # best fit leaves no two packs that would go into one
    fill = sorted(lengths[p].sum() for p in packed.packs)
    assert len(fill) == 1 or fill[0] + fill[1] > context


def test_packing_is_tight_on_short_documents():
    lengths = np.random.default_rng(0).integers(30, 400, 2000)
    assert pack(documents_of(lengths), 4096, 0).efficiency > 0.985


def test_all_rows_too_long():
    with pytest.raises(
        UserError, match=r"all 2 rows are longer than --data.context-length 8 \(the shortest has 9 tokens\)"
    ):
        pack(documents_of([9, 12]), 8, 0)


def test_batch_of_packs_by_hand():
    tokens = np.array([10, 11, 12, 20, 21, 30, 31, 32, 33], np.int32)
    trained = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1], bool)
    packed = pack(Documents(tokens, trained, np.array([0, 3, 5, 9])), 5, 0)
    batch = collate(packed, [next(i for i, p in enumerate(packed.packs) if len(p) == 2)], 99, "cpu")
    row = [10, 11, 12, 20, 21] if batch.tokens[0, 0] == 10 else [20, 21, 10, 11, 12]
    assert batch.tokens.tolist() == [row]
    # 20 is trained, but nothing in its document stands before it
    expected = {10: -100, 11: 12, 12: -100, 20: 21, 21: -100}
    assert batch.labels.tolist() == [[expected[t] for t in row]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1] if row[0] == 10 else [0, 1, 0, 1, 2]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1] if row[0] == 10 else [0, 0, 1, 1, 1]]
    assert (batch.count, batch.trained, batch.squares) == (5, 2, 13)

    both = collate(packed, [0, 1], 99, "cpu")
    assert both.tokens.shape == (2, 5) and both.count == 9
    padding = both.document_ids == -1
    assert padding.sum() == 1 and (both.tokens[padding] == 99).all() and (both.labels[padding] == -100).all()


def test_no_packs_is_a_batch_without_labels():
    batch = collate(pack(documents_of([3]), 4, 0), [], 7, "cpu")
    assert batch.tokens.tolist() == [[7]] and batch.labels.tolist() == [[-100]]
    assert (batch.count, batch.trained, batch.squares) == (0, 0, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("packs", [1, 7, 24, 50])
def test_an_epoch_takes_every_pack_once_and_no_split_changes_a_step(world_size, packs):
    config = TrainConfig(epochs=2, batch_size=2, accumulate=24 // world_size // 2 or 1)
    runs = [list(steps(packs, config, 5, rank, world_size)) for rank in range(world_size)]
    assert {len(run) for run in runs} == {count_steps(packs, config, world_size)}
    for epoch in (0, 1):
        taken = [i for run in runs for s in run if s.epoch == epoch for m in s.micro_batches for i in m.tolist()]
        assert sorted(taken) == list(range(packs))
    window = config.batch_size * config.accumulate * world_size
    order = epoch_order(packs, 5, 0)
    for per_rank in zip(*runs, strict=True):
        assert len({len(s.micro_batches) for s in per_rank}) == 1  # or a rank would wait for the others forever
        assert all(len(m) <= config.batch_size for s in per_rank for m in s.micro_batches)
        s = per_rank[0]
        if s.epoch == 0:
            start = s.number * window
            assert sorted(i for s in per_rank for m in s.micro_batches for i in m) == sorted(
                order[start : start + window]
            )
    assert [s.ends_epoch for s in runs[0]].count(True) == 2 and runs[0][-1].progress == 2


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(epoch_order(20, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(epoch_order(20, 1, 1)) == orders[1]


def test_max_steps_stops_in_mid_epoch():
    config = TrainConfig(epochs=3, batch_size=2, max_steps=4)
    assert [s.number for s in steps(5, config, 0, 0, 1)] == [0, 1, 2, 3] and count_steps(5, config, 1) == 4


def test_short_windows_are_shared_evenly():
    parts = [[len(m) for m in split_window(np.arange(5), 4, rank, 2)] for rank in range(2)]
    assert parts == [[3], [2]]
    assert [[len(m) for m in split_window(np.arange(1), 4, rank, 2)] for rank in range(2)] == [[1], [0]]


def test_labels_shift_within_each_document():
    packed = pack(documents_of([5, 9, 2, 1, 7]), 12, 3)
    batch = collate(packed, list(range(len(packed.packs))), 0, "cpu")
    total = 0
    for i in range(5):
        ids, trained = packed.documents[i]
        total += int(trained[1:].sum())
    assert batch.trained == total
    for r, row in enumerate(packed.packs):
        for number, document in enumerate(row):
            ids, trained = (torch.from_numpy(x.copy()) for x in packed.documents[document])
            here = batch.document_ids[r] == number
            assert batch.tokens[r, here].tolist() == ids.tolist()
            assert batch.positions[r, here].tolist() == list(range(len(ids)))
            shifted = torch.cat((torch.where(trained[1:], ids[1:], -100), torch.tensor([-100])))
            assert batch.labels[r, here].tolist() == shifted.tolist()
