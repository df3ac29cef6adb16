"""The result of an evaluation, and its names in eval.jsonl and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

__all__ = ["FIGURES", "EvalResult"]


@dataclass(frozen=True)
class EvalResult:
    """Means over `tokens` tokens with a label.

    Attributes:
        token_accuracy: Share of them that have the largest logit.
        entropy: Of the predicted distributions, in nats. Both are None where the model's loss is
            not one cross-entropy of these tokens.
        sets: The same for each evaluation set, where there are several with names.
    """

    loss: float
    perplexity: float
    token_accuracy: float | None
    entropy: float | None
    tokens: int
    sets: Mapping[str, EvalResult] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return the numbers of all sets together, by name."""
        return {name: getattr(self, name) for name in FIGURES}

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
        names = [key.removesuffix("_loss") for key in values if key.endswith("_loss")]
        # A name that only ends like that of a figure is not a set's.
        known = [n for n in names if all(f"{n}_{figure}" in values for figure in FIGURES)]
        sets = {name: cls._from_names(values, f"{name}_") for name in known}
        return replace(cls._from_names(values, ""), sets=sets)

    @classmethod
    def _from_names(cls, values: Mapping[str, Any], prefix: str) -> EvalResult:
        figures = {name: values[f"{prefix}{name}"] for name in FIGURES}
        means = {name: math.nan for name in ("loss", "perplexity") if figures[name] is None}
        return cls(**figures | means | {"tokens": int(figures["tokens"] or 0)})


FIGURES = [entry.name for entry in fields(EvalResult) if entry.name != "sets"]
