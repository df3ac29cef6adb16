"""Arguments of liger_kernel: those with another form here, those without one, and their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["POSITIONS", "cast_of", "name_positions", "refuse"]

_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
_SWIGLU = ("rope", *_LOSSES, "rms_norm", "swiglu", "model")
_GEGLU = ("rope", *_LOSSES, "rms_norm", "geglu", "model")
_VISION_GEGLU = ("rope", *_LOSSES, "layer_norm", "rms_norm", "geglu", "model")
_VISION_SWIGLU = ("rope", *_LOSSES, "layer_norm", "rms_norm", "swiglu", "model")
_VISION = (*_LOSSES, "rms_norm", "layer_norm", "model")
# The order in which apply_liger_kernel_to_<type> of liger_kernel 0.8 takes its arguments.
POSITIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("deepseek_v2", "deepseek_v3", "deepseek_v4", "exaone4", "falcon_h1", "glm4", "glm4v"),
            *("glm4v_moe", "gpt_oss", "granite", "hunyuan_v1_dense", "hunyuan_v1_moe", "llama"),
            *("ministral", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen2_5_vl"),
            *("qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl"),
            *("qwen3_vl_moe", "smollm3"),
        ),
        _SWIGLU,
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gemma4_text"), _GEGLU),
    **dict.fromkeys(("gemma3", "gemma4", "paligemma"), _VISION_GEGLU),
    **dict.fromkeys(("internvl", "smolvlm"), _VISION),
    "llama4": (*_SWIGLU, "layer_norm"),
    "llava": (*_LOSSES, "model"),
    **dict.fromkeys(("mllama", "muse_glimmer"), _VISION_SWIGLU),
    "qwen2_vl": ("rope", *_LOSSES, "rms_norm", "layer_norm", "swiglu", "model"),
}

# The cast of ops.rms_norm for each casting mode. "none" computes in the dtype of x alone; the op
# computes in fp32 and rounds once, which is nearer to the formula.
_CASTS = {"llama": "before_weight", "gemma": "after_weight", "none": "after_weight"}


def cast_of(casting_mode: str) -> str:
    """Return the cast of ops.rms_norm for a casting mode.

    Raises:
        ValueError: The mode is unknown.
    """
    if casting_mode not in _CASTS:
        allowed = ", ".join(map(repr, _CASTS))
        raise ValueError(f"casting_mode must be one of {allowed}, got {casting_mode!r}")
    return _CASTS[casting_mode]


def refuse(where: str, **options: Any) -> None:
    """Raise ValueError for the first option that is set: no op has it."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{where} got {name}={value!r}, which liger_kernels does not have")


def name_positions(
    function: str, order: tuple[str, ...], values: tuple[Any, ...], named: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all arguments of a call by their names.

    Args:
        function: Its name.
        order: Of its positional arguments; empty if it is not known.
        values: The positional arguments.
        named: The keyword arguments.

    Raises:
        TypeError: The order is not known, there are too many, one is given twice, or a model stands
            where an option does.
    """
    if values and not order:
        raise TypeError(
            f"{function} takes keyword arguments alone, as liger_kernel has no such function or "
            f"one with an option that no op has; got {len(values)} without a name"
        )
    if len(values) > len(order):
        raise TypeError(
            f"{function} takes at most {len(order)} positional arguments ({', '.join(order)}), got "
            f"{len(values)}"
        )
    given = dict(zip(order, values, strict=False))
    for name, value in given.items():
        if name in named:
            raise TypeError(f"{function} got multiple values for argument {name!r}")
        if name != "model" and isinstance(value, nn.Module):
            raise TypeError(
                f"{function} got a {type(value).__name__} for {name!r}, its argument "
                f"{order.index(name) + 1}; pass model=..."
            )
    return {**given, **named}
