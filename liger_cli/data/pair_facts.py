"""Pairs that say the same or the contrary of each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["PairFacts", "compare_pairs"]

_COLUMNS = ["chosen_input_ids", "rejected_input_ids"]
# Places that are named.
_MAX_SHOWN = 5


@dataclass(frozen=True)
class PairFacts:
    """Repetitions and contradictions in the pairs of a dataset.

    Args:
        repeated: Pairs that were there before, with their prompt.
        contradicting: Pairs of which another prefers the answer that they reject.
        places: The numbers, from 1 on, of some that contradict each other.
    """

    repeated: int
    contradicting: int
    places: tuple[tuple[int, int], ...] = ()


def compare_pairs(rows: Any) -> PairFacts:
    """Return how many pairs repeat or contradict another, by their token ids.

    Args:
        rows: Tokenised pairs: a datasets.Dataset or a list.
    """
    # The first number of each pair; hashes, since the ids would be in memory twice.
    first: dict[tuple[int, int], int] = {}
    numbers: list[tuple[int, int]] = []
    for chosen, rejected in _answers(rows):
        numbers.append((hash(chosen), hash(rejected)))
        first.setdefault(numbers[-1], len(numbers))
    opposed = [
        (number, first[key[::-1]]) for number, key in enumerate(numbers, 1) if key[::-1] in first
    ]
    places = dict.fromkeys((min(pair), max(pair)) for pair in opposed)
    return PairFacts(len(numbers) - len(first), len(opposed), tuple(places)[:_MAX_SHOWN])


def _answers(rows: Any) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    if not hasattr(rows, "select_columns"):
        yield from ((tuple(row[_COLUMNS[0]]), tuple(row[_COLUMNS[1]])) for row in rows)
        return
    for batch in rows.select_columns(_COLUMNS).with_format("arrow").iter(1000):
        chosen, rejected = (batch[name].to_pylist() for name in _COLUMNS)
        yield from zip(map(tuple, chosen), map(tuple, rejected), strict=True)
