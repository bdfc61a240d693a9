"""FSDP2: precision, mesh, and a model sharded over the ranks."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from minillama.errors import UserError
from minillama.model.llama import Llama
from minillama.model.quant import quantized_layers
from minillama.parallel.memory import least_memory, parameter_bytes
from minillama.parallel.processes import all_reduce, local_world_size, process_count
from minillama.parallel.recompute import keep_some

Precision = Literal["auto", "mixed", "bf16", "fp16", "fp32"]

DTYPES = {"mixed": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What each precision computes in."""


@dataclass(frozen=True)
class FsdpConfig:
    """How the model is sharded over processes, and in which precision it computes."""

    strategy: Literal["auto", "full-shard", "shard-grad-op", "no-shard", "hybrid-shard"] = "auto"
    """full-shard: each process holds its shard of the parameters, gradients and optimizer state, and gathers a block
    when it computes it. shard-grad-op: the same, but what the forward gathered stays for the backward. no-shard: each
    process holds all. hybrid-shard: groups of --fsdp.shard-size processes hold one copy each. auto: no-shard if most
    of the model is frozen and it fits in half of the device's memory, else full-shard."""
    shard_size: int = 0
    """Processes that hold one copy together under hybrid-shard; 0: those of one machine."""
    precision: Precision = "auto"
    """mixed: compute in bf16, trained parameters, their gradients and sums over processes fp32, a frozen base bf16.
    bf16: trained parameters bf16 too. fp16: as mixed with fp16 for bf16, and a loss scale. fp32: everything fp32. auto:
    what the hardware multiplies fast. That is mixed on GPUs with bf16, else fp16 on those with fp16, and on a CPU mixed if
    it is measured to be faster in bf16, else fp32."""
    recompute: Literal["none", "full", "selective"] = "none"
    """full: keep only each block's input and run the block again in the backward (less memory, a third more work).
    selective: keep also the results of attention and of every other large matrix product, mostly v, o and up."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory, and run the optimizer there."""
    timeout_minutes: float = 30.0
    """How long a process waits for the others before it gives up, as long as they are alive."""
    lost_seconds: float = 60.0
    """A process that gives no sign of life for so long, because its machine is lost, frozen or cut off, ends the others,
    with a message that names it. A slow process is alive: it gives signs while it computes, or waits for its disk."""

    def __post_init__(self) -> None:
        if self.shard_size < 0:
            raise UserError(f"--fsdp.shard-size {self.shard_size}: must be at least 1, or 0 for those of one machine")
        if self.shard_size and self.strategy != "hybrid-shard":
            raise UserError(
                f"--fsdp.shard-size {self.shard_size} is for --fsdp.strategy hybrid-shard, not for {self.strategy}"
            )
        if not 0 < self.timeout_minutes < math.inf:
            raise UserError(f"--fsdp.timeout-minutes {self.timeout_minutes}: must be above 0")
        if not 1 <= self.lost_seconds < math.inf:
            raise UserError(f"--fsdp.lost-seconds {self.lost_seconds}: must be at least 1")

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.precision == "auto":
            raise ValueError("precision is still auto: minillama.hardware.precision.choose_precision decides")
        return DTYPES[self.precision]

    @property
    def trained_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def set_dtypes(model: Llama, config: FsdpConfig, stored: Mapping[str, torch.dtype] | None = None) -> None:
    """Gives trained and frozen parameters the dtypes of config.precision. On the meta device, before sharding.

    stored: frozen parameters by name that are kept in another dtype, which FSDP casts when it gathers them.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            frozen = (stored or {}).get(f"{path}.{name}", config.compute_dtype)
            dtype = config.trained_dtype if parameter.requires_grad else frozen
            if parameter.is_floating_point() and parameter.dtype != dtype:  # not a quantised weight's bytes
                module.register_parameter(name, nn.Parameter(parameter.to(dtype), parameter.requires_grad))
    model.tie_weights()


def choose_strategy(model: nn.Module, config: FsdpConfig, device: str, memory: float = 0) -> FsdpConfig:
    """config with "auto" resolved for a model whose dtypes are set.

    A replicated frozen base is never gathered and has no gradient to reduce. That is fastest, if the base and what is
    trained fit in half the memory. memory: bytes of a process, where its
    device is not here to be asked.
    """
    if config.strategy != "auto":
        return config
    frozen, trained = parameter_bytes(model)
    half = (memory or least_memory(device)) / 2
    replicate = frozen > trained and frozen + STATE * trained <= half and not config.cpu_offload
    return replace(config, strategy="no-shard" if replicate else "full-shard")


STATE = 4.5
"""Bytes that training a parameter takes per byte of its own: itself, its gradient, two moments and half a copy."""


def make_mesh(config: FsdpConfig, device: str) -> DeviceMesh:
    """All processes as a 1-D mesh "shard", or as 2-D "replicate" x "shard" under hybrid-shard.

    Neighbouring ranks share a copy, so that the busier dimension stays within a machine. Raises UserError if
    config.shard_size does not divide the number of processes.
    """
    world_size = dist.get_world_size()
    if config.strategy not in ("no-shard", "hybrid-shard"):
        return init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    size = 1
    if config.strategy == "hybrid-shard":
        size = config.shard_size or local_world_size()
        least, most = all_reduce([-float(size), float(size)], "max")
        if -least != most or (not config.shard_size and world_size > 1 and "LOCAL_WORLD_SIZE" not in os.environ):
            raise UserError(
                "--fsdp.shard-size must be given: the machines run different numbers of processes, or do not say how many"
            )
        if world_size % size:
            raise UserError(
                f"--fsdp.shard-size {size} does not divide the {world_size} processes: give the number that are to hold "
                "one copy of the model together"
            )
    mesh = init_device_mesh(device, (world_size // size, size), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():  # new groups do not inherit the world's timeout
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=config.timeout_minutes), group)
    return mesh


def shard(model: Llama, mesh: DeviceMesh, config: FsdpConfig) -> Llama:
    """FSDP2: one group a block; final norm and head one group, with the embedding if it is tied to the head.

    mesh: as make_mesh makes it. The head's group is not resharded after the forward, because the backward starts with it.
    Gradients are summed over ranks in fp32, never averaged: the loss is divided by the trained tokens of all ranks
    before. Under no-shard, frozen parameters stay plain tensors that FSDP does not touch.
    """
    reshard_after_forward = config.strategy not in ("shard-grad-op", "no-shard")
    offload = OffloadPolicy()
    if config.cpu_offload:
        # Pinned copies are asynchronous, and with replicas they race with the all-reduce (PyTorch #160291, #180665).
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda" and mesh.ndim == 1)
    for module in quantized_layers(model).values():
        # FSDP of PyTorch 2.11 takes no integers: bytes pass as numbers of the dtype that it gathers in and does not cast.
        module.weight = nn.Parameter(module.weight.detach().view(config.compute_dtype), requires_grad=False)
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    group = partial(
        fully_shard,
        mesh=mesh,
        # cast_forward_inputs would round the fp32 RoPE tables.
        mp_policy=MixedPrecisionPolicy(config.compute_dtype, torch.float32, cast_forward_inputs=False),
        offload_policy=offload,
        ignored_params=frozen if config.strategy == "no-shard" and not config.cpu_offload else None,
    )
    decoder, head = model.model, model.lm_head
    for block in decoder.layers:
        # Inside FSDP's hooks: a block that is recomputed in the backward finds its parameters gathered.
        if config.recompute == "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        elif config.recompute == "selective":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=keep_some(block))
        group(block, reshard_after_forward=reshard_after_forward)
    ends = [decoder.norm, head]
    if model.config.tie_word_embeddings:
        ends.insert(0, decoder.embed_tokens)
    else:
        embedding = group(decoder.embed_tokens, reshard_after_forward=reshard_after_forward)
        if isinstance(decoder.embed_tokens, nn.Embedding):
            embedding.set_unshard_in_backward(False)  # its backward needs only the indices
    group(ends, reshard_after_forward=False)
    group(model)
    sum_gradients(model)
    return model


def sum_gradients(model: nn.Module) -> None:
    """Makes FSDP2 sum gradients over processes instead of averaging them; also for a model sharded by the user."""
    # one process would divide by 1, in two more passes; and setting it once is enough
    if process_count() == 1 or hasattr(model, "gradients_are_summed"):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    model.gradients_are_summed = True  # type: ignore[assignment]


def summed_gradients(model: nn.Module) -> list[Tensor]:
    """The gradients of all parameters that have one, after a backward.

    Raises UserError, on every rank, for a gradient that is not summed over all processes.
    """
    processes = process_count()
    replicated = model if isinstance(model, DistributedDataParallel) else None
    gradients = []
    for name, parameter in (replicated.module if replicated else model).named_parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        gradients.append(gradient)
        problem = None
        if isinstance(gradient, DTensor):
            if (size := gradient.device_mesh.size()) != processes:
                problem = f"is sharded over {size} of the {processes} processes"
            elif sum(not placement.is_replicate() for placement in gradient.placements) > 1:
                problem = "is split along two dimensions of its mesh, and not by samples alone"
        elif replicated and name not in replicated.parameters_to_ignore:
            if (size := dist.get_world_size(replicated.process_group)) != processes:
                problem = f"is shared by {size} of the {processes} processes"
        elif processes > 1:
            problem = f"is a plain parameter, of which each of the {processes} processes trains its own"
        if problem:
            raise UserError(
                f"{name} {problem}: its gradient is not the sum over all. Give the whole model to minillama.shard, "
                "PyTorch's fully_shard or DistributedDataParallel, over all processes"
            )
    return gradients


def reshard(model: nn.Module) -> None:
    """Frees the parameters that a forward without a backward leaves gathered, whole and in the compute dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """`whole`, the same on every rank, distributed as the DTensor `parameter`; unchanged if that is a plain tensor."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device_mesh.device_type)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def row_offset(parameter: Tensor) -> int:
    """The first row of the whole tensor that this rank holds."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the plain tensor itself: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
