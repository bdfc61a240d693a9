"""When memory runs out in training: what holds it, and which flags would help."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillama.data.packing import Packed
from minillama.errors import UserError
from minillama.formats.hub import model_name
from minillama.model.llama import Llama
from minillama.parallel.failures import out_of_memory
from minillama.parallel.memory import least_memory, peak_memory_gib
from minillama.parallel.processes import rank
from minillama.parallel.sharding import FsdpConfig, local
from minillama.training.config import RunConfig
from minillama.training.metrics import Metrics

REST = "activations and all else"
FRAGMENTS = "reserved but not allocated"


def check_context_fits(packed: Packed, model: Llama, dtype: torch.dtype, device: str) -> None:
    """Raises UserError if the longest pack cannot be trained on in the memory of a process, whatever the flags.

    The least that it takes: of each token what goes into each block that trains, for the backward. dtype: what the
    model computes in. Every rank must call it.
    """
    tokens, width = int(packed.lengths.max()), model.config.hidden_size
    blocks = sum(any(p.requires_grad for p in block.parameters()) for block in model.model.layers)
    needed, memory = tokens * width * blocks * dtype.itemsize, least_memory(device)
    if needed > memory:
        raise UserError(
            f"--data.context-length {packed.context_length}: the longest pack has {tokens:,} tokens, which take more than "
            f"{needed / 2**30:,.0f} GiB, and a process has {memory / 2**30:,.0f} GiB: give less"
        )


@contextmanager
def out_of_memory_explained(
    config: RunConfig, fsdp: FsdpConfig, model: nn.Module, optimizer: torch.optim.Optimizer, metrics: Metrics
) -> Iterator[None]:
    """Around training: turns an out-of-memory error into a UserError that says what this rank holds and what would help.

    fsdp: config.fsdp with its strategy resolved. On entry the model must be as between steps, with nothing gathered.
    """
    parameters = list(model.parameters())  # now: within a step FSDP replaces some by gathered ones
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        problem = out_of_memory(error)
        if problem is None:
            raise
        device = "cuda" if isinstance(error, torch.OutOfMemoryError) else "cpu"
        held = held_bytes(parameters, optimizer, device)  # the traceback keeps the step's tensors alive
        shares = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in held.items())
        metrics.close()
        raise UserError(
            f"{problem}; rank {rank()} holds {sum(held.values()) / 2**30:.2f} GiB: {shares}. What would help, most "
            f"first: {'; '.join(remedies(held, config, fsdp, device))}. {advice(config)}"
        ) from None


def held_bytes(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, device: str) -> dict[str, int]:
    """Bytes this rank holds in the memory of "cuda" or "cpu" by kind, largest first; of a sharded tensor its own part."""

    def size(tensors: list[Tensor]) -> int:
        parts = [local(tensor) for tensor in tensors]
        return sum(part.numel() * part.element_size() for part in parts if part.device.type == device)

    held = {
        "parameters": size(list(parameters)),
        "gradients": size([parameter.grad for parameter in parameters if parameter.grad is not None]),
        "optimizer state": size([t for state in optimizer.state.values() for t in state.values()]),
    }
    if device == "cuda":
        total = torch.cuda.memory_reserved()
        held[FRAGMENTS] = total - torch.cuda.memory_allocated()
    else:
        total = int(peak_memory_gib(device) * 2**30)
    held[REST] = max(0, total - sum(held.values()))
    return dict(sorted(held.items(), key=lambda item: -item[1]))


def advice(config: RunConfig) -> str:
    """The command that says which settings fit."""
    adapter = getattr(config, "lora", None) or getattr(config, "adapter", None)
    method = getattr(config, "method", "lora" if hasattr(config, "lora") else "llama-adapter" if adapter else "full")
    quantize = f" --quantize {adapter.quantize}" if adapter and adapter.quantize != "none" else ""
    return (
        f"Which settings fit: python tools/estimate.py --model {model_name(config.model)} --method {method}{quantize} "
        f"--gpus {dist.get_world_size()} --context-length {config.data.context_length} --advise --gpu with the card's name"
    )


def remedies(held: dict[str, int], config: RunConfig, fsdp: FsdpConfig, device: str) -> list[str]:
    """Flags that would reduce what is held, those for the largest kind first; none that is given already."""
    train, optim = config.train, config.optim
    recompute = [] if fsdp.recompute == "full" else ["--fsdp.recompute full"]
    batch = []
    if train.batch_size > 1:  # as many samples a step
        smaller = train.batch_size // 2 if train.batch_size % 2 == 0 else 1
        accumulate = train.accumulate * train.batch_size // smaller
        batch = [f"--train.batch-size {smaller} --train.accumulate {accumulate}"]
    spread = ["more processes"]
    if fsdp.strategy != "full-shard":
        spread = ["--fsdp.strategy full-shard" + " on more processes" * (dist.get_world_size() == 1)]
    offload = ["--fsdp.cpu-offload"] if device == "cuda" and not fsdp.cpu_offload else []
    has_lora = getattr(config, "method", "lora") == "lora" and hasattr(config, "lora")
    fewer = ["a lower --lora.rank"] if has_lora else ["recipes/lora_fsdp.py, which trains fewer weights"]
    smaller_state = ["--optim.kind anyprecision"] if optim.kind == "adamw" and fsdp.precision != "fp16" else []
    by_kind = {
        "parameters": [*spread, *offload],
        "gradients": [*spread, *offload, *fewer],
        "optimizer state": [*spread, *offload, *smaller_state, *fewer],
        REST: [*batch, *recompute, f"--data.context-length below {config.data.context_length}"],
        FRAGMENTS: ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment"],
    }
    least = sum(held.values()) / 20
    return list(dict.fromkeys(flag for kind, size in held.items() if size >= least for flag in by_kind[kind]))
