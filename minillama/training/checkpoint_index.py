"""The index of a sharded checkpoint: in which file, and where in it, the rows of a tensor are. JSON, which runs no code.

torch.distributed.checkpoint has its own index, the pickle `.metadata`. It is written, so that PyTorch's tools read the
checkpoint too, but we never read it: a pickle can run code, and it can make DCP call torch.load on files that do.
"""

import json
import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from minillama.errors import UserError
from minillama.files import read_json

INDEX = "index.json"
"""{tensor: {"dtype", "shape", "parts": [[first row, rows, file, first byte, bytes], ...]}}; a number counts as one row."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)
}


class IndexWriter(dcp.FileSystemWriter):
    """DCP's writer, which writes our index too. The tensors are split by rows, if at all."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        places = {written.index: written.storage_data for of_rank in results for written in of_rank}
        index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), name
            parts = []
            for chunk in tensor.chunks:
                assert chunk.sizes[1:] == tensor.size[1:], name
                place = places[MetadataIndex(name, chunk.offsets)]
                row, rows = (chunk.offsets[0], chunk.sizes[0]) if chunk.sizes else (0, 1)
                if rows:
                    parts.append([row, rows, place.relative_path, place.offset, place.length])
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            index[name] = {"dtype": dtype, "shape": list(tensor.size), "parts": sorted(parts)}
        with (Path(self.path) / INDEX).open("w") as file:
            json.dump(index, file)
            file.flush()
            os.fsync(file.fileno())
        metadata.state_dict_metadata, metadata.storage_data = {}, None  # dcp.save sends it to all ranks, for no use


def read_index(folder: Path, sizes: dict[str, int] | None = None) -> Metadata:
    """The index as DCP's metadata: only tensors, whole, each row once, in files of this folder.

    sizes: of the files, in bytes, if they are known. Raises UserError for any other index.
    """
    if sizes is None:
        sizes = {file.name: file.stat().st_size for file in folder.glob("*.distcp")}
    described, places = {}, {}
    for name, entry in read_json(folder / INDEX).items():
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
    """DCP's reader, with our index, which is read once. sizes: as read_index takes them."""

    def __init__(self, folder: Path, sizes: dict[str, int] | None = None) -> None:
        super().__init__(folder)
        self.index = read_index(folder, sizes)

    def read_metadata(self) -> Metadata:
        self.index.storage_meta = StorageMeta(load_id=self.load_id)
        return self.index
