"""Arguments of liger_kernel that have another form here, or none."""

from __future__ import annotations

from typing import Any

__all__ = ["cast_of", "refuse"]

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
