"""The result of an evaluation, and its names in eval.jsonl and reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from liger_cli.config.objectives import OBJECTIVES, PAIR_MEANS

__all__ = ["EvalResult", "logged_name", "plain_name", "required_names"]

FIGURES = ("loss", "perplexity", "token_accuracy", "entropy", "tokens")
_PAIR_FIGURES = ("loss", "tokens", "pairs")
_CLASS_FIGURES = ("loss", "rows")
_COUNTS = ("tokens", "pairs", "rows")


@dataclass(frozen=True)
class EvalResult:
    """Means over `tokens` tokens with a label, over `pairs` pairs, or over `rows` with a class.

    Attributes:
        perplexity: None of pairs.
        token_accuracy: Share of tokens that have the largest logit.
        entropy: Of the predicted distributions, in nats. Both are None where the model's loss is
            not one cross-entropy of these tokens.
        sets: The same for each evaluation set, where there are several with names.
        pairs: None where the data are no pairs.
        rows: None where the rows have no classes.
        means: Of pairs, by TRL's names, such as rewards/accuracies; of rows accuracy, f1, the mean
            of those of the classes, and f1/NAME of each.
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
    rows: int | None = None
    confusion: list[list[int]] | None = None
    means: Mapping[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return the numbers of all sets together, by name."""
        names: tuple[str, ...] = FIGURES if self.pairs is None else _PAIR_FIGURES
        names = names if self.rows is None else _CLASS_FIGURES
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
        figures = _figures_of(values, "")
        names = [key.removesuffix("_loss") for key in values if key.endswith("_loss")]
        # A name that only ends like that of a figure is not a set's.
        known = [n for n in names if all(f"{n}_{figure}" in values for figure in figures)]
        sets = {name: cls._from_names(values, f"{name}_") for name in known}
        return replace(cls._from_names(values, ""), sets=sets)

    @classmethod
    def _from_names(cls, values: Mapping[str, Any], prefix: str) -> EvalResult:
        names = _figures_of(values, prefix)
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


def _figures_of(values: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    """Return the names of the figures of an evaluation whose numbers these are."""
    kinds = {"pairs": _PAIR_FIGURES, "rows": _CLASS_FIGURES}
    return next((names for key, names in kinds.items() if f"{prefix}{key}" in values), FIGURES)


def required_names(objective: str) -> tuple[str, ...]:
    """Return the names that a line of eval.jsonl has of an objective, beside step."""
    keys = OBJECTIVES[objective]
    figures = _CLASS_FIGURES if keys.has_scores else FIGURES
    names = (*(_PAIR_FIGURES if keys.has_pairs else figures), *keys.metrics)
    return tuple(map(logged_name, dict.fromkeys(names)))


def logged_name(name: str) -> str:
    """Return the name that a line of eval.jsonl has for a number of an evaluation.

    One of pairs is in a group already, as rewards/margins.
    """
    return name if "/" in name else f"eval_{name}"


def plain_name(logged: str) -> str:
    """Return the name whose logged_name this is."""
    return logged if "/" in logged else logged.removeprefix("eval_")
