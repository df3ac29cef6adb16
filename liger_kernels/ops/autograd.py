"""What the backward of every op has in common."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def differentiable_once(name: str) -> Callable[[Any], Any]:
    """Decorate the backward of `name` so that create_graph=True raises: its result has no graph.

    torch's own once_differentiable stays silent where the gradient it is given needs none, and a
    penalty on the result would then train nothing.
    """

    def decorate(backward: Any) -> Any:
        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            # Autograd turns gradients on inside a backward if, and only if, create_graph is set;
            # a tracer has them on.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{name} is not differentiable twice: call backward or grad without "
                    "create_graph=True, or use torch's own operation there"
                )
            return backward(ctx, *grads)

        return checked

    return decorate
