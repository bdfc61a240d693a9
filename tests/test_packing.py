"""Packing, padding, order and batches: nothing lost, nothing twice, labels where they belong."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model

from minillama.data.batch import collate
from minillama.data.documents import Documents
from minillama.data.packing import Part, pack, pad
from minillama.errors import UserError
from minillama.model.attention import document_lengths
from minillama.training.plan import TrainConfig, count_steps, steps
from minillama.training.step import batch_loss


def documents_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = random.integers(0, 500, offsets[-1]).astype(np.int32)
    return Documents(tokens, random.random(offsets[-1]) < 0.5, offsets)


def packs_of(packed):
    """The documents of each pack, by number: for those that are whole."""
    documents = np.searchsorted(packed.documents.offsets, packed.starts, "right") - 1
    return [documents[a:b].tolist() for a, b in zip(packed.firsts[:-1], packed.firsts[1:], strict=True)]


def pieces_of(packed):
    """The tokens of each pack's pieces."""
    spans = [packed.documents.tokens[a : a + n].tolist() for a, n in zip(packed.starts, packed.sizes, strict=True)]
    return [spans[a:b] for a, b in zip(packed.firsts[:-1], packed.firsts[1:], strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_every_document_that_fits_is_in_one_pack(seed):
    random = np.random.default_rng(seed)
    context = int(random.integers(5, 200))
    lengths = random.integers(1, context * 5 // 4, 300)
    packed = pack(documents_of(lengths), context, seed)
    held = sorted(i for p in packs_of(packed) for i in p)
    assert held == np.flatnonzero(lengths <= context).tolist()
    assert packed.long == {"dropped": (lengths > context).sum(), "truncated": 0, "split": 0, "untrained": 0}
    assert all(0 < lengths[p].sum() <= context for p in packs_of(packed))
    assert packed.tokens == lengths[lengths <= context].sum()
    # best fit leaves no two packs that would go into one
    fill = sorted(lengths[p].sum() for p in packs_of(packed))
    assert len(fill) == 1 or fill[0] + fill[1] > context


def test_packing_is_tight_on_short_documents():
    lengths = np.random.default_rng(0).integers(30, 400, 2000)
    assert pack(documents_of(lengths), 4096, 0).efficiency() > 0.985


def test_all_rows_too_long():
    with pytest.raises(
        UserError, match=r"all 2 rows are longer than --data.context-length 8 \(the shortest has 9 tokens\)"
    ):
        pack(documents_of([9, 12]), 8, 0)


def test_batch_of_packs_by_hand():
    tokens = np.array([10, 11, 12, 20, 21, 30, 31, 32, 33], np.int32)
    trained = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1], bool)
    packed = pack(Documents(tokens, trained, np.array([0, 3, 5, 9])), 5, 0)
    batch = collate(packed, [next(i for i, p in enumerate(packs_of(packed)) if len(p) == 2)], 99, "cpu")
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
    for made in (batch, both):  # ready for the step
        assert {"lengths", "targets"} <= vars(made).keys()
        assert made.lengths == document_lengths(made.document_ids)
        assert made.targets.rows.tolist() == (made.labels.flatten() != -100).nonzero().flatten().tolist()
        assert made.targets.ids.tolist() == [label for row in made.labels.tolist() for label in row if label != -100]
    assert both.lengths in ([3, 2, 4, 1], [2, 3, 4, 1], [4, 1, 3, 2], [4, 1, 2, 3])
    fewer = replace(both, labels=torch.full_like(both.labels, -100), document_ids=torch.zeros_like(both.document_ids))
    assert fewer.lengths == [5, 5] and fewer.targets.ids.tolist() == []  # found again


def test_no_packs_is_a_batch_without_labels():
    batch = collate(pack(documents_of([3]), 4, 0), [], 7, "cpu")
    assert batch.tokens.tolist() == [[7]] and batch.labels.tolist() == [[-100]]
    assert (batch.count, batch.trained, batch.squares) == (0, 0, 0)


def of_packs(batching, count):
    """`count` packs; those of padding have lengths of their own."""
    lengths = np.random.default_rng(count).integers(1, 9, count) if batching == "padding" else [8] * count
    packed = pad(documents_of(lengths), 8) if batching == "padding" else pack(documents_of(lengths), 8, 0)
    assert len(packed) == count
    return packed


@pytest.mark.parametrize("batching", ["packing", "padding"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [1, 7, 24, 50])
def test_an_epoch_takes_every_pack_once_and_no_split_changes_a_step(batching, count, world_size):
    packed = of_packs(batching, count)
    config = TrainConfig(epochs=2, batch_size=2, accumulate=24 // world_size // 2 or 1)
    start = config.begin(world_size)
    runs = [list(steps(packed, config, 5, rank, world_size, start)) for rank in range(world_size)]
    assert {len(run) for run in runs} == {count_steps(packed, config, start.packs_per_step)}
    for epoch in (0, 1):
        taken = [i for run in runs for s in run if s.epoch == epoch for m in s.micro_batches for i in m.tolist()]
        assert sorted(taken) == list(range(count))
    window = config.batch_size * config.accumulate * world_size
    for per_rank in zip(*runs, strict=True):
        assert len({len(s.micro_batches) for s in per_rank}) == 1  # or a rank would wait for the others forever
        assert all(len(m) <= config.batch_size for s in per_rank for m in s.micro_batches)
        s = per_rank[0]
        start = (s.number - s.epoch * -(-count // window)) * window
        taken = sorted(i for s in per_rank for m in s.micro_batches for i in m)
        assert taken == sorted(packed.order(5, s.epoch)[start : start + window])
    assert [s.ends_epoch for s in runs[0]].count(True) == 2 and runs[0][-1].progress == 2


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_uneven_windows_are_shared_evenly(world_size, batch_size):
    packed = of_packs("padding", 50)
    for size in (1, 5, 31, 50):
        window = packed.order(1, 0)[:size]
        ranks = [packed.micro_batches(window, batch_size, rank, world_size) for rank in range(world_size)]
        rounds = list(zip(*ranks, strict=True))
        assert sorted(i for parts in rounds for m in parts for i in m) == sorted(window)
        sizes = [len(m) for parts in rounds for m in parts]
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
        # round after round, and within one rank after rank, the documents get longer
        dealt = packed.lengths[np.concatenate([m for parts in rounds for m in parts])]
        assert (np.diff(dealt) >= 0).all()
    packs = of_packs("packing", 5)  # these keep their order
    assert [m.tolist() for rank in (0, 1) for m in packs.micro_batches(np.arange(5)[::-1], 4, rank, 2)] == [
        [4, 3, 2],
        [1, 0],
    ]


@pytest.mark.parametrize("batching", ["packing", "padding"])
def test_epochs_and_seeds_have_orders_of_their_own(batching):
    for count in (1, 63, 64, 65, 300):
        packed = of_packs(batching, count)
        orders = [packed.order(seed, epoch).tolist() for seed in (1, 2) for epoch in (0, 1)]
        assert all(sorted(order) == list(range(count)) for order in orders)
        assert count == 1 or len(set(map(tuple, orders))) == 4
        assert packed.order(1, 1).tolist() == orders[1]


@pytest.mark.parametrize("batching", ["packing", "padding"])
def test_any_part_of_an_order_can_be_asked_for(batching):
    lengths = np.random.default_rng(0).integers(1, 9, 10_000) if batching == "padding" else [8] * 10_000
    packed = pad(documents_of(lengths), 8) if batching == "padding" else pack(documents_of(lengths), 8, 0)
    whole = packed.order(3, 2)
    assert sorted(whole) == list(range(10_000))
    for start, stop in ((0, 1), (4000, 4200), (4096, 8192), (63, 9999), (8191, 8193), (9999, 20_000), (10_000, 10_001)):
        assert packed.order(3, 2, start, stop).tolist() == whole[start:stop].tolist()


def test_documents_of_one_length_keep_no_order():
    order = pad(documents_of([5] * 200), 8).order(0, 0)
    assert np.abs(np.diff(order)).mean() > 200 / 4  # 1 in the file's order, 200 / 3 in a random one


def test_max_steps_stops_in_mid_epoch():
    config, packed = TrainConfig(epochs=3, batch_size=2, max_steps=4), of_packs("packing", 5)
    assert [s.number for s in steps(packed, config, 0, 0, 1, config.begin(1))] == [0, 1, 2, 3]
    assert count_steps(packed, config, 2) == 4


@pytest.mark.parametrize("world_size, accumulate", [(1, 1), (8, 1), (1, 8), (8, 4)])
def test_length_grouping_pads_little(world_size, accumulate):
    lengths = np.clip(np.random.default_rng(1).lognormal(5.5, 0.6, 6000), 8, 2048).astype(int)
    packed, batch_size = pad(documents_of(lengths), 2048), 4

    def padding(batches):
        return 1 - lengths.sum() / sum(len(b) * lengths[b].max(initial=0) for b in batches)

    window = batch_size * world_size * accumulate
    windows = np.split(packed.order(3, 1), range(window, 6000, window))
    grouped = padding(
        b for w in windows for rank in range(world_size) for b in packed.micro_batches(w, batch_size, rank, world_size)
    )
    # found: 0.029 where a step is one batch, at most 0.006 elsewhere; 0.41 in a random order
    assert grouped < (0.04 if world_size * accumulate == 1 else 0.01)
    assert padding(np.split(np.random.default_rng(0).permutation(6000), 1500)) > 0.38
    assert 1 - packed.efficiency(batch_size, world_size, accumulate) == pytest.approx(grouped, abs=0.005)


def test_a_padded_epoch_mixes_long_and_short():
    packed = pad(documents_of(np.random.default_rng(0).integers(30, 400, 6000)), 400)
    halves = np.split(packed.lengths[packed.order(0, 0)], 2)
    assert abs(halves[0].mean() - halves[1].mean()) < 60  # sorted: 185


def test_epochs_of_a_small_padded_set_have_steps_of_their_own():
    packed = pad(documents_of(np.random.default_rng(0).integers(30, 400, 1000)), 400)
    step = np.empty((2, 1000), int)
    for epoch in (0, 1):
        step[epoch, packed.order(0, epoch)] = np.arange(1000) // 32
    together = (step[:, :, None] == step[:, None]).sum((1, 2)) - 1000  # pairs of documents that share a step
    again = ((step[0][:, None] == step[0]) & (step[1][:, None] == step[1])).sum() - 1000
    assert again < 0.4 * together.min()


def long(dropped=0, truncated=0, split=0, untrained=0):
    return {"dropped": dropped, "truncated": truncated, "split": split, "untrained": untrained}


def test_truncation_by_hand():
    tokens = np.array([10, 11, 12, 13, 20, 30, 31, 32, 33, 34, 40, 41, 42, 43], np.int32)
    trained = np.array([0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1], bool)
    packed = pad(Documents(tokens, trained, np.array([0, 4, 5, 10, 14])), 3)
    # 33 and 34, all that was trained in their document, are cut off: it is left out
    assert packed.long == long(truncated=3, untrained=1) and packed.tokens == 7
    assert sorted(pieces_of(packed)) == [[[10, 11, 12]], [[20]], [[40, 41, 42]]]
    batch = collate(packed, [pieces_of(packed).index([[t, t + 1, t + 2]]) for t in (40, 10)], 99, "cpu")
    assert batch.tokens.tolist() == [[40, 41, 42], [10, 11, 12]]
    assert batch.labels.tolist() == [[-100, 42, -100], [11, 12, -100]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert (batch.count, batch.trained, batch.squares) == (6, 3, 18)


@pytest.mark.parametrize("context", [2, 7, 25])
@pytest.mark.parametrize("batching", ["packing", "padding"])
def test_split_documents_predict_each_token_once(batching, context):
    documents = documents_of(np.random.default_rng(4).integers(1, 60, 100))
    documents.tokens[:] = np.arange(len(documents.tokens))  # so that a token tells where it stood
    parts = [Part(np.arange(60), "split"), Part(np.arange(60, 100), "split")]
    packed = pad(documents, context, parts) if batching == "padding" else pack(documents, context, 5, parts)
    assert packed.long["split"] == (documents.lengths > context).sum() > 0
    assert packed.lengths.max() <= context
    batch = collate(packed, np.arange(len(packed)), 0, "cpu")
    predicted = batch.tokens[batch.labels != -100] + 1
    assert (predicted == batch.labels[batch.labels != -100]).all()
    expected = [
        t
        for i, (_, trained) in enumerate(documents)
        for t in documents.offsets[i] + np.flatnonzero(trained)
        if t > documents.offsets[i]
    ]
    assert sorted(predicted.tolist()) == expected
    whole = [piece for p in pieces_of(packed) for piece in p]
    fitting = np.flatnonzero(documents.lengths <= context)
    assert all(documents[i][0].tolist() in whole for i in fitting)


def test_split_by_hand():
    documents = Documents(np.arange(10, dtype=np.int32), np.arange(10) != 4, np.array([0, 7, 10]))
    packed = pad(documents, 4, [Part(np.array([0, 1]), "split")])
    # 3 is the last of the first piece and the first of the second, which predicts 5 and 6 and, untrained, 4
    assert sorted(pieces_of(packed)) == [[[0, 1, 2, 3]], [[3, 4, 5, 6]], [[7, 8, 9]]]
    assert packed.long == long(split=1)


def test_parts_choose_and_repeat_documents():
    documents = documents_of([5, 6, 7, 8])
    parts = [Part(np.array([2, 2, 0]), "drop"), Part(np.array([3]), "truncate")]
    for packed in (pack(documents, 7, 1, parts), pad(documents, 7, parts)):
        documents.trained[:] = True
        assert sorted(i for p in packs_of(packed) for i in p) == [0, 2, 2, 3]
        assert packed.long == long(truncated=1)
    other = pack(documents, 7, 1, parts[:1])
    assert other.fingerprint != pack(documents, 7, 1, parts).fingerprint == pack(documents, 7, 1, parts).fingerprint
    assert pad(documents, 7, parts[:1]).fingerprint != other.fingerprint


def test_many_documents_are_packed_window_by_window():
    lengths = np.random.default_rng(0).integers(30, 400, 150_000)
    packed = pack(documents_of(lengths), 4096, 0)
    assert packed.efficiency() > 0.999
    assert sorted(i for p in packs_of(packed) for i in p) == list(range(150_000))
    first = np.concatenate(packs_of(packed)[:20])
    assert abs(first.mean() - 75_000) < 10_000  # of all parts of the file


def test_truncation_that_leaves_nothing_to_train():
    documents = Documents(np.arange(9, dtype=np.int32), np.arange(9) == 8, np.array([0, 2, 9]))
    packed = pad(documents, 6)
    assert (packed.long, pieces_of(packed)) == (long(truncated=1, untrained=1), [[[0, 1]]])
    with pytest.raises(UserError, match=r"no row has a token to train among its first --data.context-length 6"):
        pad(documents, 6, [Part(np.array([1]), "truncate")])
    assert pad(documents, 7).long == long()


def loss_and_gradient(model, losses):
    """Those of the sum of the losses, each backward on its own as in a step."""
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return total, flat


@pytest.mark.parametrize("batching, context", [("packing", 40), ("padding", 40), ("padding", 15)])
def test_batches_have_the_loss_and_gradient_of_their_documents_one_by_one(batching, context):
    documents = documents_of(np.random.default_rng(2).integers(1, 40, 12))
    packed = pad(documents, context) if batching == "padding" else pack(documents, context, 0)
    model = random_model(num_hidden_layers=2)

    def one_by_one():
        for ids, trained in documents:
            ids, trained = torch.from_numpy(ids[:context].astype(np.int64)), torch.from_numpy(trained[:context].copy())
            labels = torch.cat((torch.where(trained[1:], ids[1:], -100), torch.tensor([-100])))
            yield model(ids[None], labels=labels[None])

    expected, expected_gradient = loss_and_gradient(model, one_by_one())
    batches = [b for rank in (0, 1) for b in packed.micro_batches(packed.order(0, 0), 3, rank, 2)]
    loss, gradient = loss_and_gradient(model, (batch_loss(model, collate(packed, b, 7, "cpu")) for b in batches))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_batches_without_a_label_have_no_gradient():
    """An empty one, and one of a document without trained tokens."""
    documents = Documents(np.arange(9, dtype=np.int32), np.arange(9) >= 7, np.array([0, 7, 9]))
    packed, model = pad(documents, 9), random_model()
    for rows in ([], [0]):
        batch = collate(packed, rows, 7, "cpu")
        loss, gradient = loss_and_gradient(model, [batch_loss(model, batch)])
        assert (batch.trained, loss, gradient.abs().max().item()) == (0, 0.0, 0.0)


def test_labels_shift_within_each_document():
    packed = pack(documents_of([5, 9, 2, 1, 7]), 12, 3)
    batch = collate(packed, list(range(len(packed))), 0, "cpu")
    total = 0
    for i in range(5):
        ids, trained = packed.documents[i]
        total += int(trained[1:].sum())
    assert batch.trained == total
    for r, row in enumerate(packs_of(packed)):
        for number, document in enumerate(row):
            ids, trained = (torch.from_numpy(x.copy()) for x in packed.documents[document])
            here = batch.document_ids[r] == number
            assert batch.tokens[r, here].tolist() == ids.tolist()
            assert batch.positions[r, here].tolist() == list(range(len(ids)))
            shifted = torch.cat((torch.where(trained[1:], ids[1:], -100), torch.tensor([-100])))
            assert batch.labels[r, here].tolist() == shifted.tolist()


def pairs_of(lengths, seed=0):
    return replace(documents_of(np.ravel(lengths), seed), per_row=2)


def test_a_pair_stays_in_one_pack():
    random = np.random.default_rng(3)
    lengths = random.integers(2, 40, (200, 2))
    packed = pack(pairs_of(lengths), 64, 0)
    held = [i for p in packs_of(packed) for i in p]
    assert all(a % 2 == 0 and b == a + 1 for p in packs_of(packed) for a, b in zip(p[::2], p[1::2], strict=True))
    assert sorted(held[::2]) == (2 * np.flatnonzero(lengths.sum(1) <= 64)).tolist()
    assert packed.long["dropped"] == (lengths.sum(1) > 64).sum() > 0
    assert all(lengths.ravel()[p].sum() <= 64 for p in packs_of(packed))
    assert packs_of(pad(pairs_of(lengths), 80)) == [[2 * i, 2 * i + 1] for i in range(200)]


def test_of_a_pair_that_is_truncated_the_longer_loses_its_end():
    lengths = [[9, 3], [3, 9], [9, 9], [5, 20], [4, 6]]
    documents = pairs_of(lengths)
    documents.trained[:] = True
    packed = pad(documents, 10)
    assert packed.sizes.reshape(-1, 2).tolist() == [[4, 6], [7, 3], [3, 7], [5, 5], [5, 5]]
    assert packed.long["truncated"] == 4
    assert packed.starts.reshape(-1, 2)[1].tolist() == documents.offsets[:2].tolist()
    documents.trained[:] = False
    documents.trained[4:9] = True  # of the first pair's chosen, none of its rejected
    with pytest.raises(UserError, match="no row has a token to train"):
        pad(documents, 10, [Part(np.arange(1), "truncate")])
