"""A frozen base whose linear layers hold NF4 or int8 codes, which are dequantised where they are multiplied.

NF4 (QLoRA, https://arxiv.org/abs/2305.14314, section 3): every 64 weights of a row share a scale, their largest
magnitude, and each weight is the nearest of 16 levels times that scale. Double quantisation: the mean of the scales is
subtracted, every 256 scales share an outer scale, and each scale is one of 256 levels. int8: a row has one scale, its
largest magnitude, and a weight is an integer from -127 to 127 times scale / 127. Values, codes and their order are those
of bitsandbytes.

A quantised layer has one parameter, under the weight's name: `weight` is uint8 (out, row_bytes), for each row the codes,
then the scales. FSDP shards parameters by rows, so it cuts codes and scales at the same place, gathers the bytes, and
casts nothing. Values that span rows are small fp32 buffers, which FSDP does not touch.
"""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from minillama.errors import UserError
from minillama.model.llama import Llama
from minillama.model.surgery import replace_modules

Kind = Literal["nf4", "int8"]

BLOCK = 64
"""So many weights of a row share a scale in NF4."""
OUTER = 256
"""So many scales share an outer scale, in the order of the whole tensor."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of NF4: appendix E of the paper."""


def dynamic_levels() -> tuple[float, ...]:
    """The 256 levels of a quantised scale: 127 of each sign, 0 and 1.

    They are dense near zero: 2^i of them, evenly, from 10^(i - 7) to 10^(i - 6) for i = 0 ... 6
    (https://arxiv.org/abs/2110.02861, section 2.2).
    """
    positive = [10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / 2**i) for i in range(7) for k in range(2**i)]
    return tuple(sorted([*(-level for level in positive), 0.0, *positive, 1.0]))


class Tables(NamedTuple):
    """What NF4 needs besides a layer's rows, fp32. All None for int8; only `pairs` if scales are not quantised."""

    pairs: Tensor | None
    """(256, 2): the two levels of a byte, that of its high half first."""
    scale_levels: Tensor | None
    """(256,): the level of a scale's byte."""
    outer: Tensor | None
    """(blocks,): the outer scales."""
    mean: Tensor | None
    """(): the mean of all scales."""


def row_bytes(kind: Kind, width: int, *, double: bool = True) -> int:
    """Bytes of a quantised row of so many weights: a multiple of 4. double: whether NF4's scales are quantised too."""
    if kind == "int8":
        return width + 4
    scales = width // BLOCK
    size = width // 2 + scales * (1 if double else 4)
    return size + -size % 4


def quantize_rows(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows: (rows, width) -> uint8 (rows, width / 2) or (rows, width), fp32 (rows, scales)."""
    weight = weight.float()
    if kind == "int8":
        scales = weight.abs().amax(1, keepdim=True)
        codes = torch.round(weight * (127 / scales.clamp(min=TINY)))
        return codes.to(torch.int8).view(torch.uint8), scales
    blocks = weight.unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(2)
    codes = _nearest_nf4(blocks / scales.clamp(min=TINY)[..., None]).flatten(1)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


TINY = 1e-38
"""Replaces a scale of 0: smaller than any other, but 1 / it is finite."""


def _nearest(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The index, uint8, of the level nearest to each value."""
    table = torch.tensor(levels, device=values.device)
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)


def _nearest_nf4(values: Tensor) -> Tensor:
    """_nearest for NF4's levels and values from -1 to 1, eight times as fast on a CPU.

    In a cell of 1/32 there is at most one middle between two levels, so that one comparison decides.
    """
    levels = torch.tensor(NF4, device=values.device)
    middles = (levels[:-1] + levels[1:]) / 2
    edges = torch.arange(-CELLS, CELLS + 1, device=values.device) / CELLS
    below = torch.bucketize(edges, middles)  # so many of them are below the cell
    within = torch.cat((middles, middles.new_tensor([2.0])))[below]  # the next one, or beyond all
    cells = ((values + 1) * CELLS).int().flatten()
    above = values > within.index_select(0, cells).view(values.shape)
    return below.to(torch.uint8).index_select(0, cells).view(values.shape).add_(above)


CELLS = 32


def quantize_scales(scales: Tensor, outer: Tensor, mean: Tensor, first_row: int = 0) -> Tensor:
    """Codes of the scales of some rows: fp32 (rows, n) -> uint8 (rows, n). outer, mean: of the whole tensor."""
    spread = _outer_of(scales, outer, first_row)
    return _nearest((scales - mean) / spread.clamp(min=TINY), dynamic_levels())


def _outer_of(scales: Tensor, outer: Tensor, first_row: int) -> Tensor:
    """The outer scale of each scale of these rows, which begin with row first_row of the tensor."""
    first = first_row * scales.shape[1]
    return outer[:, None].expand(-1, OUTER).reshape(-1)[first : first + scales.numel()].view(scales.shape)


def outer_maxima(scales: Tensor, mean: Tensor, blocks: int | None = None, first_row: int = 0) -> Tensor:
    """The largest distance from the mean in each block of scales: the outer scales, of a whole tensor's scales.

    blocks: how many the tensor has, if these are only some of its rows; blocks without any of them get 0.
    """
    places = torch.arange(scales.numel(), device=scales.device).add_(first_row * scales.shape[1]) // OUTER
    zeros = scales.new_zeros(-(-scales.numel() // OUTER) if blocks is None else blocks)
    return zeros.scatter_reduce_(0, places, (scales - mean).abs().flatten(), "amax")


def pack(codes: Tensor, scales: Tensor) -> Tensor:
    """The bytes of rows: (rows, row_bytes). scales: as they are stored, fp32 or uint8."""
    scales = scales.contiguous().view(torch.uint8)
    return F.pad(torch.cat((codes, scales), 1), (0, -(codes.shape[1] + scales.shape[1]) % 4))


def dequantize(
    packed: Tensor, width: int, tables: Tables, dtype: torch.dtype = torch.float32, first_row: int = 0
) -> Tensor:
    """The weights of some rows, rounded to dtype once: (rows, width).

    packed: (rows, row_bytes), uint8 or viewed as anything else. first_row: the index of the first row in the tensor.
    """
    packed = packed.view(torch.uint8)
    rows = len(packed)
    if tables.pairs is None:
        scales = packed[:, width : width + 4].view(torch.float32) / 127
        return (packed[:, :width].view(torch.int8) * scales).to(dtype)
    codes, stored = packed[:, : width // 2], packed[:, width // 2 :]
    if tables.outer is None:
        scales = stored[:, : width // BLOCK * 4].view(torch.float32)
    else:
        assert tables.scale_levels is not None and tables.mean is not None
        levels = tables.scale_levels.index_select(0, stored[:, : width // BLOCK].int().flatten())
        scales = levels.view(rows, width // BLOCK)
        scales = scales * _outer_of(scales, tables.outer, first_row) + tables.mean
    # A byte is two weights: looked up as one 64-bit number, in half the time.
    both = tables.pairs.view(torch.int64).flatten().index_select(0, codes.int().flatten())
    blocks = both.view(torch.float32).view(rows, width // BLOCK, BLOCK)
    return blocks.mul_(scales[..., None]).view(rows, width).to(dtype)


def nf4_tables(outer: Tensor, mean: Tensor) -> Tables:
    """With the levels of the papers."""
    levels, scale_levels = (torch.tensor(values, device=outer.device) for values in (NF4, dynamic_levels()))
    return Tables(pair_table(levels), scale_levels, outer, mean)


def pair_table(levels: Tensor) -> Tensor:
    """Tables.pairs of the 16 levels of a code."""
    return torch.cartesian_prod(levels, levels)


def product(
    x: Tensor,
    packed: Tensor,
    pairs: Tensor | None,
    scale_levels: Tensor | None,
    outer: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    """W x: (..., in) -> (..., out), in the dtype of x.

    One operation for torch.compile, which would save W otherwise, and for selective recomputation.
    """
    return F.linear(x, dequantize(packed, x.shape[-1], Tables(pairs, scale_levels, outer, mean), x.dtype))


def product_backward(
    grad: Tensor,
    packed: Tensor,
    width: int,
    pairs: Tensor | None,
    scale_levels: Tensor | None,
    outer: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    """The gradient of x: (..., out) -> (..., in). Dequantises again instead of saving W."""
    return grad @ dequantize(packed, width, Tables(pairs, scale_levels, outer, mean), grad.dtype)


quantized_linear = library.custom_op("minillama::quantized_linear", product, mutates_args=())
quantized_linear_backward = library.custom_op("minillama::quantized_linear_backward", product_backward, mutates_args=())


@quantized_linear.register_fake
def _(x, packed, *tables):
    return x.new_empty(*x.shape[:-1], len(packed))


@quantized_linear_backward.register_fake
def _(grad, packed, width, *tables):
    return grad.new_empty(*grad.shape[:-1], width)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *rest = inputs
    ctx.save_for_backward(*rest)
    ctx.width = x.shape[-1]


def _input_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, *tables = ctx.saved_tensors
    return quantized_linear_backward(grad, packed, ctx.width, *tables), *[None] * 5


quantized_linear.register_autograd(_input_gradient, setup_context=_keep_inputs)


class Quantized(nn.Module):
    """How a frozen quantised weight is held: common to a linear layer and to one that LoRA adapts."""

    kind: Kind
    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    dtype: torch.dtype
    """The dtype of the weight before it was quantised."""

    def hold(self, kind: Kind, dtype: torch.dtype, weight: nn.Parameter, tables: Tables) -> None:
        """Sets the bytes of a weight and its tables."""
        self.kind, self.dtype, self.weight = kind, dtype, weight
        for name, table in tables._asdict().items():
            self.register_buffer(name, table)

    @property
    def tables(self) -> Tables:
        return Tables(*(getattr(self, name) for name in Tables._fields))

    def tables_on(self, device: torch.device) -> Tables:
        """The tables where the weight is gathered: offloaded ones stay on the host."""
        return Tables(*(None if table is None else table.to(device) for table in self.tables))

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised weight; the whole one also if it is sharded."""
        tensors = (self.weight, *self.tables)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def reset_parameters(self) -> None:
        """Sets the weight to 0: quantised weights are loaded, never drawn."""
        for tensor in (self.weight, self.bias, *self.tables):
            if tensor is not None:
                nn.init.zeros_(tensor)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Quantises a whole weight (out, in)."""
        codes, scales = quantize_rows(weight, self.kind)
        if self.kind == "nf4":
            mean = scales.mean(dtype=torch.float64).float()
            outer = outer_maxima(scales, mean)
            self.set_tables(nf4_tables(outer, mean))
            scales = quantize_scales(scales, outer, mean)
        self.weight.view(torch.uint8).copy_(pack(codes, scales))

    @torch.no_grad()
    def set_tables(self, tables: Tables) -> None:
        for own, given in zip(self.tables, tables, strict=True):
            if own is not None:
                assert given is not None
                own.copy_(given)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = quantized_linear(x, self.weight, *self.tables_on(x.device))
        return y if bias is None else y + bias

    def base_weight(self) -> Tensor:
        """Dequantised: fp32 (out, in)."""
        return dequantize(self.weight, self.in_features, self.tables_on(self.weight.device))


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[misc]  # Linear has its weight as a Tensor
    """y = W x + b of a frozen W. On the meta device empty, else with the quantised weight of `linear`."""

    def __init__(self, linear: nn.Linear, kind: Kind, *, double: bool = True) -> None:
        """double: whether NF4's scales are quantised too. We always do that; some folders do not."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        blocks = -(-self.out_features * self.in_features // (BLOCK * OUTER))
        shapes = {"pairs": (256, 2), "scale_levels": (256,), "outer": (blocks,), "mean": ()}
        used = () if kind == "int8" else Tables._fields if double else ("pairs",)
        fresh: dict[str, Any] = {"device": linear.weight.device}
        empty = [torch.empty(shapes[name], **fresh) if name in used else None for name in Tables._fields]
        rows = torch.empty(
            self.out_features, row_bytes(kind, self.in_features, double=double), dtype=torch.uint8, **fresh
        )
        self.hold(kind, linear.weight.dtype, nn.Parameter(rows, requires_grad=False), Tables(*empty))
        if not rows.is_meta:
            self.fill(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


def apply_quantization(
    model: Llama, kind: Kind, layers: Collection[str] | None = None, *, double: bool = True
) -> Llama:
    """Quantises the linear layers of the blocks; embedding, norms and head stay as they are. Before LoRA and sharding.

    On the meta device the weights are to be loaded; a real model's are quantised in place. layers: the names of those to
    quantise, None: all. double: whether NF4's scales are quantised too. Raises UserError for a width that does not fit.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
    chosen = linear.keys() if layers is None else set(layers)
    step = BLOCK if kind == "nf4" else 4
    if odd := next((name for name in chosen if linear[name].in_features % step), None):
        raise UserError(
            f"{kind} cannot hold {odd}, whose rows of {linear[odd].in_features} weights are no multiple of {step}: quantise "
            f"as {'int8' if kind == 'nf4' and linear[odd].in_features % 4 == 0 else 'none'}"
        )
    return replace_modules(
        model,
        lambda name, _: name in chosen,
        lambda m: QuantizedLinear(m, kind, double=double),  # type: ignore[arg-type]
    )


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """Those of the model, by the names of their weights."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Quantized)}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of each parameter by name; of a quantised weight that of what it stands for."""
    found = {name: parameter.shape for name, parameter in model.named_parameters()}
    return found | {n: torch.Size((m.out_features, m.in_features)) for n, m in quantized_layers(model).items()}
