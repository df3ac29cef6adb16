"""A configuration of another program, read key by key, and what could not be translated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from liger_cli.config import ALIASES, RunConfig

__all__ = ["Rule", "Translation", "lost", "needless", "rename"]

# Reads the value of one key of the other program into a translation.
Rule = Callable[["Translation", str, Any], None]


@dataclass
class Translation:
    """The keys that were translated, and those that were not.

    Attributes:
        values: Keys of liger.
        lost: Keys of the other program that have no counterpart, each with the reason.
        notes: Differences that a user should know of.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, origin: str) -> None:
        """Set a key of liger, if this version has it and it takes the value."""
        if key not in RunConfig.model_fields:
            self.lost[origin] = "liger has no such key"
            return
        try:
            RunConfig(**{"model": "m", key: value})
        except ValueError as error:
            # A conflict with a key that is yet to come has no place.
            places = [detail for detail in getattr(error, "errors", list)() if detail["loc"]]
            if places:
                self.lost[origin] = f"{value!r} is not taken by {key}"
                return
        self.values[key] = value

    def read(self, given: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
        """Read every key that says something; one without a rule is lost, unless it is ours."""
        for key, value in given.items():
            if value is None or value == "" or value == [] or value == {}:
                continue
            if (rule := rules.get(key)) is not None:
                rule(self, key, value)
            elif key in RunConfig.model_fields or key in ALIASES:
                self.set(ALIASES.get(key, key), value, key)
            elif value is not False:
                self.lost[key] = "liger has no such key"


def rename(ours: str, values: Mapping[Any, Any] | None = None) -> Rule:
    """Return the rule of a key that is ours under another name, perhaps with other values."""

    def rule(found: Translation, key: str, value: Any) -> None:
        if values is not None and isinstance(value, str | bool):
            value = values.get(value, value)
        if value is not None:
            found.set(ours, value, key)

    return rule


def needless(found: Translation, key: str, value: Any) -> None:
    """Pass over a key that says nothing about which tokens are trained, or how."""


def lost(reason: str) -> Rule:
    """Return the rule of a key that cannot be translated."""

    def rule(found: Translation, key: str, value: Any) -> None:
        if value is not False:
            found.lost[key] = reason

    return rule
