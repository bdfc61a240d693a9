"""Attention against the softmax written out in float64."""

import pytest
import torch
from conftest import random_model
from torch.library import opcheck

from minillama.attention import BACKENDS, document_lengths, document_mask

ROWS = [[[30], [30]], [[5, 1, 24], [29, 1]], [[10, 10, 10], [3, 27]]]


def naive(q, k, v, ids):
    heads, kv_heads, T = q.shape[2], k.shape[2], q.shape[1]
    k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    visible = torch.ones(T, T, dtype=torch.bool).tril() & (ids[:, :, None] == ids[:, None, :])
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1), v)


def document_ids(rows):
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def outputs_and_gradients(name, rows, heads, kv_heads, width, dtype, device="cpu"):
    """Pairs of a backend's output and gradients of q, k, v with those of exact arithmetic."""
    torch.manual_seed(0)
    ids = document_ids(rows)
    shape = (*ids.shape, 1, width)
    q, k, v = (torch.randn(shape).repeat(1, 1, h, 1).to(dtype) for h in (heads, kv_heads, kv_heads))
    q, k, v = (torch.randn_like(x.float()).to(dtype) for x in (q, k, v))
    ours = [x.to(device).requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, expected = BACKENDS[name](document_lengths(ids), torch.device(device)).attend(*ours), naive(*exact, ids)
    assert out.shape == q.shape and out.dtype == dtype
    grad = torch.randn_like(q)
    gradients = zip(
        torch.autograd.grad(out, ours, grad.to(device)),
        torch.autograd.grad(expected, exact, grad.double()),
        strict=True,
    )
    return [(a.detach().cpu().double(), b.detach()) for a, b in ((out, expected), *gradients)]


@pytest.mark.parametrize("name", ["sdpa", "flash", "math"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", ROWS)
def test_outputs_and_gradients(name, kv_heads, rows):
    for ours, exact in outputs_and_gradients(name, rows, 4, kv_heads, 8, torch.float32):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


LONG = [[[300, 1, 150, 61], [128, 129, 255]]]


@pytest.mark.parametrize("kv_heads, width", [(1, 64), (3, 64), (1, 128)])
def test_math_of_many_blocks_in_bf16_is_at_least_as_exact_as_flash(kv_heads, width):
    def errors(name):
        pairs = outputs_and_gradients(name, LONG[0], 3, kv_heads, width, torch.bfloat16)
        return [((a - b).norm() / b.norm()).item() for a, b in pairs]

    for ours, flash in zip(errors("math"), errors("flash"), strict=True):
        assert ours < min(1.05 * flash, 4e-3)


def test_math_may_split_heads(monkeypatch):
    monkeypatch.setattr("minillama.blockwise.SCORES", 128 * 128 * 2)
    for ours, exact in outputs_and_gradients("math", LONG[0], 6, 3, 16, torch.float32):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_math_is_an_operator_that_pytorch_can_check():
    q, k, v = (torch.randn(10, h, 8, requires_grad=True) for h in (4, 2, 2))
    bounds = torch.tensor([0, 3, 10])
    opcheck(torch.ops.minillama.blockwise_attention.default, (q, k, v, bounds))
    inputs = (torch.randn(10, 4, 8), *(x.detach() for x in (q, k, v)), bounds)
    opcheck(torch.ops.minillama.blockwise_attention_backward.default, inputs)


def test_math_has_no_second_derivative_and_says_so():
    q, k, v = (torch.randn(10, h, 8, requires_grad=True) for h in (4, 2, 2))
    out = torch.ops.minillama.blockwise_attention(q, k, v, torch.tensor([0, 3, 10]))
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="blockwise_attention_backward"):
        first.sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize(
    "name, dtype",
    [(n, torch.bfloat16) for n in BACKENDS] + [(n, torch.float32) for n in ("sdpa", "math", "flex")],
)
def test_on_cuda(name, dtype, kv_heads):
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    for rows in [*ROWS, *LONG]:
        for ours, exact in outputs_and_gradients(name, rows, 3, kv_heads, 64, dtype, "cuda"):
            assert (ours - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("lengths", [[128], [1] * 300, [300, 1, 150, 61], [128, 128, 256], [1000], [5, 400, 7, 129]])
def test_the_mask_for_flex_is_the_documents(lengths):
    from torch.nn.attention.flex_attention import create_block_mask

    mask, tokens = document_mask(lengths, torch.device("cpu")), sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = create_block_mask(
        lambda b, h, q, k: (document[q] == document[k]) & (q >= k), None, None, tokens, tokens, device="cpu"
    )
    assert mask.shape == expected.shape == (1, 1, tokens, tokens)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, ours, theirs = (
            getattr(m, f"{name}_{what}")[0, 0]
            for m, what in ((mask, "num_blocks"), (mask, "indices"), (expected, "indices"))
        )
        assert all(set(a[:n].tolist()) == set(b[:n].tolist()) for n, a, b in zip(counts, ours, theirs, strict=True))


def test_documents_end_with_their_row_even_if_ids_go_on():
    assert document_lengths(torch.tensor([[0, 0, 1], [1, 1, 0], [0, -1, -1]])) == [2, 1, 2, 1, 1, 2]


def test_a_model_computes_the_same_with_each():
    model, ids = random_model(), document_ids(ROWS[1])
    tokens = torch.randint(0, 512, ids.shape)
    for documents in (None, ids):
        results = []
        for name in ("sdpa", "flash", "math"):
            model.attention = BACKENDS[name]
            results.append(model(tokens, document_ids=documents))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
