"""LazyLogits: deferred logits as an eager tensor, and one eager forward of a lazy model."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from liger_kernels.ops.fused_linear_cross_entropy import LabelCount, count_labels
from liger_kernels.ops.losses.options import IGNORE_INDEX
from liger_kernels.transformers.lazy_logits.callers import running_function
from liger_kernels.transformers.lazy_logits.deferred import DeferredLogits, HeadOp
from liger_kernels.transformers.lazy_logits.ops import is_metadata, respond

__all__ = ["LazyCall", "LazyLogits"]


class LazyLogits(Tensor):
    """Logits that are not materialized: shape, dtype, device and graph, but no values."""

    _deferred: DeferredLogits

    @staticmethod
    def __new__(cls, deferred: DeferredLogits) -> LazyLogits:
        lazy: LazyLogits = Tensor._make_wrapper_subclass(
            cls, deferred.shape, dtype=deferred.dtype, device=deferred.rows.device
        )
        lazy._deferred = deferred
        return lazy

    def materialize(self) -> Tensor:
        """Return the logits as a plain tensor; the first call computes them."""
        deferred = self._deferred
        is_new = deferred.made is None
        real = deferred.real()
        if is_new and real.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                hooks = list((self._backward_hooks or {}).values())
            for hook in hooks:
                # FSDP's are on the real logits already.
                if hook not in deferred.backward_hooks:
                    real.register_hook(hook)
        return real

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        deferred = self._deferred
        state = "made when read" if deferred.made is None else "made"
        return (
            f"LazyLogits(shape={tuple(deferred.shape)}, dtype={deferred.dtype}, "
            f"device='{deferred.rows.device}', {state})"
        )

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.compiler.is_compiling():
            # A compiled loss: its graph breaks here and resumes with the result.
            torch._dynamo.graph_break()
        kwargs = kwargs or {}
        function = running_function(function)
        face = next((arg for arg in args[:2] if isinstance(arg, LazyLogits)), None)
        # FSDP hooks every output that has a gradient; that must not cost the memory of the logits.
        is_hook = function is Tensor.register_hook
        if face is not None and face._deferred.call.has_loss:
            _warn_of_no_gradient(function, args[1:])
        if is_metadata(function) or (is_hook and face is not None and face._deferred.made is None):
            if is_hook and face is not None and _home_of(args[1:]).startswith("torch.distributed"):
                face._deferred.backward_hooks.append(args[1])
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if face is not None:
            answer = respond(face._deferred, face, function, args, kwargs)
            if isinstance(answer, DeferredLogits):
                return face if answer is face._deferred else answer.call.show(answer)
            if isinstance(answer, tuple):
                return tuple(part.call.show(part) for part in answer)
            if answer is not None:
                return answer
        args, kwargs = tree_map(_read, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Reached from C++ and inside autograd functions, where autograd has already noted the lazy
        # tensor as an input: only numbers are wanted, and the gradient goes through _Attach.
        args, kwargs = tree_map(_read_numbers, (args, kwargs or {}))
        return function(*args, **kwargs)


def _warn_of_no_gradient(function: Callable[..., Any], args: Any) -> None:
    """Warn the caller who asks for a gradient: a loss without logits brings them none."""
    is_hook = function is Tensor.register_hook
    # Hooks of torch itself only wait for backward.
    if function is Tensor.retain_grad or (is_hook and not _home_of(args).startswith("torch.")):
        warnings.warn(
            "out.loss was computed without making these logits, so its backward brings them no "
            "gradient: call the model with skip_logits=False to have one",
            stacklevel=4,
        )


def _home_of(args: Any) -> str:
    """Return the module that a hook comes from, the first of args."""
    hook = args[0] if args else None
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", ""))


def _read(value: Any) -> Any:
    return value.materialize() if isinstance(value, LazyLogits) else value


def _read_numbers(value: Any) -> Any:
    return value.materialize().detach() if isinstance(value, LazyLogits) else value


class _Attach(torch.autograd.Function):
    """Place lazy logits in the autograd graph, behind the head's input and weights.

    Python code gets real logits with a separate graph and does not come through here. Autograd
    functions that take logits as an input do: DDP's, and the losses of other packages.
    """

    @staticmethod
    def forward(ctx: Any, deferred: DeferredLogits, *sources: Tensor) -> Tensor:
        ctx.deferred = deferred
        ctx.sources = sources
        return LazyLogits(deferred)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, *weights = ctx.sources
        # The real logits' own graph goes on to embeddings, which may be tied to the head: it would
        # count them twice.
        cut = source.detach().requires_grad_(source.requires_grad)
        with ctx.deferred.as_recorded(True):
            logits = ctx.deferred.again(cut)
            wanted = [x for x in (cut, *weights) if x.requires_grad]
            grads = iter(torch.autograd.grad(logits, wanted, grad, allow_unused=True))
        return (None, *(next(grads) if x.requires_grad else None for x in ctx.sources))


class LazyCall:
    """One eager forward of a model whose head is lazy."""

    def __init__(self, op: HeadOp, labels: Tensor | None) -> None:
        self.op = op
        self.num_targets = 0
        self.has_loss = False
        self.label_count: LabelCount | None = None
        if op == "fused_linear_cross_entropy" and isinstance(labels, Tensor):
            # On its way to the host while the model runs, so that the loss has nothing to wait for.
            self.label_count = count_labels(labels, IGNORE_INDEX)
            self.num_targets = labels.numel()

    def show(self, deferred: DeferredLogits) -> Tensor:
        """Return LazyLogits for deferred logits, with a place in the graph if they have one."""
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
        if not deferred.needs_grad:
            return LazyLogits(deferred)
        weights = [p for p in deferred.head.parameters() if p.requires_grad]
        lazy: Tensor = _Attach.apply(deferred, deferred.source, *weights)
        return lazy

    def end(self) -> None:
        """Drop the label count: a loss after the forward may have other labels."""
        self.label_count = None
