"""The surface: patch a model, see what would be patched, load a patched model, patch a family."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from liger_kernels.transformers.engine import PatchRecord, apply, restore
from liger_kernels.transformers.families import FAMILIES, Family
from liger_kernels.transformers.plan import (
    LOSSES,
    PATCH_OPS,
    OpSelection,
    PatchPlan,
    build_plan,
    coverage_of,
    resolve_ops,
)
from liger_kernels.transformers.repair import repair_model

_logger = logging.getLogger(__name__)

# Every family has these besides those of its row.
_COMMON_OPTIONS = ("save_memory", "fused_add_rms_norm")
# Every other option that some family has.
_OPTIONS = {name for row in FAMILIES.values() for name in row.options}


def inspect_model(
    model: nn.Module, ops: str | Sequence[str] = "auto", *, recognise: bool = True
) -> PatchPlan:
    """Return what apply_liger_kernel would do to a model; changes nothing, needs no weights.

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
        save_memory: Whether what patched modules can cheaply make again, norm outputs and gated
            products, is made again in backward instead of kept; the numbers stay the same. Inside
            gradient checkpointing that decides.

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
    return _apply(model, selection, recognise=recognise)


def _apply(model: nn.Module, selection: OpSelection, *, recognise: bool = True) -> PatchRecord:
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
    """Return what a plan without a patch found, and what it did not."""
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


# Options ----------------------------------------------------------------------------------------


def _select(options: dict[str, bool], save_memory: bool, where: str) -> OpSelection:
    """Return the ops that keyword options turn on."""
    for name, value in {**options, "save_memory": save_memory}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{where} got {name}={value!r}; it is True or False")
    if all(options.get(loss) for loss in LOSSES):
        raise ValueError(
            f"{where} got cross_entropy=True and fused_linear_cross_entropy=True, which compute "
            "the same loss: set one of them to False"
        )
    ops = tuple(op for op in PATCH_OPS if options.get(op))
    return OpSelection(ops, is_auto=True, save_memory=save_memory)


def _unknown_option(name: str, known: Collection[str], where: str, rest: str) -> ValueError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"{where} got an unknown option {name!r}{hint} {rest}")


# Loading ----------------------------------------------------------------------------------------

# What AutoConfig needs to find the configuration that from_pretrained will find.
_CONFIG_OPTIONS = (
    "cache_dir",
    "code_revision",
    "force_download",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


class AutoLigerKernelForCausalLM(AutoModelForCausalLM):
    """AutoModelForCausalLM whose models come patched; rope, rms_norm, ... choose the ops.

    A configuration with a vision part is built as its image-text class. Options that a model has no
    place for are without effect; an unknown option is a ValueError that names the nearest.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        rope: bool = True,
        rms_norm: bool = True,
        fused_add_rms_norm: bool = True,
        layer_norm: bool = True,
        swiglu: bool = True,
        geglu: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        save_memory: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Return the model of AutoModelForCausalLM.from_pretrained(path, **kwargs), patched.

        Raises:
            ValueError: An option neither we nor transformers knows, or both losses are asked for.
        """
        where = f"{cls.__name__}.from_pretrained"
        selection = _select(
            {
                "rope": rope,
                "rms_norm": rms_norm,
                "fused_add_rms_norm": fused_add_rms_norm,
                "layer_norm": layer_norm,
                "swiglu": swiglu,
                "geglu": geglu,
                "cross_entropy": cross_entropy,
                "fused_linear_cross_entropy": fused_linear_cross_entropy,
            },
            save_memory,
            where,
        )
        config = kwargs.get("config")
        if not isinstance(config, PretrainedConfig):
            config = _find_config(config or pretrained_model_name_or_path, kwargs)
        _check_options(kwargs, config, where)
        loaded = _auto_class(config).from_pretrained(
            pretrained_model_name_or_path, *model_args, **kwargs
        )
        # With output_loading_info=True it is (model, info).
        _apply_anew(loaded[0] if isinstance(loaded, tuple) else loaded, selection)
        return loaded

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        rope: bool = True,
        rms_norm: bool = True,
        fused_add_rms_norm: bool = True,
        layer_norm: bool = True,
        swiglu: bool = True,
        geglu: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        save_memory: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Return the model of AutoModelForCausalLM.from_config(config, **kwargs), patched.

        Raises:
            ValueError: An option neither we nor transformers knows, or both losses are asked for.
        """
        where = f"{cls.__name__}.from_config"
        selection = _select(
            {
                "rope": rope,
                "rms_norm": rms_norm,
                "fused_add_rms_norm": fused_add_rms_norm,
                "layer_norm": layer_norm,
                "swiglu": swiglu,
                "geglu": geglu,
                "cross_entropy": cross_entropy,
                "fused_linear_cross_entropy": fused_linear_cross_entropy,
            },
            save_memory,
            where,
        )
        _check_options(kwargs, config, where)
        model = _auto_class(config).from_config(config, **kwargs)
        _apply_anew(model, selection)
        return model


def _apply_anew(model: nn.Module, selection: OpSelection) -> None:
    repair = repair_model(model)
    if repair is not None:
        _logger.warning(repair)
    # Built while its family is in class mode it is patched already; the options of this call win.
    restore(model)
    _apply(model, selection)


def _find_config(path: Any, kwargs: dict[str, Any]) -> Any:
    options = {name: kwargs[name] for name in _CONFIG_OPTIONS if name in kwargs}
    try:
        return AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError):
        # An adapter's directory has none; what is really wrong from_pretrained will say.
        return None


def _auto_class(config: Any) -> Any:
    """Return the auto class for a configuration: image-text where there is a vision part."""
    has_vision = getattr(config, "vision_config", None) is not None
    if has_vision and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _check_options(kwargs: dict[str, Any], config: Any, where: str) -> None:
    if config is None:
        return
    known = {*_transformers_options(), *config.to_dict(), *getattr(config, "attribute_map", ())}
    mapping = _auto_class(config)._model_mapping
    if type(config) in mapping:
        models = mapping[type(config)]
        for model_class in models if isinstance(models, tuple) else (models,):
            known |= set(inspect.signature(model_class.__init__).parameters)
    for name in kwargs:
        if name not in known:
            ours = [*(op for op in PATCH_OPS if op in _OPTIONS), *_COMMON_OPTIONS]
            rest = f"Ours: {', '.join(ours)}; others go to transformers"
            raise _unknown_option(name, sorted({*ours, *known}), where, rest)


@functools.cache
def _transformers_options() -> frozenset[str]:
    """Return the keyword arguments that transformers' loaders know.

    Most are taken out of **kwargs by name, so signatures do not show them, but the code does.
    """
    names: set[Any] = set(_CONFIG_OPTIONS)
    for loader in (
        PreTrainedModel.from_pretrained,
        PreTrainedModel._from_config,
        AutoModelForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_config,
    ):
        names |= set(inspect.signature(loader).parameters)
        code = inspect.unwrap(loader.__func__).__code__
        for value in code.co_consts:
            names |= set(value if isinstance(value, (tuple, frozenset)) else (value,))
    return frozenset(name for name in names if isinstance(name, str) and name.isidentifier())


# Families ---------------------------------------------------------------------------------------

# How deep in constructors of watched classes each thread is: only the outermost model is patched.
_building = threading.local()


class FamilyRecord(PatchRecord):
    """Class mode: models of a family are patched as they are built, until undo()."""

    def __init__(self, row: Family, selection: OpSelection) -> None:
        super().__init__(PatchPlan(row.model_type, "row", selection.ops, (), ()), None)
        self.built: list[PatchPlan] = []
        self._selection = selection
        self._classes = _models_of(row)
        for cls in self._classes:
            if getattr(cls.__init__, "_is_watched", False):
                raise ValueError(
                    f"models of type {row.model_type!r} are patched already; call undo() of the "
                    "record that did it first"
                )
        self._originals = {cls: vars(cls).get("__init__") for cls in self._classes}
        for cls in self._classes:
            cls.__init__ = _watched(cls.__init__, self._patch)

    def _patch(self, model: nn.Module) -> None:
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
        for cls, original in self._originals.items():
            if original is None:
                del cls.__init__
            else:
                cls.__init__ = original
        self._originals.clear()


def _watched(original: Callable[..., None], on_built: Callable[[nn.Module], None]) -> Any:
    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        depth = getattr(_building, "depth", 0)
        _building.depth = depth + 1
        try:
            original(self, *args, **kwargs)
        finally:
            _building.depth = depth
        if not depth:
            on_built(self)

    __init__._is_watched = True  # type: ignore[attr-defined]
    return __init__


def _models_of(row: Family) -> list[Any]:
    """Return the model classes of a family, importing that family alone."""
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
        and getattr(getattr(value, "config_class", None), "model_type", None) == row.model_type
    ]


def _family_function(row: Family) -> Callable[..., PatchRecord]:
    known, name = row.options, f"apply_liger_kernel_to_{row.model_type}"
    common = ("model", *_COMMON_OPTIONS)

    def apply_to_family(
        *,
        model: nn.Module | None = None,
        save_memory: bool = True,
        fused_add_rms_norm: bool = True,
        **options: bool,
    ) -> PatchRecord:
        for option in options:
            if option not in known:
                rest = f"Besides {', '.join(common)} it has {', '.join(known)}"
                raise _unknown_option(option, (*known, *common), name, rest)
        ops = {**known, **options, "fused_add_rms_norm": fused_add_rms_norm}
        selection = _select(ops, save_memory, name)
        if model is None:
            return FamilyRecord(row, selection)
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type is None:
            raise ValueError(f"{name}: model must be a transformers model, got {model!r}")
        if model_type != row.model_type:
            raise ValueError(
                f"{name} got a model of type {model_type!r}; use apply_liger_kernel(model), or "
                f"apply_liger_kernel_to_{model_type} if there is one"
            )
        return _apply(model, selection)

    apply_to_family.__name__ = apply_to_family.__qualname__ = name
    apply_to_family.__doc__ = f"""Patch {row.model_type} models; each option turns one op on or off.

        Args:
            {", ".join(known)}: Whether to use the op.
            model: The model to patch. None: models of this type built from now on are patched, by
                from_pretrained, from_config or their class; existing ones stay as they are.
            save_memory: As apply_liger_kernel takes it.
            fused_add_rms_norm: Whether to use the op, in layers that have a place for it and whose
                norms run rms_norm.

        Returns:
            The record. In class mode its undo() makes construction as it was.

        Raises:
            ValueError: An option is unknown, both losses are asked for, or the model is of another
                type or patched already.
            ImportError: This transformers version lacks the family (class mode).
        """
    keyword = inspect.Parameter.KEYWORD_ONLY
    apply_to_family.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(
                inspect.Parameter(option, keyword, default=default, annotation="bool")
                for option, default in known.items()
            ),
            inspect.Parameter("model", keyword, default=None, annotation="nn.Module | None"),
            *(
                inspect.Parameter(option, keyword, default=True, annotation="bool")
                for option in _COMMON_OPTIONS
            ),
        ],
        return_annotation="PatchRecord",
    )
    return apply_to_family


FAMILY_FUNCTIONS = {
    f"apply_liger_kernel_to_{model_type}": _family_function(row)
    for model_type, row in FAMILIES.items()
}
