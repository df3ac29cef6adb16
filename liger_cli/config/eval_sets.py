"""Evaluation sets with names, as a flag can spell them, and the metrics there are of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import WithJsonSchema

from liger_cli.config.datasets import ENTRY_SCHEMA, read_entry
from liger_cli.config.objectives import OBJECTIVES

__all__ = ["EvalSets", "join_sets", "metric_names", "read_sets"]

_NAMED_ENTRY = {
    **ENTRY_SCHEMA,
    "properties": {**ENTRY_SCHEMA["properties"], "name": {"type": "string"}},
}
# NAME=DATA,NAME=DATA; a YAML mapping of names to data means the same as the text. A file may also
# have entries, as `dataset` has them, with a name.
EvalSets = Annotated[
    str | list[dict[str, Any]],
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "object"},
                {"type": "array", "items": {"anyOf": [{"type": "string"}, _NAMED_ENTRY]}},
            ]
        }
    ),
]

_NAMED = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)


def join_sets(value: object) -> object:
    """Return a mapping as the text that means the same, entries checked, other values as is."""
    if isinstance(value, list):
        return _read_entries(value)
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


def _read_entries(value: list[Any]) -> list[dict[str, Any]]:
    if not value:
        raise ValueError("should name a set")
    entries = [read_entry(entry, {"name": _set_name}) for entry in value]
    for entry in entries:
        if "name" in entry and "weight" in entry:
            raise ValueError(
                f"(entry {entry['name']!r}): weight is a share among datasets that are one set, "
                "and this is a set by itself"
            )
    return entries


def _set_name(value: object) -> str:
    if not isinstance(value, str) or not _NAMED.fullmatch(f"{value}="):
        raise ValueError("should consist of letters, digits and . _ -")
    return value


def read_sets(value: str | list[dict[str, Any]] | None) -> dict[str, str | list[dict[str, Any]]]:
    """Return the data by name, as read_datasets takes them; data without a name have the name "".

    A path that begins like a name is written with a directory: ./k=1.jsonl.

    Raises:
        ValueError: Only some of several sets have a name, or two have the same.
    """
    if value is None:
        return {}
    if isinstance(value, list):
        return _sets_of_entries(value)
    words = [word.strip() for word in value.split(",")]
    named = [match for word in words if (match := _NAMED.fullmatch(word))]
    if not named:
        return {"": value}
    sets = {match[1]: match[2].strip() for match in named}
    if len(sets) < len(words) or not all(sets.values()):
        raise ValueError("should give every set a different name, as NAME=DATA,NAME=DATA")
    return dict(sets)


def _sets_of_entries(entries: list[dict[str, Any]]) -> dict[str, str | list[dict[str, Any]]]:
    names = [entry["name"] for entry in entries if "name" in entry]
    if not names:
        return {"": entries}
    if len(set(names)) < len(entries):
        raise ValueError("should give every entry a different name, or none a name")
    return {
        entry["name"]: [{key: part for key, part in entry.items() if key != "name"}]
        for entry in entries
    }


def metric_names(sets: Iterable[str], objective: str = "sft") -> list[str]:
    """Return the metrics of all evaluation data, then of each set as NAME_loss and so on."""
    metrics = ("loss", *OBJECTIVES[objective].metrics)
    return [f"{name}_{metric}" if name else metric for name in ["", *sets] for metric in metrics]
