"""DeferredLogits: a head, its input, and the operations recorded since, in place of the logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from liger_kernels.ops.fused_linear_cross_entropy import LabelCount
from liger_kernels.transformers.lazy_logits.sharding import (
    can_gather,
    gather,
    is_part,
    is_sharded,
    reshard_if_left,
)
from liger_kernels.transformers.lazy_logits.steps import SWITCH, num_steps
from liger_kernels.transformers.recognise import original_class
from liger_kernels.transformers.replacements.calls import is_transformed, runs_stock_linear

HeadOp = Literal["fused_linear_cross_entropy", "cross_entropy"]
# Of each of a head's parameters: whether it is sharded, its shape, dtype, address and version.
Weights = list[tuple[bool, torch.Size, torch.dtype, int, int]]
# Of each of a head's modules: dropout, and which adapters are on.
Switches = list[tuple[Any, ...]]


class HeadCall(Protocol):
    """One forward of a model during which its head's logits are deferred."""

    op: HeadOp
    # An upper bound of the labels among `num_targets` targets, on its way to the host.
    label_count: LabelCount | None
    num_targets: int
    # Whether a loss was computed from the logits without making them.
    has_loss: bool

    def show(self, deferred: DeferredLogits) -> Tensor:
        """Return a placeholder tensor for the deferred logits."""


@dataclass(frozen=True)
class RecordedOp:
    """One recorded operation: function(logits, *args)."""

    kind: Literal["scale", "tanh", "cast", "view", "rows", "detach", "log_softmax"]
    function: Callable[..., Tensor]
    args: tuple[Any, ...] = ()
    # What a scale multiplies by; None where reading the number would wait for the device.
    factor: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        return self.function(logits, *self.args)


class DeferredLogits:
    """Logits as a recipe: a head, its input, and the operations recorded since."""

    def __init__(
        self,
        head: nn.Module,
        call: HeadCall,
        source: Tensor,
        rows: Tensor,
        width: int,
        dtype: torch.dtype,
        needs_grad: bool,
        autocast: torch.dtype | None,
        weights: Weights,
        parent: DeferredLogits | None = None,
        last_op: RecordedOp | None = None,
    ) -> None:
        self.head = head
        self.call = call
        # The head's input, and the same after the recorded views and row selections.
        self.source = source
        self.rows = rows
        self.width = width
        self.dtype = dtype
        self.needs_grad = needs_grad
        # What autocast computed in where the head was called; None: it was off.
        self.autocast = autocast
        self.weights = weights
        self.parent = parent
        # The operation that made these logits of the parent.
        self.last_op = last_op
        if parent is None:
            self.source_version = _version(source)
            self.switches = _switches_of(head)
            self.num_steps = num_steps(head)
        self.is_log_softmax: bool = (last_op is not None and last_op.kind == "log_softmax") or (
            parent is not None and parent.is_log_softmax
        )
        self.made: Tensor | None = None
        # Of each token, where it was computed beside the logits of labels.
        self.lse: Tensor | None = None
        # FSDP's, which gather the head's group before the backward of these logits.
        self.backward_hooks: list[Callable[[Tensor], Any]] = []
        # Random states as a head with dropout found them.
        self.rng_states: list[Tensor] = []

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows.shape[:-1], self.width)

    def then(
        self, op: RecordedOp, *, rows: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> DeferredLogits:
        """Record one more operation and return the result."""
        return DeferredLogits(
            head=self.head,
            call=self.call,
            source=self.source,
            rows=self.rows if rows is None else rows,
            width=self.width,
            dtype=self.dtype if dtype is None else dtype,
            needs_grad=self.needs_grad and torch.is_grad_enabled() and op.kind != "detach",
            autocast=self.autocast,
            weights=self.weights,
            parent=self,
            last_op=op,
        )

    def lineage(self) -> list[DeferredLogits]:
        """Return these logits and those they came from, oldest first."""
        return [self] if self.parent is None else [*self.parent.lineage(), self]

    def arithmetic(self) -> list[RecordedOp]:
        """Return the recorded operations on values, oldest first; views are in `rows`."""
        ops = [x.last_op for x in self.lineage() if x.last_op is not None]
        return [op for op in ops if op.kind in ("scale", "tanh", "cast")]

    def has_been_made(self) -> bool:
        # A reader of the real logits may have changed them in-place, so they are the truth now.
        return any(deferred.made is not None for deferred in self.lineage())

    def real(self) -> Tensor:
        """Materialize the logits as the stock model does, with their graph; cached."""
        if self.made is None and torch.compiler.is_compiling():
            self.made = self._make()
        elif self.made is None:
            # Read inside inference_mode they would have no graph, which a later reader may need.
            with torch.inference_mode(False), self.as_recorded(self.needs_grad):
                self.made = self._make()
            _register(self.backward_hooks, self.made)
        return self.made

    def finish_loss(self, *values: Tensor) -> None:
        """Count a loss that was computed from these logits, and prepare its backward.

        It brings the logits no gradient, so FSDP's hooks wait for that of the loss instead. Without
        a backward nothing would reshard the head.

        Args:
            values: The loss, or several values per token that were computed together.
        """
        self.call.has_loss |= self.call.op == "fused_linear_cross_entropy"
        _count_loss(self.head)
        if torch.compiler.is_compiling():
            return
        for deferred in self.lineage():
            for value in values:
                _register(deferred.backward_hooks, value)
        if not any(value.requires_grad for value in values):
            reshard_if_left(self.head)

    def _make(self) -> Tensor:
        if self.parent is not None and self.last_op is not None:
            return self.last_op.apply(self.parent.real())
        changed = self.what_changed()
        if changed is not None:
            raise RuntimeError(
                f"these lazy logits can no longer be made: {changed} since the forward. Read "
                f"out.logits before optimizer.step() and the like, {SWITCH}."
            )
        if _has_dropout(self.head) and not torch.compiler.is_compiling():
            self.rng_states = _rng_states(self.source.device)
        return self.head_output(self.source)

    def again(self, source: Tensor) -> Tensor:
        """Return the logits once more, from another tensor for the head's input."""
        root, *rest = self.lineage()
        device = source.device
        others = [] if device.type == "cpu" else [device]
        kind = device.type if others else "cuda"
        with torch.random.fork_rng(others, enabled=bool(root.rng_states), device_type=kind):
            for of, state in zip((None, *others), root.rng_states, strict=False):
                if of is None:
                    torch.set_rng_state(state)
                else:
                    torch.get_device_module(of).set_rng_state(state, of)
            logits = root.head_output(source)
        for deferred in rest:
            if deferred.last_op is not None:
                logits = deferred.last_op.apply(logits)
        return logits

    def head_output(self, x: Tensor) -> Tensor:
        """Run the stock head on x.

        The head's hooks have run by then: those before its forward on the input that was recorded,
        those after it on the lazy logits. They run again only where they hold the weights.
        """
        head: Any = self.head
        gather(head)
        if "forward" not in head.__dict__ and same_layout(self.weights, weights_of(head)):
            return stock_output(head, x)
        if is_sharded(head) and not head._forward_pre_hooks:
            # FSDP2 gathers the weights of a group where the group's own module is called.
            raise RuntimeError(
                "these lazy logits can no longer be made: the head's weights are sharded again, "
                "with those of a module around it. Shard the head by itself, "
                f"fully_shard(model.lm_head), {SWITCH}."
            )
        call, head._lazy_call = head._lazy_call, None
        try:
            return head(x)
        finally:
            head._lazy_call = call

    def what_changed(self) -> str | None:
        """Return the reason why logits computed now would differ from the forward's, or None."""
        if torch.compiler.is_compiling():
            return None
        now = weights_of(self.head)
        is_written = self.num_steps != num_steps(self.head)
        if is_written or (same_layout(self.weights, now) and self.weights != now):
            return "the head's weights have changed"
        if self.switches != _switches_of(self.head):
            return "an adapter or the dropout of the head was switched"
        if self.source_version != _version(self.source):
            return "the head's input was written to"
        return None

    @contextlib.contextmanager
    def as_recorded(self, needs_grad: bool) -> Iterator[None]:
        """Restore autocast of the head's call, and enable gradients only if needs_grad."""
        kind = self.source.device.type
        is_on = self.autocast is not None
        with torch.set_grad_enabled(needs_grad), torch.autocast(kind, self.autocast, enabled=is_on):
            yield


def _register(hooks: list[Callable[[Tensor], Any]], x: Tensor) -> None:
    if x.requires_grad:
        for hook in hooks:
            x.register_hook(hook)


def _has_dropout(head: nn.Module) -> bool:
    return any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0.0
        for module in head.modules()
    )


def _rng_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def weights_of(head: nn.Module) -> Weights:
    """Return a fingerprint of the head's weights: it changes when they are resharded or written."""
    if torch.compiler.is_compiling():
        return []
    # FSDP2 may gather the same weights at another address.
    moves = can_gather(head)
    return [
        (is_part(p), p.shape, p.dtype, 0 if moves else _address(p), _version(p))
        for p in head.parameters()
    ]


def _version(x: Tensor) -> int:
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _address(x: Tensor) -> int:
    try:
        return x.data_ptr()
    # Of tensors that are wrapped around others, such as quantised ones.
    except RuntimeError:
        return 0


def _switches_of(head: nn.Module) -> Switches:
    """Return the state of a head's modules, other than weights, that its output depends on."""
    if torch.compiler.is_compiling():
        return []
    found: Switches = []
    for module in head.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found.append((module.training and module.p,))
        elif hasattr(module, "active_adapters"):
            names = ("active_adapters", "disable_adapters", "merged_adapters")
            found.append(tuple(str(getattr(module, name, None)) for name in names))
    return found


def same_layout(before: Weights, now: Weights) -> bool:
    """Return whether a head's weights are the tensors they were, whatever their values.

    FSDP2 and ZeRO-3 take them away after the head's forward; only its hooks bring them back.
    """
    return [entry[:2] for entry in before] == [entry[:2] for entry in now]


# The head. Its class is swapped by head.py; `_lazy_call` is the HeadCall of a forward whose
# logits are deferred, else None.


def class_of(module: nn.Module) -> Any:
    """Return the class of a module as it was before it was patched."""
    return original_class(type(module))


def is_lazy_head(module: nn.Module) -> bool:
    """Return whether a module's class was swapped for one that can answer with deferred logits."""
    return hasattr(type(module), "_lazy_call")


def _count_loss(head: nn.Module) -> None:
    module: Any
    for module in head.modules():
        if is_lazy_head(module):
            if torch.compiler.is_compiling():
                # Written, never read, in a compiled region: a counter would recompile every step.
                module._has_compiled_loss = True
            else:
                module._num_losses += 1


def stock_output(head: nn.Module, x: Tensor) -> Tensor:
    """Run the head's original forward on x, without hooks."""
    forward = class_of(head).forward
    if runs_stock_linear(head):
        x = as_weight(x, head.weight)
    return forward(head, x)


def as_weight(x: Tensor, weight: Any) -> Tensor:
    """Return x in the dtype of a linear layer's weight, where autocast does not see to it.

    Preparing a model for k-bit training leaves norms, and so hidden states, in fp32 before a bf16
    head. The product is computed in the weight's dtype; gradients come back in each tensor's own.
    """
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype) if weight.is_floating_point() else x


def active_layer(head: nn.Module) -> nn.Module:
    """Return the layer that PEFT's wrapper of whole modules or of tokens calls, or the head."""
    if isinstance(tokens := head._modules.get("token_adapter"), nn.Module):
        return tokens
    copies = head._modules.get("modules_to_save")
    original = head._modules.get("original_module")
    if not isinstance(copies, nn.ModuleDict) or original is None:
        return head
    names: Any = getattr(head, "active_adapters", None) or ["default"]
    is_on = not getattr(head, "disable_adapters", False) and names[0] in copies
    return copies[names[0]] if is_on else original


def begin(head: nn.Module, call: HeadCall, x: Tensor) -> DeferredLogits | None:
    """Return the deferred logits of one call of the head, or None where it has to be stock."""
    leaf = active_layer(head)
    width: Any = getattr(leaf, "out_features", None)
    if type(x) is not Tensor or x.is_meta or is_transformed() or not isinstance(width, int):
        return None
    # A tensor-parallel head makes a slice of the logits; its hooks put the slices together.
    if is_sharded(head):
        return None
    linear: Any = leaf if runs_stock_linear(leaf) else None
    if linear is not None and type(linear.weight) is nn.Parameter and len(linear.weight) != width:
        return None
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    dtype = x.dtype if linear is None else linear.weight.dtype
    if autocast is not None and x.dtype != torch.float64:
        dtype = autocast
    is_trained = x.requires_grad or any(p.requires_grad for p in head.parameters())
    return DeferredLogits(
        head=head,
        call=call,
        source=x,
        rows=x,
        width=width,
        dtype=dtype,
        needs_grad=is_trained and torch.is_grad_enabled(),
        autocast=autocast,
        weights=weights_of(head),
    )
