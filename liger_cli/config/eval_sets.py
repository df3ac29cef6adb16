"""Evaluation sets with names, as a flag can spell them, and the metrics there are of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import WithJsonSchema

__all__ = ["EvalSets", "join_sets", "metric_names", "read_sets"]

# NAME=DATA,NAME=DATA; a YAML mapping of names to data means the same as the text.
EvalSets = Annotated[str, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})]

_NAMED = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)

_METRICS = ("loss", "perplexity", "token_accuracy", "entropy")


def join_sets(value: object) -> object:
    """Return a mapping as the text that means the same; anything else as it is."""
    if not isinstance(value, dict):
        return value
    for name, data in value.items():
        if not isinstance(name, str) or not _NAMED.fullmatch(f"{name}="):
            raise ValueError("should name its sets by letters, digits and . _ -")
        if not isinstance(data, str) or not data or "," in data:
            raise ValueError("should map names to data, each without a comma")
    if not value:
        raise ValueError("should name a set")
    return ",".join(f"{name}={data}" for name, data in value.items())


def read_sets(text: str | None) -> dict[str, str]:
    """Return the data by name; data without a name have the name "".

    A path that begins like a name is written with a directory: ./k=1.jsonl.

    Raises:
        ValueError: Only some of several sets have a name, or two have the same.
    """
    if text is None:
        return {}
    words = [word.strip() for word in text.split(",")]
    named = [match for word in words if (match := _NAMED.fullmatch(word))]
    if not named:
        return {"": text}
    sets = {match[1]: match[2].strip() for match in named}
    if len(sets) < len(words) or not all(sets.values()):
        raise ValueError("should give every set a different name, as NAME=DATA,NAME=DATA")
    return sets


def metric_names(sets: Iterable[str]) -> list[str]:
    """Return the metrics of all evaluation data, then of each set as NAME_loss and so on."""
    return [f"{name}_{metric}" if name else metric for name in ["", *sets] for metric in _METRICS]
