"""Attention against the softmax written out in float64."""

import pytest
import torch

from minillama.attention import attend, document_lengths


def naive(q, k, v, ids):
    heads, kv_heads, T = q.shape[2], k.shape[2], q.shape[1]
    k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    visible = torch.ones(T, T, dtype=torch.bool).tril() & (ids[:, :, None] == ids[:, None, :])
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", [[[30], [30]], [[5, 1, 24], [29, 1]], [[10, 10, 10], [3, 27]]])
def test_outputs_and_gradients(kv_heads, rows):
    torch.manual_seed(0)
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    q, k, v = (torch.randn(2, 30, h, 8, requires_grad=True) for h in (4, kv_heads, kv_heads))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, expected = attend(q, k, v, document_lengths(ids)), naive(*exact, ids)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_documents_end_with_their_row_even_if_ids_go_on():
    assert document_lengths(torch.tensor([[0, 0, 1], [1, 1, 0], [0, -1, -1]])) == [2, 1, 2, 1, 1, 2]
