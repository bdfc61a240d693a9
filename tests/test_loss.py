"""The fused loss against cross entropy of whole logits in float64."""

import pytest
import torch
import torch.nn.functional as F

from minillama import loss as loss_module
from minillama.loss import linear_cross_entropy


def batch(seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(2, 37, 16), torch.randn(50, 16)
    labels = torch.randint(0, 50, (2, 37)).masked_fill(torch.rand(2, 37) < 0.4, -100)
    return hidden, weight, labels


@pytest.mark.parametrize("rows_a_chunk", [1, 7, 1000])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_loss_and_gradients(monkeypatch, rows_a_chunk, frozen_head):
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", {"cpu": rows_a_chunk})
    monkeypatch.setattr(loss_module, "SLICE_BYTES", {"cpu": 3 * 50 * 4})  # 3 rows
    hidden, weight, labels = batch()
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.cross_entropy((exact_hidden @ exact_weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    (expected * 0.37).backward()
    hidden.requires_grad_()
    weight.requires_grad_(not frozen_head)
    loss = linear_cross_entropy(hidden, weight, labels)
    (loss * 0.37).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-6)
    if frozen_head:
        assert weight.grad is None
    else:
        torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows_a_chunk", [7, 1000])
def test_a_low_rank_part_of_the_head(monkeypatch, rows_a_chunk):
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", {"cpu": rows_a_chunk})
    monkeypatch.setattr(loss_module, "SLICE_BYTES", {"cpu": 3 * 50 * 4})  # 3 rows
    hidden, weight, labels = batch()
    low, up = torch.randn(2, 37, 3, requires_grad=True), torch.randn(50, 3, requires_grad=True)
    hidden.requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, low, up)]
    logits = exact[0] @ weight.double().T + exact[1] @ exact[2].T
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (expected * 0.37).backward()
    loss = linear_cross_entropy(hidden, weight, labels, low, up)
    (loss * 0.37).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in zip((hidden, low, up), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_low_rank_part_in_fp16_does_not_overflow_before_it_is_divided():
    x, weight = torch.zeros(1, 4096, 2, dtype=torch.float16), torch.zeros(8, 2, dtype=torch.float16)
    low, up = torch.full((1, 4096, 1), 20.0).half(), torch.zeros(8, 1).half().requires_grad_()
    (linear_cross_entropy(x, weight, torch.zeros(1, 4096, dtype=torch.int64), low, up) / 4096).backward()
    torch.testing.assert_close(up.grad.flatten().float(), torch.tensor([-17.5] + [2.5] * 7), rtol=1e-2, atol=0)


def test_no_label_is_zero_with_a_graph():
    hidden, weight, labels = batch()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_bf16_sums_in_fp32():
    hidden, weight, labels = batch()
    loss = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).double().flatten(0, 1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(logits, labels.flatten(), reduction="sum"), rtol=1e-5, atol=0
    )


def test_a_large_sum_over_rows_does_not_overflow_fp16():
    """65,536 rows of |error * x| near 2 add up to more than fp16 holds before the mean is taken."""
    x = torch.full((1, 2**16, 2), 2.0, dtype=torch.float16)
    weight = torch.zeros(8, 2, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, 2**16, dtype=torch.int64)
    (linear_cross_entropy(x, weight, labels) / 2**16).backward()
    expected = torch.tensor([[-1.75] * 2] + [[0.25] * 2] * 7)
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1e-2, atol=0)
