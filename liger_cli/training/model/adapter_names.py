"""Names around an adapter: of its settings, which must be of the model, and of parameters."""

from __future__ import annotations

import re
from typing import Any

from liger_cli.errors import ConfigError

__all__ = ["bare_name", "check_names", "check_parameters"]

_MOST_SHOWN = 30


def bare_name(name: str) -> str:
    """Return the name of a parameter before peft wrapped the model and its layers."""
    name = name.removeprefix("base_model.model.").removeprefix("_orig_mod.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def check_names(adapted: Any, settings: Any) -> None:
    """Check that every name of a rank, an exclusion, a module and a parameter is of the model.

    Args:
        adapted: The model with the adapter around it.
        settings: The peft configuration as it was asked for.

    Raises:
        ConfigError: One is not; the message has the names that there are.
    """
    named = [
        (name.replace(".base_layer", ""), m) for name, m in adapted.get_base_model().named_modules()
    ]
    modules = [name for name, _ in named]
    with_adapter = [name for name, module in named if hasattr(module, "base_layer")]
    parameters = [
        f"{name}.{module.parameter_name}"
        for name, module in named
        if hasattr(module, "parameter_name")
    ]
    for pattern in settings.rank_pattern:
        # As peft matches it.
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in with_adapter + parameters):
            what = f"lora_rank_pattern: {pattern} matches no module with an adapter"
            raise ConfigError(what, hint=_hint(with_adapter))
    for name in settings.exclude_modules or ():
        if not _is_end(name, modules):
            what = f"lora_exclude_modules: {name} is the name of no module"
            raise ConfigError(what, hint=_hint(modules))
    for name in settings.modules_to_save or ():
        # Of a classifier peft has a name that there is, and passes over others.
        if not _is_end(name, modules):
            what = f"lora_modules_to_save: {name} is the name of no module"
            raise ConfigError(what, hint=_hint(modules))
    for name in settings.target_parameters or ():
        if not _is_end(name, parameters):
            stacked = [
                f"{prefix}.{key}"
                for prefix, module in named
                for key, parameter in module.named_parameters(recurse=False)
                if parameter.dim() > 2
            ]
            what = f"lora_target_parameters: {name} is the name of no parameter of a module"
            raise ConfigError(what, hint=_hint(stacked) if stacked else None)


def check_parameters(adapted: Any) -> None:
    """Check that no parameter with an adapter is quantised: a change added to it would be nonsense.

    Raises:
        ConfigError: One is.
    """
    for module in adapted.modules():
        name = getattr(module, "parameter_name", None)
        if name is not None and not module.get_param().is_floating_point():
            raise ConfigError(
                f"lora_target_parameters: {name} is quantised",
                hint="lora_target_modules adapts layers in 4 or 8 bits.",
            )


def _is_end(name: str, names: list[str]) -> bool:
    return any(f".{each}".endswith(f".{name}") for each in names)


def _hint(names: list[str]) -> str:
    """Return the last two parts of each name as what there is."""
    ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names if name))
    more = ", ..." if len(ends) > _MOST_SHOWN else ""
    return "There are: " + ", ".join(ends[:_MOST_SHOWN]) + more
