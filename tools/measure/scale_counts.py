"""What rank 0 exchanges with the other ranks and which files it opens, in a run of any number of ranks.

    python tools/measure/scale_counts.py --model DIR
    python tools/measure/scale_counts.py --model DIR --ranks 64 --strategy hybrid-shard

recipes/full_fsdp.py runs in this one process, in PyTorch's fake process group: it starts, takes a step, evaluates, saves and
resumes. Nothing is sent. What the other ranks would have sent is made from rank 0's own, so losses mean nothing. FSDP2 makes
rank 0's part of each parameter only. The other ranks' checkpoint files are rank 0's under their names, and no tensors are
read from them when it resumes. Rank 0 asks and opens what the others do, and more. DIR: a small model.

Bytes of a collective are those of the larger of what a rank gives and gets; of an object, its pickle; of files, their size.
Heartbeats and the rendezvous, which are not collectives, are not counted here.
"""

import importlib
import json
import os
import pickle
import shlex
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.utils._python_dispatch import TorchDispatchMode

from minillama.errors import UserError
from minillama.files import write_json
from minillama.help import filled
from minillama.parallel import heartbeat
from minillama.parallel.failures import user_errors
from minillama.training import checkpoint
from minillama.training.alive import fake_processes, replaced
from minillama.training.checkpoint_index import IndexReader

ROOT = Path(__file__).parents[2]
KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
    "gather_": "gather",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
}


@dataclass(frozen=True)
class Args:
    """Counts what a rank sends to others and which files it opens."""

    model: Path
    """Folder of a small model."""
    ranks: tuple[int, ...] = (8, 512, 16384)
    """How many there are, one or several numbers."""
    machine: int = 8
    """Ranks of one machine."""
    strategy: Literal["full-shard", "hybrid-shard"] = "full-shard"
    """As --fsdp.strategy of the recipe. Under hybrid-shard the ranks of a machine shard the model."""
    flags: str = "--fsdp.precision fp32"
    """More flags of recipes/full_fsdp.py."""
    json: Path | None = None
    """File for the counts."""


Counts = dict[str, dict[str, list[int]]]
"""By phase and kind: how many, bytes"""


class Counted(TorchDispatchMode):
    """Counts collectives by the phase that a run says it is in, and gives them an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = defaultdict(lambda: defaultdict(lambda: [0, 0]))
        self.quiet = False
        sys.addaudithook(self._opened)

    def note(self, kind: str, size: int) -> None:
        entry = self.counts[phase()][kind]
        entry[0] += 1
        entry[1] += size

    def _opened(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not self.quiet and isinstance(args[0], (str, os.PathLike)):
            path, flags = Path(args[0]), args[2]
            if path.suffix not in (".py", ".pyc", ".so") and not str(path).startswith(
                ("/proc", "/sys", "/dev", "/usr")
            ):
                writes = flags & (os.O_WRONLY | os.O_RDWR)
                self.note("files written" if writes else "files read", 0 if writes else _size(path))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # which makes its collectives of plain tensors
        namespace, _, name = func._schema.name.partition("::")
        if namespace not in ("c10d", "_c10d_functional") or name == "wait_tensor":
            return func(*args, **(kwargs or {}))
        answer = func(*args, **(kwargs or {}))
        kind = KINDS.get(name, name)
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            output, given = args[0], args[1]
        elif name == "gather_":
            output, given = None, args[1][0]
        elif namespace == "c10d":
            output, given = None, args[0][0]
        else:
            output, given = answer, args[0]
        if kind == "all-gather":  # of copies of rank 0's
            output.view(-1, *given.shape).copy_(given.expand(output.numel() // given.numel(), *given.shape))
        elif kind == "reduce-scatter":
            output.view(-1).copy_(given.view(-1)[: output.numel()])
        self.note(kind, _bytes(output if kind == "all-gather" else given))
        return answer


def phase() -> str:
    where = heartbeat._doing[0]
    for name in ("saving", "evaluation", "step"):
        if name in where:
            return name
    return "start-up"


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


class Others:
    """What the other ranks would have sent to rank 0."""

    def __init__(self, counted: Counted, shards: int) -> None:
        self.counted, self.shards = counted, shards
        self.plans: list[SavePlan] = []

    def plan(self, mine: SavePlan, rank: int) -> SavePlan:
        """Of a rank that has its own rows of each tensor that is sharded, and a whole copy of each other."""
        items = []
        for item in mine.items:
            assert item.tensor_data
            size, chunk = item.tensor_data.size, item.tensor_data.chunk
            fqn = item.index.fqn.replace("random.0.", f"random.{rank}.")
            row, end = (rank % self.shards) * chunk.sizes[0] if chunk.sizes else 0, size[0] if size else 1
            if chunk.sizes == size:
                row = 0
            if row < end:
                offsets = torch.Size([row, *chunk.offsets[1:]][: len(size)])
                sizes = torch.Size([min(chunk.sizes[0], end - row), *chunk.sizes[1:]] if size else [])
                data = replace(item.tensor_data, chunk=ChunkStorageMetadata(offsets, sizes))
                items.append(replace(item, index=MetadataIndex(fqn, offsets), tensor_data=data))
        return replace(mine, items=items)

    def results(self, mine: list[WriteResult], rank: int) -> list[WriteResult]:
        """Of a rank that wrote its plan, to a file in which parts begin where they do in rank 0's."""
        plan, places = self.plans[rank], cycle(mine)
        file = f"{plan.storage_data.prefix}0.distcp"
        return [
            replace(of, index=item.index, storage_data=replace(of.storage_data, relative_path=file))
            for item, of in zip(plan.items, places, strict=False)
        ]

    def gather(self, tensor: torch.Tensor, gather_list: list[torch.Tensor] | None = None, **_: Any) -> None:
        self.counted.note("gather to rank 0", _bytes(tensor))
        text = bytes(tensor.tolist()).rstrip(b"\0").decode()
        for rank, each in enumerate(gather_list or ()):
            files = {name.replace("__0_", f"__{rank}_"): file for name, file in json.loads(text).items()}
            of_rank = {name: file for name, file in files.items() if not rank or name.startswith("__")}
            content = json.dumps(of_rank).encode().ljust(len(each), b"\0")[: len(each)]
            each.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def gather_object(self, obj: Any, object_gather_list: list[Any] | None = None, **_: Any) -> None:
        self.counted.note("PyTorch's gather of objects to rank 0", len(pickle.dumps(obj)))
        for rank in range(len(object_gather_list or ())):
            assert object_gather_list
            answer = obj
            if isinstance(obj, SavePlan) and rank:
                answer = self.plan(obj, rank)
            elif isinstance(obj, list) and obj and isinstance(obj[0], WriteResult) and rank:
                answer = self.results(obj, rank)
            object_gather_list[rank] = answer

    def scatter_object_list(
        self, scatter_object_output_list: list[Any], scatter_object_input_list: list[Any], **_: Any
    ) -> None:
        mine = scatter_object_input_list[0]
        self.counted.note("PyTorch's scatter of objects from rank 0", len(pickle.dumps(mine)))
        if isinstance(mine, SavePlan):
            self.plans = scatter_object_input_list
        scatter_object_output_list[0] = mine

    def all_gather_object(self, object_list: list[Any], obj: Any, **_: Any) -> None:
        self.counted.note("objects of all ranks to all ranks", len(pickle.dumps(obj)))
        object_list[:] = [obj] * len(object_list)

    @contextmanager
    def answer(self) -> Iterator[None]:
        new_group, check_shared = dist.new_group, checkpoint._check_shared

        def group(*args: Any, **kwargs: Any) -> Any:
            self.counted.note("groups made", 0)
            return new_group(*args, **(kwargs | {"backend": "fake"}))

        def write_theirs(path: Path, names: Iterable[str]) -> None:
            self.counted.quiet = True
            for name in names:
                if not (path / name).exists():
                    os.link(path / "__0_0.distcp", path / name)
            self.counted.quiet = False
            check_shared(path, names)

        def read_nothing(*_: Any) -> Future[None]:
            done: Future[None] = Future()
            done.set_result(None)
            return done

        names = ("gather", "gather_object", "scatter_object_list", "all_gather_object")
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(replaced(dist, name, getattr(self, name)))
            stack.enter_context(replaced(dist, "new_group", group))
            stack.enter_context(replaced(checkpoint, "_check_shared", write_theirs))
            stack.enter_context(replaced(IndexReader, "read_data", read_nothing))
            yield


def count(args: Args, ranks: int, folder: Path) -> dict[str, Counts]:
    """Of a run's start, first step, evaluation and checkpoint, and of a start that resumes."""
    sys.path.insert(0, str(ROOT / "recipes"))
    recipe = importlib.import_module("full_fsdp")
    flags = [f"--model={args.model}", f"--output-dir={folder / 'out'}", f"--data.cache-dir={folder / 'cache'}"]
    flags += [
        "--device=cpu",
        f"--fsdp.strategy={args.strategy}",
        "--checkpoint.no-async-save",
        "--train.max-steps=1",
        *shlex.split(args.flags),
    ]
    config = tyro.cli(filled(recipe.Config), args=flags)

    @contextmanager
    def pretended(*_: Any) -> Iterator[str]:
        yield "cpu"

    vars(recipe).update(process_group=pretended, save_pretrained=nothing, finish_run=nothing)
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": min(args.machine, ranks)}
    os.environ |= {key: str(value) for key, value in place.items()}
    found = {}
    for name in ("first", "resumed"):
        heartbeat.stand("start-up")
        counted = Counted()
        shards = args.machine if args.strategy == "hybrid-shard" else ranks
        print(f"{ranks:,} ranks, {'starting' if name == 'first' else name}", file=sys.stderr)
        with fake_processes(ranks), Others(counted, shards).answer(), counted, redirect_stdout(sys.stderr):
            recipe.main(config)
        counted.quiet = True
        found[name] = counted.counts
        config = tyro.cli(filled(recipe.Config), args=[*flags, "--resume=auto"])
    return found


def nothing(*_: Any, **__: Any) -> None:
    return None


def main(args: Args) -> None:
    if not args.model.is_dir():
        raise UserError(f"--model {args.model}: no such folder; give that of a small model")
    found: dict[int, dict[str, Counts]] = {}
    for ranks in args.ranks:
        folder = Path(tempfile.mkdtemp())
        try:
            found[ranks] = count(args, ranks, folder)
        finally:
            shutil.rmtree(folder)
    rows = {
        (start, phase, kind): None
        for starts in found.values()
        for start, phases in starts.items()
        for phase, kinds in phases.items()
        for kind in kinds
        if start == "first" or phase == "start-up"
    }
    print("| phase | what | " + " | ".join(f"{ranks:,} ranks" for ranks in found) + " |")
    print("|---" * (len(found) + 2) + "|")
    for start, where, kind in rows:
        cells = []
        for starts in found.values():
            number, size = starts[start].get(where, {}).get(kind, (0, 0))
            cells.append(f"{number}" + f", {size / 1024:,.1f} KiB" * bool(size))
        print(f"| {'resuming' if start == 'resumed' else where} | {kind} | " + " | ".join(cells) + " |")
    if args.json:
        write_json(args.json, {str(ranks): starts for ranks, starts in found.items()})


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(filled(Args)))
