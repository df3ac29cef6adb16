"""A preview of a dataset: rendered rows, lengths, cuts and packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, takewhile
from typing import Any

import numpy as np

from liger_cli.config import RunConfig
from liger_cli.data.class_formats import TARGETS
from liger_cli.data.encode import IGNORED, WEIGHTS
from liger_cli.data.packing import Strategy, answer_lengths, answers_of, row_lengths
from liger_cli.data.padding import packed_share, padding_share
from liger_cli.data.pair_facts import compare_answers, compare_pairs
from liger_cli.data.pair_formats import ANSWERS, DESIRABLE, FIGURES
from liger_cli.data.stream import Stream
from liger_cli.errors import ConfigError
from liger_cli.report.data import Bar, DataPreview, Fill, Piece, RowPreview, TokenPreview
from liger_cli.training.inputs import load_inputs
from liger_cli.training.model.classifiers import MULTI_LABEL
from liger_cli.training.model.template_facts import template_facts
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["preview_data"]

_BARS = 10


def preview_data(
    config: RunConfig, num_rows: int, *, index: int | None = None, with_ids: bool = False
) -> DataPreview:
    """Read and tokenize the data of a run as the run would, without loading weights.

    Args:
        config: Of the run; its packing is shown and not applied.
        num_rows: Rows to render, the first.
        index: The number of a row, from 1 on, to render in place of the first.
        with_ids: List the tokens of these rows.

    Raises:
        LigerError: The model or the data cannot be loaded, or there is no such row.
    """
    alone = {"packing": False, "eval_fraction": 0.0, "eval_dataset": None, "eval_steps": 0}
    inputs = load_inputs(config.model_copy(update=alone))
    examples = inputs.data.examples
    is_stream = isinstance(examples, Stream)
    if is_stream:
        first = takewhile(lambda row: _is_first_block(row.after), examples.rows(examples.start()))
        examples = [row.row for row in first]
    lengths = _lengths(examples)
    answers = lengths.reshape(-1)
    if index is not None and index > len(examples):
        raise ConfigError(f"--index {index}: there are {len(examples)} rows to train on")
    numbers = range(min(num_rows, len(examples))) if index is None else [index - 1]
    tokenizer = inputs.preprocessing.tokenizer
    return DataPreview(
        name=inputs.data.name,
        licence=inputs.data.licence,
        max_length=config.max_length,
        is_part=is_stream,
        stats=inputs.data.stats,
        lengths=_summary(answers),
        histogram=_histogram(answers),
        fill=_fill(config, lengths),
        template=template_facts(
            tokenizer,
            inputs.source,
            config.chat_template,
            config.enable_thinking,
        ),
        rows=tuple(
            replace(row, labels=_labels(examples[i], inputs.meta_model))
            for i in numbers
            for row in _render(examples[i], tokenizer, with_ids=with_ids)
        ),
        first_row=index or 1,
        pairs=compare_pairs(examples) if config.trains_pairs else None,
        labelled=compare_answers(examples) if config.trains_unpaired else None,
    )


def _is_first_block(place: Any) -> bool:
    return place.epoch == place.block == 0


def _lengths(examples: Any) -> np.ndarray[Any, Any]:
    if hasattr(examples, "select_columns"):
        return row_lengths(examples)
    lengths = np.asarray([answer_lengths(examples[i]) for i in range(len(examples))])
    return lengths if lengths.shape[1] > 1 else lengths[:, 0]


def _render(row: Mapping[str, Any], tokenizer: Any, *, with_ids: bool) -> list[RowPreview]:
    """Return a row as it is read; of a pair both answers."""
    answers = answers_of(row)
    if len(answers) == 1:
        label = {"label": bool(row[DESIRABLE])} if DESIRABLE in row else None
        return [replace(_render_one(row, tokenizer, with_ids=with_ids), figures=label)]
    figures = {name: row[name] for name in FIGURES if name in row}
    return [
        replace(
            _render_one(answer, tokenizer, with_ids=with_ids), answer=name, figures=figures or None
        )
        for name, answer in zip(ANSWERS, answers, strict=True)
    ]


def _render_one(row: Mapping[str, Any], tokenizer: Any, *, with_ids: bool) -> RowPreview:
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    pieces = []
    for is_trained, tokens in groupby(pairs, lambda pair: pair[1] != IGNORED):
        ids = [token for token, _ in tokens]
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        pieces.append(Piece(text, is_trained))
    listed = [TokenPreview(token, _piece(token, tokenizer), label) for token, label in pairs]
    num_trained = sum(label != IGNORED for _, label in pairs)
    weights = row.get(WEIGHTS)
    return RowPreview(
        len(pairs),
        num_trained,
        tuple(pieces),
        tuple(listed) if with_ids else None,
        weights=None if weights is None else tuple(weights),
    )


def _labels(row: Mapping[str, Any], model: Any) -> tuple[str, ...] | None:
    """Return the names of the classes of a row; None of one without."""
    if TARGETS not in row:
        return None
    config = inner_model(model).config
    target = row[TARGETS]
    if config.problem_type == MULTI_LABEL:
        return tuple(config.id2label[i] for i, has in enumerate(target) if has)
    return (config.id2label[int(target[0])],)


def _piece(token: int, tokenizer: Any) -> str:
    """Return a token as the vocabulary has it, which decoding may not show alone."""
    return "" if tokenizer is None else str(tokenizer.convert_ids_to_tokens(token))


def _summary(lengths: np.ndarray[Any, Any]) -> dict[str, float]:
    return {
        "min": float(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": round(float(lengths.mean()), 1),
        "p95": float(np.percentile(lengths, 95)),
        "max": float(lengths.max()),
    }


def _histogram(lengths: np.ndarray[Any, Any]) -> tuple[Bar, ...]:
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // _BARS)
    starts = range(low, high + 1, width)
    counts = np.bincount((lengths - low) // width, minlength=len(starts))
    return tuple(
        Bar(start, min(start + width - 1, high), int(count))
        for start, count in zip(starts, counts, strict=True)
    )


def _fill(config: RunConfig, lengths: np.ndarray[Any, Any]) -> tuple[Fill, ...]:
    padded = padding_share(lengths, config.per_device_train_batch_size, config.order_seed)
    found = [Fill("unpacked", len(lengths), 1 - padded)]
    strategies: Sequence[Strategy] = ("bfd", "sequential")
    for strategy in strategies:
        rows, padded = packed_share(lengths, config.max_length, strategy)
        found.append(Fill(strategy, rows, 1 - padded))
    return tuple(found)
