"""Pending logits under torch.compile, where a tensor without storage cannot be traced.

The head answers with a stub: one zero, expanded to the logits' shape. A torch function mode that is
on during the model's forward, and is traced with it, knows the stubs by identity and does to them
what LazyLogits does in eager code. It meets every function of a stub, so none gets into arithmetic:
what is not recorded gets the real logits. `out.logits` is None.

The fused op chooses its tokens by a count that the host waits for, which a graph cannot hold, so it
is one opaque node that returns the summed loss and its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from liger_kernels.ops.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernels.transformers.lazy_logits.deferred import HeadOp, Pending
from liger_kernels.transformers.lazy_logits.loss import is_metadata, respond
from liger_kernels.transformers.recognise import Tail


class StubCall(TorchFunctionMode):
    """One traced forward of a model whose head's logits are pending."""

    def __init__(self, op: HeadOp) -> None:
        super().__init__()
        self.op = op
        # Labels cannot be counted on the host inside a graph.
        self.label_count = None
        self.num_targets = 0
        self.has_loss = False
        self.stubs: list[Tensor] = []
        self.pendings: list[Pending] = []

    def show(self, pending: Pending) -> Tensor:
        """Return a stub for pending logits."""
        stub = pending.rows.new_zeros((), dtype=pending.dtype).expand(pending.shape)
        self.stubs.append(stub)
        self.pendings.append(pending)
        return stub

    def find(self, value: Any) -> Pending | None:
        """Return the pending logits that a value stands for."""
        for stub, pending in zip(self.stubs, self.pendings, strict=True):
            if value is stub:
                return pending
        return None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Most calls come before the head.
        if not self.stubs or is_metadata(function):
            return function(*args, **kwargs)
        for value in args[:2]:
            pending = self.find(value)
            if pending is not None:
                answer = respond(pending, value, function, args, kwargs)
                if isinstance(answer, Pending):
                    return value if answer is pending else self.show(answer)
                if answer is not None:
                    return answer
        args, kwargs = tree_map(self._real, (args, kwargs))
        return function(*args, **kwargs)

    def _real(self, value: Any) -> Any:
        pending = self.find(value)
        return value if pending is None else pending.real()


def call_traced(
    head: Any, op: HeadOp, forward: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Any, StubCall]:
    """Return what the model's forward returns, and the call that knows the stubs in it."""
    call = StubCall(op)
    head._lazy_call = call
    try:
        with call:
            out = forward(*args, **kwargs)
    finally:
        head._lazy_call = None
    return out, call


@torch.library.custom_op("liger_kernels::summed_head_loss", mutates_args=())
def _summed_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    autocast: torch.dtype | None,
    needs_grad: Sequence[bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss summed over tokens, and its gradients for hidden, weight and bias, or nothing."""
    needs_grad = list(needs_grad)
    inputs: list[Any] = [
        None if x is None else x.detach().requires_grad_(needs)
        for x, needs in zip((hidden, weight, bias), needs_grad, strict=True)
    ]
    # A custom op runs below autograd; the fused op is above it.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set() - keys
    with (
        torch._C._ForceDispatchKeyGuard(include, exclude),
        torch.set_grad_enabled(any(needs_grad)),
        torch.autocast(hidden.device.type, autocast, enabled=autocast is not None),
    ):
        loss: Any = fused_linear_cross_entropy(
            inputs[0],
            inputs[1],
            target,
            bias=inputs[2],
            class_weight=class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="sum",
            softcap=softcap,
            scale=scale,
        )
        wanted = [x for x, needs in zip(inputs, needs_grad, strict=True) if needs]
        found = iter(torch.autograd.grad(loss, wanted) if wanted else ())
    dx, dw, db = (
        next(found).contiguous() if needs else hidden.new_empty(0) for needs in needs_grad
    )
    return loss.detach(), dx, dw, db


@_summed_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    autocast: torch.dtype | None,
    needs_grad: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if x is not None and needs
        else hidden.new_empty(0)
        for x, needs in zip((hidden, weight, bias), needs_grad, strict=True)
    ]
    return hidden.new_empty((), dtype=wide), *grads


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs_grad = inputs[6]
    ctx.save_for_backward(*output[1:])


def _hand_out_gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = zip(ctx.saved_tensors, ctx.needs_grad, strict=True)
    return (*(grad * dy if needs else None for grad, needs in grads), *(None,) * 8)


_summed_loss.register_autograd(_hand_out_gradients, setup_context=_keep_gradients)


def summed_loss(
    pending: Pending,
    linear: Any,
    tail: Tail,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Return the fused loss summed over tokens, as one node of a graph."""
    tensors = (pending.rows, linear.weight, linear.bias)
    total: Tensor = _summed_loss(
        *tensors,
        target,
        class_weight,
        pending.autocast,
        [x is not None and x.requires_grad and torch.is_grad_enabled() for x in tensors],
        ignore_index,
        label_smoothing,
        tail.softcap,
        tail.scale,
    )[0]
    return total
