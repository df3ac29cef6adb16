"""Lists and arguments as a flag can spell them: NAME,NAME and NAME=VALUE,NAME=VALUE."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import WithJsonSchema

from liger_cli.config.yaml_file import read_set

__all__ = ["Pairs", "are_pairs", "join_pairs", "read_pairs", "split_names"]

# As the text of HF's optim_args; a YAML mapping of names to values means the same.
Pairs = Annotated[str, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})]

_PAIR = re.compile(r"[A-Za-z_]\w*\s*=[^,=]+")


def split_names(text: str | None) -> list[str]:
    """Return the entries of a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def join_pairs(value: object) -> object:
    """Return a mapping as the text that means the same; anything else as it is."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(entry, bool | int | float | str) for entry in value.values()):
        raise ValueError("should map names to numbers, true, false or text")
    return ",".join(f"{name}={_word(entry)}" for name, entry in value.items())


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def are_pairs(text: str) -> bool:
    """Return whether read_pairs can read a text."""
    return all(_PAIR.fullmatch(pair) for pair in split_names(text) or [""])


def read_pairs(text: str | None) -> dict[str, Any]:
    """Return the arguments by name, their values read as YAML: 1e-4 and true are no text.

    Raises:
        ConfigError: A value is not YAML.
    """
    entries = map(read_set, split_names(text))
    return {entry.name.strip(): entry.value for entry in entries}
