"""Shared by all patched forwards: whether an op serves a call, and the record of calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from liger_kernels.transformers.recognise import RopeSpec, original_class
from liger_kernels.transformers.replacements.subclasses import SPEC_ATTRIBUTE

_PLAIN_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_plain(*tensors: Any) -> bool:
    """Return whether the ops serve these tensors; None counts as served."""
    return not is_transformed() and have_plain_types(tensors)


def have_plain_types(tensors: Sequence[Any], device: torch.device | None = None) -> bool:
    """Return whether the ops serve these tensors, under no transform, and all are on a device.

    None counts as served.
    """
    # A loop, for this runs in every call, where a generator costs the host a Python call a tensor.
    for x in tensors:
        if x is not None and not (
            type(x) in _PLAIN_TYPES
            and x.dtype in _DTYPES
            and not x.is_meta
            and (device is None or x.device == device)
        ):
            return False
    return True


def is_transformed() -> bool:
    """Return whether this runs under a transform that takes no custom autograd function.

    That is torch.func (vmap, grad, jvp), a level of forward-mode AD, or torch.jit.trace, with which
    torch.onnx.export traces as well.
    """
    return not torch.compiler.is_compiling() and has_transform()


def has_transform() -> bool:
    """Return the same outside of torch.compile, which does not trace the question."""
    stack: Any = torch._C._functorch.peek_interpreter_stack
    is_traced = torch._C._get_tracing_state() is not None
    return is_traced or forward_ad._current_level >= 0 or stack() is not None


def runs_stock_linear(layer: nn.Module) -> bool:
    """Return whether a layer's own class computes x @ weight.T + bias as torch does it.

    Tools replace nn.Linear.forward, or F.linear beneath it, for numbers of other kinds.
    """
    cls = type(layer)
    forward = (cls if cls is nn.Linear else original_class(cls)).forward
    return forward is _LINEAR_FORWARD and F.linear is torch._C._nn.linear


# None where somebody was there before us.
_LINEAR_FORWARD: Any = nn.Linear.forward
if _LINEAR_FORWARD.__code__.co_filename != inspect.getfile(nn.Linear):
    _LINEAR_FORWARD = None


def is_bare(*modules: nn.Module) -> bool:
    """Return whether calling each module is calling its class's forward and nothing else.

    Hooks on every module are not looked at: who sets them, such as an estimate of memory or a
    counter of FLOPs, wants to see what runs, and not to change it.
    """
    for module in modules:
        if "forward" in module.__dict__ or (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return False
    return True


class Tally:
    """The modules that called an op, by id, while a tally runs."""

    def __init__(self) -> None:
        self.called: set[int] = set()
        # The attention whose forward runs: its rotary function does not know whose it is.
        self.attention: nn.Module | None = None
        # torch.compile traced a patched forward: its modules run without Python and are not seen.
        self.is_compiled = False


_TALLY: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def tally_calls(modules: Iterable[nn.Module]) -> Iterator[Tally]:
    """Record which patched modules call their op. Compiled code records nothing."""
    tally = Tally()

    def enter(module: nn.Module, args: Any) -> None:
        tally.attention = module

    hooks = [
        module.register_forward_pre_hook(enter)
        for module in modules
        if isinstance(getattr(type(module), SPEC_ATTRIBUTE, None), RopeSpec)
    ]
    token = _TALLY.set(tally)
    try:
        yield tally
    finally:
        _TALLY.reset(token)
        for hook in hooks:
            hook.remove()


def record_call(*modules: nn.Module) -> None:
    """Count modules, or the attention that runs if none is given, as ones that called their op."""
    # Of the two questions the one that costs an eager call less.
    if torch.compiler.is_dynamo_compiling():
        _record_compiled()
        return
    tally = _TALLY.get()
    if tally is not None:
        tally.called.update(map(id, modules or (tally.attention,)))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _record_compiled() -> None:
    """Run once, in Python, where torch.compile traces."""
    tally = _TALLY.get()
    if tally is not None:
        tally.is_compiled = True
