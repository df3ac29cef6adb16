"""Lists and arguments as a flag can spell them: NAME,NAME and NAME=VALUE,NAME=VALUE."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import WithJsonSchema

from liger_cli.config.yaml_file import read_set

__all__ = [
    "Pairs",
    "are_pairs",
    "join_pairs",
    "join_ranks",
    "read_numbers",
    "read_pairs",
    "read_ranks",
    "split_names",
]

# As the text of HF's optim_args; a YAML mapping of names to values means the same.
Pairs = Annotated[str, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})]

_PAIR = re.compile(r"[A-Za-z_]\w*\s*=[^,=]+")


def split_names(text: str | None) -> list[str]:
    """Return the entries of a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def read_numbers(text: str | None) -> list[float]:
    """Return the numbers of a comma-separated list.

    Raises:
        ValueError: An entry is no finite number.
    """
    numbers = []
    for word in split_names(text):
        try:
            numbers.append(float(word))
        except ValueError:
            raise ValueError(f"should be numbers, separated by commas; {word!r} is none") from None
    if not all(map(math.isfinite, numbers)) or (text is not None and not numbers):
        raise ValueError("should be finite numbers, separated by commas")
    return numbers


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


def join_ranks(value: object) -> object:
    """Return a mapping of names to ranks as the text that means the same; else the value."""
    if not isinstance(value, dict):
        return value
    for name, rank in value.items():
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise ValueError(f"should map names to ranks, which are integers; {name}: {rank!r}")
        if not isinstance(name, str) or "," in name or not name.strip():
            raise ValueError(f"should map names of modules without a comma to ranks; {name!r}")
    return ",".join(f"{name}={rank}" for name, rank in value.items())


def read_ranks(text: str | None) -> dict[str, int]:
    """Return the ranks by name of module, a regular expression, of NAME=RANK,NAME=RANK.

    Raises:
        ValueError: It is not written so, a rank is no integer above 0, or a name is given twice.
    """
    ranks: dict[str, int] = {}
    pairs = split_names(text)
    if text is not None and not pairs:
        raise ValueError("should be NAME=RANK,NAME=RANK")
    for pair in pairs:
        name, sign, rank = (part.strip() for part in pair.rpartition("="))
        if not (sign and name and re.fullmatch("[1-9][0-9]{0,8}", rank)):
            raise ValueError(f"should be NAME=RANK,NAME=RANK with ranks above 0; {pair!r} is not")
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"has a name that is no regular expression: {name}: {error}") from None
        if name in ranks:
            raise ValueError(f"has {name} twice")
        ranks[name] = int(rank)
    return ranks
