"""The one way to change a built model."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from minillama.errors import UserError

M = TypeVar("M", bound=nn.Module)


def replace_modules(model: M, match: Callable[[str, nn.Module], bool], make: Callable[[nn.Module], nn.Module]) -> M:
    """Replaces every module of `model` for which match(name, module) is true by make(module).

    Names are those of model.named_modules(). Changes the model and returns it. A new module gets the training mode of
    the one it replaces. Raises UserError if nothing matched.
    """
    found = [(name, module) for name, module in model.named_modules() if name and match(name, module)]
    if not found:
        raise UserError(f"no module of {type(model).__name__} matched: nothing to replace")
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(module).train(module.training))
    return model
