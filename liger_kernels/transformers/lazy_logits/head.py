"""The patch of a model: its head returns lazy logits, and its forward decides when.

The head's class is swapped for a subclass of the same name. The model's forward is wrapped by a
bound method in its __dict__, as PEFT calls `model.forward` and would miss a hook. Nothing closes
over a module, so copies by deepcopy and pickle are independent and stay patched. Replicas of
torch.nn.DataParallel share the bound method of the original and do not work; DDP does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernels.ops.losses.options import IGNORE_INDEX
from liger_kernels.transformers.lazy_logits.compiled import call_traced
from liger_kernels.transformers.lazy_logits.deferred import (
    DeferredLogits,
    HeadOp,
    active_layer,
    begin,
    class_of,
    is_lazy_head,
    stock_output,
)
from liger_kernels.transformers.lazy_logits.logprobs import ARGUMENT, HeadRequest, answer
from liger_kernels.transformers.lazy_logits.sharding import reshard_if_left
from liger_kernels.transformers.lazy_logits.tensor import LazyCall, LazyLogits
from liger_kernels.transformers.replacements.calls import is_transformed
from liger_kernels.transformers.replacements.subclasses import subclass_in_place, swap
from liger_kernels.transformers.wrappers import inner_model, output_head

__all__ = ["HeadPatch", "head_problem", "install_head", "is_head_patched", "num_fused"]

# Where a patched model keeps its HeadPatch.
_KEY = "_head_patch"


def _head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return class_of(self).forward(self, *args, **kwargs)
    call = self._lazy_call
    deferred = None if call is None else begin(self, call, args[0])
    return stock_output(self, args[0]) if deferred is None else call.show(deferred)


def _state_of(self: Any) -> dict[str, Any]:
    # The call that runs is no part of a copy.
    return {k: v for k, v in self.__dict__.items() if k != "_lazy_call"}


# What a head has while it is lazy, and at first.
_STATE = {
    "_lazy_call": None,
    "_num_losses": 0,
    "_is_left_gathered": False,
    "_has_compiled_loss": False,
}


def lazy_class(stock_class: type) -> Any:
    """Return the subclass of a head's class, of the same name, that can answer with lazy logits."""
    return subclass_in_place(
        lazy_class,
        stock_class,
        members=lambda: {"forward": _head_forward, "__getstate__": _state_of, **_STATE},
    )


def _swap(head: Any) -> None:
    if not is_lazy_head(head):
        swap(head, lazy_class(class_of(head)))


def _restore(head: nn.Module) -> None:
    for name in _STATE:
        head.__dict__.pop(name, None)
    # FSDP2 may have put its class on top; beneath it the head behaves as the stock one.
    if "_lazy_call" in type(head).__dict__:
        swap(head, class_of(head))


def num_fused(head: Any) -> int:
    """Return how many losses were computed from the head without the stock cross-entropy.

    Fused and chunked losses count alike. The runs of compiled code between two looks count as one.
    """
    if getattr(head, "_has_compiled_loss", False):
        head._has_compiled_loss = False
        head._num_losses += 1
    return int(getattr(head, "_num_losses", 0))


def head_problem(model: nn.Module) -> str | None:
    """Return why a model's head cannot be patched, or None if it can."""
    head = output_head(inner_model(model))
    if head is None:
        return "the model has no output head: pass the model that has"
    if "forward" in head.__dict__:
        return "the head's forward is wrapped (accelerate hooks do that); patch before wrapping"
    if not isinstance(getattr(active_layer(head), "out_features", None), int):
        return f"the head is a {type(head).__name__}, no linear layer: nothing to fuse"
    return None


def is_head_patched(model: Any) -> bool:
    """Return whether the head of a model, without its wrappers, is patched now."""
    patch: HeadPatch | None = getattr(model, _KEY, None)
    return patch is not None and patch.op is not None


class HeadPatch:
    """The patch of one model's head: install() applies it, undo() reverts it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # None before and after; a wrapper of somebody else may still call through the patch then.
        self.op: HeadOp | None = None
        parameters = _parameters_of(class_of(model))
        names = list(parameters)
        # Positions of a bound call, which does not pass self.
        self.positions = {name: names.index(name) - 1 for name in _TARGETS if name in names}
        # transformers hands shift_labels to the loss in **kwargs, but only if there are labels.
        self.fills_labels = (
            "labels" in names
            and not {"shift_labels", "decoder_input_ids"} & set(names)
            and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        )
        self.previous: Callable[..., Any] | None = model.__dict__.get("forward")

    def install(self, op: HeadOp) -> None:
        """Patch the head and the model's forward; undo() works wherever this is interrupted."""
        self.op = op
        head = output_head(self.model)
        assert head is not None
        _swap(head)
        members = self.model.__dict__
        if members.get(_KEY) is self and "forward" in members:
            # Undone beneath a wrapper of somebody else, which is still there.
            return
        members[_KEY] = self
        # The patch stands before the bound method: pickle then knows one when it meets the other.
        members.pop("forward", None)
        self._bind()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # pickle looks a bound method up by its name and would find the class's forward.
        self._bind()

    def _bind(self) -> None:
        _keep_from_dynamo()
        forward = _forward_of(class_of(self.model))
        self.model.__dict__["forward"] = MethodType(forward, self.model)

    def undo(self) -> None:
        """Restore the model's forward and the head's class; later wrappers stay callable."""
        self.op = None
        members = self.model.__dict__
        forward = members.get("forward")
        # By a mark, as FSDP2 may have given the model another class.
        is_outermost = hasattr(forward, "calls_head_patch")
        for module in self.model.modules():
            if is_lazy_head(module):
                _restore(module)
        # The patch goes last: an undo that was interrupted is finished by another call.
        if members.get(_KEY) is self and (is_outermost or forward in (None, self.previous)):
            if self.previous is None:
                members.pop("forward", None)
            else:
                members["forward"] = self.previous
            del members[_KEY]


def install_head(model: nn.Module, op: HeadOp) -> HeadPatch:
    """Patch a model so that its loss is computed by `op`; return the patch, whose undo reverts it.

    Args:
        model: As prepare_head takes it.
        op: "fused_linear_cross_entropy" materializes logits only if they are read;
            "cross_entropy" always does, and runs the cross_entropy op on them, except under
            torch.compile, which generates the kernel.

    Raises:
        ValueError: op is unknown, or as prepare_head.
    """
    if op not in get_args(HeadOp):
        raise ValueError(f"op must be one of {', '.join(get_args(HeadOp))}, got {op!r}")
    patch = prepare_head(model)
    patch.install(op)
    return patch


def prepare_head(model: nn.Module) -> HeadPatch:
    """Return the patch of a model's head, whose install() does it; nothing is changed yet.

    Args:
        model: A model whose forward computes a loss from labels, with get_output_embeddings(); or
            a PEFT, DDP or compiled wrapper of one, in which case the model inside is patched.

    Raises:
        ValueError: The head cannot be patched, or it has been patched.
    """
    model = inner_model(model)
    problem = head_problem(model)
    if problem is not None:
        raise ValueError(f"model {type(model).__name__} cannot be patched: {problem}")
    patch: HeadPatch | None = model.__dict__.get(_KEY)
    if patch is not None and patch.op is not None:
        raise ValueError(f"the head of model {type(model).__name__} is patched; undo that first")
    # With a wrapper of somebody else around it, it is still what that calls.
    is_wrapped = patch is not None and model.__dict__.get("forward") not in (None, patch.previous)
    return patch if patch is not None and is_wrapped else HeadPatch(model)


@functools.cache
def _keep_from_dynamo() -> None:
    """Exclude functions of this package from being compiled on their own.

    Where a model cannot be traced as a whole, dynamo compiles it in pieces. Then its head and loss
    must be the eager ones, not stubs that pass from one piece to the next. A function traced as
    part of a caller's graph is unaffected.
    """
    # Not at import: it takes a second, which transformers has spent by the time there is a model.
    frames: Any = importlib.import_module("torch._dynamo.eval_frame")
    skip, default = frames.FrameAction.SKIP, frames.FrameAction.DEFAULT
    # The model's own modules, which it calls, are compiled.
    calls: Any = (_call_model, _call_for_logprobs)
    for function in calls:
        frames.set_code_exec_strategy(function.__code__, frames.FrameExecStrategy(skip, default))
    interpose: Any = LazyLogits.__torch_function__
    for function in (interpose.__func__, LazyCall.show, answer):
        frames.set_code_exec_strategy(function.__code__, frames.FrameExecStrategy(skip, skip))


# The model's forward.

_TARGETS = ("labels", "shift_labels")


@functools.cache
def _parameters_of(model_class: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model_class.forward).parameters)


@functools.cache
def _forward_of(model_class: Any) -> Callable[..., Any]:
    """The function that patched models of a class are bound to, with the class's signature."""

    # No functools.wraps: accelerate's unwrap_model follows __wrapped__ and would lose the patch.
    def forward(self: Any, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        request = kwargs.pop(ARGUMENT, None)
        if request is not None:
            return _call_for_logprobs(self, args, kwargs, request)
        return _call_model(self, args, kwargs, skip_logits)

    parameters = list(_parameters_of(model_class).values())
    option = inspect.Parameter("skip_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    has_rest = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - has_rest, option)
    signature = inspect.signature(model_class.forward).replace(parameters=parameters)
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.calls_head_patch = True  # type: ignore[attr-defined]
    forward.__doc__ = model_class.forward.__doc__
    forward.__qualname__ = model_class.forward.__qualname__
    return forward


def _call_model(model: Any, args: Any, kwargs: dict[str, Any], skip_logits: bool | None) -> Any:
    patch: HeadPatch | None = getattr(model, _KEY, None)
    previous = _previous_forward(model, patch)
    if patch is None or patch.op is None:
        if skip_logits is not None:
            kwargs = {**kwargs, "skip_logits": skip_logits}
        return previous(*args, **kwargs)
    if skip_logits is not None and not isinstance(skip_logits, bool):
        raise ValueError(f"skip_logits must be True, False or None, got {skip_logits!r}")
    labels = _bound("labels", patch, args, kwargs)
    shift_labels = _bound("shift_labels", patch, args, kwargs)
    if labels is None and shift_labels is not None and patch.fills_labels:
        args, kwargs = _with_labels(shift_labels, patch, args, kwargs)
    targets = labels if shift_labels is None else shift_labels
    is_on = skip_logits
    if is_on is None:
        is_on = targets is not None and model.training and torch.is_grad_enabled()
    head: Any = output_head(model) if is_on else None
    is_traced = torch.compiler.is_compiling()
    # Inductor generates a kernel for the loss of materialized logits.
    is_generated = is_traced and patch.op == "cross_entropy"
    if is_generated or reason_not_lazy(head, is_traced) is not None:
        out = previous(*args, **kwargs)
        return _without_logits(out) if skip_logits else out
    if is_traced:
        out, stubs = call_traced(head, patch.op, previous, args, kwargs)
        return _without_logits(out, stubs.find, is_named_kept=not skip_logits)
    with _lazy_head(head, LazyCall(patch.op, targets)):
        out = previous(*args, **kwargs)
    return _without_logits(out) if skip_logits else out


def _call_for_logprobs(model: Any, args: Any, kwargs: dict[str, Any], request: HeadRequest) -> Any:
    """Run the model's forward and return its output with token_logprobs' values for logits."""
    patch: Any = getattr(model, _KEY)
    previous = _previous_forward(model, patch)
    head: Any = output_head(model)
    is_traced = torch.compiler.is_compiling()
    problem = reason_not_lazy(head, is_traced)
    if patch.op != "fused_linear_cross_entropy":
        problem = "the head is patched with cross_entropy, not with fused_linear_cross_entropy"
    if problem is not None:
        return answer(previous(*args, **kwargs), lambda value: None, request, problem)
    problem = "the model's forward reads them"
    if is_traced:
        out, stubs = call_traced(head, patch.op, previous, args, kwargs)
        return answer(out, stubs.find, request, problem)
    with _lazy_head(head, LazyCall(patch.op, request.target)):
        out = previous(*args, **kwargs)
        return answer(out, _deferred_of, request, problem)


def _previous_forward(model: Any, patch: HeadPatch | None) -> Any:
    previous: Any = None if patch is None else patch.previous
    return functools.partial(type(model).forward, model) if previous is None else previous


def reason_not_lazy(head: Any, is_traced: bool) -> str | None:
    """Return why the logits of this call are real, or None where they can be deferred."""
    if head is None:
        return "the model has no output head"
    # A head that came after the patch, and cannot or must not be patched now.
    if (is_traced or "forward" in head.__dict__) and not is_lazy_head(head):
        return "the head came after the patch, wrapped or inside of torch.compile"
    return "the call is inside of torch.func or forward mode" if is_transformed() else None


@contextlib.contextmanager
def _lazy_head(head: Any, call: LazyCall) -> Iterator[None]:
    """Let the head answer with deferred logits."""
    # PEFT may have put an adapter in the head's place since it was patched.
    _swap(head)
    reshard_if_left(head)
    head._lazy_call = call
    try:
        yield
    finally:
        head._lazy_call = None
        call.end()


def _deferred_of(value: Any) -> DeferredLogits | None:
    return getattr(value, "_deferred", None)


def _bound(name: str, patch: HeadPatch, args: Any, kwargs: dict[str, Any]) -> Any:
    at = patch.positions.get(name, len(args))
    return args[at] if at < len(args) else kwargs.get(name)


def _with_labels(
    shift_labels: Tensor, patch: HeadPatch, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    # Where the loss takes shift_labels it does not look at labels. Where it does not, these are
    # right but for the last position, whose label no unshifted row can hold.
    labels = F.pad(shift_labels, (1, -1), value=IGNORE_INDEX)
    at = patch.positions["labels"]
    if at < len(args):
        return (*args[:at], labels, *args[at + 1 :]), kwargs
    return args, {**kwargs, "labels": labels}


def _without_logits(
    out: Any,
    find: Callable[[Any], DeferredLogits | None] = _deferred_of,
    is_named_kept: bool = False,
) -> Any:
    """A model's output with None for logits; in a tuple, as transformers does it, without them."""
    if isinstance(out, tuple):
        return tuple(value for value in out if find(value) is None)
    if not isinstance(out, dict):
        return out
    named = None if is_named_kept else "logits"
    fields = {k: None if k == named or find(v) is not None else v for k, v in out.items()}
    return type(out)(**fields)
