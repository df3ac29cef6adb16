"""The surface: patch a model, see what would be patched. loading.py and class_mode.py use it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

# Registers liger_varlen with transformers.
from liger_kernels.transformers.attention import interface as _interface  # noqa: F401
from liger_kernels.transformers.patching.engine import PatchRecord, apply
from liger_kernels.transformers.patching.families import FAMILIES
from liger_kernels.transformers.patching.plan import PatchPlan, build_plan
from liger_kernels.transformers.patching.selection import OpSelection, resolve_ops

__all__ = ["apply_liger_kernel", "apply_selection", "inspect_model", "patched"]

_logger = logging.getLogger(__name__)


def inspect_model(
    model: nn.Module, ops: str | Sequence[str] = "auto", *, recognise: bool = True
) -> PatchPlan:
    """Return the plan that apply_liger_kernel would follow; changes nothing, needs no weights.

    Args:
        model: As apply_liger_kernel takes it; it may be on the meta device.
        ops: As apply_liger_kernel takes them.
        recognise: As apply_liger_kernel takes it.

    Raises:
        ValueError: ops is unknown or contradicts itself.
    """
    return build_plan(model, ops, recognise=recognise)


def apply_liger_kernel(
    model: nn.Module,
    ops: str | Sequence[str] = "auto",
    *,
    recognise: bool = True,
    save_memory: bool = True,
) -> PatchRecord:
    """Patch one model in place and return the record, whose undo() takes it back.

    Args:
        model: A transformers model, or one wrapped by PEFT or DistributedDataParallel.
        ops: "auto" (every op the model has a place for, except cross_entropy, less those whose
            check fails on the model's device), "all" (the same without the check), "none", names,
            or removals such as "auto,-rope"; one comma-separated string or a sequence.
        recognise: Whether a model type that is not listed may be patched too, by what its modules
            compute; that is logged, and record.plan.source is "recognised" then.
        save_memory: Whether norm outputs and gated products, which are cheap to recompute, are
            recomputed in backward instead of kept; the numbers stay the same. Inside gradient
            checkpointing that decides.

    Returns:
        The record: coverage, patches, skipped (with reasons), undo(). If the model has no place for
        any requested op a warning names the known model types and the model stays as it was.

    Raises:
        ValueError: ops is unknown or contradicts itself, save_memory is no boolean, or the model is
            patched already.
    """
    if not isinstance(save_memory, bool):
        raise ValueError(f"save_memory must be True or False, got {save_memory!r}")
    selection = replace(resolve_ops(ops), save_memory=save_memory)
    return apply_selection(model, selection, recognise=recognise)


def apply_selection(
    model: nn.Module, selection: OpSelection, *, recognise: bool = True
) -> PatchRecord:
    """Patch one model in place, with ops that are resolved; see apply_liger_kernel."""
    plan = build_plan(model, selection, recognise=recognise)
    if selection.ops and not plan.patches:
        warnings.warn(_nothing_patched(plan), stacklevel=3)
    record = apply(model, plan)
    if plan.source == "recognised" and plan.patches:
        _logger.info(
            "model type %r is not listed; patched by what its modules compute: %s",
            plan.model_type,
            record.summary(),
        )
    return record


def _nothing_patched(plan: PatchPlan) -> str:
    """Return the warning for a plan without a patch: the places it found and those it did not."""
    places: dict[str, str] = {}
    for skip in plan.skips:
        if skip.op is not None:
            places.setdefault(skip.op, skip.reason)
    counts = {op: n["candidates"] for op, n in plan.coverage.items()}
    found = ", ".join(f"{op} ({n}, {places[op]})" for op, n in counts.items())
    missing = ", ".join(op for op in plan.ops if op not in counts)
    parts = [f"no place for {missing}"] if missing else []
    parts += [f"it has places for {found}"] if found else []
    return (
        f"model type {plan.model_type!r} stays unpatched: {'; '.join(parts)}. Known model types: "
        f"{', '.join(FAMILIES)}"
    )


@contextmanager
def patched(
    model: nn.Module,
    ops: str | Sequence[str] = "auto",
    *,
    recognise: bool = True,
    save_memory: bool = True,
) -> Iterator[PatchRecord]:
    """Patch a model inside a with block; arguments and errors are apply_liger_kernel's."""
    record = apply_liger_kernel(model, ops, recognise=recognise, save_memory=save_memory)
    try:
        yield record
    finally:
        record.undo()
