"""Deferred logits under torch.compile, where a tensor without storage cannot be traced.

The head returns a stub: one NaN, expanded to the logits' shape. A torch function mode, active
during the model's forward and traced with it, recognizes stubs by identity and handles them as
LazyLogits does in eager code. It sees the functions of torch's public names, so a stub enters no
arithmetic: a function that is not recorded gets the real logits. `out.logits` is None. Dynamo
hides other functions from the mode, such as those of torch._C._nn and the original of one that a
tool replaced before the first compilation: their result is NaN, not the wrong number.

The loss is fused_linear_cross_entropy, one operator in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from liger_kernels.transformers.lazy_logits.deferred import DeferredLogits, HeadOp
from liger_kernels.transformers.lazy_logits.ops import is_metadata, respond


class StubCall(TorchFunctionMode):
    """One traced forward of a model whose head's logits are deferred."""

    def __init__(self, op: HeadOp) -> None:
        super().__init__()
        self.op = op
        # Labels cannot be counted on the host inside a graph.
        self.label_count = None
        self.num_targets = 0
        self.has_loss = False
        self.stubs: list[Tensor] = []
        self.deferred: list[DeferredLogits] = []

    def show(self, deferred: DeferredLogits) -> Tensor:
        """Return a stub for deferred logits."""
        # NaN, as a number that somebody reads past the mode must not look like a logit.
        nan = deferred.rows.new_full((), float("nan"), dtype=deferred.dtype)
        stub = nan.expand(deferred.shape)
        self.stubs.append(stub)
        self.deferred.append(deferred)
        return stub

    def find(self, value: Any) -> DeferredLogits | None:
        """Return the deferred logits behind a stub, or None for any other value."""
        for stub, deferred in zip(self.stubs, self.deferred, strict=True):
            if value is stub:
                return deferred
        return None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Most calls come before the head.
        if not self.stubs or is_metadata(function):
            return function(*args, **kwargs)
        for value in args[:2]:
            deferred = self.find(value)
            if deferred is not None:
                answer = respond(deferred, value, function, args, kwargs)
                if isinstance(answer, DeferredLogits):
                    return value if answer is deferred else self.show(answer)
                if isinstance(answer, tuple):
                    return tuple(self.show(part) for part in answer)
                if answer is not None:
                    return answer
        args, kwargs = tree_map(self._real, (args, kwargs))
        return function(*args, **kwargs)

    def _real(self, value: Any) -> Any:
        deferred = self.find(value)
        return value if deferred is None else deferred.real()


def call_traced(
    head: Any, op: HeadOp, forward: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Any, StubCall]:
    """Run the model's forward with stubs; return its output and the call that resolves them."""
    call = StubCall(op)
    head._lazy_call = call
    try:
        with call:
            out = forward(*args, **kwargs)
    finally:
        head._lazy_call = None
    return out, call
