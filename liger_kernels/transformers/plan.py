"""PatchPlan: which modules will run which op, which will not and why. A plan changes nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from liger_kernels.compare import check_op
from liger_kernels.ops.launch import backend
from liger_kernels.ops.registry import OPS
from liger_kernels.transformers.families import FAMILIES, Family
from liger_kernels.transformers.lazy_logits import head_problem
from liger_kernels.transformers.recognise import (
    GLU_OPS,
    ExpertsSpec,
    GatedNormSpec,
    HeadSpec,
    LayerNormSpec,
    Mismatch,
    MlpSpec,
    NormSpec,
    Recogniser,
    Refusal,
    RopeSpec,
    Spec,
    is_linear,
    original_class,
    rope_functions,
)
from liger_kernels.transformers.residual import AddNormSpec, find_layers, layer_problem
from liger_kernels.transformers.swap import can_swap

# In the order reports show them.
PATCH_OPS = (
    "rope",
    "rms_norm",
    "fused_add_rms_norm",
    "layer_norm",
    "gated_rms_norm",
    "swiglu",
    "geglu",
    "cross_entropy",
    "fused_linear_cross_entropy",
)
# These two are ways to compute the same loss.
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
_WORDS = ("auto", "all", "none")


# Requests ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpSelection:
    """Ops asked for."""

    ops: tuple[str, ...]
    # Those spelled out by name: a model without a place for one is worth telling.
    named: tuple[str, ...] = ()
    # Whether ops that fail their check on the model's device are left out.
    is_auto: bool = False
    # Whether norm outputs and gated products are made again in backward instead of kept.
    save_memory: bool = True


def resolve_ops(ops: str | Sequence[str] | OpSelection) -> OpSelection:
    """Return the ops that a request names, in a fixed order.

    Args:
        ops: "auto", "all", "none", names, or removals after one of these ("auto,-rope"), as one
            comma-separated string or a sequence. "all" is every op except cross_entropy, which must
            be named; "auto" is "all" without ops that fail their check on the device. Short names
            (rmsnorm, layernorm, ce, flce) and dashes for underscores are accepted.

    Raises:
        ValueError: A name is unknown (the message names the nearest) or no string, the words are
            combined in a way that says nothing, or both losses are asked for.
    """
    if isinstance(ops, OpSelection):
        return ops
    items = ops.split(",") if isinstance(ops, str) else ops
    # A mapping of names to booleans would lose the booleans.
    is_list = isinstance(items, Collection) and not isinstance(items, Mapping)
    if not is_list or not all(isinstance(item, str) for item in items):
        raise ValueError(f"ops must be a string or a sequence of names, got {ops!r}")
    items = [item.strip() for item in items]
    if not any(items):
        raise ValueError(f"ops is empty: {ops!r}; write 'none' to patch nothing")
    chosen: set[str] = set()
    named: list[str] = []
    removed: set[str] = set()
    words = [item.lower() for item in items if item.lower() in _WORDS]
    if len(words) > 1 or (words == ["none"] and len(items) > 1):
        raise ValueError(
            f"ops must hold one of {', '.join(_WORDS)} at most, and none alone: {ops!r}"
        )
    for item in items:
        if item.lower() in ("auto", "all"):
            chosen |= set(PATCH_OPS) - {"cross_entropy"}
        elif item.startswith("-"):
            removed.add(_op_name(item[1:]))
        elif item.lower() != "none":
            named.append(_op_name(item))
    if removed and not (chosen or named):
        raise ValueError(f"ops removes from nothing: {ops!r}; write 'auto,{items[0]}'")
    chosen = (chosen | set(named)) - removed
    if set(LOSSES) <= chosen:
        raise ValueError(
            "ops asks for cross_entropy and fused_linear_cross_entropy, which compute the same "
            "loss; keep one, for example 'auto,-fused_linear_cross_entropy,cross_entropy'"
        )
    return OpSelection(
        tuple(op for op in PATCH_OPS if op in chosen),
        tuple(op for op in named if op in chosen),
        words == ["auto"],
    )


def _op_name(name: str) -> str:
    names = {alias: op.name for op in OPS.values() for alias in (op.name, *op.aliases)}
    names = {alias: op for alias, op in names.items() if op in PATCH_OPS}
    wanted = name.strip().lower().replace("-", "_")
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, [*names, *_WORDS], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown op {name!r}{hint} Known: {', '.join((*PATCH_OPS, *_WORDS))}")


# Plans ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """A module that will run an op."""

    name: str
    module_class: str
    op: str
    spec: Spec | AddNormSpec


@dataclass(frozen=True)
class Skip:
    """A module that stays as it is; op is None if it is no candidate of any op."""

    name: str
    module_class: str
    op: str | None
    reason: str


@dataclass(frozen=True)
class PatchPlan:
    """What applying would do to a model, module by module."""

    model_type: str
    # "row": the model type is in FAMILIES; "recognised": everything was found by what it computes.
    source: Literal["row", "recognised"]
    # The ops that were asked for.
    ops: tuple[str, ...]
    patches: tuple[Patch, ...]
    skips: tuple[Skip, ...]
    # Ops asked for by name that the model has no place for.
    missing: tuple[str, ...] = ()
    # What would run the ops on the model's device; None while it is on meta.
    backend: str | None = None
    # Whether norm outputs and gated products are made again in backward instead of kept.
    save_memory: bool = True

    @property
    def coverage(self) -> dict[str, dict[str, int]]:
        """Modules to patch and candidates, for each op that has a candidate, requested or not."""
        return coverage_of((p.op for p in self.patches), (s.op for s in self.skips))

    @property
    def modules(self) -> list[dict[str, str | None]]:
        """One row for each module: name, class, op, status, backend, reason."""
        rows = [module_row(patch, "patched", backend=self.backend) for patch in self.patches]
        rows += [module_row(skip, "skipped", reason=skip.reason) for skip in self.skips]
        return sorted(rows, key=row_order)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return {
            "model_type": self.model_type,
            "source": self.source,
            "ops": list(self.ops),
            "missing": list(self.missing),
            "save_memory": self.save_memory,
            "coverage": self.coverage,
            "modules": self.modules,
        }


def coverage_of(
    patched: Iterable[str | None], skipped: Iterable[str | None]
) -> dict[str, dict[str, int]]:
    """Return {op: {"patched": n, "candidates": m}} in the order of reports."""
    done, left = list(patched), list(skipped)
    return {
        op: {"patched": done.count(op), "candidates": done.count(op) + left.count(op)}
        for op in PATCH_OPS
        if op in done or op in left
    }


def module_row(
    entry: Patch | Skip, status: str, *, backend: str | None = None, reason: str | None = None
) -> dict[str, str | None]:
    """Return a module's row of a report."""
    return {
        "name": entry.name,
        "class": entry.module_class,
        "op": entry.op,
        "status": status,
        "backend": backend,
        "reason": reason,
    }


def row_order(row: dict[str, str | None]) -> tuple[Any, ...]:
    """Sort rows by op as in reports, then by name with numbers as numbers."""
    op, name = row["op"], row["name"] or ""
    index = PATCH_OPS.index(op) if op in PATCH_OPS else len(PATCH_OPS)
    parts = re.split(r"(\d+)", name)
    return index, [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def build_plan(
    model: nn.Module,
    ops: str | Sequence[str] | OpSelection = "auto",
    *,
    recognise: bool = True,
) -> PatchPlan:
    """Return what patching a model with these ops would do; works on meta tensors.

    Args:
        model: A transformers model, or one wrapped by PEFT or DistributedDataParallel.
        ops: As resolve_ops takes them.
        recognise: Whether a model type without a row in FAMILIES may be patched by what its modules
            compute. False leaves it alone.

    Raises:
        ValueError: model is no module, or ops is not as resolve_ops wants it.
    """
    selection = resolve_ops(ops)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a model that is built already, got {model!r}")
    config = getattr(inner_model(model), "config", None)
    model_type = getattr(config, "model_type", None) or type(model).__name__
    row = FAMILIES.get(model_type)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    patches: list[Patch] = []
    skips: list[Skip] = []
    ops_of: dict[nn.Module, str] = {}
    for name, module, op, found in _survey(model, row) if row or recognise else ():
        if op == "cross_entropy" and op not in selection.ops:
            # The head already stands for the fused loss.
            continue
        class_name = original_class(type(module)).__name__
        reason = found.reason if isinstance(found, Refusal) else None
        if reason is None and op is not None:
            reason = _refusal(model, module, op, selection, device)
        if reason is None and isinstance(found, AddNormSpec):
            reason = layer_problem(module, found, ops_of)
        if reason is not None:
            skips.append(Skip(name, class_name, op, reason))
        elif op is not None and not isinstance(found, Refusal):
            patches.append(Patch(name, class_name, op, found))
            ops_of[module] = op
    candidates = {patch.op for patch in patches} | {skip.op for skip in skips}
    return PatchPlan(
        model_type,
        "row" if row else "recognised",
        selection.ops,
        tuple(patches),
        tuple(skips),
        tuple(op for op in selection.named if op not in candidates),
        None if device.type == "meta" else backend(device),
        selection.save_memory,
    )


Found = Spec | AddNormSpec | Refusal


def _survey(
    model: nn.Module, row: Family | None
) -> Iterator[tuple[str, nn.Module, str | None, Found]]:
    """Yield the modules worth a word: name, module, the op it is a candidate of, what was found."""
    recogniser = Recogniser(model)
    norms: set[nn.Module] = set()
    for name, module in model.named_modules():
        class_name = original_class(type(module)).__name__
        found = recogniser.recognise(module)
        if isinstance(found, RopeSpec) and not getattr(module, "use_rope", True):
            found = Refusal("attention without rotary positions in this layer", is_known_form=True)
        if row is not None:
            found = row.check(class_name, found)
        if isinstance(found, NormSpec) and not found.is_l2:
            norms.add(module)
        if found is None:
            reason = _idle_attention(name, module)
            found = None if reason is None else Refusal(reason)
        if found is not None:
            op = _op_of(found)
            if row is not None and isinstance(found, Mismatch):
                op = row.ops[class_name]
            yield name, module, op, found
    # After all norms, which these layers call.
    for name, module, layer in find_layers(model, norms):
        yield name, module, _op_of(layer), layer
    head = _head_of(model)
    if head is not None:
        name, module = head
        for op in LOSSES:
            yield name, module, op, HeadSpec()


def _op_of(found: Found) -> str | None:
    if isinstance(found, NormSpec):
        return "rms_norm"
    if isinstance(found, AddNormSpec):
        return "fused_add_rms_norm"
    if isinstance(found, LayerNormSpec):
        return "layer_norm"
    if isinstance(found, GatedNormSpec):
        return "gated_rms_norm"
    if isinstance(found, (MlpSpec, ExpertsSpec)):
        return GLU_OPS[found.activation]
    return "rope" if isinstance(found, RopeSpec) else None


def _idle_attention(name: str, module: nn.Module) -> str | None:
    """Return why an attention is no candidate of rope; None for other modules."""
    cls = original_class(type(module))
    is_attention = "Attention" in cls.__name__ or "Attn" in cls.__name__
    if not is_attention or not any(is_linear(child) for child in module.children()):
        return None
    if rope_functions(cls):
        return None
    if "Cross" in cls.__name__ or "cross" in name.rpartition(".")[2]:
        return "cross-attention: no rotary positions"
    return "attention without rotary positions"


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside the wrappers of PEFT, torch.compile and DDP."""
    inner: Any = model
    while True:
        if hasattr(type(inner), "get_base_model"):
            inner = inner.get_base_model()
        elif "_orig_mod" in inner._modules:
            inner = inner._modules["_orig_mod"]
        elif "module" in inner._modules and not hasattr(inner, "get_output_embeddings"):
            inner = inner._modules["module"]
        else:
            assert isinstance(inner, nn.Module)
            return inner


def _head_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the name and module of the language-model head, if the model has one."""
    find: Any = getattr(inner_model(model), "get_output_embeddings", None)
    try:
        head = None if find is None else find()
    except (AttributeError, NotImplementedError):
        return None
    return next((entry for entry in model.named_modules() if entry[1] is head), None)


def _refusal(
    model: nn.Module, module: nn.Module, op: str, selection: OpSelection, device: torch.device
) -> str | None:
    """Return why a module that a kernel could serve is left alone."""
    other = next((loss for loss in LOSSES if loss != op and loss in selection.ops), None)
    if op in LOSSES and op not in selection.ops and other is not None:
        return f"{other} was chosen for this head"
    if op not in selection.ops:
        return "not requested"
    if op == "fused_add_rms_norm" and "rms_norm" not in selection.ops:
        return "needs rms_norm, which was not requested"
    if op in LOSSES:
        problem = head_problem(inner_model(model))
        if problem is not None:
            return problem
    elif not can_swap(module):
        return "another forward is set on the module and hides its class's: patch before setting it"
    if selection.is_auto and op not in selection.named:
        failure = _failure(op, device)
        if failure is not None:
            return f"left out by auto, its check fails on {device.type}: {failure}"
    return None


def _failure(op: str, device: torch.device) -> str | None:
    # torch code is the reference itself, and the interpreter is a tool of the tests.
    return _kernel_failure(op, device) if backend(device) == "triton" else None


@cache
def _kernel_failure(op: str, device: torch.device) -> str | None:
    return check_op(op, device).reason
