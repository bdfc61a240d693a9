"""Meta's checkpoint folders, params.json and consolidated.NN.pth, under Hugging Face's names.

Meta rotates neighbours (0, 1), (2, 3), ... of a head, Hugging Face (0, D / 2), (1, D / 2 + 1), ...: the rows of q and k are
in another order. Several files hold equal parts of each tensor, one for each process of Meta's model parallelism.
"""

import math
import mmap
import os
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor
from torch.serialization import set_default_mmap_options, skip_data

from minillama.errors import UserError, disk_error
from minillama.files import open_file, read_json, room_for, write_json
from minillama.model.config import LlamaConfig
from minillama.progress import progress

PIECE_BYTES = 32 * 2**20
"""Bytes read or written at a time"""
OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 0),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
"""Hugging Face's name -> Meta's, and the dimension along which several files split the tensor (None: each has all)"""
BLOCK = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}

PARAMS = {
    **dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads"), int),
    **dict.fromkeys(("norm_eps", "rope_theta", "rope_scaling_factor", "low_freq_factor", "high_freq_factor"), float),
    "use_scaled_rope": bool,
}
"""The types of what we read of params.json, if it is there"""


class Weights(Protocol):
    """The tensors of a checkpoint, under Hugging Face's names, read a few rows at a time."""

    names: list[str]

    def shape(self, name: str) -> list[int]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


def finite(tensor: Tensor, name: str, where: str | Path) -> Tensor:
    """The tensor itself. Raises UserError for NaN and infinity."""
    plain = tensor.dtype.itemsize > 1 and tensor.is_floating_point()  # other dtypes are refused elsewhere
    if plain and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise UserError(
            f"{where}: {name} holds NaN or infinity: the file is damaged, or was saved after a failed training"
        )
    return tensor


def is_meta_folder(folder: Path) -> bool:
    return (folder / "params.json").exists() and not (folder / "config.json").exists()


def meta_names(num_layers: int) -> dict[str, tuple[str, int | None]]:
    """Hugging Face's name -> Meta's, and the dimension along which files split it."""
    names = dict(OUTSIDE_LAYERS)
    for i in range(num_layers):
        for ours, (theirs, dim) in BLOCK.items():
            names[f"model.layers.{i}.{ours}.weight"] = (f"layers.{i}.{theirs}.weight", dim)
    return names


class MetaWeights:
    """The tensors of a Meta folder, mapped and not yet read. Raises UserError for files that are missing or damaged."""

    def __init__(self, folder: Path) -> None:
        params = read_json(folder / "params.json")
        self.config = read_meta_config(folder)
        self._folder, self._parts = folder, _parts(folder)
        self._names = meta_names(params["n_layers"])
        known = {theirs for theirs, _ in self._names.values()} | {"rope.freqs"}
        for number, part in enumerate(self._parts):
            where = folder / f"consolidated.{number:02}.pth"
            if missing := [theirs for theirs, _ in self._names.values() if theirs not in part]:
                raise UserError(
                    f"{where} lacks {', '.join(missing[:4])}, which every Llama of {params['n_layers']} layers has"
                )
            if unknown := sorted(part.keys() - known):
                raise UserError(f"{where} has tensors that no Llama has: {', '.join(unknown[:4])}")
            if uneven := [
                name for name, tensor in part.items() if tensor.shape != self._parts[0].get(name, tensor).shape
            ]:
                raise UserError(f"{where} has another shape than consolidated.00.pth of {', '.join(uneven[:4])}")
        self.names = [name for name in self._names if name != "lm_head.weight" or not self.config.tie_word_embeddings]

    def shape(self, name: str) -> list[int]:
        dim, parts = self._of(name)
        shape = list(parts[0].shape)
        if dim is not None:
            shape[dim] = sum(part.shape[dim] for part in parts)
        return shape

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name)[1][0].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start, ...): the rows from start to stop, a copy. Raises UserError for NaN and infinity."""
        return finite(self._read(name, start, stop), name, self._folder)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        dim, parts = self._of(name)
        if dim is None:
            return parts[0][start:stop].clone()
        if dim == 1:
            return torch.cat([part[start:stop] for part in parts], dim=1)
        height = len(parts[0])
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            first = [number * height for number in range(len(parts))]
            return torch.cat([part[max(0, start - n) : max(0, stop - n)] for n, part in zip(first, parts, strict=True)])
        places = interleaved(torch.arange(start, stop), self.config.head_dim or 0)
        found = torch.empty(len(places), *parts[0].shape[1:], dtype=parts[0].dtype)
        for number, part in enumerate(parts):
            here = (places >= number * height) & (places < (number + 1) * height)
            found[here] = part[places[here] - number * height]
        return found

    def _of(self, name: str) -> tuple[int | None, list[Tensor]]:
        theirs, dim = self._names[name]
        parts = [part[theirs] for part in self._parts]
        if theirs == "tok_embeddings.weight" and parts[0].shape[1] * len(parts) == self.config.hidden_size:
            dim = 1  # Llama 2's files split the embedding by columns
        return dim, parts


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """The position in Meta's order of rows of q_proj or k_proj in Hugging Face's order: (n,) integers, of n."""
    head, place = rows // head_dim, rows % head_dim
    half, pair = place // (head_dim // 2), place % (head_dim // 2)
    return head * head_dim + 2 * pair + half


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleaved`."""
    head, place = rows // head_dim, rows % head_dim
    return head * head_dim + place % 2 * (head_dim // 2) + place // 2


@lru_cache(maxsize=4)
def _parts(folder: Path) -> list[dict[str, Tensor]]:
    files = sorted(folder.glob("consolidated.*.pth"))
    expected = [folder / f"consolidated.{number:02}.pth" for number in range(len(files))]
    if not files or files != expected:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{folder} must hold consolidated.00.pth and so on, without gaps; there: {found}")
    return [_load(file) for file in files]


def _load(file: Path) -> dict[str, Tensor]:
    open_file(file).close()  # its message names what torch.load's does not
    try:
        if not _is_stored(file):
            raise ValueError
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file} holds more than tensors, which may be code, and is not read") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError):
        raise UserError(
            f"{file} cannot be read, it may be truncated, or not written by torch.save of PyTorch 1.6 or newer"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file} does not hold tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not _is_plain(name, tensor):
            raise UserError(f"{file} holds {name!r:.80}, which is no matrix or vector of numbers as a Llama's")
    # a shape may promise more than the file has; a tied head is there twice
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * file.stat().st_size:
        raise UserError(f"{file} has tensors that are larger than the file: copy it again")
    return tensors


def _is_plain(name: str, tensor: Tensor) -> bool:
    """Whether the tensor has numbers that can be read row by row, as many dimensions as Llama's of that name, and is not
    empty."""
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    dimensions = 1 if name.endswith("norm.weight") else 2
    return tensor.numel() > 0 and (tensor.ndim == dimensions or not name.endswith(".weight"))


def _is_stored(file: Path) -> bool:
    """Whether nothing in a .pth is compressed: torch.load maps compressed entries as if they were not."""
    try:
        with ZipFile(file) as entries:
            return all(entry.compress_type == ZIP_STORED for entry in entries.infolist())
    except (BadZipFile, NotImplementedError):
        return False


@lru_cache(maxsize=4)
def read_meta_config(folder: Path) -> LlamaConfig:
    """The config from params.json and the tensors' shapes. Raises UserError for what they leave open."""
    file = folder / "params.json"
    params, parts = {key: value for key, value in read_json(file, PARAMS).items() if value is not None}, _parts(folder)
    if missing := [name for name in ("dim", "n_layers", "n_heads", "norm_eps") if name not in params]:
        raise UserError(f"{file} lacks {', '.join(missing)}")
    if wrong := [name for name in PARAMS if params.get(name, 1) < (name in ("dim", "n_layers", "n_heads"))]:
        raise UserError(f"{file}: {wrong[0]} must be above 0, found {params[wrong[0]]}")
    layers = len({name.split(".")[1] for name in parts[0] if name.startswith("layers.")})
    if params["n_layers"] > layers:
        raise UserError(f"{file} has n_layers {params['n_layers']}, and the weights are of {layers} layers")
    width, heads = params["dim"], params["n_heads"]
    first = parts[0]
    try:
        head, inner = first["output.weight"], first["layers.0.feed_forward.w1.weight"]
        query_rows = first["layers.0.attention.wq.weight"].shape[0] * len(parts)
        tied = all(_same(part["tok_embeddings.weight"], part["output.weight"]) for part in parts)
    except (KeyError, IndexError) as error:
        where = folder / "consolidated.00.pth"
        if error.args[0] == "output.weight" and "tok_embeddings.weight" in first:
            raise UserError(
                f"{where} lacks output.weight, the head, which Meta's own files have even where it is tied to the "
                "embedding: if it is, as in Llama 3.2's 1B and 3B, add it, equal to tok_embeddings.weight"
            ) from None
        raise UserError(f"{where} lacks {error}, which every Llama has: copy the file again") from None
    if query_rows < width and width % query_rows == 0:
        raise UserError(
            f"{folder} holds {len(parts)} consolidated files with 1/{width // query_rows} of the weights that params.json "
            f"speaks of: copy the missing ones there, there must be {len(parts) * width // query_rows}"
        )
    scaling = None
    if params.get("use_scaled_rope"):
        if "rope_scaling_factor" not in params:
            raise UserError(
                f'{file} has use_scaled_rope without its factor: add "rope_scaling_factor": 8 for Llama 3.1 and 3.3, '
                "32 for Llama 3.2"
            )
        scaling = {
            "rope_type": "llama3",
            "factor": float(params["rope_scaling_factor"]),
            "low_freq_factor": float(params.get("low_freq_factor", 1)),
            "high_freq_factor": float(params.get("high_freq_factor", 4)),
            "original_max_position_embeddings": 8192,
        }
    theta = float(params.get("rope_theta", 10000.0))
    return LlamaConfig(
        vocab_size=head.shape[0] * len(parts),
        hidden_size=width,
        intermediate_size=inner.shape[0] * len(parts),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        # params.json has no maximum of positions; nothing is computed from it
        max_position_embeddings=131072 if scaling else 8192 if theta >= 500000 else 4096,
        rms_norm_eps=params["norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
    )


def _same(a: Tensor, b: Tensor) -> bool:
    step = 4096
    return a.shape == b.shape and all(torch.equal(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step))


def meta_params(config: LlamaConfig) -> dict[str, Any]:
    """params.json of a config. Raises UserError for what Meta's format cannot express."""
    assert config.head_dim and config.num_key_value_heads
    scaling = config.rope_scaling or {}
    problems = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        f"head_dim {config.head_dim}": config.head_dim * config.num_attention_heads != config.hidden_size,
        f"rope type {scaling.get('rope_type')}": scaling.get("rope_type", "llama3") != "llama3",
        "original_max_position_embeddings": scaling.get("original_max_position_embeddings", 8192) != 8192,
    }
    if found := [name for name, there in problems.items() if there]:
        raise UserError(f"Meta's format has no place for {', '.join(found)}")
    multiple_of, multiplier = _feed_forward(config.hidden_size, config.intermediate_size)
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
    }
    if scaling:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": scaling["factor"]}
        params |= {name: scaling[name] for name in ("low_freq_factor", "high_freq_factor")}
    return params


def feed_forward_width(dim: int, multiple_of: int, multiplier: float) -> int:
    """Width of the feed-forward layer, as Meta's model computes it."""
    return -(-int(multiplier * int(2 * 4 * dim / 3)) // multiple_of) * multiple_of


def _feed_forward(dim: int, inner: int) -> tuple[int, float]:
    """multiple_of and ffn_dim_multiplier from which Meta's model computes `inner`."""
    multiple_of = min(inner & -inner, 1024)
    multiplier = round((inner - (multiple_of - 1) / 2 + 0.5) / int(2 * 4 * dim / 3), 6)
    assert feed_forward_width(dim, multiple_of, multiplier) == inner, (dim, inner)
    return multiple_of, multiplier


def write_meta(
    weights: Weights,
    config: LlamaConfig,
    folder: Path,
    dtype: torch.dtype | None = None,
    files: int = 1,
) -> None:
    """Writes params.json and consolidated.NN.pth into a folder that exists, PIECE_BYTES at a time.

    dtype: None keeps each tensor's. files: how many processes of Meta's model parallelism it is for. Raises UserError
    for what Meta's format cannot express, and for heads or widths that `files` does not divide.
    """
    params = meta_params(config)
    for what, count in (("n_kv_heads", config.num_key_value_heads), ("vocab_size", config.vocab_size)):
        if count and count % files:
            raise UserError(f"--files {files}: {what} {count} is not a multiple of it")
    if config.intermediate_size % files:
        raise UserError(f"--files {files}: the feed-forward width {config.intermediate_size} is not a multiple of it")
    names = meta_names(config.num_hidden_layers)
    total = 0
    for ours, (_, dim) in names.items():
        source = "model.embed_tokens.weight" if ours not in weights.names else ours
        size = math.prod(weights.shape(source)) * (dtype or weights.dtype(source)).itemsize
        total += size * (files if dim is None else 1)
    bar = progress(total=total, desc="writing", unit="B", unit_scale=True, leave=False)
    with bar, room_for(total, folder):
        for number in range(files):
            file = folder / f"consolidated.{number:02}.pth"
            empty = {}
            for ours, (theirs, dim) in names.items():
                source = "model.embed_tokens.weight" if ours not in weights.names else ours  # the tied head
                shape = weights.shape(source)
                if dim is not None:
                    shape[dim] //= files
                # never touched, so costs nothing
                empty[theirs] = torch.empty(shape, dtype=dtype or weights.dtype(source))
            try:
                with skip_data():
                    torch.save(empty, file)
            except RuntimeError as error:
                raise disk_error(error) or error from None
            del empty
            # Allocates the space: a full disk is an error here, in mapped memory it would kill the process.
            with file.open("rb+") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            with set_default_mmap_options(mmap.MAP_SHARED):  # what is written to these goes to the file
                tensors = torch.load(file, weights_only=True, mmap=True)
            for ours, (theirs, dim) in names.items():
                source = "model.embed_tokens.weight" if ours not in weights.names else ours
                _fill(tensors[theirs], weights, source, dim, number, files, config.head_dim or 0)
                bar.update(tensors[theirs].nbytes)
    write_json(folder / "params.json", params)


def _fill(target: Tensor, weights: Weights, name: str, dim: int | None, number: int, files: int, head_dim: int) -> None:
    """The `number`-th part of a tensor into target, a head or some rows at a time."""
    height = weights.shape(name)[0]
    rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
    first = number * len(target) if dim == 0 else 0
    row_bytes = max(1, target.nbytes // max(1, len(target))) * (files if dim == 1 else 1)
    step = max(1, PIECE_BYTES // row_bytes)
    if rotated:
        step = max(1, step // head_dim) * head_dim  # whole heads: a row's place is within its own
    for start in range(0, len(target), step):
        stop = min(start + step, len(target))
        rows = weights.rows(name, first + start, min(first + stop, height))
        if dim == 1:
            rows = rows[:, number * target.shape[1] : (number + 1) * target.shape[1]]
        if rotated:
            rows = rows[half_split(torch.arange(len(rows)), head_dim)]
        target[start:stop] = rows
