"""The patching functions under the names of liger_kernel: by family, by model type, by instance.

They differ from ours in what callers of liger_kernel expect: calling one again is no error, the
last call wins; None counts as False, as tools pass what their configuration leaves out; nothing is
returned. Existing models change only where they are passed.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from liger_kernels.compat.arguments import POSITIONS, name_positions
from liger_kernels.transformers.api import apply_liger_kernel
from liger_kernels.transformers.class_mode import FAMILY_FUNCTIONS, recognised_functions
from liger_kernels.transformers.loading import AutoLigerKernelForCausalLM
from liger_kernels.transformers.patching.engine import PatchRecord, restore
from liger_kernels.transformers.patching.families import FAMILIES

# Functions that serve more than one model type.
_ALSO = {"llama4": ("llama4_text",)}
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
# Options of ours that choose no op: they are taken, and not shown.
_NO_OPS = {"save_memory"}


class Patching:
    """The functions of one installation, and the class modes that they turned on."""

    def __init__(self) -> None:
        self._class_modes: dict[str, PatchRecord] = {}
        self._functions = {
            **{model_type: FAMILY_FUNCTIONS[_name(model_type)] for model_type in FAMILIES},
            **recognised_functions(),
        }
        functions = {model_type: self._function(model_type) for model_type in self._functions}
        self.names: dict[str, Any] = {
            "AutoLigerKernelForCausalLM": AutoLigerKernelForCausalLM,
            "MODEL_TYPE_TO_APPLY_LIGER_FN": functions,
            "_apply_liger_kernel": self.apply_to_type,
            "_apply_liger_kernel_to_instance": self.apply_to_instance,
            **{_name(model_type): function for model_type, function in functions.items()},
        }

    def undo(self) -> None:
        """Turn every class mode off."""
        for record in self._class_modes.values():
            record.undo()
        self._class_modes.clear()

    def apply_to_type(self, model_type: str = "", **options: bool | None) -> None:
        """Patch the models of a type that are built from now on; options as the type's function.

        A type without a function is a warning, and nothing is patched.
        """
        function = self.names["MODEL_TYPE_TO_APPLY_LIGER_FN"].get(model_type)
        if function is None:
            warnings.warn(
                f"model type {model_type!r} has no function: nothing is patched. Once a "
                "model is built, liger_kernels.transformers.apply_liger_kernel(model) patches what "
                "it recognises",
                stacklevel=2,
            )
            return
        function(**options)

    def apply_to_instance(self, model: nn.Module, **options: bool | None) -> None:
        """Patch a model of any type; a patch that it has is replaced.

        Raises:
            ValueError: The model is not of transformers, or an option is unknown to its type.
        """
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type is None:
            raise ValueError(f"model must be a transformers model, got {type(model).__name__}")
        chosen = _booleans(options)
        restore(model)
        if model_type in FAMILIES:
            FAMILY_FUNCTIONS[_name(model_type)](model=model, **chosen)
        else:
            rest = {name: chosen.pop(name) for name in _NO_OPS & chosen.keys()}
            apply_liger_kernel(model, _ops_of(chosen), **rest)

    def _function(self, model_type: str) -> Callable[..., None]:
        ours = self._functions[model_type]
        parameters = inspect.signature(ours).parameters

        order = POSITIONS.get(model_type, ())

        @functools.wraps(ours)
        def apply_to_family(*values: Any, **named: Any) -> None:
            options = name_positions(_name(model_type), order, values, named)
            model: nn.Module | None = options.pop("model", None)
            chosen = _booleans(options)
            if model is None:
                self._watch(model_type, chosen)
                return
            if not isinstance(model, nn.Module):
                raise ValueError(
                    f"{_name(model_type)}: model must be a transformers model, got {model!r}"
                )
            function = ours
            given: Any = getattr(getattr(model, "config", None), "model_type", None)
            if given in _ALSO.get(model_type, ()) and chosen.keys() <= parameters.keys():
                function = FAMILY_FUNCTIONS[_name(given)]
                chosen = _known_to(function, chosen)
            restore(model)
            function(model=model, **chosen)

        # Tools read the ops off the signature and turn each on or off.
        first = [parameters[name].replace(kind=_POSITIONAL) for name in order]
        rest = [each for name, each in parameters.items() if name not in (*order, *_NO_OPS)]
        apply_to_family.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*first, *rest], return_annotation=None
        )
        apply_to_family.__doc__ = f"{ours.__doc__}".partition("Returns:")[0]
        return apply_to_family

    def _watch(self, model_type: str, options: dict[str, bool]) -> None:
        for each in (model_type, *_ALSO.get(model_type, ())):
            function = self._functions[each]
            previous = self._class_modes.pop(each, None)
            if previous is not None:
                previous.undo()
            chosen = options if each == model_type else _known_to(function, options)
            self._class_modes[each] = function(**chosen)


def _name(model_type: str) -> str:
    return f"apply_liger_kernel_to_{model_type}".replace("-", "_")


def _known_to(function: Callable[..., Any], options: dict[str, bool]) -> dict[str, bool]:
    """Return the options that a function has: other types of a family may have fewer places."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def _booleans(options: dict[str, bool | None]) -> dict[str, bool]:
    return {name: False if value is None else value for name, value in options.items()}


def _ops_of(options: dict[str, bool]) -> list[str]:
    """Return the ops of options for a model type without a function, whose names are all ops."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    named = [op for op, is_on in options.items() if is_on]
    removed = [f"-{op}" for op, is_on in options.items() if not is_on]
    return ["auto", *named, *removed]
