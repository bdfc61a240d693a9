"""Which tensors are alive in a step, by kind and phase, what is computed, and what is sent between processes.

A mode that sees every operation of PyTorch, on real tensors or on fake ones, which have shapes and no memory.
"""

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillama.model.llama import Llama
from minillama.model.quant import product, product_backward
from minillama.parallel.sharding import local

aten = torch.ops.aten
COLLECTIVES = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}
FAKE_MODE = torch._C._TorchDispatchModeKey.FAKE
QUANTIZED: dict[Any, Callable[..., Any]] = {
    torch.ops.minillama.quantized_linear.default: product,
    torch.ops.minillama.quantized_linear_backward.default: product_backward,
}
"""What these operations do inside, where a mode does not look: they make a whole weight for a while."""
COMPOSITE = (aten.linear.default, aten.matmul.default)
"""Operations that only there are not yet taken apart by autograd."""


@dataclass(eq=False)
class Held:
    """A piece of memory, from when it is allocated until it is freed."""

    size: int
    """Bytes"""
    kind: str


@dataclass(frozen=True)
class Peak:
    """The moment of a phase at which most is held."""

    size: int
    """Bytes"""
    kinds: dict[str, int]
    """What they are, in bytes"""


@dataclass
class Work:
    """What a step computes and sends, of one process."""

    flops: float = 0.0
    """In matrix products and attention, recomputation too, attention as half a square of scores"""
    moved: float = 0.0
    """Bytes that all other operations read and write"""
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Bytes by kind of collective and link, "inside" a machine or "between" machines"""


class Alive(TorchDispatchMode):
    """Inside, every allocation is noted, with what it turns out to be.

    Kinds: parameters, optimizer and what else `hold` is told of; gathered parameters and unreduced gradients, which FSDP2
    is about to sum; loss, made in the head; activations, made in a forward and there at its end, or made again in a
    backward; workspace, all else. Phases: what `watch` and the caller set.
    """

    def __init__(self, fake: FakeTensorMode | None = None, *, machine: int = 8, squares: int = 0) -> None:
        """fake: makes the tensors, without memory. machine: ranks of one. squares: of the documents' lengths, summed over
        a micro-batch."""
        super().__init__()
        self.fake, self.machine, self.squares = fake, machine, squares
        self.phase = "load"
        self.work = Work()
        self.reads = 0
        """How often a number was asked of a device"""
        self._in_head = False
        self._events: list[tuple[str, Held, int]] = []
        self._held: dict[int, tuple[Held, Any]] = {}  # by the address of the storage
        self._spread: dict[str, tuple[int, int]] = {}  # ranks and machines of a process group

    def __enter__(self) -> "Alive":
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            if storage._cdata in self._held:
                self._note(storage)
            return result

        self._resizing = replaced(torch.UntypedStorage, "resize_", resize_)  # FSDP2 frees so; it is no operation
        self._resizing.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resizing.__exit__(None, None, None)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Sees operations inside of one, too."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """These tensors are of this kind, from when they were made."""
        for tensor in tensors:
            self._note(local(tensor).untyped_storage()).kind = kind

    def watch(self, model: Llama, optimizer: torch.optim.Optimizer) -> None:
        """Phases and kinds of the steps of this model with this optimizer."""

        def in_phase(phase: str) -> None:
            self.phase = phase
            if phase == "optimizer":
                self.hold((p.grad for p in model.parameters() if p.grad is not None), "gradients")

        def in_head(entered: bool) -> None:
            self._in_head = entered

        model.register_forward_pre_hook(lambda *_: in_phase("forward"))
        model.register_forward_hook(lambda *_: in_phase("backward"))
        optimizer.register_step_pre_hook(lambda *_: in_phase("optimizer"))

        def gradient_of_middle(*outputs: Any) -> None:
            if outputs[-1].requires_grad:
                outputs[-1].register_hook(lambda _: in_phase("end of backward"))

        # A backward's peak is near its start, where most is kept, or near its end, where most gradients are. Each grows
        # along a line with the layers; the larger of the two does not.
        layers = model.model.layers
        layers[len(layers) // 2].register_forward_hook(gradient_of_middle)
        model.lm_head.register_forward_pre_hook(lambda *_: in_head(True))
        model.lm_head.register_forward_hook(lambda *_: in_head(False))

    def peaks(self, but: Iterable[str] = ()) -> dict[str, Peak]:
        """Of each phase, without the kinds in `but`."""
        events = [(phase, held.kind, 0 if held.kind in but else change) for phase, held, change in self._events]
        total, highest = 0, dict[str, tuple[int, int]]()
        for number, (phase, _, change) in enumerate(events):
            total += change
            if total > highest.get(phase, (-1, 0))[0]:
                highest[phase] = total, number
        kinds: Counter[str] = Counter()
        found = {}
        for number, (phase, kind, change) in enumerate(events):
            kinds[kind] += change
            if highest[phase][1] == number:
                found[phase] = Peak(highest[phase][0], {name: size for name, size in kinds.items() if size})
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with its local tensors
        if torch._C._get_dispatch_mode(FAKE_MODE) is not None or func.namespace == "prim":
            return func(*args, **kwargs)  # DTensor asks for the shape of a whole result
        if inside := QUANTIZED.get(func) or (func.decompose if func in COMPOSITE else None):
            with self._looking():
                return inside(*args, **kwargs)
        faked = self.fake is not None and func.namespace != "c10d"
        if func.namespace == "c10d" and (sent := self._collective(func, args)) is not None:
            return sent
        if faked and func is aten._local_scalar_dense.default:
            self.reads += 1
            return True if args[0].dtype == torch.bool else 1.0
        if faked and func is aten._fused_adamw_.default:  # in place, which its rule for fake tensors is not
            self.work.moved += sum(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor)) * 2
            return None
        with self.fake or nullcontext():
            result = func(*args, **kwargs)
        if func is aten.detach.default and "backward" in self.phase and self._kind(args[0]) == "workspace":
            self.hold(args, "activations")  # what checkpoint keeps of what it makes again
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        for tensor in made:
            self._note(tensor.untyped_storage())
        match func._schema.name:
            case "fsdp::all_gather_copy_in":
                self.hold([args[1]], "gathered parameters")
            case "fsdp::split_with_sizes_copy":
                self.hold(kwargs["out"], "gathered parameters")
            case "fsdp::chunk_cat":
                self.hold([*args[0], kwargs["out"]], "unreduced gradients")
        if not func.is_view:
            self._count(func._schema.name, [*tree_leaves((args, kwargs)), *made])
        return result

    def _count(self, name: str, values: list[Any]) -> None:
        tensors = [value for value in values if isinstance(value, Tensor)]
        if name in ("aten::mm", "aten::addmm"):
            left, right = tensors[1:3] if name == "aten::addmm" else tensors[:2]
            self.work.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        elif "attn" in name or "attention" in name:
            queries, keys = tensors[1:3] if "backward" in name else tensors[:2]
            # in documents half a square of scores; else, as of llama-adapter's prompt, all keys
            if queries.ndim == 4:
                causal = any(value is True for value in values)
                seen = 2 * queries.numel() * keys.shape[-2] / (2 if causal else 1)
            else:
                seen = math.prod(queries.shape[-2:]) * self.squares
            self.work.flops += (5 if "backward" in name else 2) * seen
        else:
            self.work.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _kind(self, tensor: Tensor) -> str | None:
        entry = self._held.get(tensor.untyped_storage()._cdata)
        return entry and entry[0].kind

    def _note(self, storage: torch.UntypedStorage) -> Held:
        address, size = storage._cdata, storage.nbytes()
        if address in self._held:
            held = self._held[address][0]
            if size != held.size:
                self._events.append((self.phase, held, size - held.size))
                held.size = size
            return held
        kind = {"forward": "activations"}.get(self.phase, "workspace")
        held = Held(size, "loss" if self._in_head else kind)

        def freed(_: Any) -> None:
            del self._held[address]
            if self.phase == "forward" and held.kind == "activations":
                held.kind = "workspace"
            self._events.append((self.phase, held, -held.size))

        self._held[address] = held, weakref.ref(storage, freed)
        self._events.append((self.phase, held, size))
        return held

    def _collective(self, func: Any, args: Any) -> Any:
        """Counts what is sent; of fake tensors nothing is, and this is the answer."""
        kind = COLLECTIVES.get(func._schema.name.removeprefix("c10d::"))
        if kind:
            tensor = args[0][0] if kind == "all-reduce" else args[kind == "reduce-scatter"]
            group = dist.ProcessGroup.unbox(args[1 if kind == "all-reduce" else 2])
            if group.group_name not in self._spread:
                members = dist.get_process_group_ranks(group)
                self._spread[group.group_name] = len(members), len({rank // self.machine for rank in members})
            ranks, machines = self._spread[group.group_name]
            size = (2 if kind == "all-reduce" else 1) * tensor.numel() * tensor.element_size()
            if machines < ranks:
                self.work.sent[kind, "inside"] += size * (ranks - 1) // ranks
            if machines > 1:  # what the machine sends, shared among its ranks of the group
                self.work.sent[kind, "between"] += size * (machines - 1) // ranks
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args)):
            return None
        from torch._C._distributed_c10d import FakeWork

        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` meanwhile, for all of this process; nothing happens if the owner has no such name."""
    before = getattr(owner, name, None)
    if before is not None:
        setattr(owner, name, value)
    try:
        yield
    finally:
        if before is not None:
            setattr(owner, name, before)


@contextmanager
def fake_processes(world_size: int) -> Iterator[None]:
    """This process is rank 0 of so many, of which there are no others: what it exchanges with them goes nowhere."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def first_of(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
        return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // count))]

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        # FSDP2 makes a tensor of each rank's part of each parameter, 16,384 of them, and keeps its own. There is no other
        # way in; without it this only takes longer.
        with replaced(_fsdp_param, "_chunk_with_empty", first_of), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Set timeout")  # which nobody here waits for
            yield
    finally:
        dist.destroy_process_group()
