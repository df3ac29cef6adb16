"""Pending logits under torch.compile, where a tensor without storage cannot be traced.

The head answers with a stub: one zero, expanded to the logits' shape. A torch function mode that is
on during the model's forward, and is traced with it, knows the stubs by identity and does to them
what LazyLogits does in eager code. It meets every function of a stub, so none gets into arithmetic:
what is not recorded gets the real logits. `out.logits` is None.

The loss is fused_linear_cross_entropy, which is an operator of its own in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from liger_kernels.transformers.lazy_logits.deferred import HeadOp, Pending
from liger_kernels.transformers.lazy_logits.loss import is_metadata, respond


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
