"""Types of keys that a YAML file may also write as a list: names, and weighted datasets."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

__all__ = ["Datasets", "Names"]


def _join_names(value: object) -> object:
    """Join a YAML list of op names to the comma-separated string that it means."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value)
    return value


Names = Annotated[
    str,
    BeforeValidator(_join_names),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


def _join_datasets(value: object) -> object:
    """Join a YAML list of datasets to NAME:WEIGHT,NAME,..., which is one flag."""
    if not isinstance(value, list):
        return value
    return ",".join(_dataset_words(entry) for entry in value)


def _dataset_words(entry: object) -> str:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict) or not {"path"} <= set(entry) <= {"path", "weight"}:
        raise ValueError("a dataset of a list is a name, or an object of path and perhaps weight")
    path, weight = entry["path"], entry.get("weight")
    if not isinstance(path, str) or not path or "," in path or re.search(r":[\d.e+-]+$", path):
        raise ValueError("the path of a dataset of a list has no comma and no :NUMBER at its end")
    if weight is None:
        return path
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
        raise ValueError("the weight of a dataset is a number above 0")
    return f"{path}:{weight}"


_DATASET_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "weight": {"type": "number", "exclusiveMinimum": 0},
    },
    "required": ["path"],
    "additionalProperties": False,
}
Datasets = Annotated[
    str,
    BeforeValidator(_join_datasets),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"anyOf": [{"type": "string"}, _DATASET_SCHEMA]}},
            ]
        }
    ),
]
