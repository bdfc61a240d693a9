"""Writes Hugging Face folders: safetensors, config and tokenizer files."""

import json
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from minillama.errors import UserError
from minillama.files import new_folder, read_bytes, read_json, room_for, write_json
from minillama.formats.bitsandbytes import BitsandbytesTensors, quantization_config
from minillama.formats.hf import (
    INDEX,
    SAFETENSORS_DTYPES,
    TOKENIZER_FILES,
    adapter_parameters,
    base_parameters,
    check_weights,
    read_config,
)
from minillama.formats.meta import Weights, is_meta_folder
from minillama.formats.quantized import Quantize, QuantizingWeights
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.model.quant import quantized_layers
from minillama.parallel.heartbeat import stand
from minillama.parallel.processes import is_rank_zero, say
from minillama.parallel.sharding import reshard
from minillama.progress import progress
from minillama.tokenizer.export import is_tiktoken, tokenizer_config, tokenizer_json
from minillama.tokenizer.tokenizer import load_tokenizer

WRITTEN_DTYPES = SAFETENSORS_DTYPES | {torch.uint8: "U8", torch.int8: "I8"}
WRITE_BYTES = 4 * 2**20
"""Bytes of the pieces that are written: few enough to stay in a CPU's cache while they are cast and added to."""
MAX_FILE_BYTES = 4 * 2**30
"""Bytes of the files that save_pretrained writes (one tensor may have more), and so the host memory it takes on rank 0."""


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders out


def save_pretrained(
    model: Llama,
    folder: str | Path,
    base: str | Path,
    tokenizer: str | Path | None = None,
    *,
    unchanged: Collection[str] = (),
) -> None:
    """Writes a trained model, sharded or not, as a Hugging Face folder that transformers loads: whole, or not at all.

    Every rank must call it; with or without a process group. Parameters are gathered one at a time, and only rank 0
    keeps them, until they fill a file. Each tensor is cast to its dtype in `base`, the folder that the model was loaded
    from; the model itself stays as it is. The config and generation settings are copied from `base` too, and so are the
    tokenizer's files, unless `tokenizer` is given: another folder, or the tokenizer.json or tokenizer.model in it.

    unchanged: names of parameters that never trained and are copied from `base`: in the model they may have been rounded
    to the dtype it computes in.

    Raises UserError, on every rank, for a model with adapter parameters, a `base` of other shapes or one that `folder`
    would overwrite, and for what goes wrong on the disk.
    """
    stand("writing the model")
    folder, base = Path(folder).resolve(), Path(base).resolve()
    if adapter := next(iter(adapter_parameters(model)), None):
        raise UserError(
            f"the model has adapter parameters ({adapter}), of which a model folder knows nothing: save them with "
            "save_adapter, or merge_lora first"
        )
    if base.is_relative_to(folder):
        raise UserError(f"{folder} cannot be written: the base model is there, and its files are needed")
    # merge_lora makes two tensors of a tied head and embedding of which one was adapted
    untied = read_config(base).tie_word_embeddings and not model.config.tie_word_embeddings
    weights = check_weights(model, base, but=("lm_head.weight",) if untied else ())
    embedding = "model.embed_tokens.weight"
    dtypes = {n: weights.dtype(n if n in weights.names else embedding) for n in base_parameters(model)}
    copies = companions(base, tokenizer)
    made = tokenizer_files(copies, folder)
    if as_it_is := not untied and not is_meta_folder(base):
        copies["config.json"] = base / "config.json"

    if quantized_layers(model):
        raise UserError(
            "the model is quantised, and its plain weights are gone: tools/convert_checkpoint.py --quantize writes a "
            "quantised folder, tools/merge_lora.py one with an adapter in it"
        )
    reshard(model)  # first: only the sharded parameters stay
    parameters = base_parameters(model)
    sizes = {name: p.numel() * dtypes[name].itemsize for name, p in parameters.items()}
    files = split_into_files(sizes)

    def write_with_copies(file: Path, tensors: dict[str, Tensor], copied: list[str], needed: int) -> None:
        with room_for(needed, file.parent):
            write_tensors(file, tensors | {name: weights.rows(name, 0, weights.shape(name)[0]) for name in copied})

    with new_folder(folder, mark="config.json") as (path, on_disk):
        on_disk(copy_files, copies, path, made)
        if not as_it_is:
            described = config_json(base, model.config, dtypes[embedding], tokenizer)
            on_disk(write_json, path / "config.json", described)
        if len(files) > 1:
            on_disk(write_json, path / INDEX, _index(files, sizes))
        needed = sum(sizes.values())
        for file, names in files.items():
            tensors = {name: gather(parameters[name], dtypes[name]) for name in names if name not in unchanged}
            on_disk(write_with_copies, path / file, tensors, [name for name in names if name in unchanged], needed)
            needed -= sum(sizes[name] for name in names)


def write_model(
    weights: Weights,
    config: LlamaConfig,
    folder: str | Path,
    base: str | Path,
    tokenizer: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    quantize: Quantize = "none",
) -> None:
    """Writes tensors that can be read a few rows at a time as a Hugging Face folder: whole, or not at all.

    The files that go with them are those of `base`, and of `tokenizer` if given, as in save_pretrained. Every rank must
    call it; rank 0 reads and writes. dtype: None keeps each tensor's. quantize: writes the blocks' linear layers so, in
    bitsandbytes' format. Raises UserError for what goes wrong on the disk.
    """
    base = Path(base)
    copies = companions(base, tokenizer)
    made = tokenizer_files(copies, Path(folder))
    kind = dtype or weights.dtype("model.embed_tokens.weight")
    described = config_json(base, config, kind, tokenizer)
    if quantize != "none":
        weights = BitsandbytesTensors(QuantizingWeights(weights, quantize))
        described["quantization_config"] = quantization_config(quantize, kind)
    with new_folder(Path(folder), mark="config.json") as (path, on_disk):
        on_disk(copy_files, copies, path, made)
        on_disk(write_hf, weights, described, path, dtype)


def write_hf(weights: Weights, config: dict[str, Any], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and the tensors into a folder that exists, WRITE_BYTES at a time.

    config: the contents of config.json. dtype: None keeps each tensor's.
    """
    dropped = ("lm_head.weight",) if config.get("tie_word_embeddings") else ()
    names = [name for name in weights.names if name not in dropped and not name.endswith("rotary_emb.inv_freq")]
    dtypes = {name: dtype or weights.dtype(name) for name in names}
    sizes = {name: math.prod(weights.shape(name)) * dtypes[name].itemsize for name in names}
    files = split_into_files(sizes)
    write_json(folder / "config.json", config)
    if len(files) > 1:
        write_json(folder / INDEX, _index(files, sizes))
    total = sum(sizes.values())
    bar = progress(total=total, desc="writing", unit="B", unit_scale=True, leave=False)
    with bar, room_for(total, folder):
        for file, inside in files.items():
            # The format: 8 bytes with the length of a JSON header, the header, then all tensors' bytes as it says.
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in inside:
                kind, shape = WRITTEN_DTYPES[dtypes[name]], weights.shape(name)
                header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + sizes[name]]}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with (folder / file).open("wb") as opened:
                opened.write(len(text).to_bytes(8, "little") + text)
                for name in inside:
                    height = weights.shape(name)[0]
                    step = max(1, WRITE_BYTES * height // max(1, sizes[name]))
                    for start in range(0, height, step):
                        rows = weights.rows(name, start, min(start + step, height)).to(dtypes[name]).contiguous()
                        bar.update(opened.write(rows.view(torch.uint8).numpy().data))


def config_json(
    base: Path, config: LlamaConfig, dtype: torch.dtype, tokenizer: str | Path | None = None
) -> dict[str, Any]:
    """config.json of a model of this config and dtype that was made from `base`; keeps the other keys of base's own."""
    kind = str(dtype).removeprefix("torch.")
    if not is_meta_folder(base):
        described = read_json(base / "config.json")
        key = "dtype" if "dtype" in described else "torch_dtype"  # transformers 5's name, and 4's
        described.pop("quantization_config", None)  # what is written is not
        return described | {key: kind, "tie_word_embeddings": config.tie_word_embeddings}
    described = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": kind} | asdict(config)
    if any(path.exists() for path in companions(base, tokenizer).values()):
        known = load_tokenizer(tokenizer or base)
        described |= {"bos_token_id": known.bos_id, "eos_token_id": known.eos_id}
    return described


def split_into_files(sizes: dict[str, int]) -> dict[str, list[str]]:
    """Which tensors go into which safetensors file. sizes: bytes of each."""
    parts = split_by_size(sizes, MAX_FILE_BYTES)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": names for i, names in enumerate(parts, start=1)}


def _index(files: dict[str, list[str]], sizes: dict[str, int]) -> dict[str, Any]:
    weight_map = {name: file for file, names in files.items() for name in names}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


def split_by_size(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names, in order, in groups of at most `limit` bytes, or of one name with more."""
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > limit:
            groups.append([])
        groups[-1].append(name)
    return groups


def companions(base: Path, tokenizer: str | Path | None = None) -> dict[str, Path]:
    """Where the generation settings and the tokenizer's files are, there or not, by the names they have in a Hugging
    Face folder: those of `base`, or the tokenizer of another folder or file. Raises UserError if there is none."""
    path = base if tokenizer is None else Path(tokenizer)
    if tokenizer is not None:
        load_tokenizer(path)
    folder = path if path.is_dir() else path.parent
    found = {"generation_config.json": base / "generation_config.json"}
    found |= {file: folder / file for file in TOKENIZER_FILES}
    if not path.is_dir():
        found["tokenizer.json" if path.suffix == ".json" else "tokenizer.model"] = path
    elif not found["tokenizer.model"].exists():
        found["tokenizer.model"] = (
            folder / "original" / "tokenizer.model"
        )  # where it is in Meta's own Hugging Face folders
    return found


def tokenizer_files(copies: dict[str, Path], target: Path) -> dict[str, dict[str, Any]]:
    """Files to write besides these copies, if a tokenizer.model alone is not enough for transformers."""
    there = {name for name, path in copies.items() if path.exists()}
    if "tokenizer.model" not in there or there & {"tokenizer.json", "tokenizer_config.json"}:
        return {}
    content = read_bytes(copies["tokenizer.model"])
    made = None if is_tiktoken(content) else tokenizer_json(content)
    if made is None:
        say(
            f"note: minillama reads the tokenizer.model of {target}, transformers needs the tokenizer.json of the Hugging "
            "Face model: give its folder by --tokenizer, or copy its tokenizer's files there"
        )
        return {}
    return {"tokenizer.json": made, "tokenizer_config.json": tokenizer_config(content)}


def copy_files(sources: dict[str, Path], folder: Path, made: Mapping[str, dict[str, Any]] | None = None) -> None:
    """made: JSON files to write besides the copies."""
    for file, source in sources.items():
        if source.exists():
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / file)
    for file, content in (made or {}).items():
        write_json(folder / file, content)


def gather(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole parameter on the host of rank 0, and nothing on the others. Every rank must call it."""
    whole = parameter.detach().to(dtype or parameter.dtype)  # before it is sent: half the bytes from fp32 to bf16
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.cpu().contiguous() if is_rank_zero() else torch.empty(0)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes it readable for its owner only
