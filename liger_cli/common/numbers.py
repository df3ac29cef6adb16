"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["finite", "format_bytes", "format_count"]


def finite(value: Any) -> Any:
    """Return a value of JSON with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_bytes(num_bytes: float) -> str:
    """Return a size with its unit: '5.1 GB', '35 MB', '7 kB', '512 B'."""
    if num_bytes >= 1e8:
        return f"{num_bytes / 1e9:.1f} GB"
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def format_count(number: float) -> str:
    """Return a number with spaces between thousands: '12 345'; below ten with one decimal."""
    if number < 10 and number != int(number):
        return f"{number:.1f}"
    return f"{number:,.0f}".replace(",", " ")
