"""OpSelection: the ops that a request names."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liger_kernels.ops.registry import OPS, PATCH_OPS, find_op

__all__ = ["ADAPTER_OP", "LOSSES", "PATCH_OPS", "OpSelection", "drop_retired", "resolve_ops"]

_logger = logging.getLogger(__name__)

# These two are ways to compute the same loss.
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
# The op of LoRA layers, which a model may get, change and lose after it was patched.
ADAPTER_OP = "lora_linear"
_WORDS = ("auto", "all", "none")
# Configurations and calls may still name it: it was patched once.
_RETIRED = OPS["fused_add_rms_norm"]


@dataclass(frozen=True)
class OpSelection:
    """Ops asked for."""

    ops: tuple[str, ...]
    # Those spelled out by name: a model without a place for one is worth telling.
    named: tuple[str, ...] = ()
    # Whether ops that fail their check on the model's device are left out.
    is_auto: bool = False
    # Whether norm outputs and gated products are recomputed in backward instead of kept.
    save_memory: bool = True


def resolve_ops(ops: str | Sequence[str] | OpSelection) -> OpSelection:
    """Return the ops that a request names, in a fixed order.

    Args:
        ops: "auto", "all", "none", names, or removals after one of these ("auto,-rope"), as one
            comma-separated string or a sequence. "all" is every op except cross_entropy, which must
            be named; "auto" is "all" without ops that fail their check on the device. Short names
            (rmsnorm, layernorm, ce, flce) and dashes for underscores are accepted. So is
            fused_add_rms_norm, which was patched once: without effect, and a line is logged.

    Raises:
        ValueError: A name is unknown (the message names the nearest) or no string, the words are
            combined in a way that says nothing, or both losses are asked for.
    """
    if isinstance(ops, OpSelection):
        return ops
    items = _items(ops)
    chosen: set[str] = set()
    named: list[str] = []
    removed: set[str] = set()
    words = [item.lower() for item in items if item.lower() in _WORDS]
    if len(words) > 1 or (words == ["none"] and len(items) > 1):
        raise ValueError(
            f"ops must hold one of {', '.join(_WORDS)} at most, and none alone: {ops!r}"
        )
    for item in items:
        if item.lower() in ("auto", "all"):
            chosen |= set(PATCH_OPS) - {"cross_entropy"}
        elif item.startswith("-"):
            removed.add(_op_name(item[1:]))
        elif item.lower() != "none":
            named.append(_op_name(item))
    if removed and not (chosen or named):
        raise ValueError(f"ops removes from nothing: {ops!r}; write 'auto,{items[0]}'")
    chosen = (chosen | set(named)) - removed - {_RETIRED.name}
    if set(LOSSES) <= chosen:
        raise ValueError(
            "ops asks for cross_entropy and fused_linear_cross_entropy, which compute the same "
            "loss; keep one, for example 'auto,-fused_linear_cross_entropy,cross_entropy'"
        )
    return OpSelection(
        tuple(op for op in PATCH_OPS if op in chosen),
        tuple(op for op in named if op in chosen),
        words == ["auto"],
    )


def _items(ops: Any) -> list[str]:
    """Return the words of a request, without spaces around them."""
    items = ops.split(",") if isinstance(ops, str) else ops
    # A mapping of names to booleans would lose the booleans.
    is_list = isinstance(items, Collection) and not isinstance(items, Mapping)
    if not is_list or not all(isinstance(item, str) for item in items):
        raise ValueError(f"ops must be a string or a sequence of names, got {ops!r}")
    items = [item.strip() for item in items]
    if not any(items):
        raise ValueError(f"ops is empty: {ops!r}; write 'none' to patch nothing")
    return items


def _op_name(name: str) -> str:
    if name.strip().lower().replace("-", "_") in (_RETIRED.name, *_RETIRED.aliases):
        _note_retired()
        return _RETIRED.name
    return find_op(name, PATCH_OPS, _WORDS).name


def drop_retired(options: dict[str, Any]) -> None:
    """Remove the keyword option of an op that is no longer patched."""
    if options.pop(_RETIRED.name, None) is not None:
        _note_retired()


@functools.cache
def _note_retired() -> None:
    """Log, once a process, that the retired op has no effect."""
    _logger.warning(
        "%s is no longer patched: naming it has no effect; remove it from ops", _RETIRED.name
    )
