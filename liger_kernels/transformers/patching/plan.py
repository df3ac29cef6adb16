"""PatchPlan: the modules that will run each op, and the others with a reason; changes nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from liger_kernels.compare import CheckResult
from liger_kernels.ops.backend import backend
from liger_kernels.transformers.lazy_logits.head import head_problem
from liger_kernels.transformers.patching.candidates import Candidate, find_candidates
from liger_kernels.transformers.patching.families import FAMILIES
from liger_kernels.transformers.patching.render import others_text, tree_text
from liger_kernels.transformers.patching.selection import (
    ADAPTER_OP,
    LOSSES,
    PATCH_OPS,
    OpSelection,
    resolve_ops,
)
from liger_kernels.transformers.patching.self_check import try_op
from liger_kernels.transformers.patching.third_party import ThirdParty, source_of
from liger_kernels.transformers.recognise import LoraSpec, Refusal, Spec, original_class
from liger_kernels.transformers.replacements.adapters import adapter_problem
from liger_kernels.transformers.replacements.subclasses import can_swap, is_patched
from liger_kernels.transformers.wrappers import inner_model

# The names of selection.py are a plan's too.
__all__ = [
    "ADAPTER_OP",
    "LOSSES",
    "PATCH_OPS",
    "OpSelection",
    "Patch",
    "PatchPlan",
    "Skip",
    "build_plan",
    "coverage_line",
    "coverage_of",
    "module_row",
    "resolve_ops",
    "row_order",
]


@dataclass(frozen=True)
class Patch:
    """A module that will run an op."""

    name: str
    module_class: str
    op: str
    spec: Spec
    # File and line of the forward that is replaced.
    source: str | None = None


@dataclass(frozen=True)
class Skip:
    """A module that stays as it is; op is None if it is no candidate of any op."""

    name: str
    module_class: str
    op: str | None
    reason: str
    # File and line of the class's forward.
    source: str | None = None
    # The package whose kernels the module runs instead.
    owner: str | None = None


@dataclass(frozen=True)
class PatchPlan:
    """The patches and skips of one model, module by module."""

    model_type: str
    # "row": the model type is in FAMILIES; "recognised": every class was found by probing it.
    source: Literal["row", "recognised"]
    # The ops that were asked for.
    ops: tuple[str, ...]
    patches: tuple[Patch, ...]
    skips: tuple[Skip, ...]
    # Ops asked for by name that the model has no place for.
    missing: tuple[str, ...] = ()
    # The backend that would run the ops on the model's device; None while it is on meta.
    backend: str | None = None
    # Whether norm outputs and gated products are recomputed in backward instead of kept.
    save_memory: bool = True
    # The self-checks of auto on the model's device, each form of an op once.
    trials: tuple[CheckResult, ...] = ()
    # Modules that run ops of ours already: what the plan says is then of the model restored.
    num_patched: int = 0
    # The request that the plan answers.
    selection: OpSelection = OpSelection(())

    @property
    def coverage(self) -> dict[str, dict[str, int]]:
        """Modules to patch and candidates, for each op that has a candidate, requested or not."""
        return coverage_of((p.op for p in self.patches), (s.op for s in self.skips))

    @property
    def takes_adapters(self) -> bool:
        """Return whether LoRA layers that the model gets later are to run the op."""
        return ADAPTER_OP in self.ops and all(t.op != ADAPTER_OP for t in self.failures)

    @property
    def failures(self) -> list[CheckResult]:
        """The checks for which auto leaves ops out."""
        return [trial for trial in self.trials if not trial.ok]

    @property
    def modules(self) -> list[dict[str, str | None]]:
        """One row for each module: name, class, op, status, backend, reason, source."""
        rows = [module_row(patch, "patched", backend=self.backend) for patch in self.patches]
        rows += [module_row(skip, "skipped", reason=skip.reason) for skip in self.skips]
        return sorted(rows, key=row_order)

    @property
    def others(self) -> dict[str, int]:
        """How many modules run the kernels of each other package."""
        owners = {(skip.owner, skip.name) for skip in self.skips if skip.owner is not None}
        return dict(Counter(owner for owner, _ in sorted(owners) if owner is not None))

    def summary(self) -> str:
        """Return one line: patched and candidates of each op, and kernels of others."""
        line = coverage_line(self.coverage, self.missing)
        return f"{line}  ({others_text(self.others)})" if self.others else line

    def __str__(self) -> str:
        how = "a listed family" if self.source == "row" else "recognised by what it computes"
        parts = [f"model type {self.model_type} ({how})", tree_text(self.modules), self.summary()]
        if self.num_patched:
            parts.insert(
                1,
                f"{self.num_patched} modules are patched already; this is what patching would do "
                "after undo() of its record, or restore(model)",
            )
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return {
            "model_type": self.model_type,
            "source": self.source,
            "ops": list(self.ops),
            "missing": list(self.missing),
            "save_memory": self.save_memory,
            "num_patched": self.num_patched,
            "others": self.others,
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


def coverage_line(coverage: dict[str, dict[str, int]], missing: Iterable[str]) -> str:
    """Return patched and candidates of each op in a line, and the ops that have no place."""
    parts = [f"{op} {n['patched']}/{n['candidates']}" for op, n in coverage.items()]
    return "  ".join([*parts, *(f"{op} 0/0" for op in missing)]) or "nothing to patch"


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
        "source": entry.source,
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
    """Build the plan of patching a model with these ops; works on meta tensors.

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
    found = find_candidates(model, row) if row or recognise else ()
    patches, skips, trials = _sort_candidates(model, found, selection, device)
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
        tuple(trials),
        sum(map(is_patched, model.modules())),
        selection,
    )


def _sort_candidates(
    model: nn.Module,
    candidates: Iterable[Candidate],
    selection: OpSelection,
    device: torch.device,
) -> tuple[list[Patch], list[Skip], list[CheckResult]]:
    """Return the candidates to patch, those to leave alone, and the self-checks that were run."""
    patches: list[Patch] = []
    skips: list[Skip] = []
    trials: dict[CheckResult, None] = {}
    for candidate in candidates:
        name, module, op, found = candidate
        if op == "cross_entropy" and op not in selection.ops:
            # The head's row for the fused loss says it all.
            continue
        cls = original_class(type(module))
        reason = _refusal(model, candidate, selection)
        if reason is None and op is not None and selection.is_auto and op not in selection.named:
            trial = _self_check(model, candidate)
            if trial is not None:
                trials[trial] = None
                if not trial.ok:
                    reason = f"left out by auto, its check fails on {device.type}: {trial.reason}"
        if reason is not None:
            owner = found.owner if isinstance(found, ThirdParty) else None
            skips.append(Skip(name, cls.__name__, op, reason, source_of(cls), owner))
        elif op is not None and not isinstance(found, Refusal):
            patches.append(Patch(name, cls.__name__, op, found, source_of(cls)))
    return patches, skips, list(trials)


def _refusal(model: nn.Module, candidate: Candidate, selection: OpSelection) -> str | None:
    """Return why a module is left alone without a self-check, or None."""
    _, module, op, found = candidate
    if isinstance(found, Refusal):
        return found.reason
    if op is None:
        return None
    other = next((loss for loss in LOSSES if loss != op and loss in selection.ops), None)
    if op in LOSSES and op not in selection.ops and other is not None:
        return f"{other} was chosen for this head, which has one loss"
    if op not in selection.ops:
        return f"not requested: add {op} to ops"
    if op in LOSSES:
        return head_problem(inner_model(model))
    if not can_swap(module):
        return "another forward is set on the module and hides its class's: patch before setting it"
    return adapter_problem(module) if isinstance(found, LoraSpec) else None


def _self_check(model: nn.Module, candidate: Candidate) -> CheckResult | None:
    """Return whether the op of a module is right in that module's form; None if untried."""
    _, module, op, found = candidate
    assert op is not None
    assert not isinstance(found, Refusal)
    return try_op(op, found, module, model)
