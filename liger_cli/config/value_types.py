"""Types of keys that a YAML file may also write as a list of names."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

__all__ = ["Names"]


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
