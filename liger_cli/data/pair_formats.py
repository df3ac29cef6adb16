"""Rows of preferences: two answers to one prompt, each read as a row that sft would train on.

A pair becomes two rows of prompt and completion, or of instruction and output, so all that holds
for those holds for both answers: names of columns, roles and fields, tools, system messages.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from liger_cli.config.datasets import Naming
from liger_cli.data.formats import find_format
from liger_cli.data.layouts import layout_hint
from liger_cli.data.messages import read_messages
from liger_cli.data.names import RowNames, delimiter_advice, join_names
from liger_cli.data.rows import Record, Row, as_object, make_row, only_last, with_names
from liger_cli.data.values import describe
from liger_cli.errors import DataError

__all__ = ["ANSWERS", "ANSWER_FIGURES", "DESIRABLE", "FIGURES", "Pair", "PairFormat"]

ANSWERS = ("chosen", "rejected")
# Numbers of a pair, which objectives read.
FIGURES = ("margin", "ref_chosen_logps", "ref_rejected_logps")
# Of an answer in no pair, 1 where it is labelled good and 0 where it is bad.
DESIRABLE = "desirable"
# Numbers of pairs, and of answers in no pair.
ANSWER_FIGURES = (*FIGURES, DESIRABLE, "ref_logps")

_LARGEST = 1e300
# They say of one answer whether it is good, and nothing of two.
_IDLE = ("label", "kto_tag")

# What the prompt is in, by the columns that make it; the first that fits the first row is it.
_PROMPTS = ("prompt", "instruction", "conversations", "messages")
# Other names of the question, which make a conversation of it.
_QUESTIONS = ("question", "input")
_WANTED = (
    "chosen and rejected, and perhaps the prompt: prompt (text or messages), instruction (and "
    "input, system, history), conversations or messages"
)
# A dialog as one text, as in hh-rlhf: an answer begins behind it.
_SPEAKER = re.compile(r"\n\nAssistant:")


@dataclass(frozen=True)
class Pair:
    """A preference that has passed its checks.

    Args:
        chosen: The prompt with the better answer, as sft has a row.
        rejected: The prompt with the other answer.
        figures: Those of FIGURES that its source has.
    """

    chosen: Row
    rejected: Row
    figures: tuple[float, ...] = ()

    @property
    def rows(self) -> tuple[Row, Row]:
        return self.chosen, self.rejected

    @property
    def is_same(self) -> bool:
        """Whether there is nothing to prefer."""
        chosen, rejected = self.rows
        return (chosen.parts, chosen.messages) == (rejected.parts, rejected.messages)


@dataclass(frozen=True)
class PairFormat:
    """The format of a source of pairs, which all of its records have.

    Args:
        prompt: The column of the prompt; empty where it is the shared beginning of both answers.
        first: Where the record stands that decided it.
        folder: Where relative paths start.
        names: Of its columns, roles and fields.
        figures: Those of FIGURES that it has.
    """

    prompt: str
    first: str
    folder: Path | None
    names: RowNames
    figures: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.prompt}, chosen and rejected" if self.prompt else "chosen and rejected"

    @classmethod
    def find(cls, record: Record, folder: Path | None, naming: Naming) -> PairFormat:
        """Return the format of a source by its first record.

        Raises:
            DataError: It has no chosen or no rejected answer; names the columns found and wanted.
        """
        where, raw = record[0], as_object(record)
        names = RowNames(naming.columns, naming)
        content = names.row(raw)[0]
        missing = RowNames.missing(raw, naming, (*_PROMPTS, *ANSWERS, *FIGURES))
        if missing is not None:
            raise DataError(f"{where}: {missing}; found {join_names(raw)}")
        if not set(ANSWERS) <= set(content):
            raise DataError(
                f"{where}: found the columns {join_names(raw)}; pairs are wanted: {_WANTED}",
                hint=_advice(content),
            )
        if hint := layout_hint(content, ANSWERS):
            raise DataError(f"{where}: chosen and rejected are of several pairs", hint=hint)
        mapped = [name for name in _PROMPTS if name in naming.columns]
        prompt = next((name for name in (*mapped, *_PROMPTS) if name in content), "")
        question = next((name for name in _QUESTIONS if name in content), None)
        if not prompt and question and question not in naming.columns:
            names = RowNames({**naming.columns, "instruction": question}, naming)
            prompt = "instruction"
        if prompt in ("conversations", "messages") and isinstance(content["chosen"], list):
            turns = read_messages(content["chosen"], "chosen", where, names).messages
            # Beside whole conversations it is another copy of one of them.
            prompt = prompt if turns[0]["role"] == "assistant" else ""
        given = tuple(name for name in FIGURES if content.get(name) not in (None, ""))
        if len({"ref_chosen_logps", "ref_rejected_logps"} & set(given)) == 1:
            raise DataError(
                f"{where}: {given[-1]} is there without the other; the reference has a "
                "log-probability of both answers: ref_chosen_logps and ref_rejected_logps"
            )
        return cls(prompt, where, folder, names, given)

    def pair(self, record: Record) -> Pair:
        """Return the pair of a record.

        Raises:
            DataError: The record cannot be used; names its place and the reason.
        """
        where, raw = record[0], as_object(record)
        content, hidden = self.names.row(raw)
        for name in (self.prompt, *ANSWERS) if self.prompt else ANSWERS:
            if content.get(name) is None:
                column = self.names.columns.get(name, name)
                raise DataError(
                    f"{where}: the column {column} is {'null' if column in raw else 'missing'}; "
                    f"found {join_names(raw)}, wanted {self.name} as in {self.first}"
                )
        figures = tuple(self._figure(content.get(name), name, where) for name in self.figures)
        if late := [
            name for name in FIGURES if name not in self.figures and content.get(name) is not None
        ]:
            raise DataError(
                f"{where}: {late[0]} is there, and the data start without it ({self.first}); all "
                "pairs of a source have it, or none"
            )
        try:
            chosen, rejected = self._rows(content, where)
        except DataError as error:
            raise with_names(error, self.names) from error
        idle = [self.names.shown(name) for name in self._idle(content)]
        return Pair(replace(chosen, unused=(*chosen.unused, *idle, *hidden)), rejected, figures)

    @property
    def _output(self) -> str:
        """The column that an answer has in a row of sft."""
        return "output" if self.prompt == "instruction" else "completion"

    def _idle(self, content: Mapping[str, Any]) -> list[str]:
        """Return the columns that have a value and no meaning beside two answers."""
        names = {self._output, *_IDLE, *(() if self.prompt == "prompt" else ("prompt",))}
        return [name for name in content if name in names and content[name] not in (None, "", [])]

    def _figure(self, value: Any, name: str, where: str) -> float:
        figure: Any = value
        if isinstance(value, str):
            # A table such as CSV has numbers as text.
            with contextlib.suppress(ValueError):
                figure = float(value)
        is_number = isinstance(figure, int | float) and not isinstance(figure, bool)
        # A whole number may be too large for a float, and NaN is not below anything.
        if not is_number or not abs(figure) < _LARGEST:
            shown = value if isinstance(value, float) else describe(value)
            raise DataError(f"{where}: {name} must be a finite number, found {shown}")
        if name != "margin" and figure > 0:
            raise DataError(
                f"{where}: {name} is {value}; the logarithm of a probability is 0 at most",
                hint="it is the sum over the tokens of the answer, without a sign changed",
            )
        return float(figure)

    def _rows(self, content: Mapping[str, Any], where: str) -> tuple[Row, Row]:
        apart = {*ANSWERS, *FIGURES, *self._idle(content)}
        rest = {key: value for key, value in content.items() if key not in apart}
        if self.prompt == "instruction":
            chosen, rejected = (
                self._row(answer, {**rest, "output": content[answer]}, where) for answer in ANSWERS
            )
            return only_last(chosen), only_last(rejected)
        prompt, *answers = self._split(rest.pop(self.prompt, None), content, where)
        chosen, rejected = (
            self._row(name, {**rest, "prompt": prompt, "completion": answer}, where)
            for name, answer in zip(ANSWERS, answers, strict=True)
        )
        return chosen, rejected

    def _row(self, answer: str, content: Mapping[str, Any], where: str) -> Row:
        """Return the row of one answer, whose columns are shown as the data name them."""
        ours = self.names.columns
        output = self._output
        theirs = {output: ours.get(answer, answer)}
        if output == "completion":
            theirs["prompt"] = ours.get(self.prompt, self.prompt) or theirs[output]
        names = RowNames({**ours, **theirs}, self.names.naming)
        row = make_row(_FORMS[output], content, where, self.folder, names)
        if row.images:
            raise DataError(f"{row.where}: pairs with images are not trained on")
        used = {"prompt": self.prompt, output: answer}
        shown = {names.shown(name): self.names.shown(used[name]) for name in used if used[name]}
        columns = tuple(shown.get(name, name) for name in row.columns)
        if not self.prompt:
            columns = tuple(name for name in columns if name != names.shown("prompt"))
        figures = map(self.names.shown, self.figures if answer == ANSWERS[-1] else ())
        seen = tuple(self.names.shown(name) for name in ours if name in (*used.values(), *content))
        return replace(row, columns=(*columns, *figures), seen=seen)

    def _split(self, given: Any, content: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
        """Return the prompt and both answers: texts, or lists of turns where one is a list.

        Raises:
            DataError: The answers have no prompt, or another one than the column of it says.
        """
        answers = [content[name] for name in ANSWERS]
        if all(value is None or isinstance(value, str) for value in (given, *answers)):
            return _split_texts(given, *answers)
        turns = [self._turns(value, "assistant") for value in answers]
        read = [
            read_messages(part, name, where, self.names).messages
            for part, name in zip(turns, ANSWERS, strict=True)
        ]
        if given is not None and all(part[0]["role"] == "assistant" for part in read):
            return self._turns(given, "user"), turns[0], turns[1]
        num_prompt = _num_shared(*read)
        if not num_prompt:
            raise DataError(
                f"{where}: chosen and rejected share no turn before an answer of the assistant; a "
                "pair is two answers to one prompt"
            )
        if given is not None:
            num_prompt = self._check_prompt(given, read[0][:num_prompt], where)
        return turns[0][:num_prompt], turns[0][num_prompt:], turns[1][num_prompt:]

    def _check_prompt(self, given: Any, shared: Sequence[Mapping[str, Any]], where: str) -> int:
        """Return how many of the shared turns the column of the prompt has.

        Raises:
            DataError: It has other turns; or its text is none of theirs.
        """
        if isinstance(given, str):
            if any(given.strip() == str(turn["content"]).strip() for turn in shared):
                return len(shared)
        else:
            turns = read_messages(self._turns(given, "user"), "prompt", where, self.names).messages
            if turns == tuple(shared[: len(turns)]):
                return len(turns)
        raise DataError(
            f"{where}: prompt is not the beginning that chosen and rejected share",
            hint="where both answers are whole conversations, leave the column prompt out",
        )

    def _turns(self, value: Any, role: str) -> list[Any]:
        """Return messages; a text is what one says, and one message is a list of it."""
        if isinstance(value, str):
            wanted = self.names.wanted
            return [{wanted("role"): role, wanted("content"): value}]
        return value if isinstance(value, list) else [value]


_Turn = Mapping[str, Any]
_FORMS = {"completion": "prompt and completion", "output": "instruction and output"}


def _num_shared(chosen: Sequence[_Turn], rejected: Sequence[_Turn]) -> int:
    """Return the longest shared beginning that an answer follows in both; 0 for none."""
    both = list(zip(chosen, rejected, strict=False))
    num_shared = sum(1 for _ in takewhile(lambda two: two[0] == two[1], both))
    return next(
        (
            number
            for number in range(min(num_shared, len(both) - 1), 0, -1)
            if all(turn["role"] == "assistant" for turn in both[number])
        ),
        0,
    )


def _split_texts(prompt: str | None, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return the text of the prompt and of both answers; no word is cut."""
    if prompt is not None:
        return prompt, chosen, rejected
    shared = os.path.commonprefix([chosen, rejected])
    if marks := list(_SPEAKER.finditer(shared)):
        place = marks[-1].end()
    else:
        place = max((match.start() for match in re.finditer(r"(?<=\S)\s", shared)), default=0)
    return shared[:place], chosen[place:], rejected[place:]


def _advice(content: Mapping[str, Any]) -> str | None:
    """Return how to train on columns that make no pair."""
    there = [name for name in ANSWERS if name in content]
    if there:
        other = next(name for name in ANSWERS if name not in there)
        return f"columns names it, ours to theirs: --columns {other}=X"
    if advice := delimiter_advice(list(content)):
        return advice
    if {"label", "kto_tag"} & set(content):
        return "--objective kto learns from answers with a label"
    if form := find_format(content):
        return f"--objective sft trains on rows of {form}"
    return layout_hint(content) or (
        "columns names them, ours to theirs: --columns prompt=X,chosen=Y,rejected=Z"
    )
