"""The result of an evaluation, and its names in eval.jsonl and reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from liger_cli.config.objectives import OBJECTIVES, PAIR_MEANS

__all__ = ["EvalResult", "logged_name", "plain_name", "required_names"]

FIGURES = ("loss", "perplexity", "token_accuracy", "entropy", "tokens")
# What there is beside means, by what is counted where that is not tokens alone: pairs, answers that
# are in none, or rows with a class.
_COUNTED = {
    "pairs": ("loss", "tokens", "pairs"),
    "answers": ("loss", "tokens", "answers"),
    "rows": ("loss", "rows"),
}
_COUNTS = ("tokens", *_COUNTED)


@dataclass(frozen=True)
class EvalResult:
    """Means over `tokens` tokens with a label, `pairs` pairs, `answers` answers, or `rows` rows.

    Attributes:
        perplexity: None of pairs.
        token_accuracy: Share of tokens that have the largest logit.
        entropy: Of the predicted distributions, in nats. Both are None where the model's loss is
            not one cross-entropy of these tokens.
        sets: The same for each evaluation set, where there are several with names.
        pairs: None where the data are no pairs.
        answers: None where the data are no labelled answers.
        rows: None where the rows have no classes.
        means: Of pairs and answers, by TRL's names, such as rewards/margins; of rows accuracy, f1,
            the mean of those of the classes, and f1/NAME of each.
        confusion: How many rows of each class are said to have each class, (C, C), in the order
            of the f1/NAME; None where there are many classes, or a row has several.
    """

    loss: float
    perplexity: float | None = None
    token_accuracy: float | None = None
    entropy: float | None = None
    tokens: int = 0
    sets: Mapping[str, EvalResult] = field(default_factory=dict)
    pairs: int | None = None
    answers: int | None = None
    rows: int | None = None
    confusion: list[list[int]] | None = None
    means: Mapping[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return the numbers of all sets together, by name."""
        names = _figures([name for name in _COUNTED if getattr(self, name) is not None])
        return {**{name: getattr(self, name) for name in names}, **self.means}

    def by_name(self) -> dict[str, Any]:
        """Return the numbers of all together as loss, those of a set as NAME_loss."""
        return self._named(EvalResult.figures)

    def logged(self) -> dict[str, Any]:
        """Return by_name and the numbers of confusion, a row of a table of numbers."""
        return self._named(lambda part: {**part.figures(), **part._cells()})

    def _named(self, values_of: Callable[[EvalResult], dict[str, Any]]) -> dict[str, Any]:
        named = {
            f"{name}_{key}": value
            for name, part in self.sets.items()
            for key, value in values_of(part).items()
        }
        return {**values_of(self), **named}

    def _cells(self) -> dict[str, int]:
        return {
            f"confusion/{i}/{j}": count
            for i, row in enumerate(self.confusion or ())
            for j, count in enumerate(row)
        }

    @classmethod
    def from_names(cls, values: Mapping[str, Any]) -> EvalResult:
        """Return the result whose logged these values are; a null is NaN."""
        figures = _figures(values)
        names = [key.removesuffix("_loss") for key in values if key.endswith("_loss")]
        # A name that only ends like that of a figure is not a set's.
        known = [n for n in names if all(f"{n}_{figure}" in values for figure in figures)]
        sets = {name: cls._from_names(values, f"{name}_") for name in known}
        return replace(cls._from_names(values, ""), sets=sets)

    @classmethod
    def _from_names(cls, values: Mapping[str, Any], prefix: str) -> EvalResult:
        names = _figures(values, prefix)
        figures = {name: values[f"{prefix}{name}"] for name in names}
        of_classes = [key for key in values if key.startswith(f"{prefix}f1/")]
        means = {
            key.removeprefix(prefix): math.nan if values[key] is None else values[key]
            for key in (*(f"{prefix}{name}" for name in PAIR_MEANS), *of_classes)
            if key in values
        }
        absent = ("loss", "perplexity") if names is FIGURES else ("loss",)
        missing = {name: math.nan for name in absent if figures[name] is None}
        counts = {name: int(figures[name] or 0) for name in figures if name in _COUNTS}
        cells = [int(values[key] or 0) for key in values if key.startswith(f"{prefix}confusion/")]
        size = math.isqrt(len(cells))
        table = [cells[i : i + size] for i in range(0, len(cells), size)] if cells else None
        return cls(**figures | missing | counts, means=means, confusion=table)


def _figures(names: Container[str], prefix: str = "") -> tuple[str, ...]:
    """Return the names of the figures of an evaluation that has these names among others."""
    found = (figures for count, figures in _COUNTED.items() if f"{prefix}{count}" in names)
    return next(found, FIGURES)


def required_names(objective: str) -> tuple[str, ...]:
    """Return the names that a line of eval.jsonl has of an objective, beside step."""
    keys = OBJECTIVES[objective]
    has = {"pairs": keys.has_pairs, "answers": keys.is_unpaired, "rows": keys.has_scores}
    names = (*_figures([name for name in _COUNTED if has[name]]), *keys.metrics)
    return tuple(map(logged_name, dict.fromkeys(names)))


def logged_name(name: str) -> str:
    """Return the name that a line of eval.jsonl has for a number of an evaluation.

    One of pairs is in a group already, as rewards/margins.
    """
    return name if "/" in name else f"eval_{name}"


def plain_name(logged: str) -> str:
    """Return the name whose logged_name this is."""
    return logged if "/" in logged else logged.removeprefix("eval_")
