"""Text of unknown origin made safe to show: nothing in it that a terminal would obey."""

from __future__ import annotations

import re

__all__ = ["printable", "shorten"]

# C0 and C1 controls but newline and tab, line separators, marks that reorder text, and halves of
# surrogate pairs, which no UTF-8 stream takes.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Escape control characters as Python writes them; newlines and tabs stay."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def shorten(text: str, length: int = 80) -> str:
    """Return text fit for a line of a message: on one line, escaped, cut in the middle."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 4 :]}"
