"""From a model on the meta device to one with memory and values."""

import zlib
from collections.abc import Collection

import torch
from torch import nn

from minillama.errors import UserError
from minillama.model.llama import Llama
from minillama.parallel.sharding import like, local


def materialise(model: Llama, device: torch.device | str) -> None:
    """Allocates the parameters of a model on the meta device, without values. Offloaded ones belong on "cpu"."""
    model.to_empty(device=device)
    model.tie_weights()


@torch.no_grad()
def initialise(model: nn.Module, seed: int, loaded: Collection[str] = ()) -> None:
    """Fills every parameter and buffer not in `loaded` through its module's reset_parameters().

    The numbers depend on seed and name alone, not on the number of ranks, the device or the dtype: each module's
    parameters are drawn whole on the host in at least fp32, one module at a time, and each rank keeps its part. (Random
    functions on DTensors draw the same numbers in every shard on CPU.) Raises UserError for a module that does not fill
    all it owns.
    """
    # named_parameters lists a tied head only once
    missing = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}.difference(loaded)
    for path, module in model.named_modules():
        kept = {name: t for name, t in (module._parameters | module._buffers).items() if t is not None}
        own = {name: t for name, t in kept.items() if (f"{path}.{name}" if path else name) in missing}
        if not own:
            continue
        who = f"{path or 'the model'} ({type(module).__name__})"
        if not hasattr(module, "reset_parameters"):
            raise UserError(f"{who} owns {', '.join(own)}, but has no reset_parameters() that fills it: give it one")
        for name, tensor in kept.items():
            # What was loaded is on the meta device here, where drawing costs nothing. In half precision random functions
            # draw other numbers, which depend on PyTorch's version.
            wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
            blank = torch.empty(tensor.shape, dtype=wide, device="cpu" if name in own else "meta")
            if blank.is_floating_point():
                blank.fill_(torch.nan)
            if isinstance(tensor, nn.Parameter):
                module._parameters[name] = nn.Parameter(blank, tensor.requires_grad)
            else:
                module._buffers[name] = blank
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(f"{seed} {path}".encode()))
            module.reset_parameters()
        for name, tensor in kept.items():
            tensors = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
            drawn, tensors[name] = tensors[name], tensor
            if name not in own:
                continue
            if drawn is None or drawn.isnan().any():
                raise UserError(f"{who}: its reset_parameters() does not fill {name}, or not with numbers")
            local(tensor).copy_(local(like(drawn, tensor)))
