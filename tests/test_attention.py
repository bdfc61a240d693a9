"""Attention against the softmax written out in float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import random_model
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

from minillama.model.attention import BACKENDS, document_lengths, document_mask
from minillama.training.flops import FlopCounter, step_flops

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

    before = torch.backends.mkldnn.matmul.fp32_precision
    (output, *gradients), (flash_output, *flash_gradients) = errors("math"), errors("flash")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    # With AMX ours rounds probabilities to bf16, and flash their exponentials, of which the largest is exactly 1.
    assert output < min(1.2 * flash_output, 4e-3)
    for ours, flash in zip(gradients, flash_gradients, strict=True):
        assert ours < min(1.05 * flash, 4e-3)


def test_math_may_split_heads(monkeypatch):
    monkeypatch.setattr("minillama.model.blockwise.SCORES", 128 * 128 * 2)
    for ours, exact in outputs_and_gradients("math", LONG[0], 6, 3, 16, torch.float32):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_math_is_an_operator_that_pytorch_can_check():
    q, k, v = (torch.randn(10, h, 8, requires_grad=True) for h in (4, 2, 2))
    bounds = torch.tensor([0, 3, 10])
    library.opcheck(torch.ops.minillama.blockwise_attention.default, (q, k, v, bounds))
    inputs = (torch.randn(10, 4, 8), *(x.detach() for x in (q, k, v)), bounds)
    library.opcheck(torch.ops.minillama.blockwise_attention_backward.default, inputs)


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


class VarlenWrittenOut(TorchDispatchMode):
    """In the place of FlashAttention, which CPUs do not have: what PyTorch's documentation says varlen_attn computes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() not in ("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"):
            return func(*args, **(kwargs or {}))
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        q, k, v = (given[name].detach() for name in ("query", "key", "value"))
        starts = given["cu_seq_q"]
        assert starts.dtype == torch.int32 and starts.tolist() == given["cu_seq_k"].tolist()
        assert starts[0] == 0 and starts[-1] == len(q) == len(k)
        assert given["max_q"] == given["max_k"] == starts.diff().max()
        # causal as a window: any number of earlier keys, no later one; by default the scale is D^-0.5
        assert given["window_size"] == [-1, 0] and given["is_causal"] and given["scale"] is None
        assert given.get("enable_gqa") or "enable_gqa" not in given or q.shape[1] == k.shape[1]
        ids = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())

        def compute():
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = naive(*(x[None] for x in leaves), ids[None])[0]
            return torch.autograd.grad(out, leaves, given["grad_out"]) if "grad_out" in given else out.detach()

        with ThreadPoolExecutor(1) as thread:  # where autograd is not excluded, as it is on this side of it
            out = thread.submit(compute).result()
        if "grad_out" in given:
            return out
        return out, torch.empty(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", ROWS)
def test_what_varlen_is_given(kv_heads, rows):
    with VarlenWrittenOut():
        pairs = outputs_and_gradients("varlen", rows, 4, kv_heads, 8, torch.float32)
    for ours, exact in pairs:
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def visible(mask):
    """Which keys each query attends to by FlexAttention's reading of a block mask: (tokens, tokens) bool."""
    tokens, (rows, columns) = mask.seq_lengths[0], mask.BLOCK_SIZE
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    within = mask.mask_mod(torch.tensor(0), torch.tensor(0), query, key)
    for kind, of_block in (("kv", within), ("full_kv", torch.ones_like(within))):
        counts, blocks = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
        for row, (count, listed) in enumerate(zip(counts.tolist(), blocks, strict=True)):
            for column in listed[:count].tolist():
                place = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
                assert not seen[place].any(), "a block is listed twice"
                seen[place] = of_block[place]
    return seen


@pytest.mark.parametrize("seed", range(8))
def test_the_blocks_that_flex_computes_are_those_of_the_documents(seed):
    random = torch.Generator().manual_seed(seed)
    longest = (3, 40, 200, 700)[seed % 4]
    lengths = torch.randint(1, longest, (3 + 300 // longest,), generator=random).tolist()
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = (document[:, None] == document) & torch.ones(len(document), len(document), dtype=torch.bool).tril()
    assert torch.equal(visible(document_mask(lengths, torch.device("cpu"))), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # PyTorch's own
def test_flex_forward():
    """By the operator's own definition, which is not compiled; it has no backward on a CPU."""
    lengths = [30, 1, 25, 8]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    q, k, v = (torch.randn(1, 64, h, 16) for h in (4, 2, 2))
    with torch.compiler.set_stance(force_backend="eager"):
        out = BACKENDS["flex"](lengths, torch.device("cpu")).attend(q, k, v)
    torch.testing.assert_close(out.double(), naive(q.double(), k.double(), v.double(), ids), rtol=1e-4, atol=1e-5)


def test_varlen_is_counted():
    model, ids = random_model(num_attention_heads=4, num_key_value_heads=2), document_ids(ROWS[1])
    model.attention = BACKENDS["varlen"]
    tokens = torch.randint(0, 512, ids.shape)
    with VarlenWrittenOut(), FlopCounter() as counter:
        model(tokens, document_ids=ids, labels=tokens).backward()
    squares = sum(length**2 for row in ROWS[1] for length in row)
    assert 6 * counter.in_attention == 14 * step_flops(model, 0, 0, squares)
