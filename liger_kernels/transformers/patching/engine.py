"""Apply a plan to one model, and undo it. Knows modules and plans, not transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from liger_kernels.ops.backend import backend
from liger_kernels.transformers.lazy_logits.head import HeadPatch, num_fused, prepare_head
from liger_kernels.transformers.patching.plan import (
    ADAPTER_OP,
    Patch,
    PatchPlan,
    Skip,
    build_plan,
    coverage_line,
    coverage_of,
    module_row,
    row_order,
)
from liger_kernels.transformers.patching.selection import LOSSES
from liger_kernels.transformers.recognise import (
    BASE_ATTRIBUTE,
    ExpertListSpec,
    MlpSpec,
    RopeSpec,
    original_class,
)
from liger_kernels.transformers.replacements.adapters import is_lora_patched
from liger_kernels.transformers.replacements.calls import tally_calls
from liger_kernels.transformers.replacements.subclasses import is_patched, swap
from liger_kernels.transformers.replacements.table import patched_class, prepare

# Why no call of a patched module reached its op.
_UNREACHED = (
    "no call reached the op in the step that was counted: its inputs do not need the module, or "
    "other code computes it"
)
_APART = (
    "its experts ran one by one in the step that was counted: their weights do not lie together "
    "(sharded, offloaded, or assigned after patching; PatchRecord.refresh() moves them), or an "
    "expert was changed"
)


class PatchRecord:
    """The patches of one model, and their undo. Holds the model, which does not hold it."""

    def __init__(self, plan: PatchPlan, model: nn.Module | None) -> None:
        self.plan = plan
        self.model = model
        self.unused: frozenset[str] = frozenset()
        self._swapped: dict[str, nn.Module] = {}
        self._heads: dict[str, tuple[nn.Module, HeadPatch]] = {}

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patched modules."""
        return self.plan.patches

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """The modules left alone, with reasons."""
        return self.plan.skips

    @property
    def coverage(self) -> dict[str, dict[str, int]]:
        """{op: {"patched": n, "candidates": m}}; a module found unused no longer counts in n."""
        used = [p.op for p in self.patches if p.name not in self.unused]
        unused = [p.op for p in self.patches if p.name in self.unused]
        return coverage_of(used, [*unused, *(s.op for s in self.skipped)])

    @property
    def modules(self) -> list[dict[str, str | None]]:
        """One row for each module: name, class, op, status, backend, reason, source."""
        rows = [self._row(patch) for patch in self.patches]
        rows += [module_row(skip, "skipped", reason=skip.reason) for skip in self.skipped]
        return sorted(rows, key=row_order)

    def _row(self, patch: Patch) -> dict[str, str | None]:
        module = self._swapped.get(patch.name)
        if module is None and patch.name in self._heads:
            module = self._heads[patch.name][0]
        if patch.name in self.unused:
            reason = _APART if isinstance(patch.spec, ExpertListSpec) else _UNREACHED
            return module_row(patch, "unused", backend=self._backend(module), reason=reason)
        return module_row(patch, "patched", backend=self._backend(module))

    def _backend(self, module: nn.Module | None) -> str | None:
        # A module without parameters runs where the model does.
        for owner in (module, self.model):
            for parameter in () if owner is None else owner.parameters():
                return None if parameter.is_meta else backend(parameter.device)
        return backend(torch.device("cpu"))

    @contextmanager
    def count_calls(self) -> Iterator[None]:
        """Run a training or evaluation step inside; modules whose op it never calls become unused.

        Under torch.compile a module that the compiled code holds cannot tell; it stays patched.
        """
        parts = () if self.model is None else self.model.modules()
        if any(getattr(part, "_compiled_call_impl", None) is not None for part in parts):
            # It could not tell, and the hooks of a tally would have it compiled again without them.
            yield
            return
        losses = {name: num_fused(head) for name, (head, _) in self._heads.items()}
        with tally_calls(self._swapped.values()) as tally:
            yield
        if tally.is_compiled:
            return
        heads = {name for name, (head, _) in self._heads.items() if num_fused(head) == losses[name]}
        modules = {n for n, module in self._swapped.items() if id(module) not in tally.called}
        self.unused = frozenset(heads | modules)

    def refresh(self) -> None:
        """Bring the rows of LoRA layers up to date with what the model has and does now, and move
        the weights of lists of experts together again.

        Those that came after patching are patched and listed, those that are gone are not listed
        any more, and those that are merged, disabled or changed are left to peft, with the reason.

        Raises:
            ValueError: A layer cannot be restored, as in undo(); nothing is changed then.
        """
        if self.model is None:
            return
        prepare(self._swapped.values())
        request = self.plan.selection
        ops = tuple(op for op in request.ops if op == ADAPTER_OP)
        now = build_plan(
            self.model,
            replace(request, ops=ops),
            recognise=self.plan.source == "row" or bool(self.patches),
        )
        left = {skip.name for skip in now.skips if skip.op == ADAPTER_OP}
        patched = _lora_patched(self.model)
        restored = {name: module for name, module in patched.items() if name in left}
        _check_restorable(restored)
        for module in restored.values():
            swap(module, original_class(type(module)))
        for patch in self.plan.patches:
            if patch.op == ADAPTER_OP:
                self._swapped.pop(patch.name, None)
        modules = dict(self.model.named_modules())
        patches = tuple(patch for patch in now.patches if patch.op == ADAPTER_OP)
        for patch in patches:
            module = self._swapped[patch.name] = modules[patch.name]
            swap(module, _class_for(original_class(type(module)), patch, self.plan))
        self.plan = replace(
            self.plan,
            patches=(*(p for p in self.plan.patches if p.op != ADAPTER_OP), *patches),
            skips=(
                *filter(_is_other, self.plan.skips),
                *(s for s in now.skips if not _is_other(s)),
            ),
            trials=tuple(dict.fromkeys((*self.plan.trials, *now.trials))),
        )
        self.unused &= {patch.name for patch in self.plan.patches}

    def undo(self) -> None:
        """Give every module its class and its forward back. A second call does nothing, or
        finishes a first one that was interrupted.

        Raises:
            ValueError: A module's class was changed again since, for example by fully_shard; what
                came later must be undone first. Nothing is touched then.
        """
        adopted = _lora_patched(self.model)
        _check_restorable({**self._swapped, **adopted})
        # Each step may have run in an earlier call that was interrupted, or never in apply().
        for _, patch in self._heads.values():
            patch.undo()
        for module in {**self._swapped, **adopted}.values():
            swap(module, original_class(type(module)))
        self._heads.clear()
        self._swapped.clear()

    def summary(self) -> str:
        """Return one line: patched and candidates of each op, unused modules and missing ops."""
        line = coverage_line(self.coverage, self.plan.missing)
        return f"{line}  ({len(self.unused)} unused)" if self.unused else line

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data for JSON."""
        return {**self.plan.to_dict(), "coverage": self.coverage, "modules": self.modules}

    def __repr__(self) -> str:
        return f"PatchRecord({self.plan.model_type}: {self.summary()})"


def apply(model: nn.Module, plan: PatchPlan) -> PatchRecord:
    """Patch one model as planned and return the record that undoes it.

    Only this model's modules change; their classes, transformers and torch stay as they were. An
    exception on the way, KeyboardInterrupt included, leaves the model as it was.

    Raises:
        ValueError: The plan names modules the model does not have, or the model is patched already:
            undo that first, or call restore(model) where its record is out of reach.
    """
    modules = dict(model.named_modules())
    for patch in plan.patches:
        module = modules.get(patch.name)
        if module is None or original_class(type(module)).__name__ != patch.module_class:
            raise ValueError(
                f"the plan is of another model: it has no {patch.module_class} at {patch.name!r}"
            )
        if is_patched(module):
            raise ValueError(
                f"model {type(model).__name__} is already patched (at {patch.name!r}); call undo() "
                "of its record or liger_kernels.transformers.restore(model) first"
            )
    record = PatchRecord(plan, model)
    try:
        for patch in plan.patches:
            module = modules[patch.name]
            # Noted first: what an exception interrupts is undone as well.
            if patch.op in LOSSES:
                head_patch = prepare_head(model)
                record._heads[patch.name] = (module, head_patch)
                head_patch.install(cast(Any, patch.op))
            else:
                cls: Any = type(module)
                record._swapped[patch.name] = module
                swap(module, _class_for(cls, patch, plan))
        prepare(record._swapped.values())
        return record
    except BaseException:
        record.undo()
        raise


def _is_other(skip: Skip) -> bool:
    """Return whether a skipped module is no LoRA layer of a matrix."""
    return skip.op != ADAPTER_OP


def _class_for(cls: Any, patch: Patch, plan: PatchPlan) -> type[nn.Module]:
    # Of the modules that hold LoRA layers, and of no other, lest classes be made for nothing.
    holds = isinstance(patch.spec, RopeSpec | MlpSpec)
    return patched_class(cls, patch.spec, plan.save_memory, holds and plan.takes_adapters)


def _lora_patched(model: nn.Module | None) -> dict[str, nn.Module]:
    """Return the LoRA layers of a model that run the op, with those patched since."""
    modules = () if model is None else model.named_modules()
    return {name: module for name, module in modules if is_lora_patched(module)}


def restore(model: nn.Module) -> None:
    """Undo every patch of a model whose record is out of reach: a copy, one loaded by pickle, or
    one whose patching was interrupted. A call that was interrupted itself is finished by another.

    Raises:
        ValueError: As PatchRecord.undo.
    """
    for module in model.modules():
        for value in tuple(vars(module).values()):
            if isinstance(value, HeadPatch):
                value.undo()
    swapped = {name: module for name, module in model.named_modules() if is_patched(module)}
    _check_restorable(swapped)
    for module in swapped.values():
        swap(module, original_class(type(module)))


def _check_restorable(modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        if is_patched(module) and BASE_ATTRIBUTE not in vars(type(module)):
            raise ValueError(
                f"module {name!r} cannot be restored: its class was changed after patching, to "
                f"{type(module).__name__}; undo that first"
            )
