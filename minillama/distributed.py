"""Processes, sharding and precision: from a model on the meta device to one spread over the ranks."""

import atexit
import ctypes
import gc
import math
import os
import platform
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from minillama.errors import UserError, disk_text
from minillama.faults import processes, rank, user_errors
from minillama.model import Llama
from minillama.recompute import keep_some
from minillama.rendezvous import fresh_store

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "mixed", "bf16", "fp16", "fp32"]

DTYPES = {"mixed": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What each precision computes in."""


@dataclass(frozen=True)
class FsdpConfig:
    """How the model is spread over processes, and in which precision it computes."""

    strategy: Literal["auto", "full-shard", "shard-grad-op", "no-shard", "hybrid-shard"] = "auto"
    """full-shard: each process holds its part of the parameters, gradients and optimizer state, and gathers a block
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
    """How long a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        if self.shard_size < 0:
            raise UserError(f"--fsdp.shard-size {self.shard_size}: must be at least 1, or 0 for those of one machine")
        if self.shard_size and self.strategy != "hybrid-shard":
            raise UserError(
                f"--fsdp.shard-size {self.shard_size} is for --fsdp.strategy hybrid-shard, not for {self.strategy}"
            )
        if not 0 < self.timeout_minutes < math.inf:
            raise UserError(f"--fsdp.timeout-minutes {self.timeout_minutes}: must be above 0")

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.precision == "auto":
            raise ValueError("precision is still auto: minillama.precision.choose_precision decides")
        return DTYPES[self.precision]

    @property
    def trained_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def say(text: str) -> None:
    """Prints once, on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning once, on rank 0, to stderr: what a program answers on stdout stays as it is."""
    if rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def quiet_but_on_rank_zero() -> Iterator[None]:
    """Nothing is printed on other ranks: what all would say, say about wrong flags, is said once."""
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:
        if rank() != 0:
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


@contextmanager
def process_group(device: Device = "auto", timeout_minutes: float = 30.0) -> Iterator[str]:
    """Joins the processes that torchrun (or another launcher) started, or this one alone; yields "cuda" or "cpu".

    Ends them all, as user_errors does, on a UserError of one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use; try --device cpu")
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        wanted = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # so that rank 0 sees it too
        if wanted > torch.cuda.device_count():
            raise UserError(f"{wanted} processes on a machine with {torch.cuda.device_count()} GPUs: start one a GPU")
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory()
    backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}[device]
    if "RANK" in os.environ:
        if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(f"RANK is set but {', '.join(missing)} is not: start with torchrun, or unset RANK")
        timeout = timedelta(minutes=timeout_minutes)
        store, own_rank, world_size = fresh_store(timeout)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=world_size, timeout=timeout)
    else:  # no launcher, so no address to meet at either
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    finished = False
    processes[:] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(processes, (platform.node(), os.getpid()))
    try:
        with user_errors():
            yield device
        finished = True
    finally:
        # NCCL would wait for the other ranks, and they perhaps for this one. An exit alone makes torchrun end them.
        if finished or device == "cpu":
            dist.destroy_process_group()
        # A sharded model holds its group, and gloo's threads with it, in reference cycles. A thread that drops its last
        # tensor while the interpreter is being torn down aborts the process: end the threads before that.
        atexit.register(gc.collect)


def keep_freed_memory() -> None:
    """Lets glibc, where it is the allocator, keep what is freed for the tensors that come next.

    By default large pieces go back to the kernel, which clears each page when it is taken again: a third of the time of
    a step that trains all weights on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its highest: larger pieces still go back, smaller ones do not
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def patient_group() -> dist.ProcessGroup:
    """All ranks in a group of its own, for waits that take as long as they take. Every rank must call it."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def on_rank_zero(task: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs task on rank 0 while the others wait; if it raises there, every rank raises: UserError where it was an OSError.

    Returns the task's result on every rank. Every rank must call it.
    """
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = task()
        except Exception as error:
            failure = error
    answer: list[Any] = [failure and _text(failure), result]
    dist.broadcast_object_list(answer, src=0, group=group)
    _raise(failure, answer[:1])
    return answer[1]


def _text(error: Exception) -> str:
    """What is wrong, for the other ranks; "" of what is no user's mistake, which one rank alone tells of."""
    if isinstance(error, OSError):
        return disk_text(error) if error.errno else str(error)
    return str(error) if isinstance(error, UserError) else ""


def _raise(failure: Exception | None, problems: list[str | None]) -> None:
    """Raises what failed on any rank. problems: of all that may have, as _text has it."""
    if failure is not None and not isinstance(failure, (OSError, UserError)):
        raise failure
    for problem in problems:
        if problem == "":
            sys.exit(1)
        if problem is not None:
            raise UserError(problem)


def on_each_node(task: Callable[[], T]) -> T:
    """Runs task on the first process of each machine while the others wait, however long it takes.

    Returns on every rank the result of its machine. If it raises anywhere, every rank raises, as on_rank_zero does.
    Every rank must call it.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    result, failure = None, None
    if local_rank == 0:
        try:
            result = task()
        except Exception as error:
            failure = error
    answers: list[Any] = [None] * dist.get_world_size()
    patient = patient_group()
    dist.all_gather_object(answers, (failure and _text(failure), result), patient)
    dist.destroy_process_group(patient)
    _raise(failure, [problem for problem, _ in answers])
    return answers[dist.get_rank() - local_rank][1]


def all_reduce(
    values: list[float], op: Literal["sum", "max"] = "sum", device: torch.device | str = "cpu"
) -> list[float]:
    """Each of a few numbers summed (or maximised) over all ranks, exactly (fp64)."""
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(numbers, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return numbers.tolist()


def set_dtypes(model: Llama, config: FsdpConfig, stored: Mapping[str, torch.dtype] | None = None) -> None:
    """Gives trained and frozen parameters the dtypes of config.precision. On the meta device, before sharding.

    stored: frozen parameters by name that are kept in another dtype, which FSDP casts when it gathers them.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            frozen = (stored or {}).get(f"{path}.{name}", config.compute_dtype)
            dtype = config.trained_dtype if parameter.requires_grad else frozen
            if parameter.is_floating_point() and parameter.dtype != dtype:  # not what a quantized base is packed in
                module.register_parameter(name, nn.Parameter(parameter.to(dtype), parameter.requires_grad))
    model.tie_weights()


def choose_strategy(model: nn.Module, config: FsdpConfig, device: str) -> FsdpConfig:
    """config with "auto" resolved for a model whose dtypes are set.

    A replicated frozen base is never gathered and has no gradient to exchange: nothing is faster where it fits, with
    what is trained, in half the memory.
    """
    if config.strategy != "auto":
        return config
    frozen, trained = parameter_bytes(model)
    replicate = frozen > trained and frozen + STATE * trained <= least_memory(device) / 2 and not config.cpu_offload
    return replace(config, strategy="no-shard" if replicate else "full-shard")


STATE = 4.5
"""Bytes of training a parameter over its own: with its gradient, two moments and half a copy to compute with."""


def parameter_bytes(model: nn.Module) -> tuple[int, int]:
    """Of the frozen parameters, and of those that train."""
    size = {True: 0, False: 0}
    for parameter in model.parameters():
        size[parameter.requires_grad] += parameter.numel() * parameter.element_size()
    return size[False], size[True]


def least_memory(device: str) -> float:
    """Bytes that a process may count on: its GPU's, or its part of the host's; the least of any rank, so that all choose
    the same. Every rank must call it."""
    if device == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = host_memory() // _local_world_size()
    return -all_reduce([-float(memory)], "max")[0]


def host_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # versions 2 and 1
        with suppress(OSError, ValueError):  # not there; "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def make_mesh(config: FsdpConfig, device: str) -> DeviceMesh:
    """All processes as a 1-D mesh "shard", or as 2-D "replicate" x "shard" where several copies are held.

    Neighbouring ranks share a copy, so that the busier dimension stays within a machine. Raises UserError if
    config.shard_size does not divide the number of processes.
    """
    world_size = dist.get_world_size()
    if config.strategy not in ("no-shard", "hybrid-shard"):
        return init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    size = 1
    if config.strategy == "hybrid-shard":
        size = config.shard_size or _local_world_size()
        least, most = all_reduce([-float(size), float(size)], "max")
        if -least != most or (not config.shard_size and world_size > 1 and "LOCAL_WORLD_SIZE" not in os.environ):
            raise UserError(
                "--fsdp.shard-size must be given: the machines do not all say, alike, how many processes run"
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


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or dist.get_world_size())


def shard(model: Llama, mesh: DeviceMesh, config: FsdpConfig) -> Llama:
    """FSDP2: one group a block; final norm and head one group, with the embedding if it is the head's twin.

    mesh: as make_mesh makes it. The head's group is not resharded after the forward, as the backward starts with it.
    Gradients are summed over ranks in fp32, never averaged: the loss is divided by the trained tokens of all ranks
    beforehand. Under no-shard, frozen parameters stay plain tensors that FSDP does not touch.
    """
    reshard_after_forward = config.strategy not in ("shard-grad-op", "no-shard")
    offload = OffloadPolicy()
    if config.cpu_offload:
        # Pinned copies are asynchronous, and with replicas they race with the all-reduce (PyTorch #160291, #180665).
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda" and mesh.ndim == 1)
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    group = partial(
        fully_shard,
        mesh=mesh,
        # cast_forward_inputs would round the fp32 RoPE tables.
        mp_policy=MixedPrecisionPolicy(config.compute_dtype, torch.float32, cast_forward_inputs=False),
        offload_policy=offload,
        ignored_params=frozen if config.strategy == "no-shard" and not config.cpu_offload else None,
    )
    trunk, head = model.model, model.lm_head
    for block in trunk.layers:
        # Inside FSDP's hooks: what runs again in the backward finds its parameters already gathered.
        if config.recompute == "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        elif config.recompute == "selective":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=keep_some(block))
        group(block, reshard_after_forward=reshard_after_forward)
    ends = [trunk.norm, head]
    if model.config.tie_word_embeddings:
        ends.insert(0, trunk.embed_tokens)
    else:
        embedding = group(trunk.embed_tokens, reshard_after_forward=reshard_after_forward)
        if isinstance(trunk.embed_tokens, nn.Embedding):
            embedding.set_unshard_in_backward(False)  # it needs only the indices
    group(ends, reshard_after_forward=False)
    group(model)
    sum_gradients(model)
    return model


def sum_gradients(model: nn.Module) -> None:
    """Has FSDP2 sum the gradients of all processes, whoever sharded the model: by itself it averages them."""
    # one process would divide by 1, in two passes more; and once is enough
    if process_count() == 1 or hasattr(model, "gradients_are_summed"):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    model.gradients_are_summed = True  # type: ignore[assignment]


def summed_gradients(model: nn.Module) -> list[Tensor]:
    """Of all parameters that have one, after a backward.

    Raises UserError, on every rank, for one that is not summed over all processes.
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
                problem = f"is spread over {size} of the {processes} processes"
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


def process_count() -> int:
    """Processes that train together: 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def reshard(model: nn.Module) -> None:
    """Frees what a forward without a backward leaves gathered: until then parameters are whole, in the compute dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def materialise(model: Llama, device: torch.device | str) -> None:
    """Gives the parameters of a model on the meta device memory, not values. Offloaded ones belong on "cpu"."""
    model.to_empty(device=device)
    model.tie_weights()


@torch.no_grad()
def initialise(model: nn.Module, seed: int, loaded: Collection[str] = ()) -> None:
    """Fills every parameter and buffer not in `loaded` through its module's reset_parameters().

    The numbers depend on seed and name alone, not on the number of ranks or the device: each module's parameters are
    drawn whole on the host, one module at a time, and each rank keeps its part. (Random functions on DTensors draw the
    same numbers in every shard on CPU.) Raises UserError for a module that does not fill what it owns.
    """
    # without the second name of a tied head
    missing = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}.difference(loaded)
    for path, module in model.named_modules():
        kept = {name: t for name, t in (module._parameters | module._buffers).items() if t is not None}
        own = {name: t for name, t in kept.items() if (f"{path}.{name}" if path else name) in missing}
        if not own:
            continue
        who = f"{path or 'the model'} ({type(module).__name__})"
        if not hasattr(module, "reset_parameters"):
            raise UserError(f"{who} owns {', '.join(own)}, but has no reset_parameters() that fills it: give it one")
        for name, tensor in kept.items():
            # What is loaded stays on the meta device, where drawing costs nothing.
            blank = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu" if name in own else "meta")
            if blank.is_floating_point():
                blank.fill_(torch.nan)
            if isinstance(tensor, nn.Parameter):
                module._parameters[name] = nn.Parameter(blank, tensor.requires_grad)
            else:
                module._buffers[name] = blank
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(f"{seed} {path}".encode()))
            module.reset_parameters()
        for name, tensor in kept.items():
            tensors = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
            drawn, tensors[name] = tensors[name], tensor
            if name not in own:
                continue
            if drawn is None or drawn.isnan().any():
                raise UserError(f"{who}: its reset_parameters() does not fill {name}, or not with numbers")
            local(tensor).copy_(local(like(drawn, tensor)))


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """`whole`, which every rank holds alike, spread as the DTensor `parameter` is; unchanged for a plain tensor."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device_mesh.device_type)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the plain tensor itself: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
