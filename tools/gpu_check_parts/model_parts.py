"""Small whole models: with each adapter and kernel, compiled, recomputed, in fp16, generating."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from checks import Check, Context, NotRun, distance, worst
from kernels import random
from torch import Tensor
from torch.distributed.tensor import DTensor

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.data.batch import Batch, collate
from minillama.data.documents import Documents
from minillama.data.packing import Packed, pack
from minillama.errors import UserError
from minillama.hardware.kernels import KernelsConfig, choose_kernels, compile_blocks
from minillama.inference.generate import generate, stream
from minillama.model.llama import Llama
from minillama.parallel.initialise import materialise
from minillama.parallel.sharding import FsdpConfig, choose_strategy, like, local, make_mesh, set_dtypes, shard
from minillama.training.optim import LossScaler, OptimConfig, make_optimizer
from minillama.training.step import batch_loss, train_step

KINDS = {"full": 1e-3, "lora": 3e-3, "dora": 3e-3, "lora on head and embedding": 3e-3, "llama-adapter": 1e-1}
"""With the learning rate of each."""


def model_checks(context: Context) -> list[Check]:
    no_bf16, found = context.no_half(torch.bfloat16), []
    for kind in KINDS:
        found.append(
            Check("model", f"{kind}, fp32, against a CPU", lambda kind=kind: model_error(context, kind, "fp32"), 2e-3)
        )
    for kind in ("full", "lora"):
        found.append(
            Check(
                "model",
                f"{kind}, mixed, against fp32 on a CPU",
                lambda kind=kind: model_error(context, kind, "mixed"),
                5e-2,
                no_bf16,
            )
        )
    for precision, kinds, tolerance in (("fp32", ("lora",), 2e-3), ("mixed", ("lora", "full"), 4.0)):
        for kind in kinds:
            found.append(
                Check(
                    "compile",
                    f"{kind}, {precision}, compiled against eager",
                    lambda kind=kind, precision=precision: compile_error(context, kind, precision),
                    tolerance,
                    no_bf16 if precision == "mixed" else "",
                )
            )
    for precision, tolerance in (("fp32", 1e-4), ("mixed", 2e-2)):
        for recompute in ("full", "selective"):
            found.append(
                Check(
                    "recompute",
                    f"{recompute} against none, {precision}",
                    lambda how=recompute, precision=precision: recompute_error(context, how, precision),
                    tolerance,
                    no_bf16 if precision == "mixed" else "",
                )
            )
    found.append(Check("fp16", "losses of 8 steps against fp32", lambda: fp16_error(context), 1e-2))
    found.append(Check("fp16", "a step that overflows is left out", lambda: overflow_error(context), 0.0))
    for precision, tolerance in (("fp32", 2e-3), ("bf16", 0.1)):
        found.append(
            Check(
                "generation",
                f"greedy with a cache against one forward, {precision}",
                lambda precision=precision: generation_error(context, precision),
                tolerance,
                no_bf16 if precision == "bf16" else "",
            )
        )
    return found


def build(
    context: Context,
    kind: str,
    fsdp: FsdpConfig,
    *,
    attention: str = "auto",
    compiled: bool = False,
    dropout: float = 0.0,
) -> Llama:
    """A model as the recipes build it, on the context's device, with the same random weights on any."""
    context.join()
    model = adapted(context, kind, dropout)
    set_dtypes(model, fsdp)
    fsdp = choose_strategy(model, fsdp, context.device)
    mesh = make_mesh(fsdp, context.device)
    choose_kernels(model, KernelsConfig(attention, compiled), fsdp.compute_dtype, context.device)  # type: ignore[arg-type]
    shard(model, mesh, fsdp)
    if compiled:
        compile_blocks(model)
    materialise(model, "cpu" if fsdp.cpu_offload else context.device)
    return filled(model)


def plain(context: Context, kind: str) -> Llama:
    """The same model in fp32 on the CPU, in one piece, with the attention that is written out."""
    model = adapted(context, kind)
    set_dtypes(model, FsdpConfig(precision="fp32"))
    choose_kernels(model, KernelsConfig("math"), torch.float32, "cpu")
    materialise(model, "cpu")
    return filled(model)


def adapted(context: Context, kind: str, dropout: float = 0.0) -> Llama:
    with torch.device("meta"):
        model = Llama(context.model).requires_grad_(kind == "full")
    ends = ("embed_tokens", "v_proj", "lm_head")
    if kind == "llama-adapter":
        apply_llama_adapter(model, LlamaAdapterConfig(5, 2))
    elif kind != "full":
        targets = ends if "head" in kind else ("q_proj", "v_proj", "down_proj")
        apply_lora(model, LoraConfig(4, 8.0, dropout, targets, dora=kind == "dora"))
    return model


@torch.no_grad()
def filled(model: Llama) -> Llama:
    """With random weights, the same in every dtype, on every device and for any sharding.

    Adapter weights that start at zero are random too: else a wrong adapter would change nothing.
    """
    for name, parameter in model.named_parameters():
        drawn = random(*parameter.shape, seed=zlib.crc32(name.encode()))
        if "norm" in name:
            drawn = drawn.mul_(0.1).add_(1)
        elif parameter.ndim == 2 and not name.endswith(("embed_tokens.weight", "adaption_prompt")):
            drawn = drawn.mul_(0.1 if "lora_B" in name else parameter.shape[1] ** -0.5)
        elif "magnitude_change" in name:
            drawn = drawn.mul_(0.1)
        local(parameter).copy_(local(like(drawn, parameter)))
    return model


def documents(context: Context, packs: int, whole: bool = False) -> Packed:
    """So many packs of random documents, or, whole, of one that fills it."""
    draw, length = np.random.default_rng(0), 256 if context.cuda else 64
    lengths = [length] * packs if whole else []
    while not whole and sum(lengths) < 1.2 * packs * length:
        lengths.append(int(draw.integers(3, length * 3 // 4)))
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = draw.integers(0, context.model.vocab_size, offsets[-1]).astype(np.int32)
    packed = pack(Documents(tokens, draw.random(offsets[-1]) < 0.7, offsets), length, 0)
    assert len(packed) >= packs
    return packed


def batches_of(packed: Packed, device: str, count: int = 3) -> list[Batch]:
    """Of two packs each."""
    return [collate(packed, [2 * number, 2 * number + 1], 0, device) for number in range(count)]


def gradients(model: Llama, batches: list[Batch]) -> dict[str, Tensor]:
    """Loss a trained token and gradient, all in one vector, over the batches: whole, on the CPU."""
    trained = sum(batch.trained for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        loss = batch_loss(model, batch) / trained
        loss.backward()
        total = total + loss.detach().cpu()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [(grad.full_tensor() if isinstance(grad, DTensor) else grad).cpu().double().flatten() for grad in found]
    model.zero_grad()
    return {"loss": total, "gradient": torch.cat(whole)}


def differences(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: distance(ours[name], exact[name]) for name in ours}


def model_error(context: Context, kind: str, precision: str) -> tuple[float, str]:
    packed = documents(context, 6)
    model = build(context, kind, FsdpConfig(precision=precision))  # type: ignore[arg-type]
    ours = gradients(model, batches_of(packed, context.device))
    return worst(differences(ours, gradients(plain(context, kind), batches_of(packed, "cpu"))))


def compile_error(context: Context, kind: str, precision: str) -> tuple[float, str]:
    """In fp32 the error; in half precision, whose rounding has an order, the error against fp32 over that of eager."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    packed, fsdp = documents(context, 6), FsdpConfig(precision=precision)  # type: ignore[arg-type]
    attention = "auto" if context.cuda else "math"
    try:
        model = build(context, kind, fsdp, attention=attention, compiled=True)
    except UserError as reason:
        raise NotRun(str(reason)) from None
    compiled = gradients(model, batches_of(packed, context.device))
    times = f"{counters['stats']['unique_graphs']} compilations"
    eager = gradients(build(context, kind, fsdp, attention=attention), batches_of(packed, context.device))
    if precision == "fp32":
        error, what = worst(differences(compiled, eager))
        return error, f"{what}; {times}"
    exact = gradients(plain(context, kind), batches_of(packed, "cpu"))
    errors = [distance(numbers["gradient"], exact["gradient"]) for numbers in (compiled, eager)]
    return errors[0] / errors[1], f"times eager's error, which is {errors[1]:.1e}; {times}"


def recompute_error(context: Context, recompute: str, precision: str) -> tuple[float, str]:
    packed = documents(context, 6)
    numbers, memory = {}, {}
    for how in ("none", recompute):
        fsdp = FsdpConfig(precision=precision, recompute=how, strategy="full-shard")  # type: ignore[arg-type]
        model = build(context, "full", fsdp)
        batches = batches_of(packed, context.device)
        gradients(model, batches)  # what is made once, a compiled kernel say, is made
        with peak_mebibytes(context) as peak:
            numbers[how] = gradients(model, batches)
        memory[how] = f", peak {peak[0]:.0f} MiB {how}" if peak else ""
    error, what = worst(differences(numbers[recompute], numbers["none"]))
    return error, what + "".join(memory.values())


@contextmanager
def peak_mebibytes(context: Context) -> Iterator[list[float]]:
    """A list that holds the memory allocated at most within, above that before, at the end; on a CPU nothing."""
    found: list[float] = []
    if not context.cuda:
        yield found
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    found.append((torch.cuda.max_memory_allocated() - before) / 2**20)


def fp16_error(context: Context) -> tuple[float, str]:
    packed, losses = documents(context, 6), {}
    for precision in ("fp16", "fp32"):
        model = build(context, "lora", FsdpConfig(precision=precision))  # type: ignore[arg-type]
        optimizer = make_optimizer(model.parameters(), OptimConfig(lr=3e-3))
        scaler = LossScaler() if precision == "fp16" else None
        batches = batches_of(packed, context.device)
        steps = [train_step(model, optimizer, batches, clip_norm=1.0, scaler=scaler) for _ in range(8)]
        losses[precision] = torch.stack([loss.cpu() for loss, _ in steps])
    first, last = losses["fp32"][0].item(), losses["fp32"][-1].item()
    if not last < first - 0.02:
        raise AssertionError(f"fp32 learns nothing: {first:.4f} became {last:.4f}")
    return distance(losses["fp16"], losses["fp32"]), f"{first:.4f} became {last:.4f}"


def overflow_error(context: Context) -> tuple[float, str]:
    """How many parameters a step with an infinite gradient changed; and the loss scale must be halved."""
    model = build(context, "lora", FsdpConfig(precision="fp16"))
    optimizer = make_optimizer(model.parameters(), OptimConfig(lr=1.0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler = LossScaler()
    scaler.scale = 2.0**60
    _, norm = train_step(model, optimizer, batches_of(documents(context, 6), context.device), scaler=scaler)
    if norm.isfinite().item() or scaler.scale != 2.0**59:
        raise AssertionError(
            f"the norm is {norm.item()} and the scale 2^{np.log2(scaler.scale):g}, not infinite and 2^59"
        )
    changed = [not torch.equal(a.detach(), b) for a, b in zip(model.parameters(), before, strict=True)]
    return float(sum(changed)), "parameters changed"


def generation_error(context: Context, precision: str) -> tuple[float, str]:
    """How far the logits of the tokens chosen with a cache are below the highest ones of a forward over prompt and answer
    without a cache, at most, over the logits' standard deviation. For prompts alone, and side by side."""
    model, prompts, count = answering(context, precision), prompts_of(context), 24
    together = zip(*stream(model, prompts, max_new_tokens=count), strict=True)
    answers = [(f"prompt {n} alone", p, generate(model, p, max_new_tokens=count)) for n, p in enumerate(prompts)]
    answers += [
        (f"prompt {n} beside another", p, list(answer))
        for n, (p, answer) in enumerate(zip(prompts, together, strict=True))
    ]
    errors = {}
    for name, prompt, answer in answers:
        if len(answer) != count:
            raise AssertionError(f"{len(answer)} tokens, not {count}")
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer], device=context.device))[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(answer, device=context.device)[:, None])
        errors[name] = ((logits.amax(1, keepdim=True) - chosen).max() / logits.std()).item()
    return worst(errors)


def answering(context: Context, precision: str) -> Llama:
    model = adapted(context, "full").requires_grad_(False)
    fsdp = FsdpConfig(precision=precision, strategy="full-shard")  # type: ignore[arg-type]
    set_dtypes(model, fsdp)
    context.join()
    mesh = make_mesh(fsdp, context.device)
    choose_kernels(model, KernelsConfig(), fsdp.compute_dtype, context.device)
    if mesh.size() > 1:
        shard(model, mesh, fsdp)
    materialise(model, context.device)
    return filled(model).eval()


def prompts_of(context: Context) -> list[list[int]]:
    drawn = random(32, seed=7).abs().mul(1000).long().remainder(context.model.vocab_size).tolist()
    return [drawn[:5], drawn[5:]]
