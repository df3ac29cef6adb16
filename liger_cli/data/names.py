"""Give the columns, roles and fields of a row the names that are used here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from liger_cli.config.datasets import ROLES, Naming
from liger_cli.data.calls import check_role
from liger_cli.data.formats import FORMATS, OPTIONAL, WANTED, find_format, find_shape
from liger_cli.errors import DataError

__all__ = ["RowNames", "delimiter_advice", "join_names"]

# The speakers of the conversations format, as roles of the messages format.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "function_call",
}


_NEEDED = frozenset(name for columns in FORMATS.values() for name in columns)

# What a question and an answer are usually called.
_USUAL = (
    ("question", "query", "prompt", "input", "instruction", "user", "q", "source"),
    ("answer", "response", "completion", "output", "reply", "assistant", "a", "target"),
)


@dataclass(frozen=True)
class RowNames:
    """The names of a source.

    Args:
        columns: Ours to theirs, those of a recognised shape as well.
        naming: What the user has mapped.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    naming: Naming = field(default_factory=Naming)

    @staticmethod
    def missing(
        content: Mapping[str, Any], naming: Naming, needed: Collection[str] = _NEEDED
    ) -> str | None:
        """Return the message about a mapped column that the first row has not, or None.

        Args:
            needed: Our columns that make a format.
        """
        for ours, theirs in naming.columns.items():
            if ours in needed and theirs not in content:
                return f"columns: {ours} is {theirs}, and there is no such column"
        return None

    @classmethod
    def find(cls, content: Mapping[str, Any], naming: Naming, where: str) -> tuple[str, RowNames]:
        """Return the format of a source by its first row, and its names.

        Raises:
            DataError: The columns make no format.
        """
        mapped = naming.columns
        named = cls(mapped, naming).row(content)[0]
        if pairs := [name for name in mapped if name in ("chosen", "rejected")]:
            raise DataError(
                f"{where}: columns: {pairs[0]} is of pairs, and objective sft does not compare "
                "answers",
                hint=_PAIRS,
            )
        form = find_format(named, mapped)
        if form is not None:
            return form, cls(mapped, naming)
        if (shape := find_shape(named)) and not set(shape) & set(mapped):
            columns = {**mapped, **shape}
            names = cls(columns, naming)
            if form := find_format(names.row(content)[0], columns):
                return form, names
        read = find_format(named)
        if read is not None:
            idle = [
                name
                for name in mapped
                if find_format(named, [name]) is None or name not in _known(read)
            ]
            raise DataError(
                f"{where}: columns: no format uses {', '.join(mapped)} together; the rows are "
                f"{read}, which does not use {', '.join(idle) or ', '.join(mapped)}"
            )
        raise DataError(
            f"{where}: found the columns {join_names(content)}; wanted {WANTED}",
            hint=_advice(content),
        )

    def row(self, content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return a row with our names, and the columns whose names are taken by others."""
        if not self.columns:
            return dict(content), []
        theirs = set(self.columns.values())
        named = {k: v for k, v in content.items() if k not in theirs and k not in self.columns}
        if self.naming.as_llama_factory:
            named = {}
        named |= {ours: content[name] for ours, name in self.columns.items() if name in content}
        if self.naming.as_llama_factory:
            return named, [name for name in content if name not in theirs]
        return named, [name for name in content if name in self.columns and name not in theirs]

    def shown(self, column: str) -> str:
        """Return a column of ours with its name in the data."""
        theirs = self.columns.get(column, column)
        return column if theirs == column else f"{theirs} as {column}"

    def turn(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message with our names of its fields."""
        fields = self.naming.message_fields
        if not fields:
            return dict(turn)
        theirs = set(fields.values())
        kept = {k: v for k, v in turn.items() if k not in theirs and k not in fields}
        return kept | {ours: turn[name] for ours, name in fields.items() if name in turn}

    def field(self, name: str) -> str:
        """Return a field of ours with its name in the data."""
        theirs = self.naming.message_fields.get(name, name)
        return name if theirs == name else f"{theirs} as {name}"

    def wanted(self, name: str) -> str:
        """Return the name that a field of ours should have in the data."""
        return self.naming.message_fields.get(name, name)

    def role(self, role: str, name: str, where: str, *, is_speaker: bool) -> str:
        """Return who speaks, as one of our roles.

        Args:
            name: Of the message, for errors: messages[0].
            is_speaker: Whether it is the `from` of ShareGPT, which has names by itself.

        Raises:
            DataError: It is no role, or another spelling of one.
        """
        if (ours := self._ours.get(role)) is not None:
            return ours
        if is_speaker and role in SPEAKERS:
            return SPEAKERS[role]
        if not is_speaker and (not self._ours or role in ROLES):
            return check_role(role, name, where)
        allowed = (*self._ours, *(SPEAKERS if is_speaker else ROLES))
        label = "from" if is_speaker else self.naming.message_fields.get("role", "role")
        raise DataError(
            f"{where}: {name}.{label} is {role!r}; allowed are {', '.join(dict.fromkeys(allowed))}",
            hint=f"roles: {{assistant: [{role}]}} gives it one of our roles "
            f"({', '.join(ROLES)}), ours: theirs",
        )

    @cached_property
    def _ours(self) -> dict[str, str]:
        return {name: ours for ours, names in self.naming.roles.items() for name in names}


_PAIRS = (
    "these are pairs: --objective dpo (or orpo, cpo, simpo, ipo) learns from both answers; "
    "columns: {completion: chosen} trains on those that were chosen"
)


def _known(form: str) -> Sequence[str]:
    return (*FORMATS[form], *OPTIONAL.get(form, ()))


def _advice(content: Mapping[str, Any]) -> str | None:
    """Return how to read columns that make no format."""
    names = list(content)
    if advice := delimiter_advice(names):
        return advice
    if {"chosen", "rejected"} <= set(names):
        return _PAIRS
    texts = [name for name, value in content.items() if isinstance(value, str)]
    if len(texts) < 2:
        return None
    # Where the names do not say it, only the user knows which is which.
    asked, answer = (next((t for t in texts if t.lower() in known), None) for known in _USUAL)
    return (
        f"columns names them, ours to theirs: --columns prompt={asked or 'X'},"
        f"completion={answer or 'Y'}; instruction and output make a conversation of them"
    )


def delimiter_advice(names: Sequence[str]) -> str | None:
    """Return how to separate columns that were read as one, or None."""
    delimiter = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    if delimiter is None:
        return None
    shown = "tab" if delimiter == "\t" else f"'{delimiter}'"
    return f"the entry {{path: FILE, delimiter: {shown}}} of dataset separates the columns"


def join_names(columns: Mapping[str, Any]) -> str:
    """Return the columns of a row for an error."""
    return ", ".join(map(str, columns)) or "none"
