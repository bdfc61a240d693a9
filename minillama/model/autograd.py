"""What our autograd functions have in common."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward that autograd cannot differentiate: with create_graph=True it raises RuntimeError.

    PyTorch's once_differentiable raises only if the incoming gradient requires grad. A loss' does not, and then the second
    derivative would silently be 0.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(ctx).__name__} has no second derivative: do not ask for it with create_graph=True"
            )
        return backward(ctx, *gradients)

    return checked
