"""Ops as keyword options, on or off: how loaders and the functions of families take them."""

from __future__ import annotations

from collections.abc import Collection

from liger_kernels.nearest import nearest_name
from liger_kernels.transformers.patching.selection import (
    ADAPTER_OP,
    LOSSES,
    PATCH_OPS,
    OpSelection,
)

__all__ = ["COMMON_OPTIONS", "select", "unknown_option"]

# Every family has these and those of its row.
COMMON_OPTIONS = ("save_memory",)


def select(options: dict[str, bool], save_memory: bool, where: str) -> OpSelection:
    """Return the ops that keyword options turn on, and that of adapters the model may get."""
    for name, value in {**options, "save_memory": save_memory}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{where} got {name}={value!r}; it is True or False")
    if all(options.get(loss) for loss in LOSSES):
        raise ValueError(
            f"{where} got cross_entropy=True and fused_linear_cross_entropy=True, which compute "
            "the same loss: set one of them to False"
        )
    is_on = {**options, ADAPTER_OP: any(options.values())}
    ops = tuple(op for op in PATCH_OPS if is_on.get(op))
    return OpSelection(ops, is_auto=True, save_memory=save_memory)


def unknown_option(name: str, known: Collection[str], where: str, rest: str) -> ValueError:
    """Return the error for an option that `where` does not know, with the nearest one."""
    near = nearest_name(name, known)
    hint = f"; did you mean {near!r}?" if near else "."
    return ValueError(f"{where} got an unknown option {name!r}{hint} {rest}")
