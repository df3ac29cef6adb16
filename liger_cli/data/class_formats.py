"""Rows of classification: a text or a conversation as sft reads it, and its label or labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from liger_cli.config.datasets import Naming
from liger_cli.data.names import join_names
from liger_cli.data.rows import Record, Row, RowFormat, as_object
from liger_cli.data.values import describe
from liger_cli.errors import DataError

__all__ = ["TARGETS", "ClassFormat", "Classes", "describe_classes", "find_classes"]

# The column of a row's target: the number of its class, or of each class 1 where the row has it.
TARGETS = "targets"

# More than a head is made for; a number of an article sooner than that of a class.
_MAX_CLASSES = 65_536
_COLUMNS = ("label", "labels")
_SHOWN = 20

# A label as the data have it: the number of a class, or its name.
Label = int | str


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Args:
        names: By number.
        is_multi: Whether a row may have several labels, or none.
    """

    names: tuple[str, ...]
    is_multi: bool = False

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def _has_digits(self) -> bool:
        return any(map(_is_digits, self.names))

    def target(self, value: Any, where: str) -> list[float]:
        """Return the target of a row: the number of its class, or one 0 or 1 for each class.

        Raises:
            DataError: A label is none of the classes, or there are several and one is wanted.
        """
        if isinstance(value, list) != self.is_multi:
            wanted = "a list of labels" if self.is_multi else "one label"
            raise DataError(
                f"{where}: the label is {describe(value)}, wanted {wanted} as in all rows"
            )
        if not self.is_multi:
            return [float(self._number(read_label(value, where), where))]
        found = {self._number(read_label(one, where), where) for one in value}
        return [float(number in found) for number in range(len(self.names))]

    def _number(self, label: Label, where: str) -> int:
        if (number := self._numbers.get(str(label))) is not None:
            return number
        # The names are numbers themselves: 1 to 5 stars.
        if isinstance(label, int) and not self._has_digits and label < len(self.names):
            return label
        shown = ", ".join(self.names[:_SHOWN]) + (", ..." if len(self.names) > _SHOWN else "")
        raise DataError(
            f"{where}: the label {label!r} is none of the {len(self.names)} classes: {shown}",
            hint="label_names, or num_labels for classes with numbers, says which there are; of a "
            "model that is a classifier already its own hold",
        )


@dataclass(frozen=True)
class ClassFormat:
    """The format of a source of texts with labels, which all of its records have.

    Args:
        rows: How a record is read without its label.
        label: The column of the label.
    """

    rows: RowFormat
    label: str

    @property
    def name(self) -> str:
        return f"{self.rows.name} and label"

    @classmethod
    def find(cls, record: Record, folder: Path | None, naming: Naming) -> ClassFormat:
        """Return the format of a source by its first record.

        Raises:
            DataError: It has no text or no label; names the columns found and wanted.
        """
        where, content = record[0], as_object(record)
        mapped = [naming.columns[name] for name in _COLUMNS if name in naming.columns]
        there = [name for name in mapped or _COLUMNS if name in content]
        if len(there) != 1:
            found = " and ".join(there) or f"the columns {join_names(content)}"
            wanted = f"the column {' or '.join(mapped)}" if mapped else "one column label"
            raise DataError(
                f"{where}: found {found}; wanted {wanted}, with text or messages",
                hint="columns names it, ours to theirs: --columns text=X,label=Y",
            )
        columns = {ours: name for ours, name in naming.columns.items() if ours not in _COLUMNS}
        rest = {name: value for name, value in content.items() if name != there[0]}
        rows = RowFormat.find((where, rest), folder, replace(naming, columns=columns))
        return cls(rows, there[0])

    def labelled(self, record: Record) -> tuple[Row, Any]:
        """Return the row of a record and its label as it is there.

        Raises:
            DataError: The record cannot be used; names its place and the reason.
        """
        where, content = record[0], as_object(record)
        if content.get(self.label) is None or content[self.label] == "":
            raise DataError(
                f"{where}: {self.label} is {'empty' if self.label in content else 'missing'}; "
                "every row has a label",
                hint="leave out the rows without one",
            )
        rest = {name: value for name, value in content.items() if name != self.label}
        row = self.rows.row((where, rest))
        shown = self.label if self.label in _COLUMNS else f"{self.label} as label"
        return replace(row, columns=(*row.columns, shown)), content[self.label]


def read_label(value: Any, where: str) -> Label:
    """Return a label as the data have it; digits are a number, as tables such as CSV have them.

    Raises:
        DataError: It is neither a whole number from 0 on nor a text.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text) if _is_digits(text) else text
    if isinstance(value, int) and 0 <= value < _MAX_CLASSES:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        raise DataError(
            f"{where}: the label is {value}; classes have names or numbers from 0 on, and "
            "regression is not trained here",
            hint="a score can be learned from pairs: --objective reward",
        )
    shown = value if isinstance(value, int | float) else describe(value)
    raise DataError(
        f"{where}: the label is {shown}; wanted the name of a class, or its number from 0 on"
    )


def _is_digits(text: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,4}", text) is not None


def find_classes(
    labelled: Iterable[tuple[str, Any]], num_labels: int | None, names: Sequence[str]
) -> Classes:
    """Return the classes of data by their labels.

    Names are in the order of the alphabet; classes with numbers are called LABEL_0 and so on, as
    transformers does.

    Args:
        labelled: Where each row stands, and its label.
        num_labels: How many classes there are; None: as many as the data have.
        names: All names; none: those of the data.

    Raises:
        DataError: Labels are no classes, are numbers and names, or of another number.
    """
    found: dict[Label, str] = {}
    is_multi: bool | None = None
    for where, value in labelled:
        is_multi = isinstance(value, list) if is_multi is None else is_multi
        for one in value if isinstance(value, list) else [value]:
            found.setdefault(read_label(one, where), where)
    if names:
        return Classes(tuple(names), bool(is_multi))
    texts = sorted(label for label in found if isinstance(label, str))
    numbers = sorted(label for label in found if isinstance(label, int))
    if texts and numbers:
        raise DataError(
            f"labels are numbers and names: {numbers[0]} in {found[numbers[0]]}, {texts[0]!r} in "
            f"{found[texts[0]]}",
            hint="label_names has the names of all classes",
        )
    made = texts or [f"LABEL_{i}" for i in range(max([*numbers, (num_labels or 0) - 1]) + 1)]
    if len(made) < 2:
        raise DataError(
            f"all rows have one label, {', '.join(map(str, found)) or 'none'}; classes are two at "
            "least"
        )
    if num_labels is not None and len(made) != num_labels:
        last = (texts or numbers)[-1]
        raise DataError(
            f"num_labels is {num_labels}, and the data have {len(texts) or 'labels up to'} "
            + (f"labels: {', '.join(texts[:_SHOWN])}" if texts else f"{last} ({found[last]})"),
            hint="label_names has the names of all classes, of those without a row too"
            if texts
            else "classes have the numbers from 0 to num_labels - 1",
        )
    return Classes(tuple(made), bool(is_multi))


def describe_classes(rows: Any, classes: Classes) -> str:
    """Return in words how many rows have each class, and which no row has.

    Args:
        rows: Tokenised rows with targets, a datasets.Dataset.
    """
    counts = [0] * len(classes.names)
    for target in rows[TARGETS]:
        numbers = [i for i, has in enumerate(target) if has] if classes.is_multi else target
        for number in numbers:
            counts[int(number)] += 1
    pairs = list(zip(classes.names, counts, strict=True))
    shown = ", ".join(f"{name} {count}" for name, count in pairs[:_SHOWN] if count)
    more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
    absent = [name for name, count in pairs if not count]
    rest = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
    never = f"; of {', '.join(absent[:_SHOWN])}{rest} there is no row" if absent else ""
    return f"classes: {shown}{more}{never}"
