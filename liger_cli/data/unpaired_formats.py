"""Answers that are labelled good or bad, and pairs as two of them.

A labelled row is a row that sft would train on, with a column label, or LLaMA-Factory's kto_tag.
A pair is a good answer and a bad one to the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from liger_cli.config.datasets import Naming
from liger_cli.data.formats import read_truth
from liger_cli.data.names import RowNames, join_names
from liger_cli.data.pair_formats import ANSWERS, PairFormat
from liger_cli.data.rows import Record, Row, RowFormat, as_object, only_last
from liger_cli.data.values import describe
from liger_cli.errors import DataError

__all__ = ["LabelledAnswer", "UnpairedFormat"]

_LABELS = ("label", "kto_tag")
_WANTED = (
    "prompt, completion and label (true or false); or instruction, output, messages or "
    "conversations with label or kto_tag; or pairs: prompt, chosen and rejected"
)
_NO_PROMPT = ("text", "token ids")


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer that has passed its checks.

    Args:
        row: The prompt with the answer, as sft has a row.
        is_good: What its label says.
    """

    row: Row
    is_good: bool


@dataclass(frozen=True)
class UnpairedFormat:
    """The format of a source of labelled answers, which all of its records have.

    Args:
        form: Of the rows without their label, or of pairs.
        names: Of its columns, roles and fields.
    """

    form: RowFormat | PairFormat
    names: RowNames

    @property
    def name(self) -> str:
        return self.form.name if isinstance(self.form, PairFormat) else f"{self.form.name}, label"

    @classmethod
    def find(cls, record: Record, folder: Path | None, naming: Naming) -> UnpairedFormat:
        """Return the format of a source by its first record.

        Raises:
            DataError: Its rows are neither labelled answers nor pairs.
        """
        where, raw = record[0], as_object(record)
        names = RowNames(naming.columns, naming)
        content = names.row(raw)[0]
        missing = RowNames.missing(raw, naming, (*_LABELS, *ANSWERS))
        if missing is not None:
            raise DataError(f"{where}: {missing}; found {join_names(raw)}")
        if set(ANSWERS) <= set(content) or set(ANSWERS) & set(naming.columns):
            pairs = PairFormat.find(record, folder, naming)
            if "margin" in pairs.figures:
                raise DataError(
                    f"{where}: the pairs have a margin, which answers apart from each other have "
                    "not",
                    hint="objective dpo reads it; rename the column to leave it out",
                )
            return cls(pairs, names)
        if not set(_LABELS) & set(content):
            raise DataError(
                f"{where}: found the columns {join_names(raw)}, and none says whether the answer "
                f"is good; wanted {_WANTED}",
                hint="columns names it, ours to theirs: --columns label=X",
            )
        form = RowFormat.find(record, folder, naming)
        if form.name in _NO_PROMPT:
            raise DataError(
                f"{where}: rows of {form.name} do not say where their prompt ends; wanted {_WANTED}"
            )
        return cls(form, form.names)

    def answers(self, record: Record) -> list[LabelledAnswer]:
        """Return the answer of a record; of a pair both, the good one first.

        Raises:
            DataError: The record cannot be used; names its place and the reason.
        """
        if isinstance(self.form, PairFormat):
            pair = self.form.pair(record)
            if pair.is_same:
                return []
            rejected = _without(pair.rejected, map(self.names.shown, self.form.figures))
            return [LabelledAnswer(pair.chosen, True), LabelledAnswer(rejected, False)]
        where, raw = record[0], as_object(record)
        columns = {self.names.columns.get(name, name): name for name in _LABELS}
        given = {theirs: raw[theirs] for theirs in columns if theirs in raw}
        label = self._label(given, where)
        row = self.form.row((where, {k: v for k, v in raw.items() if k not in given}))
        if row.images:
            raise DataError(f"{where}: labelled answers with images are not trained on")
        if self.form.name != "prompt and completion":
            row = only_last(row)
        shown = [self.names.shown(columns[theirs]) for theirs in given]
        return [LabelledAnswer(replace(row, columns=(*row.columns, *shown)), label)]

    def _label(self, given: Mapping[str, Any], where: str) -> bool:
        """Return the label of a row, by its columns with their names in the data."""
        if not given:
            raise DataError(
                f"{where}: the label is missing; wanted {self.name} as in the first row"
            )
        found = {name: read_truth(value) for name, value in given.items()}
        for name, truth in found.items():
            if truth is None:
                value = given[name]
                shown = repr(value) if isinstance(value, str | int | float) else describe(value)
                raise DataError(
                    f"{where}: {name} is {shown[:40]}; a label is true (a good answer) or false (a "
                    "bad one)",
                    hint="a score becomes a label by a threshold; columns names another column: "
                    "--columns label=X",
                )
        if len(set(found.values())) > 1:
            raise DataError(f"{where}: {' and '.join(found)} contradict each other; keep one")
        return all(found.values())


def _without(row: Row, names: Iterable[str]) -> Row:
    """Return a row of which some columns are not used: a reference's values of a pair."""
    idle = tuple(names)
    columns = tuple(name for name in row.columns if name not in idle)
    return replace(row, columns=columns, unused=(*row.unused, *idle))
