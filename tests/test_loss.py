"""The fused loss against cross entropy of whole logits in float64."""

import pytest
import torch
import torch.nn.functional as F

from minillama.model import loss as loss_module
from minillama.model.loss import find_targets, linear_cross_entropy, linear_log_probabilities


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


def test_a_large_sum_within_a_chunk_does_not_overflow_fp16():
    """1024 rows of |error * x| near 88: an overflow here would be there at any loss scale."""
    x = torch.full((1, 2048, 2), 100.0, dtype=torch.float16)
    weight = torch.zeros(8, 2, dtype=torch.float16, requires_grad=True)
    (linear_cross_entropy(x, weight, torch.zeros(1, 2048, dtype=torch.int64)) / 2048).backward()
    expected = torch.tensor([[-87.5] * 2] + [[12.5] * 2] * 7)
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1e-3, atol=0)


def test_fp16_gradients_of_small_activations_keep_their_bits():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256, 16).mul(0.02).half(), torch.randn(40, 16).half().requires_grad_()
    labels = torch.randint(0, 40, (1, 256))
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy((x.double() @ exact.T)[0], labels[0]).backward()
    (linear_cross_entropy(x, weight, labels) / 256 * 2**10).backward()
    assert (weight.grad.double() / 2**10 - exact.grad).norm() / exact.grad.norm() < 1e-3


def test_labels_made_ready_are_the_labels():
    hidden, weight, labels = batch()
    targets = find_targets(labels, "cpu")
    assert torch.equal(labels.flatten()[targets.rows], targets.ids) and (targets.ids >= 0).all()
    assert len(targets.rows) == (labels != -100).sum()
    expected = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden, weight, targets), expected)


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    hidden, weight, labels = batch()
    low, up = torch.randn(2, 37, 3), torch.randn(50, 3)
    for inputs in ((hidden, weight), (hidden, weight, low, up)):
        tensors = [tensor.requires_grad_() for tensor in inputs]
        loss = linear_cross_entropy(*tensors[:2], labels, *tensors[2:])
        with pytest.raises(RuntimeError, match="LinearCrossEntropyBackward has no second derivative"):
            torch.autograd.grad(loss, tensors, create_graph=True)


def test_a_large_sum_over_rows_does_not_overflow_fp16():
    """65,536 rows of |error * x| near 2 add up to more than fp16 holds before the mean is taken."""
    x = torch.full((1, 2**16, 2), 2.0, dtype=torch.float16)
    weight = torch.zeros(8, 2, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, 2**16, dtype=torch.int64)
    (linear_cross_entropy(x, weight, labels) / 2**16).backward()
    expected = torch.tensor([[-1.75] * 2] + [[0.25] * 2] * 7)
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1e-2, atol=0)


def exact_log_probabilities(hidden, weight, labels, low=None, up=None):
    logits = hidden.double() @ weight.double().T
    if low is not None:
        logits = logits + low.double() @ up.double().T
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]


@pytest.mark.parametrize("rows_a_chunk", [7, 1000])
@pytest.mark.parametrize("trained", ["x", "x weight", "weight", "x low up", "x weight low up"])
def test_log_probabilities_with_a_gradient_of_each_row_s_own(monkeypatch, rows_a_chunk, trained):
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", {"cpu": rows_a_chunk})
    monkeypatch.setattr(loss_module, "SLICE_BYTES", {"cpu": 3 * 50 * 4})  # 3 rows
    hidden, weight, labels = batch()
    tensors = {"x": hidden, "weight": weight}
    if "low" in trained:
        tensors |= {"low": torch.randn(2, 37, 3), "up": torch.randn(50, 3)}
    exact = {name: tensor.double().requires_grad_(name in trained) for name, tensor in tensors.items()}
    ours = {name: tensor.requires_grad_(name in trained) for name, tensor in tensors.items()}
    x, w, *low_rank = exact.values()
    expected = exact_log_probabilities(x, w, labels, *low_rank)
    x, w, *low_rank = ours.values()
    log_probabilities = linear_log_probabilities(x, w, labels, *low_rank)
    factors = torch.randn(len(expected), dtype=torch.float64)
    (expected * factors).sum().backward()
    (log_probabilities * factors.float()).sum().backward()
    assert log_probabilities.dtype == torch.float32
    torch.testing.assert_close(log_probabilities.double(), expected, rtol=1e-6, atol=1e-6)
    for name, tensor in ours.items():
        if name in trained.split():
            torch.testing.assert_close(tensor.grad.double(), exact[name].grad, rtol=1e-4, atol=2e-6)
        else:
            assert tensor.grad is None
    torch.testing.assert_close(
        -log_probabilities.sum(), linear_cross_entropy(x, w, labels, *low_rank), rtol=1e-6, atol=0
    )


def test_log_probabilities_of_no_label_have_a_graph():
    hidden, weight, labels = batch()
    for trained in ((hidden,), (hidden, weight)):
        for tensor in trained:
            tensor.requires_grad_()
        linear_log_probabilities(hidden, weight, torch.full_like(labels, -100)).sum().backward()
        assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in trained)


def test_log_probabilities_have_no_second_derivative():
    hidden, weight, labels = batch()
    log_probabilities = linear_log_probabilities(hidden.requires_grad_(), weight.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match="LinearLogProbabilitiesBackward has no second derivative"):
        torch.autograd.grad(log_probabilities.square().sum(), (hidden, weight), create_graph=True)
