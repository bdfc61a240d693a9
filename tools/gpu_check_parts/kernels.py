"""Single kernels against float64: matrix products, attention, the loss, the optimizer."""

import torch
import torch.nn.functional as F
from checks import Check, Context, distance, short, worst
from torch import Tensor

from minillama.model.attention import BACKENDS
from minillama.model.loss import IGNORE, linear_cross_entropy
from minillama.training.optim import PART, CompensatedAdamW

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
# Relative errors of whole tensors. A mistake (mask, scale, order) gives a tenth or more.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def kernel_checks(context: Context) -> list[Check]:
    device, found = context.device, []
    for dtype in DTYPES:
        found.append(
            Check(
                "setup",
                f"matrix product, {short(dtype)}",
                lambda dtype=dtype: product_error(device, dtype),
                TOLERANCE[dtype],
                context.no_half(dtype),
            )
        )
    for name in BACKENDS:
        for dtype in DTYPES:
            for kv_heads in (8, 2):
                if name == "flex" and kv_heads == 8 and dtype in HALF:
                    continue  # each compiles for some ten seconds
                found.append(
                    Check(
                        "attention",
                        f"{name}, {short(dtype)}, {'8 heads' if kv_heads == 8 else '8 query heads on 2'}",
                        lambda name=name, dtype=dtype, kv=kv_heads: attention_error(context, name, dtype, kv),
                        TOLERANCE[dtype],
                        why_not(context, name, dtype),
                    )
                )
    for kind in ("frozen head", "trained head", "LoRA on the head"):
        for dtype in DTYPES:
            found.append(
                Check(
                    "loss",
                    f"{kind}, {short(dtype)}",
                    lambda kind=kind, dtype=dtype: loss_error(context, kind, dtype),
                    {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype],
                    context.no_half(dtype),
                )
            )
    for moments, tolerance in ((torch.float32, 1e-2), (torch.bfloat16, 5e-2)):
        found.append(
            Check(
                "optimizer",
                f"bf16 weights, {short(moments)} moments, 10 steps of AdamW",
                lambda moments=moments: optimizer_error(device, moments),
                tolerance,
            )
        )
    return found


def why_not(context: Context, name: str, dtype: torch.dtype) -> str:
    """Why attention `name` does not compute in dtype on this device, or nothing."""
    if name == "varlen" and not context.cuda:
        return "PyTorch has varlen on CUDA only"
    if name == "flex" and not context.cuda:
        return "FlexAttention has no backward on a CPU"
    if context.cuda and name in ("varlen", "flash"):
        if dtype == torch.float32:
            return "FlashAttention computes in half precision only"
        if context.capability < (8, 0):
            return f"FlashAttention needs compute capability 8.0, this is {'.'.join(map(str, context.capability))}"
    return context.no_half(dtype)


def product_error(device: str, dtype: torch.dtype) -> float:
    a, b = (random(256, 256, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    return distance((a @ b).cpu(), a.cpu().double() @ b.cpu().double())


def layouts(context: Context) -> list[list[list[int]]]:
    """Documents of two rows of one length: one a row, of equal and different lengths, and many of a single token."""
    if context.cuda:
        return [[[512], [512]], [[64] * 8, [64] * 8], [[300, 1, 150, 61], [128, 129, 255]], [[1] * 8 + [504], [512]]]
    return [[[64], [64]], [[16] * 4, [16] * 4], [[30, 1, 25, 8], [16, 17, 31]], [[1] * 5 + [59], [64]]]


def attention_error(context: Context, name: str, dtype: torch.dtype, kv_heads: int) -> tuple[float, str]:
    """The largest error of the output and the gradients of q, k and v over all layouts."""
    device, heads = context.device, 8
    width = (64 if kv_heads == 8 else 128) if context.cuda else 16
    errors = {}
    for number, rows in enumerate(layouts(context)):
        lengths = [length for row in rows for length in row]
        shape = (len(rows), sum(rows[0]))
        q, k, v, grad = (
            random(*shape, n, width, seed=10 * number + i, dtype=dtype, device=device)
            for i, n in enumerate((heads, kv_heads, kv_heads, heads))
        )
        ours = [x.clone().requires_grad_() for x in (q, k, v)]
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        out = BACKENDS[name](lengths, torch.device(device)).attend(*ours)
        expected = naive_attention(*exact, lengths)
        assert out.shape == q.shape and out.dtype == dtype and out.device == q.device
        pairs = zip(
            ("output", "gradient of q", "gradient of k", "gradient of v"),
            (out, *torch.autograd.grad(out, ours, grad)),
            (expected, *torch.autograd.grad(expected, exact, grad.double())),
            strict=True,
        )
        documents = f"{len(lengths)} documents, the first of {lengths[0]}"
        errors |= {f"{what}, {documents}": distance(a, b) for what, a, b in pairs}
    return worst(errors)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """The softmax written out, a document at a time: q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)."""
    group = q.shape[2] // k.shape[2]
    shape, outputs = q.shape, []
    flat = (x.flatten(0, 1).split(lengths) for x in (q, k, v))
    for one_q, one_k, one_v in zip(*flat, strict=True):
        one_k, one_v = (x.repeat_interleave(group, dim=1) for x in (one_k, one_v))
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) / shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), one_v))
    return torch.cat(outputs).view(shape)


def loss_error(context: Context, kind: str, dtype: torch.dtype) -> tuple[float, str]:
    """The largest error of the loss and its gradients; of more rows than are computed at a time."""
    device = context.device
    vocabulary, width, length = (32064, 256, 2500) if context.cuda else (517, 32, 300)
    hidden = random(2, length, width, seed=0, dtype=dtype, device=device)
    weight = random(vocabulary, width, seed=1).mul_(width**-0.5).to(device, dtype)
    inputs = {"hidden": hidden, "weight": weight}
    if kind == "LoRA on the head":
        inputs |= {"low": random(2, length, 8, seed=2, device=device)}
        inputs |= {"up": random(vocabulary, 8, seed=3).mul_(0.1).to(device)}
    draw = torch.Generator().manual_seed(4)
    labels = torch.randint(vocabulary, (2, length), generator=draw)
    labels[torch.rand(2, length, generator=draw) < 0.1] = IGNORE
    trained = [name for name in inputs if name != "weight" or kind == "trained head"]
    ours = {name: x.clone().requires_grad_(name in trained) for name, x in inputs.items()}
    exact = {name: x.double().requires_grad_(name in trained) for name, x in inputs.items()}
    loss = linear_cross_entropy(ours["hidden"], ours["weight"], labels, ours.get("low"), ours.get("up")) / 1000
    logits = exact["hidden"] @ exact["weight"].T
    if "low" in exact:
        logits = logits + exact["low"] @ exact["up"].T
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten().to(device), ignore_index=IGNORE, reduction="sum")
    expected = expected / 1000
    loss.backward()
    expected.backward()
    errors = {"loss": distance(loss, expected)}
    errors |= {f"gradient of {name}": distance(ours[name].grad, exact[name].grad) for name in trained}
    return worst(errors)


def optimizer_error(device: str, moments: torch.dtype) -> tuple[float, str]:
    """How far bf16 weights with what they remember are from those of AdamW in float64, over how far these have moved."""
    size = PART[device] + 1000  # more than is updated at a time
    start = random(size, seed=0, device=device, dtype=torch.bfloat16)
    ours, exact = (torch.nn.Parameter(x.clone()) for x in (start, start.double()))
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    optimizer = CompensatedAdamW([ours], moments=moments, **settings)
    reference = torch.optim.AdamW([exact], **settings)
    for step in range(10):
        gradient = random(size, seed=step + 1, device=device, dtype=torch.bfloat16)
        ours.grad, exact.grad = gradient, gradient.double()
        optimizer.step()
        reference.step()
    value = ours.detach().double() + optimizer.state[ours]["remainder"].double()
    moved = exact.detach() - start.double()
    return distance(value - start.double(), moved), "of the distance moved"
