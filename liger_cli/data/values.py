"""Checks of the values in a row: text and lists, and what else was found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from liger_cli.errors import DataError

__all__ = ["check_list", "check_text", "describe"]


def check_text(value: Any, name: str, where: str) -> str:
    """Return a value that is text.

    Raises:
        DataError: It is not; names the place and the column or message.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be a string, found {describe(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {name} holds half of a surrogate pair, not text") from error
    return value


def check_list(value: Any, name: str, where: str) -> Iterator[tuple[int, Any]]:
    """Return the items of a list that is not empty, with their numbers.

    Raises:
        DataError: It is empty or no list.
    """
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} must be a list, found {describe(value)}")
    if not value:
        raise DataError(f"{where}: {name} is empty")
    return iter(enumerate(value))


def describe(value: Any) -> str:
    """Return the kind of a JSON value in words."""
    kinds = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
