"""Keys of the objective classify that do not go together."""

from __future__ import annotations

import functools
from collections.abc import Callable

from liger_cli.config.keys import Keys
from liger_cli.config.pairs import read_numbers, split_names

__all__ = ["CLASS_CONFLICTS"]

_OF_TOKENS = ("completion_only_loss", "assistant_only_loss", "train_on")


def _num_known(config: Keys) -> int | None:
    """Return how many classes the keys say there are."""
    return len(split_names(config.label_names)) or config.num_labels


def _has_other_weights(config: Keys) -> bool:
    known = _num_known(config)
    given = len(read_numbers(config.class_weights))
    return config.class_weights is not None and known is not None and given != known


CLASS_CONFLICTS: tuple[tuple[tuple[str, ...], str, Callable[[Keys], bool]], ...] = (
    (
        ("num_labels", "label_names"),
        "num_labels is the number of label_names; leave it out",
        lambda c: (
            bool(c.label_names and c.num_labels) and len(split_names(c.label_names)) != c.num_labels
        ),
    ),
    (
        ("label_names",),
        "label_names are two names at least, each of them once",
        lambda c: (
            c.label_names is not None
            and len(set(split_names(c.label_names))) < max(2, len(split_names(c.label_names)))
        ),
    ),
    (
        ("class_weights", "label_names"),
        "class_weights has a weight for each class",
        _has_other_weights,
    ),
    (
        ("class_weights",),
        "class_weights are not all 0, which leaves no loss to learn from",
        lambda c: c.class_weights is not None and not any(read_numbers(c.class_weights)),
    ),
    (
        ("streaming", "objective"),
        "objective classify counts the rows of each class before the first step, which a stream "
        "does not allow; leave streaming out",
        lambda c: c.objective == "classify" and c.streaming,
    ),
    *(
        (
            (key, "objective"),
            f"objective classify learns the class of the whole text; leave {key} out",
            functools.partial(
                lambda key, c: c.objective == "classify" and getattr(c, key) is not None, key
            ),
        )
        for key in _OF_TOKENS
    ),
)
