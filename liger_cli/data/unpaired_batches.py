"""Batches of labelled answers, each with a mismatched one: another row's answer to its prompt.

Which answer stands behind which prompt is a function of the rows alone. So a step has the same
mismatched answers whatever its micro-batches, processes and packing, and a reference can score them
once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from liger_cli.data.batches import placeholder
from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED
from liger_cli.data.packing import MISMATCHED, mismatched_of
from liger_cli.data.pair_batches import collate_answers
from liger_cli.errors import DataError

__all__ = ["MismatchedRows", "UnpairedCollator", "mismatch", "one_prompt", "partners"]


def partners(prompts: Sequence[Hashable]) -> np.ndarray[Any, Any] | None:
    """Return for each row the number of another one, whose prompt is different.

    Rows are ordered by their prompt, in the order in which prompts come first, and turned by the
    size of the largest group: so each answer is taken once, unless more than half of the rows have
    one prompt. Then these take the answers of the others in turn.

    Args:
        prompts: Of each row.

    Returns:
        (N,) int64; None where all rows have one prompt.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        groups[prompt].append(number)
    if len(groups) < 2:
        return None
    order = np.array([number for group in groups.values() for number in group])
    largest = max(groups.values(), key=len)
    found = np.empty(len(order), dtype=np.int64)
    found[order] = np.roll(order, -len(largest))
    if 2 * len(largest) > len(order):
        others = np.setdiff1d(order, largest)
        found[largest] = np.resize(others, len(largest))
    return found


def _ids_and_labels(rows: Any) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    if not hasattr(rows, "select_columns"):
        yield from ((row["input_ids"], row["labels"]) for row in rows)
        return
    names = ["input_ids", "labels"]
    for batch in rows.select_columns(names).with_format("arrow").iter(1000):
        yield from zip(*(batch[name].to_pylist() for name in names), strict=True)


@dataclass(frozen=True)
class MismatchedRows:
    """Labelled answers by number, each with a mismatched one, in columns with a prefix.

    Args:
        rows: A datasets.Dataset, or a list.
        others: (N,) the rows whose answers they are.
        sizes: (N, 2) tokens of each row, and of its prompt.
        max_length: Mismatched answers, with their prompt, are cut to so many tokens.
    """

    rows: Any
    others: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    max_length: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        other = int(self.others[number])
        own, theirs = self.sizes[[number, other], 1]
        row, source = self.rows[number], self.rows[other]
        parts = {
            f"{MISMATCHED}{name}": [*row[name][:own], *source[name][theirs:]][: self.max_length]
            for name in ("input_ids", "labels")
        }
        return {**row, **parts}

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """The tokens of each row, with its own answer or the mismatched one if that is longer."""
        tokens, prompts = self.sizes.T
        mismatched = prompts + (tokens - prompts)[self.others]
        return np.maximum(tokens, np.minimum(mismatched, self.max_length))


def mismatch(rows: Any, max_length: int) -> MismatchedRows | None:
    """Return rows with mismatched answers; None where all have one prompt."""
    prompts: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    for ids, labels in _ids_and_labels(rows):
        size = next(place for place, label in enumerate(labels) if label != IGNORED)
        prompts.append(np.asarray(ids[:size]).tobytes())
        sizes.append((len(ids), size))
    others = partners(prompts)
    return None if others is None else MismatchedRows(rows, others, np.array(sizes), max_length)


def one_prompt(what: str, rows: Any) -> DataError:
    """Return the error about rows that all have one prompt."""
    return DataError(
        f"{what}: all {len(rows)} answers are to one prompt, and loss kto takes its KL over "
        "answers to other prompts",
        hint="--loss-type apo_zero_unpaired needs no KL",
    )


@dataclass(frozen=True)
class UnpairedCollator:
    """Make a batch of labelled answers.

    Beside the keys of collate_answers it has, where a KL is taken, kl: such a batch of their
    mismatched answers.

    Args:
        answers: Makes the batch of tokens.
        has_kl: Whether a KL is taken.
    """

    answers: Collator
    has_kl: bool

    @property
    def flatten(self) -> bool:
        return self.answers.flatten

    def with_layout(self, **layout: bool) -> UnpairedCollator:
        """Return a collator that lays answers out otherwise."""
        return UnpairedCollator(self.answers.with_layout(**layout), self.has_kl)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        own = [{k: v for k, v in row.items() if not k.startswith(MISMATCHED)} for row in rows]
        batch = collate_answers(self.answers, [_numbered(row) for row in own])
        if self.has_kl:
            # A process without any takes part in the forward passes of the others.
            found = [other for row in rows if (other := mismatched_of(row))]
            others = found or [placeholder(own[0])]
            batch["kl"] = collate_answers(self.answers, [_numbered(row) for row in others])
        return batch


def _numbered(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with the number of the answer of each token; one in place of none has none."""
    if "answer_ids" in row or "num_tokens" in row:
        return row
    return {**row, "answer_ids": [0] * len(row["input_ids"])}
