"""Find the code of other packages in a module, and the file and line of a forward.

Kernels of others are a module's class, the forward that it holds or that its class was given, and
the rotary function that its forward calls. They are not run, and nothing of theirs is imported.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from liger_kernels.transformers.recognise import Refusal, original_class, rope_functions

__all__ = ["ThirdParty", "find_third_party", "find_third_party_loss", "source_of"]

_PACKAGES = {
    "kernels": "HF kernels",
    "liger_kernel": "liger-kernel",
    "unsloth": "unsloth",
    "unsloth_zoo": "unsloth",
}
# Modules that unsloth writes and imports: the start of their names.
_COMPILED = "unsloth_compiled"


@dataclass(frozen=True)
class ThirdParty(Refusal):
    """Why a module is left to another package, whose kernels it runs."""

    owner: str = ""
    # The op that it computes, where that is known.
    op: str | None = None
    # True: only the forward that the instance holds is theirs, and its class is the stock one.
    is_held: bool = False


def source_of(cls: Any) -> str | None:
    """Return where a class's forward is written, "package/file.py:line"; None if in no file."""
    function = inspect.unwrap(cls.forward)
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename.startswith("<"):
        return None
    path = PurePath(code.co_filename)
    depth = function.__module__.count(".") + (2 if path.stem == "__init__" else 1)
    return f"{'/'.join(path.parts[-depth:])}:{code.co_firstlineno}"


def find_third_party(module: nn.Module) -> ThirdParty | None:
    """Return whose code a module runs where it is not the stock class's; None for stock modules."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    cls = original_class(type(module))
    for code in (cls, *_layers(cls.forward)):
        if (owner := _owner(code)) is not None:
            return _third_party(owner, code)
    for name, function in rope_functions(cls).items():
        # Of a function that the hub may replace, the package makes a module in any case.
        codes = _held(function) if isinstance(function, nn.Module) else _layers(function)
        for code in codes:
            if (owner := _owner(code)) is not None:
                return _third_party(owner, code, f"its {name}", op="rope")
    for code in _held(module):
        if (owner := _owner(code)) is not None:
            return _third_party(owner, code, is_held=True)
    return None


def find_third_party_loss(model: nn.Module) -> ThirdParty | None:
    """Return whose code computes a model's loss where the model's forward is the stock one."""
    for what, code in (
        ("torch's cross_entropy", F.cross_entropy),
        ("the model's loss function", vars(model).get("_loss_function")),
    ):
        if (owner := _owner(code)) is not None:
            return _third_party(owner, code, what)
    return None


def _third_party(owner: str, code: Any, what: str = "it", **known: Any) -> ThirdParty:
    where = f"{code.__module__}.{getattr(code, '__qualname__', type(code).__qualname__)}"
    reason = f"{owner} computes {what} ({where}): load the model without {owner} to patch it"
    return ThirdParty(reason, owner=owner, **known)


def _held(module: nn.Module) -> Iterator[Any]:
    """Yield the functions that a module itself holds as its forward, beneath hooks too."""
    for slot in ("forward", "_old_forward"):
        if slot in vars(module):
            yield from _layers(vars(module)[slot])


def _layers(function: Any) -> Iterator[Any]:
    """Yield a function and those that it wraps."""
    while function is not None:
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)


def _owner(code: Any) -> str | None:
    """Return the package that a class or a function comes from, if it is one of the others."""
    module = getattr(code, "__module__", None) or ""
    top = module.partition(".")[0]
    if top.startswith(_COMPILED):
        return _PACKAGES["unsloth"]
    if top in _PACKAGES:
        return _PACKAGES[top]
    file = getattr(sys.modules.get(module), "__file__", None)
    if inspect.isfunction(code):
        file = code.__code__.co_filename
    # Kernels of the hub are imported from its cache, under names of no package.
    parts = PurePath(file or "").parts
    is_cached = any(part.startswith(("kernels--", "models--")) for part in parts)
    return _PACKAGES["kernels"] if is_cached and "build" in parts else None
