"""The known name that a misspelled one is closest to, found in bounded time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

__all__ = ["nearest_name"]

# Nobody misspells a longer name, and nobody reads a list of more: the rest is not searched.
_MAX_LENGTH = 100
_MAX_NAMES = 5000


def nearest_name(wanted: str, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the name that is closest to `wanted`, or None where none is close.

    Args:
        wanted: At most 100 characters; a longer one has no nearest name.
        names: The known names; the first 5000 are searched.
        cutoff: Least similarity, from 0 to 1, as difflib measures it.
    """
    if len(wanted) > _MAX_LENGTH:
        return None
    found = difflib.get_close_matches(wanted, list(islice(names, _MAX_NAMES)), n=1, cutoff=cutoff)
    return found[0] if found else None
