"""The result of an evaluation, and its names in eval.jsonl and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from liger_cli.config.objectives import OBJECTIVES, PAIR_MEANS

__all__ = ["EvalResult", "logged_name", "plain_name", "required_names"]

FIGURES = ("loss", "perplexity", "token_accuracy", "entropy", "tokens")
_PAIR_FIGURES = ("loss", "tokens", "pairs")


@dataclass(frozen=True)
class EvalResult:
    """Means over `tokens` tokens with a label, or over `pairs` pairs.

    Attributes:
        perplexity: None of pairs.
        token_accuracy: Share of tokens that have the largest logit.
        entropy: Of the predicted distributions, in nats. Both are None where the model's loss is
            not one cross-entropy of these tokens.
        sets: The same for each evaluation set, where there are several with names.
        pairs: None where the data are no pairs.
        means: Of pairs, by TRL's names, such as rewards/accuracies.
    """

    loss: float
    perplexity: float | None = None
    token_accuracy: float | None = None
    entropy: float | None = None
    tokens: int = 0
    sets: Mapping[str, EvalResult] = field(default_factory=dict)
    pairs: int | None = None
    means: Mapping[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return the numbers of all sets together, by name."""
        names = FIGURES if self.pairs is None else _PAIR_FIGURES
        return {**{name: getattr(self, name) for name in names}, **self.means}

    def by_name(self) -> dict[str, Any]:
        """Return the numbers of all together as loss, those of a set as NAME_loss."""
        named = {
            f"{name}_{key}": value
            for name, part in self.sets.items()
            for key, value in part.figures().items()
        }
        return {**self.figures(), **named}

    @classmethod
    def from_names(cls, values: Mapping[str, Any]) -> EvalResult:
        """Return the result whose by_name these values are; a null is NaN."""
        figures = _PAIR_FIGURES if "pairs" in values else FIGURES
        names = [key.removesuffix("_loss") for key in values if key.endswith("_loss")]
        # A name that only ends like that of a figure is not a set's.
        known = [n for n in names if all(f"{n}_{figure}" in values for figure in figures)]
        sets = {name: cls._from_names(values, f"{name}_") for name in known}
        return replace(cls._from_names(values, ""), sets=sets)

    @classmethod
    def _from_names(cls, values: Mapping[str, Any], prefix: str) -> EvalResult:
        of_pairs = f"{prefix}pairs" in values
        figures = {
            name: values[f"{prefix}{name}"] for name in (_PAIR_FIGURES if of_pairs else FIGURES)
        }
        means = {
            name: math.nan if values[key] is None else values[key]
            for name in PAIR_MEANS
            if (key := f"{prefix}{name}") in values
        }
        absent = ("loss",) if of_pairs else ("loss", "perplexity")
        missing = {name: math.nan for name in absent if figures[name] is None}
        counts = {name: int(figures[name] or 0) for name in figures if name in ("tokens", "pairs")}
        return cls(**figures | missing | counts, means=means)


def required_names(objective: str) -> tuple[str, ...]:
    """Return the names that a line of eval.jsonl has of an objective, beside step."""
    keys = OBJECTIVES[objective]
    names = (*(_PAIR_FIGURES if keys.has_pairs else FIGURES), *keys.metrics)
    return tuple(map(logged_name, dict.fromkeys(names)))


def logged_name(name: str) -> str:
    """Return the name that a line of eval.jsonl has for a number of an evaluation.

    One of pairs is in a group already, as rewards/margins.
    """
    return name if "/" in name else f"eval_{name}"


def plain_name(logged: str) -> str:
    """Return the name whose logged_name this is."""
    return logged if "/" in logged else logged.removeprefix("eval_")
