"""AutoLigerKernelForCausalLM: models that come patched."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from liger_kernels.transformers.api import apply_selection
from liger_kernels.transformers.options import COMMON_OPTIONS, select, unknown_option
from liger_kernels.transformers.patching.engine import restore
from liger_kernels.transformers.patching.families import FAMILIES
from liger_kernels.transformers.patching.selection import PATCH_OPS, OpSelection, drop_retired
from liger_kernels.transformers.patching.upstream_fixes import repair_model

__all__ = ["AutoLigerKernelForCausalLM"]

_logger = logging.getLogger(__name__)

# Every option in the row of some family.
_OPTIONS = {name for row in FAMILIES.values() for name in row.options}
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
        layer_norm: bool = True,
        swiglu: bool = True,
        geglu: bool = True,
        moe_experts: bool = True,
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
        selection = select(
            {
                "rope": rope,
                "rms_norm": rms_norm,
                "layer_norm": layer_norm,
                "swiglu": swiglu,
                "geglu": geglu,
                "moe_experts": moe_experts,
                "cross_entropy": cross_entropy,
                "fused_linear_cross_entropy": fused_linear_cross_entropy,
            },
            save_memory,
            where,
        )
        drop_retired(kwargs)
        config = kwargs.get("config")
        if not isinstance(config, PretrainedConfig):
            config = _find_config(config or pretrained_model_name_or_path, kwargs)
        _check_options(kwargs, config, where)
        loaded = _auto_class(config).from_pretrained(
            pretrained_model_name_or_path, *model_args, **kwargs
        )
        # With output_loading_info=True it is (model, info).
        _patch_with_options(loaded[0] if isinstance(loaded, tuple) else loaded, selection)
        return loaded

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        rope: bool = True,
        rms_norm: bool = True,
        layer_norm: bool = True,
        swiglu: bool = True,
        geglu: bool = True,
        moe_experts: bool = True,
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
        selection = select(
            {
                "rope": rope,
                "rms_norm": rms_norm,
                "layer_norm": layer_norm,
                "swiglu": swiglu,
                "geglu": geglu,
                "moe_experts": moe_experts,
                "cross_entropy": cross_entropy,
                "fused_linear_cross_entropy": fused_linear_cross_entropy,
            },
            save_memory,
            where,
        )
        drop_retired(kwargs)
        _check_options(kwargs, config, where)
        model = _auto_class(config).from_config(config, **kwargs)
        _patch_with_options(model, selection)
        return model


def _patch_with_options(model: nn.Module, selection: OpSelection) -> None:
    fixed = repair_model(model)
    if fixed is not None:
        _logger.warning(fixed)
    # Built while its family is in class mode it is patched already; the options of this call win.
    restore(model)
    apply_selection(model, selection)


def _find_config(path: Any, kwargs: dict[str, Any]) -> Any:
    options = {name: kwargs[name] for name in _CONFIG_OPTIONS if name in kwargs}
    try:
        return AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError):
        # An adapter's directory has none; from_pretrained raises the error of a real defect.
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
    options = _loader_options()
    if options is None:
        return
    known = {*options, *config.to_dict(), *getattr(config, "attribute_map", ())}
    mapping = _auto_class(config)._model_mapping
    if type(config) in mapping:
        models = mapping[type(config)]
        for model_class in models if isinstance(models, tuple) else (models,):
            known |= set(inspect.signature(model_class.__init__).parameters)
    for name in kwargs:
        if name not in known:
            ours = [*(op for op in PATCH_OPS if op in _OPTIONS), *COMMON_OPTIONS]
            rest = f"Ours: {', '.join(ours)}; others go to transformers"
            raise unknown_option(name, sorted({*ours, *known}), where, rest)


def _loader_options() -> frozenset[str] | None:
    """Return the keyword arguments that transformers' loaders know.

    Most are taken out of **kwargs by name, so signatures do not show them, but the code does. None
    where a tool has put a loader with options of any name in the place of one.
    """
    names: set[str] = set(_CONFIG_OPTIONS)
    for loader in (
        PreTrainedModel.from_pretrained,
        PreTrainedModel._from_config,
        AutoModelForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_config,
    ):
        function: Any = inspect.unwrap(loader)
        found = _names_in(getattr(function, "__func__", function))
        if found is None:
            return None
        names |= found
    return frozenset(names)


@functools.cache
def _names_in(loader: Any) -> frozenset[str] | None:
    if not inspect.isfunction(loader) or not loader.__globals__["__name__"].startswith(
        "transformers."
    ):
        return None
    names: set[Any] = set(inspect.signature(loader).parameters)
    for value in loader.__code__.co_consts:
        names |= set(value if isinstance(value, (tuple, frozenset)) else (value,))
    return frozenset(name for name in names if isinstance(name, str) and name.isidentifier())
