"""The part of backward that every op shares."""

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

_this_thread = threading.local()


def _keep_thread_state() -> None:
    """Let Python's state of this thread live as long as the thread does.

    Autograd runs backward on its own threads, one a device. Python makes a state for such a
    thread whenever it is entered there and destroys it when it is left, memory maps included: for
    every node of the graph, several times, at 10 us and more each. One reference that is never
    given back ends that; for a thread that Python started itself it changes nothing.
    """
    _this_thread.is_kept = True
    ctypes.pythonapi.PyGILState_Ensure()


def differentiable_once(name: str) -> Callable[[Any], Any]:
    """Decorate the autograd function of `name` so that a derivative it lacks raises in words.

    Those are the second one, by create_graph=True, and the one of forward mode. torch's own
    once_differentiable stays silent where the gradient it is given needs none, and a penalty on the
    result would then train nothing. Gradients with a lazy minus sign are resolved before backward,
    since a kernel reads memory, where the sign is not.
    """

    def decorate(function: Any) -> Any:
        backward = function.backward

        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            # Autograd turns gradients on inside a backward if, and only if, create_graph is set;
            # a tracer has them on.
            if not torch.compiler.is_compiling():
                if torch.is_grad_enabled():
                    raise RuntimeError(
                        f"{name} is not differentiable twice: call backward or grad without "
                        "create_graph=True, or use torch's own operation there"
                    )
                if not hasattr(_this_thread, "is_kept"):
                    _keep_thread_state()
                for g in grads:
                    if g is not None and g.is_neg():
                        grads = tuple([g if g is None else g.resolve_neg() for g in grads])
            return backward(ctx, *grads)

        def apply_jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(
                f"{name} has no derivative in forward mode (torch.autograd.forward_ad): use "
                "backward, or torch's own operation there"
            )

        function.backward = staticmethod(checked)
        # Not function.jvp, for which dynamo would refuse to trace the function.
        function._backward_cls.apply_jvp = apply_jvp
        return function

    return decorate
