"""A base quantised while it is read: by each rank what it holds, or a few rows at a time to be written."""

import re
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillama.errors import UserError
from minillama.formats.bitsandbytes import ROWS, BitsandbytesWeights, dequantized
from minillama.formats.meta import Weights
from minillama.model.llama import Llama
from minillama.model.quant import (
    Kind,
    Tables,
    apply_quantization,
    nf4_tables,
    outer_maxima,
    pack,
    quantize_rows,
    quantize_scales,
    quantized_layers,
)
from minillama.parallel.processes import all_reduce
from minillama.parallel.sharding import local, row_offset

Quantize = Literal["none", "nf4", "int8"]
IN_BLOCK = re.compile(r"model\.layers\.\d+\..*_proj\.weight$")


def quantize_base(model: Llama, weights: Weights, quantize: Quantize = "none") -> Llama:
    """Quantises the base of a model on the meta device as its folder is, or as `quantize` says. Before adapters.

    Raises UserError for a folder that is quantised already and is to be so again, and as apply_quantization does.
    """
    if isinstance(weights, BitsandbytesWeights):
        if quantize != "none":
            raise UserError(
                f"{weights.folder} is quantised already, as {weights.kind}, and {quantize} is asked for: leave that flag "
                "out, or give the plain model"
            )
        layers = [name.removesuffix(".weight") for name in weights.layers]
        return apply_quantization(model, weights.kind, layers, double=weights.double)
    return model if quantize == "none" else apply_quantization(model, quantize)


class QuantizedFill:
    """Fills the quantised layers of a model from a folder, plain or quantised, piece by piece."""

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self.layers, self._weights = quantized_layers(model), weights
        self._scales: dict[str, list[Tensor]] = {name: [] for name in self.layers}

    def fill(self, name: str, piece: Tensor, start: int, stop: int) -> None:
        """Fills rows start to stop of the weight `name`, which are `piece`. A layer's pieces in their order."""
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
            self._scales[name].append(scales)

    def finish(self) -> set[str]:
        """Fills what spans rows, once all are filled; the names of all that was. Every rank must call it."""
        if isinstance(self._weights, BitsandbytesWeights):
            for name, layer in self.layers.items():
                layer.set_tables(self._weights.tables(name))
        elif self.layers:
            self._quantize_scales()
        tables = {name.removesuffix("weight") + table for name in self.layers for table in Tables._fields}
        return tables | self.layers.keys()

    def _quantize_scales(self) -> None:
        """The scales of NF4, of which each rank has those of its rows, as those of whole tensors."""
        names = [name for name, layer in self.layers.items() if layer.kind == "nf4"]
        layers = [self.layers[name] for name in names]
        scales = [torch.cat(self._scales[name]) if self._scales[name] else torch.empty(0, 1) for name in names]
        first_rows = [row_offset(layer.weight) for layer in layers]
        sums = all_reduce([x for own in scales for x in (own.sum(dtype=torch.float64).item(), float(own.numel()))])
        means = [torch.tensor(total / count) for total, count in zip(sums[::2], sums[1::2], strict=True)]
        sizes = [layer.get_buffer("outer").numel() for layer in layers]
        maxima = [
            outer_maxima(own, mean.to(own.device), size, first).cpu()
            for own, mean, size, first in zip(scales, means, sizes, first_rows, strict=True)
        ]
        outer = torch.cat([*maxima, torch.empty(0)])
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
    """The tensors of a plain folder, those of the blocks' linear layers quantised as they are read."""

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
