"""Quantises a base while it is read: each rank its own rows, or a few rows at a time for writing."""

import re
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillama.errors import UserError
from minillama.formats.bitsandbytes import ROWS, BitsandbytesWeights, dequantized, planned_layers
from minillama.formats.meta import Weights
from minillama.model.llama import Llama
from minillama.model.quant import (
    BLOCK,
    Kind,
    Tables,
    apply_quantization,
    nf4_tables,
    outer_maxima,
    pack,
    quantize_rows,
    quantize_scales,
    quantized_layers,
    shapes,
)
from minillama.parallel.processes import all_reduce
from minillama.parallel.sharding import local, row_offset

Quantize = Literal["none", "nf4", "int8"]
IN_BLOCK = re.compile(r"model\.layers\.\d+\..*_proj\.weight$")


def quantize_base(model: Llama, weights: Weights | dict[str, Any], quantize: Quantize = "none") -> Llama:
    """Quantises the base of a model on the meta device as its folder is quantised, or as `quantize` says. Before adapters.

    weights: of the folder; or for an estimate, which has none, its quantization_config, {} if there is none.
    Raises UserError if both are quantised, and as apply_quantization does.
    """
    kind: Kind
    if isinstance(weights, BitsandbytesWeights):
        kind, double, folder = weights.kind, weights.double, str(weights.folder)
        layers = [name.removesuffix(".weight") for name in weights.layers]
    elif isinstance(weights, dict) and weights:
        kind, folder = "nf4" if weights.get("load_in_4bit") else "int8", "the model's folder"
        double = bool(weights.get("bnb_4bit_use_double_quant"))
        layers = planned_layers((name for name in shapes(model) if IN_BLOCK.match(name)), weights)
        layers = [name.removesuffix(".weight") for name in layers]
    else:
        return model if quantize == "none" else apply_quantization(model, quantize)
    if quantize != "none":
        raise UserError(
            f"{folder} is quantised already, as {kind}, and {quantize} is asked for: leave that flag out, or give the "
            "plain model"
        )
    return apply_quantization(model, kind, layers, double=double)


class QuantizedFill:
    """Fills the quantised layers of a model from a folder, plain or quantised, piece by piece."""

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self.layers, self._weights = quantized_layers(model), weights
        self._first_rows = {name: row_offset(layer.weight) for name, layer in self.layers.items()}
        self._scales: dict[str, Tensor] = {}  # NF4's, fp32, of this rank's rows
        if not isinstance(weights, BitsandbytesWeights):
            for name, layer in self.layers.items():
                if layer.kind == "nf4":  # all at once: between what is freed again they would keep the memory in pieces
                    rows = local(layer.weight)
                    self._scales[name] = torch.empty(len(rows), layer.in_features // BLOCK, device=rows.device)

    def fill(self, name: str, piece: Tensor, start: int, stop: int) -> None:
        """Fills `piece`, rows start to stop of the weight `name`."""
        packed, weights = piece.view(torch.uint8), self._weights
        if isinstance(weights, BitsandbytesWeights):
            packed.copy_(weights.packed(name, start, stop))
            return
        codes, scales = quantize_rows(weights.rows(name, start, stop).to(piece.device), self.layers[name].kind)
        if self.layers[name].kind == "int8":
            packed.copy_(pack(codes, scales))
        else:
            packed[:, : codes.shape[1]] = codes
            packed[:, codes.shape[1] :] = 0
            first = start - self._first_rows[name]
            self._scales[name][first : first + len(scales)] = scales

    def finish(self) -> set[str]:
        """Fills the values that span rows when all rows are filled; returns the names filled. Every rank must call it."""
        if isinstance(self._weights, BitsandbytesWeights):
            for name, layer in self.layers.items():
                layer.set_tables(self._weights.tables(name))
        elif self._scales:
            self._quantize_scales()
        tables = {name.removesuffix("weight") + table for name in self.layers for table in Tables._fields}
        return tables | self.layers.keys()

    def _quantize_scales(self) -> None:
        """Quantises the scales of NF4 as in whole tensors, although each rank has only those of its rows."""
        layers, scales = [self.layers[name] for name in self._scales], self._scales.values()
        first_rows = [self._first_rows[name] for name in self._scales]
        sums = all_reduce([x for own in scales for x in (own.sum(dtype=torch.float64).item(), float(own.numel()))])
        means = [torch.tensor(total / count) for total, count in zip(sums[::2], sums[1::2], strict=True)]
        sizes = [layer.get_buffer("outer").numel() for layer in layers]
        maxima = [
            outer_maxima(own, mean.to(own.device), size, first).cpu()
            for own, mean, size, first in zip(scales, means, sizes, first_rows, strict=True)
        ]
        outer = torch.cat(maxima)
        if dist.is_initialized():
            dist.all_reduce(outer, dist.ReduceOp.MAX)
        parts = zip(layers, scales, outer.split(sizes), means, first_rows, strict=True)
        for layer, own, whole, mean, first in parts:
            whole, mean = whole.to(own.device), mean.to(own.device)
            layer.set_tables(nf4_tables(whole, mean))
            codes = quantize_scales(own, whole, mean, first)
            place = layer.in_features // 2
            local(layer.weight).detach().view(torch.uint8)[:, place : place + codes.shape[1]] = codes


class QuantizingWeights:
    """The tensors of a plain folder; those of the blocks' linear layers are quantised when they are read."""

    double = True

    def __init__(self, base: Weights, kind: Kind) -> None:
        self._base, self.kind, self.names = base, kind, base.names
        self.layers = [name for name in base.names if IN_BLOCK.match(name)]
        self._tables: dict[str, Tables] = {}

    def shape(self, name: str) -> list[int]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return dequantized(self, name, start, stop) if name in self.layers else self._base.rows(name, start, stop)

    def packed(self, name: str, start: int, stop: int) -> Tensor:
        codes, scales = quantize_rows(self._base.rows(name, start, stop), self.kind)
        if self.kind == "nf4":
            _, _, outer, mean = self.tables(name)
            assert outer is not None and mean is not None
            scales = quantize_scales(scales, outer, mean, start)
        return pack(codes, scales)

    def tables(self, name: str) -> Tables:
        if self.kind == "int8":
            return Tables(None, None, None, None)
        if name not in self._tables:
            height = self.shape(name)[0]
            places = [(start, min(start + ROWS, height)) for start in range(0, height, ROWS)]
            scales = torch.cat([quantize_rows(self._base.rows(name, *place), "nf4")[1] for place in places])
            mean = scales.mean(dtype=torch.float64).float()
            self._tables[name] = nf4_tables(outer_maxima(scales, mean), mean)
        return self._tables[name]
