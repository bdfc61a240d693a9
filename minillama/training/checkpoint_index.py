"""The index of a sharded checkpoint: in which file, and where in it, the rows of a tensor are. JSON, which runs no code.

torch.distributed.checkpoint has its own index, the pickle `.metadata`. It is written, so that PyTorch's tools read the
checkpoint too, but we never read it: a pickle can run code, and it can make DCP call torch.load on files that do.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from minillama.errors import UserError
from minillama.files import read_json
from minillama.parallel.sharding import local

INDEX = "index.json"
"""{tensor: {"dtype", "shape", "parts": [[first row, rows, file, first byte, bytes], ...]}}; a number counts as one row."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)
}


def write_part(folder: Path, state: dict[str, dict[str, Tensor]]) -> tuple[str, dict[str, Any]]:
    """Writes what is this rank's to write of a state, in DCP's format; returns the file's name and its part of the index.

    Nothing is asked of other ranks: dcp.save gathers the plans of all on one, and sends all of them the whole index.
    """
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(state)
    plan, tensors = planner.create_local_plan(), planner.state_dict
    largest_first = sorted(tensors, key=lambda name: (-tensors[name].numel(), name))
    turns = {name: turn for turn, name in enumerate(largest_first)}
    own = [item for item in plan.items if _writes(item.index.fqn, tensors[item.index.fqn], turns)]
    plan = replace(plan, items=own, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))
    index = {}
    for written in dcp.FileSystemWriter(folder).write_data(plan, planner).wait():
        name, place, offset = written.index.fqn, written.storage_data, written.index.offset or ()
        tensor = tensors[name]
        assert not any(offset[1:]), name
        row, rows = (offset[0], len(local(tensor))) if offset else (0, 1)
        part = [row, rows, place.relative_path, place.offset, place.length]
        dtype = str(tensor.dtype).removeprefix("torch.")
        index[name] = {"dtype": dtype, "shape": list(tensor.shape), "parts": [part]}
    return f"__{dist.get_rank()}_0.distcp", index


def _writes(name: str, tensor: Tensor, turns: dict[str, int]) -> bool:
    """Whether this rank writes its part, of those that hold the same; they take turns."""
    if name.startswith("random."):  # which each has of its own
        return True
    if not isinstance(tensor, DTensor):
        return turns[name] % dist.get_world_size() == dist.get_rank()
    mesh = tensor.device_mesh
    copies = [d for d, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return local(tensor).numel() > 0 and all(turns[name] % mesh.size(d) == mesh.get_local_rank(d) for d in copies)


def write_index(folder: Path, parts: Iterable[dict[str, Any]], sizes: dict[str, int]) -> None:
    """Our index and DCP's, of what write_part has returned on all ranks. sizes: of the files, in bytes."""
    index: dict[str, Any] = {}
    for part in parts:
        for name, entry in part.items():
            index.setdefault(name, entry | {"parts": []})["parts"] += entry["parts"]
    for entry in index.values():
        entry["parts"].sort()
    with (folder / INDEX).open("w") as file:
        json.dump(index, file)
        file.flush()
        os.fsync(file.fileno())
    metadata = read_index(folder, sizes)
    metadata.planner_data = {name: tuple(name.split(".", 1)) for name in index}
    places = metadata.storage_data.items()
    dcp.FileSystemWriter(folder).finish(metadata, [[WriteResult(key, place.length, place) for key, place in places]])


def read_index(folder: Path, sizes: dict[str, int] | None = None, content: dict[str, Any] | None = None) -> Metadata:
    """The index as DCP's metadata: only tensors, whole, each row once, in files of this folder.

    sizes: of the files, in bytes, content: of the index, if they are known. Raises UserError for any other index.
    """
    if sizes is None:
        sizes = {file.name: file.stat().st_size for file in folder.glob("*.distcp")}
    described, places = {}, {}
    for name, entry in (content or read_json(folder / INDEX)).items():
        try:
            dtype, shape = DTYPES[entry["dtype"]], torch.Size(entry["shape"])
            chunks, end = [], 0
            for row, rows, file, start, length in entry["parts"]:
                if not 0 <= start < start + length <= sizes[file]:
                    raise ValueError(f"a part that is not in {file}")
                if row != end or rows < 1:
                    raise ValueError(f"row {end} is missing")
                end += rows
                offsets = torch.Size([row, *[0] * (len(shape) - 1)][: len(shape)])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size([rows, *shape[1:]][: len(shape)])))
                places[MetadataIndex(name, offsets)] = _StorageInfo(file, start, length)
            if min(shape, default=0) < 0 or end != (shape[0] if shape else 1):
                raise ValueError(f"{end} rows")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{folder / INDEX} is none that this version wrote, at {name:.80}: {error!r:.80}") from None
        described[name] = TensorStorageMetadata(TensorProperties(dtype), shape, chunks)
    return Metadata(described, storage_data=places)  # type: ignore[arg-type]


class IndexReader(dcp.FileSystemReader):
    """DCP's reader, with our index, which is read once. sizes, content: as read_index takes them."""

    def __init__(
        self, folder: Path, sizes: dict[str, int] | None = None, content: dict[str, Any] | None = None
    ) -> None:
        super().__init__(folder)
        self.index = read_index(folder, sizes, content)

    def read_metadata(self) -> Metadata:
        self.index.storage_meta = StorageMeta(load_id=self.load_id)
        return self.index


def read_into(state: dict[str, Any], reader: dcp.FileSystemReader) -> None:
    """Fills these tensors, the parts of them that this rank holds.

    Nothing is asked of other ranks: dcp.load gathers what each will read, and that each has read it.
    """
    planner, metadata = dcp.DefaultLoadPlanner(), reader.read_metadata()
    planner.set_up_planner(state, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner).wait()
