"""apply_liger_kernel_to_<family>: one model of a family, or all that are built from now on."""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from liger_kernels.transformers.api import apply_selection
from liger_kernels.transformers.options import COMMON_OPTIONS, select, unknown_option
from liger_kernels.transformers.patching.engine import PatchRecord, apply
from liger_kernels.transformers.patching.families import FAMILIES, Family
from liger_kernels.transformers.patching.plan import PatchPlan, build_plan, coverage_of
from liger_kernels.transformers.patching.selection import (
    ADAPTER_OP,
    PATCH_OPS,
    OpSelection,
    drop_retired,
)

__all__ = ["FAMILY_FUNCTIONS", "FamilyRecord", "recognised_functions"]

# How deep in constructors of watched classes each thread is: only the outermost model is patched.
_building = threading.local()
# The records that watch each class, and the constructor that asks them.
_watchers: dict[Any, list[FamilyRecord]] = {}
_constructors: dict[Any, Callable[..., None]] = {}


class FamilyRecord(PatchRecord):
    """Class mode: models of a family are patched as they are built, until undo()."""

    def __init__(self, row: Family, selection: OpSelection) -> None:
        super().__init__(PatchPlan(row.model_type, "row", selection.ops, (), ()), None)
        self.built: list[PatchPlan] = []
        self.row = row
        self._selection = selection
        self._classes = _models_of(row)
        if any(record.row is row for cls in self._classes for record in _watchers.get(cls, ())):
            raise ValueError(
                f"models of type {row.model_type!r} are patched already; call undo() of the "
                "record that did it first"
            )
        try:
            for cls in self._classes:
                _watchers.setdefault(cls, []).append(self)
                _watch(cls)
        except BaseException:
            self.undo()
            raise

    def patch(self, model: nn.Module) -> None:
        """Patch a model that was just built, and count it."""
        plan = build_plan(model, self._selection)
        apply(model, plan)
        self.built.append(plan)

    @property
    def coverage(self) -> dict[str, dict[str, int]]:
        """{op: {"patched": n, "candidates": m}}, summed over the models built so far."""
        return coverage_of(
            [patch.op for plan in self.built for patch in plan.patches],
            [skip.op for plan in self.built for skip in plan.skips],
        )

    def summary(self) -> str:
        """Return one line: how many models were built since, and how much of them is patched."""
        line = f"{len(self.built)} {self.plan.model_type} models patched as they were built"
        return f"{line}: {super().summary()}" if self.built else line

    def undo(self) -> None:
        """Build models as before; those built meanwhile stay patched until restore(model)."""
        for cls in self._classes:
            records = _watchers.get(cls, [])
            if self in records:
                records.remove(self)
            if not records:
                _unwatch(cls)


def _watch(cls: Any) -> None:
    """Have the records of a class patch its instances as soon as they are built."""
    own = vars(cls).get("__init__")
    if own is not None and own is _constructors.get(cls):
        return
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        depth = getattr(_building, "depth", 0)
        _building.depth = depth + 1
        try:
            original(self, *args, **kwargs)
        finally:
            _building.depth = depth
        if not depth and _watchers.get(cls):
            _recorder_of(cls).patch(self)

    __init__._original = own  # type: ignore[attr-defined]
    _constructors[cls] = __init__
    cls.__init__ = __init__


def _unwatch(cls: Any) -> None:
    """Give a class its constructor back, unless somebody has wrapped ours since."""
    constructor: Any = _constructors.get(cls)
    if constructor is None or vars(cls).get("__init__") is not constructor:
        return
    if constructor._original is None:
        del cls.__init__
    else:
        cls.__init__ = constructor._original


def _recorder_of(cls: Any) -> FamilyRecord:
    """Return the record that patches instances of a class: first that of their model type."""
    own = _type_of(cls)
    return min(_watchers[cls], key=lambda record: record.row.model_type != own)


def _type_of(cls: Any) -> str | None:
    """Return the model type of a class's configurations."""
    model_type: str | None = getattr(getattr(cls, "config_class", None), "model_type", None)
    return model_type


def _models_of(row: Family) -> list[Any]:
    """Return the model classes of a family, importing that family alone.

    Those of its parts are among them: of its text model, which may be built by itself. A base
    class without a forward is none: its constructor runs before there is anything to patch.
    """
    try:
        module = importlib.import_module(row.module)
    except Exception as problem:
        raise ImportError(
            f"model type {row.model_type!r} cannot be imported from transformers "
            f"{transformers.__version__}: {problem}. Versions 4.57 to 5.24 have it"
        ) from problem
    values: list[Any] = list(vars(module).values())
    return [
        value
        for value in values
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and getattr(value, "forward", None) is not nn.Module.forward
        and _is_of(_type_of(value), row)
    ]


def _is_of(model_type: str | None, row: Family) -> bool:
    """Return whether a model type of a row's file is the row's, or that of a part: mllama_text."""
    return f"{model_type}_".startswith(f"{row.model_type}_")


def _family_function(row: Family) -> Callable[..., PatchRecord]:
    known, name = row.options, f"apply_liger_kernel_to_{row.model_type}"
    common = ("model", *COMMON_OPTIONS)

    def apply_to_family(
        *,
        model: nn.Module | None = None,
        save_memory: bool = True,
        **options: bool,
    ) -> PatchRecord:
        drop_retired(options)
        for option in options:
            if option not in known:
                rest = f"Allowed: {', '.join((*common, *known))}"
                raise unknown_option(option, (*known, *common), name, rest)
        selection = select({**known, **options}, save_memory, name)
        if model is None:
            return FamilyRecord(row, selection)
        _check_type(model, row, name)
        return apply_selection(model, selection)

    apply_to_family.__name__ = apply_to_family.__qualname__ = name
    apply_to_family.__doc__ = f"""Patch {row.model_type} models; each option turns one op on or off.

        Args:
            {", ".join(known)}: Whether to use the op.
            model: The model to patch. None: models of this type built from now on are patched, by
                from_pretrained, from_config or their class; existing ones stay as they are.
            save_memory: As apply_liger_kernel takes it.

        Returns:
            The record. In class mode its undo() makes construction as it was.

        Raises:
            ValueError: An option is unknown, both losses are asked for, or the model is of another
                type or patched already.
            ImportError: This transformers version lacks the family (class mode).
        """
    apply_to_family.__signature__ = _signature(known)  # type: ignore[attr-defined]
    return apply_to_family


def _check_type(model: Any, row: Family, name: str) -> None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise ValueError(f"{name}: model must be a transformers model, got {model!r}")
    is_part = model_type not in FAMILIES and _is_of(model_type, row)
    if model_type != row.model_type and not is_part:
        raise ValueError(
            f"{name} got a model of type {model_type!r}; use apply_liger_kernel(model), or "
            f"apply_liger_kernel_to_{model_type} if there is one"
        )


def _signature(known: Mapping[str, bool]) -> inspect.Signature:
    """Return the signature of a family's function, which names its options."""
    defaults = [
        *((option, default, "bool") for option, default in known.items()),
        ("model", None, "nn.Module | None"),
        *((option, True, "bool") for option in COMMON_OPTIONS),
    ]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind)
        for name, value, kind in defaults
    ]
    return inspect.Signature(parameters, return_annotation="PatchRecord")


FAMILY_FUNCTIONS = {
    f"apply_liger_kernel_to_{model_type}": _family_function(row)
    for model_type, row in FAMILIES.items()
}


class _RecognisedType(Family):
    """A model type without a row: what its modules compute decides what is patched."""

    @property
    def options(self) -> dict[str, bool]:
        """The ops of patching, as no row says which of them a model has a place for."""
        return {op: op != "cross_entropy" for op in PATCH_OPS if op != ADAPTER_OP}


def recognised_functions() -> dict[str, Callable[..., PatchRecord]]:
    """Return a function as those of families for each other type of text and image-text models.

    Types are those of the installed transformers whose models have their own file. A model in
    which nothing is recognised stays as it is, with a warning that says why.
    """
    names: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    home_of: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    types = (
        *names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    models = Path(transformers.__file__).parent / "models"
    functions = {}
    for model_type in sorted(set(types) - FAMILIES.keys()):
        home = home_of.model_type_to_module_name(model_type)
        module = f"transformers.models.{home}.modeling_{home}"
        if not (models / home / f"modeling_{home}.py").is_file():
            continue
        row = _RecognisedType(model_type, module, norms={}, gates={}, ropes={})
        functions[model_type] = _family_function(row)
    return functions
