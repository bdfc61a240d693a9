"""What a rank of a large run asks of the others and of the disk, counted, with PyTorch's fake process group.

    python tools/measure/scale_counts.py --model DIR
    python tools/measure/scale_counts.py --model DIR --recipe recipes/lora_fsdp.py --strategy full-shard

For each number of ranks one process is rank 0, and then another is the first rank of the second machine, or rank 1 if
there is one machine. Each runs the recipe: start-up, two steps with an evaluation and a checkpoint after each, the model
at the end; and then resumes. What it asks for goes nowhere, so some things are not as in a real run:

- A sum or a maximum over all ranks is this rank's own number, and the gradients are 0.
- The objects that rank 0 broadcasts are noted, and given to the other rank in its turn. No other exchange of objects is
  possible: dist.all_gather_object and the like end the program.
- What the other ranks send to rank 0 of a checkpoint is made up, as long as the real. Their files are rank 0's under their
  names, and no tensors are read from them when it resumes.
- The store holds what it is told, says yes to each question, and other ranks give a new sign of life each time.
- The library safetensors opens a file of weights again each time after we have; that is not seen here.
"""

import json
import os
import pickle
import runpy
import sys
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillama.errors import UserError
from minillama.help import filled
from minillama.parallel import heartbeat
from minillama.parallel.failures import user_errors
from minillama.training import checkpoint

PHASES = {
    **dict.fromkeys(("start-up", "preparing the data", "loading the weights"), "start-up"),
    "step 2": "step",
    "the evaluation after step 1": "evaluation",
    "saving step 1": "save",
    **dict.fromkeys(("writing the model", "writing the adapter"), "model"),
}
"""By what the process says it is doing. What it does the first time, or besides these, is not counted."""
RESUMING = "resuming"
"""The start-up of the second run"""
KINDS = {
    **{"allreduce_": "all-reduce", "broadcast_": "broadcast", "gather_": "gather to rank 0", "barrier": "barrier"},
    **dict.fromkeys(("_allgather_base_", "allgather_", "all_gather_into_tensor"), "all-gather"),
    **dict.fromkeys(("_reduce_scatter_base_", "reduce_scatter_tensor"), "reduce-scatter"),
}
FLAGS = (
    "--device cpu --train.batch-size 1 --eval.every 1 --eval.max-steps 1 "
    "--checkpoint.every 1 --checkpoint.no-async-save --data.dataset text --data.batching padding "
    "--data.context-length 32 --fsdp.lost-seconds 6 --fsdp.precision fp32 --kernels.attention math"
)
Counts = Counter[tuple[str, str]]


@dataclass(frozen=True)
class ScaleCounts:
    """What a rank of a large run asks of the others and of the disk."""

    model: Path
    """A small model"""
    recipe: Path = Path("recipes/full_fsdp.py")
    ranks: tuple[int, ...] = (8, 512, 16384)
    machine: int = 8
    """Ranks of one"""
    strategy: Literal["full-shard", "shard-grad-op", "no-shard", "hybrid-shard"] = "hybrid-shard"
    json: Path | None = None
    """A file for the counts: by number of ranks, rank, phase and kind, how many and their bytes"""

    def __post_init__(self) -> None:
        if not self.model.is_dir():
            raise UserError(f"--model {self.model}: no such folder; give that of a small model")
        if wrong := [count for count in self.ranks if count < 2 or count % min(count, self.machine)]:
            raise UserError(f"--ranks {wrong[0]}: must be at least 2, and whole machines of {self.machine}")


class Counting(TorchDispatchMode):
    """Notes each collective with its bytes: of all that a rank has of it before or after, whichever is more."""

    def __init__(self, counts: Counts, sizes: Counts) -> None:
        super().__init__()
        self.counts, self.sizes = counts, sizes
        self.stores: list[dist.Store] = []
        self.resumes = False

    def phase(self) -> str | None:
        found = PHASES.get(heartbeat._doing[0])
        return found if not self.resumes else RESUMING if found == "start-up" else None

    def note(self, kind: str, size: int = 0, times: int = 1) -> None:
        if (phase := self.phase()) is None:
            return
        key = phase, kind
        self.counts[key] += times
        self.sizes[key] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with its local tensors
        namespace, name = func._schema.name.split("::")
        result = func(*args, **(kwargs or {}))
        if "c10d" in namespace and not name.startswith(("wait", "_wrap")):
            parts = [[leaf for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)] for part in (*args, result)]
            self.note(KINDS[name], max(sum(tensor.nbytes for tensor in part) for part in parts))
        if name == "_reduce_scatter_base_":
            args[0].zero_()
        elif name == "gather_":  # PyTorch 2.11's fake group leaves the others' empty
            for others in args[0]:
                for tensor in others:
                    tensor.copy_(args[1][0])
        return result


class Store(dist.Store):
    """what: whose requests are noted."""

    def __init__(self, noted: Counting, what: str = "store") -> None:
        super().__init__()
        self.noted, self.what, self.content, self.signs = noted, what, dict[str, bytes](), 0
        noted.stores.append(self)  # a prefix of the store, which is C++, keeps no reference to Python's part

    def clone(self) -> "Store":
        return Store(self.noted, "heartbeat")

    def _note(self, keys: int = 1) -> None:
        if self.what == "store":
            self.noted.note("keys asked of the store", times=keys)
        else:
            key = "heartbeat", "keys of the largest request"
            self.noted.counts[key] = max(self.noted.counts[key], keys)

    def _answer(self, key: str) -> bytes:
        self.signs += 1
        return self.content.get(key) or (f"{self.signs}\t0\tmachine\tstep" if "/sign/" in key else "1").encode()

    def set(self, key: str, value: str | bytes) -> None:
        self._note()
        self.content[key] = value if isinstance(value, bytes) else value.encode()

    def get(self, key: str) -> bytes:
        self._note()
        return self._answer(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._note(len(keys))
        return [self._answer(key) for key in keys]

    def add(self, key: str, value: int) -> int:
        self._note()
        return value

    def check(self, keys: list[str]) -> bool:
        self._note(len(keys))
        return not any(key.endswith(("/lost", "/errors")) for key in keys)


def parts_of_all(state: dict[str, dict[str, torch.Tensor]], own: str, folder: Path) -> list[str]:
    """What all ranks would send of a checkpoint to rank 0, which sends `own`."""
    texts = [json.loads(own) for _ in range(dist.get_world_size())]
    [(name, described)] = texts[0]["files"].items()
    for rank, text in enumerate(texts):
        file = name.replace("__0_", f"__{rank}_")
        if rank:
            os.link(folder / name, folder / file)
        random = {key.replace(".0.", f".{rank}."): entry for key, entry in text["index"].items() if ".0.cpu" in key}
        for entry in random.values():
            entry["parts"][0][2] = file
        text |= {"files": {file: described}, "index": random}
    for part in ("model", "optimizer"):
        for key, tensor in state[part].items():
            shards = tensor.device_mesh.size(-1) if isinstance(tensor, DTensor) else 1
            rows = tensor.shape[0] if tensor.ndim else 1
            step = -(-rows // shards)
            for rank, row in enumerate(range(0, rows, step)):
                file = name.replace("__0_", f"__{rank}_")
                place = [row, min(step, rows - row), file, 0, 1]  # where it is in the file is not read
                entry = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
                texts[rank]["index"][f"{part}.{key}"] = entry | {"parts": [place]}
    return [json.dumps(text) for text in texts]


def count(
    args: ScaleCounts, folder: Path, rank: int, ranks: int, resumes: bool, sent: list[tuple[int, bytes]]
) -> tuple[Counts, Counts, list[str], list[tuple[int, bytes]]]:
    """Of this rank: counts, bytes, the files that its start-up reads, and what rank 0 broadcasts, with the group's size.

    sent: the last, for another rank.
    """
    out = folder / str(ranks)
    machine = min(args.machine, ranks)
    env = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % machine, "LOCAL_WORLD_SIZE": machine}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_MAX_RESTARTS": 1}
    os.environ |= {name: str(value) for name, value in env.items()}
    noted, read, received = Counting(Counter(), Counter()), Counter[tuple[str, int]](), iter(sent)
    noted.resumes = resumes

    def opened(event: str, details: tuple[Any, ...]) -> None:
        if event not in ("open", "os.listdir", "os.scandir"):
            return
        path = str(details[0] or "")
        if not path.startswith((str(args.model), str(folder))):
            return
        writes = event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)
        noted.note("folders listed" if event != "open" else f"files opened to {'write' if writes else 'read'}")
        if event == "open" and not writes and noted.phase() == "start-up":
            name = (
                path.replace(f"{out}.{rank}/", "CACHE/")
                .replace(f"{out}/", "OUTPUT/")
                .replace(f"{args.model}/", "MODEL/")
            )
            read[name, os.path.getsize(path)] += 1

    def broadcast(objects: list[Any], src: int = 0, group: Any = None, device: Any = None) -> None:
        if src == rank:
            text = pickle.dumps(objects)
            sent.append((dist.get_world_size(group), text))
        else:
            text = next(text for size, text in received if rank < size)
            objects[:] = pickle.loads(text)
        noted.note("broadcast of an object", len(text))

    def group_of(common: Any, options: Any) -> FakeProcessGroup:
        noted.note("others in its process groups", times=common.group_size - 1)
        return FakeProcessGroup._create_internal(common.group_rank, common.group_size, FakeProcessGroup.Options())

    def impossible(*_: Any, **__: Any) -> None:
        raise NotImplementedError("an exchange of Python objects of all ranks")

    states = []

    def write_part(folder: Path, state: Any) -> Any:
        folder.mkdir(exist_ok=True)  # of rank 0's making
        states[:] = [folder, state]
        return write(folder, state)

    def texts_on_rank_zero(text: str, group: Any = None) -> list[str]:
        return parts_of_all(states[1], text, states[0]) if gather(text, group) else []

    write, gather = checkpoint.write_part, checkpoint.texts_on_rank_zero
    checkpoint.write_part, checkpoint.texts_on_rank_zero = write_part, texts_on_rank_zero
    checkpoint.IndexReader.read_data = lambda *_: torch.futures.collect_all([])
    heartbeat.Heartbeat._judge = lambda _: None  # which would end a process that has no time for its signs
    dist.broadcast_object_list = broadcast
    for name in ("all_gather_object", "gather_object", "scatter_object_list"):
        setattr(dist, name, impossible)
    dist.rendezvous = lambda *_, **__: iter([(Store(noted), rank, ranks)])
    dist.Backend.register_backend("counted", group_of, extended_api=True, devices=["cpu"])
    initialise, new_group = dist.init_process_group, dist.new_group
    dist.init_process_group = lambda backend, **options: initialise("counted", **options)
    dist.new_group = lambda ranks=None, backend="", **options: new_group(ranks, **options)
    warnings.filterwarnings("ignore", "Set timeout")
    sys.addaudithook(opened)
    flags = (
        f"{FLAGS} --fsdp.strategy {args.strategy} --model {args.model} --output-dir {out} --data.cache-dir {out}.{rank}"
    )
    flags += f" --data.path {folder}/rows.jsonl --data.val-path {folder}/rows.jsonl"
    flags += (
        " --resume auto --train.max-steps 3 --train.epochs 3" if resumes else " --train.max-steps 2 --train.epochs 2"
    )
    sys.argv = [str(args.recipe), *flags.split()]
    with StringIO() as said, redirect_stdout(said), redirect_stderr(said), noted:
        try:
            runpy.run_path(str(args.recipe), run_name="__main__")
        except BaseException:
            raise RuntimeError(f"rank {rank} of {ranks}: {said.getvalue()}{traceback.format_exc()}") from None
    files = [f"{name}, {times} times, {size:,} bytes" for (name, size), times in sorted(read.items())]
    return noted.counts, noted.sizes, files, sent


def text_of(times: int, size: int) -> str:
    return f"{times:,}" + (f", {size / 1000:,.1f} KB" if size else "")


def main(args: ScaleCounts) -> None:
    found: dict[int, dict[int, tuple[Counts, Counts]]] = {}
    files: list[str] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text('{"text": "Once"}\n' * max(args.ranks))  # one for each rank
        for ranks in args.ranks:
            pair = (0, args.machine if ranks > args.machine else 1)
            found[ranks] = {rank: (Counter(), Counter()) for rank in pair}
            for resumes in (False, True):
                sent: list[tuple[int, bytes]] = []
                for rank in pair:
                    # A forked process makes a new pool of threads, which threads of its own must not do at once.
                    with ProcessPoolExecutor(1, get_context("fork"), torch.set_num_threads, (1,)) as pool:
                        done = pool.submit(count, args, folder, rank, ranks, resumes, sent)
                        counts, sizes, read, sent = done.result()
                    files = files if resumes else read
                    total, total_size = found[ranks][rank]
                    total |= counts  # the runs have no phase in common; of the largest request, the larger
                    total_size |= sizes
    columns = {f"{ranks:,} ranks, rank {rank}": both for ranks, of in found.items() for rank, both in of.items()}
    order = [*dict.fromkeys(PHASES.values()), RESUMING, "heartbeat"]
    keys = {key for counts, _ in columns.values() for key in counts}
    print(f"| {args.recipe.stem}, {args.strategy} | | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for key in sorted(keys, key=lambda key: (order.index(key[0]), key[1])):
        print(f"| {' | '.join([*key, *(text_of(counts[key], sizes[key]) for counts, sizes in columns.values())])} |")
    print("\nThe files that the last of these ranks opens to read in its start-up:", *files, sep="\n")
    if args.json:
        content: dict[str, Any] = {}
        for ranks, of in found.items():
            for rank, (counts, sizes) in of.items():
                for (phase, kind), times in counts.items():
                    of_rank = content.setdefault(str(ranks), {}).setdefault(str(rank), {})
                    of_rank.setdefault(phase, {})[kind] = [times, sizes[phase, kind]]
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(filled(ScaleCounts)))
