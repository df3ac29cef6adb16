"""The model that an objective needs: one of the next token, or one that scores a whole text."""

from __future__ import annotations

from collections import Counter

from liger_cli.config import RunConfig
from liger_cli.config.pairs import read_numbers
from liger_cli.data.class_formats import Classes
from liger_cli.data.class_maker import scan_classes
from liger_cli.data.collate import Collator
from liger_cli.errors import ConfigError
from liger_cli.training.model.classifiers import (
    MULTI_LABEL,
    SINGLE_LABEL,
    label_names_of,
    with_labels,
)
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.model.tokenizers import Preprocessing

__all__ = ["assumed_scores", "with_scores"]


def with_scores(
    config: RunConfig, source: ModelSource, preprocessing: Preprocessing, *, trains: bool
) -> tuple[ModelSource, Classes | None]:
    """Return the source of the model that the objective of a run needs, and its classes.

    A language model gets a new head, of one score for reward, of one for each class for classify.
    The classes of a model that has them already are its own; else those of the training data.

    Raises:
        ConfigError: The model has another head, or one that is not trained yet is evaluated.
        DataError: The labels of the data are no classes.
    """
    _check_head(config, source)
    if not config.has_scores:
        return source, None
    if not (source.is_classifier or trains):
        raise ConfigError(
            f"{config.model} is a language model: there is no head to evaluate by objective "
            f"{config.objective}",
            hint=f"liger train --objective {config.objective} trains one",
        )
    classes = _classes_of(config, source) if config.classifies else None
    if source.is_classifier:
        return source, classes
    pad = Collator.for_tokenizer(preprocessing.tokenizer).pad_token_id
    if classes is None:
        return with_labels(source, ("LABEL_0",), pad_token_id=pad), None
    problem = MULTI_LABEL if classes.is_multi else SINGLE_LABEL
    return with_labels(source, classes.names, problem_type=problem, pad_token_id=pad), classes


def assumed_scores(config: RunConfig, source: ModelSource) -> ModelSource:
    """Return the source of the model that an objective needs, where no data are read.

    Of as many classes as the keys say, else of two. Its padding is token 0 where it has none.

    Raises:
        ConfigError: The model has another head.
    """
    _check_head(config, source)
    if not config.has_scores or source.is_classifier:
        return source
    num = _assumed_number(config) if config.classifies else 1
    return with_labels(source, [f"LABEL_{i}" for i in range(num)], pad_token_id=0)


def _assumed_number(config: RunConfig) -> int:
    known = config.class_names or read_numbers(config.class_weights)
    return len(known) or config.num_labels or 2


def _check_head(config: RunConfig, source: ModelSource) -> None:
    """Check that a model that has scores has those of the objective.

    Raises:
        ConfigError: With the objective that fits.
    """
    if not source.is_classifier:
        return
    names = label_names_of(source)
    if not config.has_scores:
        raise ConfigError(
            f"{config.model} is a model of sequence classification, whose head gives scores of a "
            f"text and no next token, which objective {config.objective} learns",
            hint=f"--objective {'reward' if len(names) == 1 else 'classify'}",
        )
    if config.classifies:
        _check_classes(config, source, names)
    elif len(names) != 1:
        raise ConfigError(
            f"{config.model} is a classifier of {len(names)} labels, and a reward is one score",
            hint="--objective classify, or a language model, which gets a new head",
        )


def _check_classes(config: RunConfig, source: ModelSource, names: list[str]) -> None:
    if len(names) == 1:
        raise ConfigError(
            f"{config.model} is a model of one score, which is no class",
            hint="--objective reward",
        )
    problem = (source.config or {}).get("problem_type")
    if problem not in (None, SINGLE_LABEL, MULTI_LABEL):
        raise ConfigError(
            f"{config.model} has the problem_type {problem!r}; classes are learned by "
            f"{SINGLE_LABEL} or {MULTI_LABEL}",
            hint="start from the language model, which gets a new head",
        )
    [(most, count)] = Counter(names).most_common(1)
    if count > 1:
        raise ConfigError(f"{config.model} has {count} classes of the name {most!r} (id2label)")
    if config.num_labels not in (None, len(names)):
        raise ConfigError(
            f"num_labels is {config.num_labels}, and {config.model} has {len(names)}",
            hint="leave num_labels out, or start from the language model",
        )
    if config.class_names and config.class_names != names:
        raise ConfigError(
            f"label_names are {config.label_names}, and {config.model} has {', '.join(names)}",
            hint="leave label_names out, or start from the language model",
        )


def _classes_of(config: RunConfig, source: ModelSource) -> Classes:
    """Return the classes of a run: those of its model, or of its training data."""
    if not source.is_classifier:
        return scan_classes(config.datasets, "train", config.num_labels, config.class_names)
    names = tuple(label_names_of(source))
    return Classes(names, (source.config or {}).get("problem_type") == MULTI_LABEL)
