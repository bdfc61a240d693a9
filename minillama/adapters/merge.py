"""A base model with what was trained on top of it (a LoRA, or a checkpoint), read a few rows at a time."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from mmap import ACCESS_READ, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from struct import error as StructError
from struct import unpack_from
from typing import IO, Any, cast
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minillama.adapters.llama_adapter import LlamaAdapterConfig
from minillama.adapters.lora import LoraConfig, merge, row_norms
from minillama.adapters.peft import (
    CHANGE,
    AdapterConfig,
    adapt,
    as_peft,
    check_adapter,
    check_copy,
    copies_of_base,
    other_base,
    peft_config,
    peft_name,
    read_adapter_config,
    write_adapter,
)
from minillama.errors import UserError
from minillama.files import misfit
from minillama.formats.hf import (
    SafetensorsWeights,
    adapter_parameters,
    check_weights,
    read_config,
    tensor_names,
    weights_fingerprint,
)
from minillama.formats.hf_export import write_model
from minillama.formats.hub import model_name
from minillama.formats.meta import Weights, finite
from minillama.formats.quantized import Quantize, QuantizingWeights, quantize_base
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.training.checkpoint_index import read_index
from minillama.training.resume import MANIFEST, CorruptCheckpoint, damage_of, read_manifest, unreadable_text

LENGTH_ROWS = 1024
"""Rows whose lengths are computed at a time"""


class MergedWeights:
    """The tensors of a base with a LoRA or DoRA added in fp32: W + scale * B A, row by row."""

    def __init__(self, base: Weights, trained: Weights, lora: LoraConfig, config: LlamaConfig, *, peft: bool) -> None:
        """trained: the adapter's tensors, under PEFT's names or (a checkpoint's) ours. config: the base's."""
        self._base, self._trained, self._lora = base, trained, lora
        self._name: Callable[[str], str] = peft_name if peft else str
        prefix = peft_name("") if peft else ""
        adapters = (name for name in trained.names if ".lora_" in name)
        self._adapted = {name.removeprefix(prefix).partition(".lora_")[0] for name in adapters}
        self.config, self.names = config, list(base.names)
        self._copies: dict[str, list[str]] = {}
        for name, copied in copies_of_base(trained.names).items() if peft else ():
            source = copied if copied in base.names else "model.embed_tokens.weight"
            self._copies.setdefault(source, []).append(name)
        ends = self._adapted & {"lm_head", "model.embed_tokens"}
        if config.tie_word_embeddings and ends:  # the other must not get what one of the two learned
            self.config = replace(config, tie_word_embeddings=False)
            self.names += [] if "lm_head.weight" in base.names else ["lm_head.weight"]

    def shape(self, name: str) -> list[int]:
        return self._base.shape(self._source(name))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the base: what is to be written."""
        return self._base.dtype(self._source(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start, ...), fp32 where something was added."""
        weight, module = self._base.rows(self._source(name), start, stop), name.removesuffix(".weight")
        for copy in self._copies.get(name, []):
            check_copy("the adapter", name, self._trained.rows(copy, start, stop), weight)
        if module not in self._adapted or not name.endswith(".weight"):
            return weight
        if module.endswith("embed_tokens"):
            a, b = self._whole(f"{module}.lora_embedding_B").T, self._whole(f"{module}.lora_embedding_A").T[start:stop]
        else:
            a = self._whole(f"{module}.lora_A.weight")
            b = self._trained.rows(self._name(f"{module}.lora_B.weight"), start, stop)
        change = None
        if self._lora.dora:
            change = self._trained.rows(self._name(module + CHANGE), start, stop)
            if self._name is peft_name:  # PEFT holds the whole length
                change = change - row_norms(weight)
        return merge(weight, a, b, self._lora.of(module).scale, change=change)

    def _whole(self, name: str) -> Tensor:
        name = self._name(name)
        return self._trained.rows(name, 0, self._trained.shape(name)[0])

    def _source(self, name: str) -> str:
        return name if name in self._base.names else "model.embed_tokens.weight"


class TrainedWeights:
    """The tensors of a base, with the trained ones in place of its own; each has the dtype that it has in the base."""

    def __init__(self, base: Weights, trained: Weights) -> None:
        self._base, self._trained, self.names = base, trained, base.names

    def shape(self, name: str) -> list[int]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return (self._trained if name in self._trained.names else self._base).rows(name, start, stop)


class ShardedWeights:
    """The trained parameters of a checkpoint in torch.distributed.checkpoint's format, mapped, not loaded.

    DCP's own loading holds a whole tensor twice. Its file has one zip archive a shard, as torch.save writes them, with the
    shard's bytes uncompressed in the entry `archive/data/0`.
    """

    def __init__(self, folder: Path) -> None:
        index = read_index(folder)
        self._folder = folder
        self._tensors = {
            name.removeprefix("model."): tensor
            for name, tensor in index.state_dict_metadata.items()
            if name.startswith("model.") and isinstance(tensor, TensorStorageMetadata)
        }
        self.names = list(self._tensors)
        self._places: dict[str, dict[int, Any]] = {name: {} for name in self.names}
        for key, place in index.storage_data.items():
            if key.offset and key.fqn.startswith("model."):
                self._places[key.fqn.removeprefix("model.")][key.offset[0]] = place

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start, ...), a copy. Raises UserError for NaN and infinity."""
        found = torch.empty(stop - start, *self.shape(name)[1:], dtype=self.dtype(name))
        for chunk in self._tensors[name].chunks:
            first, count = chunk.offsets[0], chunk.sizes[0]
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                row_bytes = found[:1].nbytes
                part = slice((low - first) * row_bytes, (high - first) * row_bytes)
                content = bytearray(self._read(name, first, count * row_bytes, part))
                found[low - start : high - start] = torch.frombuffer(content, dtype=found.dtype).view(
                    -1, *found.shape[1:]
                )
        return finite(found, name, self._folder)

    def _read(self, name: str, first: int, size: int, part: slice) -> bytes:
        """A part of the bytes of the shard that begins with row `first`."""
        place = self._places[name][first]
        start = place.offset // ALLOCATIONGRANULARITY * ALLOCATIONGRANULARITY
        length = place.offset + place.length - start
        content = b""
        with (
            (self._folder / place.relative_path).open("rb") as file,
            mmap(file.fileno(), length, access=ACCESS_READ, offset=start) as mapped,
            suppress(BadZipFile, KeyError, StructError, ValueError, OverflowError),
        ):
            entry = ZipFile(cast(IO[bytes], mapped)).getinfo("archive/data/0")
            if entry.compress_type == ZIP_STORED and entry.file_size == size:
                # the entry's own header: 30 bytes, the last four the lengths of what follows before the data
                name_length, extra_length = unpack_from("<HH", mapped, entry.header_offset + 26)
                data = entry.header_offset + 30 + name_length + extra_length
                content = mapped[data + part.start : data + part.stop]
        if len(content) != part.stop - part.start:
            raise UserError(f"{self._folder / place.relative_path}: {name} is not stored as this version knows it")
        return content


def open_checkpoint(folder: Path) -> tuple[dict[str, Any], Weights]:
    """(checkpoint.json, the trained parameters) of a checkpoint that is sound. Raises UserError for any other folder."""
    name = MANIFEST
    try:
        content = read_manifest(folder)
        for name in sorted(content["files"]):
            if problem := damage_of(folder, name, content["files"][name]):
                raise CorruptCheckpoint(problem)
    except FileNotFoundError:
        raise UserError(f"{folder} is not a sound checkpoint, give another: {name} is missing") from None
    except OSError as error:
        raise UserError(unreadable_text(folder, error.strerror or str(error), name)) from None
    except CorruptCheckpoint as error:
        raise UserError(f"{folder} is not a sound checkpoint, give another: {error}") from None
    if content["format"] == "sharded":
        return content, ShardedWeights(folder)
    files = sorted((folder / "model").glob("*.safetensors"))
    return content, SafetensorsWeights({name: file for file in files for name in tensor_names(file)})


def adapter_of(content: dict[str, Any]) -> AdapterConfig | None:
    """The adapter that a checkpoint.json describes; None: full fine-tuning."""
    if content["flags"].get("method") == "full":  # of preference tuning, whose flags have a LoRA all the same
        return None
    kinds: dict[str, type[LoraConfig] | type[LlamaAdapterConfig]] = {"lora": LoraConfig, "adapter": LlamaAdapterConfig}
    for group, kind in kinds.items():
        if flags := content["flags"].get(group):
            shape: dict[str, Any] = {
                name: [str] if isinstance(value, tuple) else type(value) for name, value in asdict(kind()).items()
            }
            shape |= {"ranks": {...: int}, "alphas": {...: float}}
            shape = {name: one for name, one in shape.items() if name in flags}
            if problem := misfit(flags, shape, f"flags.{group}"):
                raise UserError(f"{MANIFEST}: {problem}")
            values: dict[str, Any] = {name: flags[name] for name in shape}
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            return kind(**values)
    return None


def merge_adapter(
    base: Path,
    adapter: Path,
    target: Path,
    tokenizer: Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    any_base: bool = False,
    from_quantized: Quantize = "none",
) -> None:
    """Writes base and LoRA, in PEFT's format, as one Hugging Face folder: added in fp32, a few rows at a time.

    Every rank must call it; rank 0 works. dtype: None keeps the base's. from_quantized: adds to what the base dequantises
    to, as a QLoRA was trained on, rather than to its own weights; a base in a quantised folder has no others. Raises
    UserError for an adapter that cannot be merged, and for one that does not fit the base, or names another unless
    any_base.
    """
    lora, config = read_adapter_config(adapter), read_config(base)
    if not isinstance(lora, LoraConfig):
        raise UserError(f"{adapter} is a llama-adapter, which cannot be merged: only LoRA is a change of weights")
    if not any_base and (problem := other_base(base, adapter)):
        raise UserError(f"{problem}: give the right base, or --any-base to merge all the same")
    with torch.device("meta"):
        model = Llama(config)
    weights = check_weights(model, base)
    quantize_base(model, weights, from_quantized)
    if from_quantized != "none":
        weights = QuantizingWeights(weights, from_quantized)
    check_adapter(adapt(model, lora), adapter)
    file = adapter / "adapter_model.safetensors"
    trained = SafetensorsWeights(dict.fromkeys(tensor_names(file), file))
    merged = MergedWeights(weights, trained, lora, config, peft=True)
    write_model(merged, merged.config, target, base, tokenizer, dtype=dtype)


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    base: Path | None = None,
    tokenizer: Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    adapter_only: bool = False,
) -> None:
    """Writes a checkpoint and the base it was trained on as one Hugging Face folder, a few rows at a time.

    base: None: the folder that the run had. adapter_only: writes the adapter in PEFT's format instead, as is always done
    with a llama-adapter, which cannot be merged. Raises UserError for a damaged checkpoint and another base than the run's.
    """
    content, trained = open_checkpoint(checkpoint)
    flags, adapter = content["flags"], adapter_of(content)
    base = base or Path(flags["model"])
    if not base.is_dir():
        raise UserError(f"the base model {base} is not there: give its folder by --base")
    if weights_fingerprint(base) != content["fingerprints"]["model"]:
        raise UserError(f"{base} is not the model that {checkpoint} was trained on: give that one by --base")
    if dtype is not None and (adapter_only or isinstance(adapter, LlamaAdapterConfig)):
        raise UserError(
            f"--dtype {str(dtype).removeprefix('torch.')}: an adapter alone is written, and it keeps its own"
        )
    config = read_config(base)
    with torch.device("meta"):
        weights = check_weights(Llama(config), base)
        model = Llama(config) if adapter is None else adapt(Llama(config), adapter)
    wanted = dict(model.named_parameters()) if adapter is None else adapter_parameters(model)
    found = {name: trained.shape(name) for name in trained.names}
    wrong = [name for name, shape in found.items() if name not in wanted or shape != list(wanted[name].shape)]
    if wrong or (adapter is not None and found.keys() != wanted.keys()):
        names = ", ".join((wrong or sorted(wanted.keys() - found.keys()))[:4])
        raise UserError(f"the parameters in {checkpoint} are not those that its {MANIFEST} speaks of: {names}")
    tokenizer = tokenizer or (Path(flags["tokenizer"]) if flags["tokenizer"] else None)
    if adapter is None and adapter_only:
        raise UserError(f"{checkpoint} is of a full fine-tuning and has no adapter: leave --adapter-only out")
    if adapter is None:
        write_model(TrainedWeights(weights, trained), config, target, base, tokenizer, dtype=dtype)
    elif isinstance(adapter, LoraConfig) and not adapter_only:
        merged = MergedWeights(weights, trained, adapter, config, peft=False)
        write_model(merged, merged.config, target, base, tokenizer, dtype=dtype)
    else:
        tensors = {name: trained.rows(name, 0, trained.shape(name)[0]) for name in trained.names}
        for name in tensors:
            if name.endswith(CHANGE):
                tensors[name] = tensors[name] + lengths(weights, name.replace(CHANGE, ".weight"))
        tensors = {peft_name(name): as_peft(name, tensor) for name, tensor in tensors.items()}
        write_adapter(target, peft_config(adapter, model_name(base.resolve()), config.num_hidden_layers), tensors)


def lengths(weights: Weights, name: str) -> Tensor:
    """Of each row of a matrix: fp32 (rows,)."""
    height = weights.shape(name)[0]
    starts = range(0, height, LENGTH_ROWS)
    return torch.cat([row_norms(weights.rows(name, i, min(i + LENGTH_ROWS, height))) for i in starts])
