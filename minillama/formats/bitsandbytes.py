"""Quantised folders, in the format that bitsandbytes and transformers write and read: NF4 (load_in_4bit) and int8.

Besides X.weight, the codes, there are X.weight.absmax, .quant_map, .nested_absmax, .nested_quant_map and
.quant_state.bitsandbytes__nf4, a JSON text as bytes; of int8 X.SCB and X.weight_format.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minillama.errors import UserError
from minillama.files import misfit
from minillama.formats.meta import Weights
from minillama.model.quant import BLOCK, NF4, OUTER, Kind, Tables, dequantize, pack, pair_table

STATE = ".quant_state.bitsandbytes__"
FLOATS = ("bfloat16", "float16", "float32")
ROWS = 1024
"""So many rows are quantised at a time"""


class QuantizedWeights(Weights, Protocol):
    """Tensors of which some are quantised; `shape`, `dtype` and `rows` are those of the dequantised values."""

    kind: Kind
    double: bool
    """Whether the scales of NF4 are quantised too"""
    layers: list[str]
    """Names of the tensors that are quantised"""

    def packed(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows as a quantised layer holds them: uint8 (stop - start, row_bytes)."""

    def tables(self, name: str) -> Tables: ...


def settings_problem(settings: Any) -> str | None:
    """Why a quantization_config is not supported; None: it is."""
    if not isinstance(settings, dict):
        return "it is no object"
    loads = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    if settings.get("quant_method", "bitsandbytes") != "bitsandbytes" or not loads:
        return f"{json.dumps(settings, default=str):.60}"
    wanted = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"} if settings.get("load_in_4bit") else {}
    return next((problem for key, one in wanted.items() if (problem := misfit(settings.get(key, one), one, key))), None)


def planned_layers(names: Iterable[str], settings: dict[str, Any]) -> list[str]:
    """Those of these linear layers that a folder with this quantization_config holds quantised, as transformers chooses."""
    skipped = settings.get("llm_int8_skip_modules") or ()
    return [name for name in names if not any(f".{part}." in f".{name}." for part in skipped)]


class BitsandbytesWeights:
    """The tensors of a folder that bitsandbytes quantised. Raises UserError for anything it would not write."""

    def __init__(self, raw: Weights, settings: dict[str, Any], folder: Path) -> None:
        self._raw, self.folder = raw, folder
        self.kind: Kind = "nf4" if settings.get("load_in_4bit") else "int8"
        self.layers = [name for name in raw.names if self._is_quantized(name)]
        parts = tuple(f"{name}." for name in self.layers) + tuple(
            name.removesuffix("weight") + end for name in self.layers for end in ("SCB", "weight_format")
        )
        hidden = {name for name in raw.names if name.startswith(parts)}
        self.names = [name for name in raw.names if name not in hidden]
        self.double = any(f"{name}.nested_absmax" in raw.names for name in self.layers)
        self._states = {name: self._read_state(name) for name in self.layers} if self.kind == "nf4" else {}
        for name in self.layers:
            self._check(name)

    def _is_quantized(self, name: str) -> bool:
        if self.kind == "int8":
            return name.endswith(".weight") and name.removesuffix("weight") + "SCB" in self._raw.names
        return f"{name}{STATE}nf4" in self._raw.names

    def _read_state(self, name: str) -> dict[str, Any]:
        mark = f"{name}{STATE}nf4"
        shape: dict[str, Any] = {"shape": [int], "dtype": tuple(FLOATS), "blocksize": BLOCK, "quant_type": "nf4"}
        if self.double:
            shape |= {"nested_blocksize": OUTER, "nested_offset": float}
        try:
            state = json.loads(bytes(self._raw.rows(mark, 0, self._raw.shape(mark)[0]).to(torch.uint8).tolist()))
        except ValueError:
            state = None
        if problem := misfit(state, shape):
            raise UserError(f"{self.folder}: {mark} is none that can be read: {problem}")
        return state

    def _check(self, name: str) -> None:
        """Raises UserError unless all parts of a quantised tensor are there, in the right shapes."""
        wanted = {name: [*self.shape(name)]}
        if self.kind == "int8":
            wanted[name.removesuffix("weight") + "SCB"] = [self.shape(name)[0]]
        else:
            height, width = self._states[name]["shape"]
            if width % BLOCK:
                raise UserError(f"{self.folder}: a row of {name} has {width} weights, no multiple of {BLOCK}")
            count = height * width
            wanted = {name: [count // 2, 1], f"{name}.absmax": [count // BLOCK], f"{name}.quant_map": [16]}
            if self.double:
                blocks = -(-count // BLOCK // OUTER)
                wanted |= {f"{name}.nested_absmax": [blocks], f"{name}.nested_quant_map": [256]}
        for part, shape in wanted.items():
            found = self._raw.shape(part) if part in self._raw.names else None
            if found != shape:
                raise UserError(f"{self.folder}: {part} has shape {found}, and {shape} was expected")

    def shape(self, name: str) -> list[int]:
        return list(self._states[name]["shape"]) if name in self._states else self._raw.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._states:
            return getattr(torch, self._states[name]["dtype"])
        return self._raw.dtype("model.embed_tokens.weight" if name in self.layers else name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.layers:
            return self._raw.rows(name, start, stop)
        return dequantized(self, name, start, stop)

    def packed(self, name: str, start: int, stop: int) -> Tensor:
        if self.kind == "int8":
            scales = self._raw.rows(name.removesuffix("weight") + "SCB", start, stop)
            return pack(self._raw.rows(name, start, stop).view(torch.uint8), scales.float()[:, None])
        width = self.shape(name)[1]
        codes, scales = (
            self._raw.rows(part, start * width // each, stop * width // each)
            for part, each in ((name, 2), (f"{name}.absmax", BLOCK))
        )
        scales = scales if self.double else scales.float()
        return pack(codes.view(-1, width // 2), scales.view(-1, width // BLOCK))

    def tables(self, name: str) -> Tables:
        if self.kind == "int8":
            return Tables(None, None, None, None)
        pairs = pair_table(self._whole(f"{name}.quant_map"))
        if not self.double:
            return Tables(pairs, None, None, None)
        mean = torch.tensor(self._states[name]["nested_offset"], dtype=torch.float32)
        return Tables(pairs, self._whole(f"{name}.nested_quant_map"), self._whole(f"{name}.nested_absmax"), mean)

    def _whole(self, name: str) -> Tensor:
        return self._raw.rows(name, 0, self._raw.shape(name)[0]).float()


def dequantized(weights: QuantizedWeights, name: str, start: int, stop: int) -> Tensor:
    """Some rows of a quantised tensor, in the dtype that it had."""
    packed, width = weights.packed(name, start, stop), weights.shape(name)[1]
    return dequantize(packed, width, weights.tables(name), weights.dtype(name), start)


class BitsandbytesTensors:
    """These weights under the names of bitsandbytes' format, to be written a few rows at a time."""

    def __init__(self, weights: QuantizedWeights) -> None:
        self._weights = weights
        self._plain = [name for name in weights.names if name not in weights.layers]
        self._small: dict[str, Tensor] = {}
        self._large: dict[str, tuple[str, list[int], torch.dtype]] = {}  # part: (its weight, its shape, its dtype)
        self._cut: tuple[str, dict[str, Tensor]] = "", {}  # the parts of the last weight, cached
        for name in weights.layers:
            height, width = weights.shape(name)
            if weights.kind == "int8":
                self._large[name] = name, [height, width], torch.int8
                self._large[name.removesuffix("weight") + "SCB"] = name, [height], torch.float32
                continue
            self._large[name] = name, [height * width // 2, 1], torch.uint8
            self._large[f"{name}.absmax"] = name, [height * width // BLOCK], torch.uint8
            tables = weights.tables(name)
            assert tables.outer is not None and tables.scale_levels is not None and tables.mean is not None
            state = {"quant_type": "nf4", "blocksize": BLOCK, "shape": [height, width]}
            state |= {"dtype": str(weights.dtype(name)).removeprefix("torch."), "nested_dtype": "float32"}
            state |= {"nested_blocksize": OUTER, "nested_offset": tables.mean.item()}
            text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
            self._small |= {f"{name}.quant_map": torch.tensor(NF4), f"{name}.nested_absmax": tables.outer}
            self._small |= {f"{name}.nested_quant_map": tables.scale_levels, f"{name}{STATE}nf4": text}
        self.names = [*self._plain, *self._large, *self._small]

    def shape(self, name: str) -> list[int]:
        if name in self._large:
            return self._large[name][1]
        return list(self._small[name].shape) if name in self._small else self._weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._large:
            return self._large[name][2]
        return self._small[name].dtype if name in self._small else self._weights.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._large:
            return self._parts(self._large[name][0])[name][start:stop]
        return self._small[name][start:stop] if name in self._small else self._weights.rows(name, start, stop)

    def _parts(self, weight: str) -> dict[str, Tensor]:
        if self._cut[0] != weight:
            height, width = self._weights.shape(weight)
            places = [(start, min(start + ROWS, height)) for start in range(0, height, ROWS)]
            packed = torch.cat([self._weights.packed(weight, *place) for place in places])
            if self._weights.kind == "int8":
                scales = packed[:, width:].contiguous().view(torch.float32).flatten()
                parts = {weight: packed[:, :width].view(torch.int8), weight.removesuffix("weight") + "SCB": scales}
            else:
                codes, scales = packed[:, : width // 2], packed[:, width // 2 :][:, : width // BLOCK]
                parts = {weight: codes.reshape(-1, 1), f"{weight}.absmax": scales.flatten()}
            self._cut = weight, parts
        return self._cut[1]


def quantization_config(kind: Kind, dtype: torch.dtype) -> dict[str, Any]:
    """The quantization_config of such a folder, as transformers writes it."""
    settings: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}
    if kind == "int8":
        return settings | {"load_in_8bit": True, "load_in_4bit": False}
    settings |= {"load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    settings |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8"}
    return settings | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
