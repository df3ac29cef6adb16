"""Keys as fields, and types of keys that a YAML file may also write as a list of names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

__all__ = ["Names", "Numbers", "Tiles", "Tokens", "key"]


def key(group: str, default: Any, description: str, **limits: Any) -> Any:
    """Return the field of a key, which pages and --help show in its group."""
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


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


def _join_numbers(value: object) -> object:
    """Join a number or a YAML list of numbers to the comma-separated string that it means."""
    numbers = value if isinstance(value, list) else [value]
    if all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        return ",".join(map(str, numbers))
    return value


Numbers = Annotated[
    str,
    BeforeValidator(_join_numbers),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "number"},
                {"type": "array", "items": {"type": "number"}},
            ]
        }
    ),
]


def _join_tokens(value: object) -> object:
    """Join a YAML list of tokens; one that a comma-separated text cannot have is refused."""
    if not isinstance(value, list):
        return value
    for token in value:
        if not isinstance(token, str) or not token or token != token.strip() or "," in token:
            raise ValueError(
                "should be a list of texts without commas and without white space at their ends"
            )
    return ",".join(value)


Tokens = Annotated[
    str,
    BeforeValidator(_join_tokens),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


# KeyChecks reads the number as text.
Tiles = Annotated[
    str, WithJsonSchema({"anyOf": [{"enum": ["auto", "none"]}, {"type": "integer", "minimum": 64}]})
]
