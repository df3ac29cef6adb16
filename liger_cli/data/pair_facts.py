"""Pairs, and labelled answers, that say the same or the contrary of each other."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from liger_cli.data.pair_formats import DESIRABLE

__all__ = ["PairFacts", "compare_answers", "compare_pairs"]

# Places that are named.
_MAX_SHOWN = 5


@dataclass(frozen=True)
class PairFacts:
    """Repetitions and contradictions in the pairs, or the labelled answers, of a dataset.

    Args:
        repeated: Pairs that were there before, with their prompt.
        contradicting: Pairs of which another prefers the answer that they reject, or answers that
            another row labels otherwise.
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
    # Hashes, since the ids would be in memory twice.
    pairs = (
        (hash(tuple(chosen)), hash(tuple(rejected)))
        for chosen, rejected in _columns(rows, ["chosen_input_ids", "rejected_input_ids"])
    )
    return _compare((pair, pair[::-1]) for pair in pairs)


def compare_answers(rows: Any) -> PairFacts:
    """Return how many labelled answers repeat or contradict another, by their token ids.

    Args:
        rows: Tokenised answers with labels: a datasets.Dataset or a list.
    """
    answers = ((hash(tuple(ids)), good) for ids, good in _columns(rows, ["input_ids", DESIRABLE]))
    return _compare(((ids, good), (ids, 1 - good)) for ids, good in answers)


def _compare(keys: Iterable[tuple[Hashable, Hashable]]) -> PairFacts:
    """Compare keys, each given with the key of the contrary."""
    # The first number of each key.
    first: dict[Hashable, int] = {}
    contraries: list[Hashable] = []
    for number, (key, contrary) in enumerate(keys, 1):
        first.setdefault(key, number)
        contraries.append(contrary)
    opposed = [
        (number, first[contrary])
        for number, contrary in enumerate(contraries, 1)
        if contrary in first
    ]
    places = dict.fromkeys((min(two), max(two)) for two in opposed)
    return PairFacts(len(contraries) - len(first), len(opposed), tuple(places)[:_MAX_SHOWN])


def _columns(rows: Any, names: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns, row by row."""
    if not hasattr(rows, "select_columns"):
        yield from (tuple(row[name] for name in names) for row in rows)
        return
    for batch in rows.select_columns(names).with_format("arrow").iter(1000):
        yield from zip(*(batch[name].to_pylist() for name in names), strict=True)
