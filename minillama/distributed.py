"""Processes, sharding and precision: from a model on the meta device to one spread over the ranks."""

import atexit
import gc
import os
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from minillama.errors import UserError
from minillama.model import Llama

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class FsdpConfig:
    """How the model is spread over processes, and in which precision it computes."""

    precision: Literal["mixed", "fp32"] = "mixed"
    """mixed: compute in bf16, trainable parameters, gradients and their sums over ranks fp32, a frozen base stored in
    bf16. fp32: everything in fp32."""
    recompute: Literal["none", "full"] = "none"
    """full: keep only each block's input and run the block again in the backward (less memory, a third more work)."""

    @property
    def compute_dtype(self) -> torch.dtype:
        return {"mixed": torch.bfloat16, "fp32": torch.float32}[self.precision]


def rank() -> int:
    """This process's rank as the launcher says, 0 without one; needs no process group."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """Prints once, on rank 0."""
    if rank() == 0:
        print(text, flush=True)


@contextmanager
def quiet_but_on_rank_zero() -> Iterator[None]:
    """Nothing is printed on other ranks: what all would say, say about wrong flags, is said once."""
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:
        if rank() != 0:
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with code 1 on a UserError, printed without a traceback, and once however many ranks make it."""
    try:
        yield
    except KeyboardInterrupt:
        if rank() == 0:
            print("\ninterrupted: what is saved only at the end, was not", file=sys.stderr, flush=True)
        sys.exit(130)
    except RuntimeError:
        if _someone_erred():  # the others are gone because of a mistake that one has named
            sys.exit(1)
        raise
    except UserError as error:
        first = rank() == 0
        if dist.is_initialized():  # all ranks usually make the same mistake, but sometimes only one does
            try:
                first = dist.distributed_c10d._get_default_store().add("minillama/errors", 1) == 1
            except dist.DistError:  # rank 0, which keeps the store without torchrun, has ended: it has spoken
                first = False
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def _someone_erred() -> bool:
    try:
        return dist.is_initialized() and dist.distributed_c10d._get_default_store().check(["minillama/errors"])
    except dist.DistError:
        return False


@contextmanager
def process_group(device: Device = "auto") -> Iterator[DeviceMesh]:
    """The processes that torchrun (or another launcher) started, or this one alone, as a 1-D mesh named "shard".

    Ends them all, as user_errors does, on a UserError of one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use; try --device cpu")
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"process {local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}[device]
    if "RANK" in os.environ:
        if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(f"RANK is set but {', '.join(missing)} is not: start with torchrun, or unset RANK")
        dist.init_process_group(backend)
    else:  # no launcher, so no address to meet at either
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with user_errors():
            yield init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("shard",))
    finally:
        dist.destroy_process_group()
        # A sharded model holds its group, and gloo's threads with it, in reference cycles. A thread that drops its last
        # tensor while the interpreter is being torn down aborts the process: end the threads before that.
        atexit.register(gc.collect)


def on_rank_zero(task: Callable[[], T]) -> T | None:
    """Runs task on rank 0 while the others wait; if it raises there, every rank raises: UserError where it was an OSError.

    Returns the task's result on rank 0, None elsewhere. Every rank must call it.
    """
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = task()
        except Exception as error:
            failure = error
    problem = [None if failure is None else str(failure)]
    dist.broadcast_object_list(problem, src=0)
    if failure is not None and not isinstance(failure, (OSError, UserError)):
        raise failure
    if problem[0] is not None:
        raise UserError(problem[0])
    return result


def all_reduce(
    values: list[float], op: Literal["sum", "max"] = "sum", device: torch.device | str = "cpu"
) -> list[float]:
    """Each of a few numbers summed (or maximised) over all ranks, exactly (fp64)."""
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return numbers.tolist()


def set_dtypes(model: Llama, config: FsdpConfig) -> None:
    """Trainable parameters fp32, frozen ones the compute dtype. On the meta device, before sharding."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = torch.float32 if parameter.requires_grad else config.compute_dtype
            if parameter.dtype != dtype:
                module.register_parameter(name, nn.Parameter(parameter.to(dtype), parameter.requires_grad))
    model.tie_weights()


def shard(model: Llama, mesh: DeviceMesh, config: FsdpConfig, *, reshard_after_forward: bool = True) -> Llama:
    """FSDP2: one group a block; final norm and head one group, with the embedding if it is the head's twin.

    The head's group is not resharded after the forward, as the backward starts with it. Gradients are summed over
    ranks, never averaged: the loss is divided by the trained tokens of all ranks beforehand.
    """
    dtype = config.compute_dtype
    # cast_forward_inputs would round the fp32 RoPE tables.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    group = partial(fully_shard, mesh=mesh, mp_policy=policy)
    trunk, head = model.model, model.lm_head
    for block in trunk.layers:
        if config.recompute == "full":
            # Inside FSDP's hooks: what runs again in the backward finds its parameters already gathered.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        group(block, reshard_after_forward=reshard_after_forward)
    ends = [trunk.norm, head]
    if model.config.tie_word_embeddings:
        ends.insert(0, trunk.embed_tokens)
    else:
        # Its backward needs only the indices.
        group(trunk.embed_tokens, reshard_after_forward=reshard_after_forward).set_unshard_in_backward(False)
    group(ends, reshard_after_forward=False)
    group(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    return model


def reshard(model: nn.Module) -> None:
    """Frees what a forward without a backward leaves gathered: until then parameters are whole, in the compute dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def materialise(model: Llama, device: torch.device | str) -> None:
    """Gives the parameters of a model on the meta device memory, not values."""
    model.to_empty(device=device)
    model.tie_weights()


@torch.no_grad()
def initialise(model: nn.Module, seed: int, loaded: Collection[str] = ()) -> None:
    """Fills every parameter not in `loaded` through its module's reset_parameters().

    The numbers depend on seed and name alone, not on the number of ranks or the device: each module's parameters are
    drawn whole on the host, one module at a time, and each rank keeps its part. (Random functions on DTensors draw the
    same numbers in every shard on CPU.)
    """
    missing = dict(model.named_parameters()).keys() - loaded  # without the second name of a tied head
    for path, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if f"{path}.{n}" in missing}
        if not own:
            continue
        kept = dict(module._parameters)
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(f"{seed} {path}".encode()))
            module.reset_parameters()
        drawn = dict(module._parameters)
        module._parameters.update(kept)
        for name, parameter in own.items():
            local(parameter).copy_(local(like(drawn[name], parameter)))


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """`whole`, which every rank holds alike, spread as the DTensor `parameter` is; unchanged for a plain tensor."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device_mesh.device_type)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the plain tensor itself: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
