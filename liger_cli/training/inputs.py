"""A model that was found but not loaded, and its data, from a configuration.

The checks that take least time come first, so that a typo does not cost the loading of a model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from liger_cli.config import RunConfig
from liger_cli.config.datasets import read_datasets
from liger_cli.data.cache import Counts
from liger_cli.data.class_batches import ClassCollator
from liger_cli.data.class_formats import Classes, describe_classes
from liger_cli.data.collate import Collator
from liger_cli.data.examples import Examples, RowOptions, join_licences, load_examples
from liger_cli.data.feed import identity
from liger_cli.data.packing import PackedRows, refuse_packing
from liger_cli.data.padding import Lengths, padding_share, sampled_lengths
from liger_cli.data.pair_batches import PairCollator
from liger_cli.data.samples import SAMPLE_NAME
from liger_cli.data.sources import SYNTHETIC_NAME, Split
from liger_cli.data.stream import open_stream
from liger_cli.data.unpaired_batches import (
    MismatchedRows,
    UnpairedCollator,
    mismatch,
    one_prompt,
)
from liger_cli.errors import ConfigError, DataError, LigerError
from liger_cli.training.attention import (
    AttentionPlan,
    Rows,
    check_implementation,
    plan_attention,
)
from liger_cli.training.model.adapters import attach_adapter, is_adapted, new_adapter
from liger_cli.training.model.dtypes import compute_dtype
from liger_cli.training.model.extended import load_preprocessing
from liger_cli.training.model.source import ModelSource, build_meta_model, resolve_model
from liger_cli.training.model.tokenizers import Preprocessing
from liger_cli.training.scores import with_scores

__all__ = ["Inputs", "load_inputs"]

# Answers of the sample's own split that end a run unasked: some seconds on a CPU. A pair has two,
# and a labelled one has a mismatched one beside it.
_UNASKED_EVAL_ANSWERS = 32
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Inputs:
    """A model that was found but not loaded, and its data.

    Attributes:
        meta_model: The model without weights, its adapter around it.
        data: As they were read, before a part was kept for evaluation.
        train: Rows to train on, or a Stream; None where only evaluation was asked for.
        eval: Rows to evaluate on by the name of their set, which is "" of one alone.
        attention: The layout of batches, and what computes their attention.
        lengths: Tokens of the first rows as they were before packing; None where unknown.
    """

    source: ModelSource
    meta_model: Any
    preprocessing: Preprocessing
    collator: Collator | PairCollator | UnpairedCollator | ClassCollator
    data: Examples
    train: Any
    eval: dict[str, Any]
    attention: AttentionPlan
    lengths: Lengths | None = None

    @functools.cached_property
    def train_identity(self) -> dict[str, Any]:
        """Values that differ where the training data do; it reads all of them."""
        return identity(self.train)

    @property
    def identities(self) -> dict[str, Any]:
        """The same by the use of the data: training, evaluation, and the sets of it."""
        sets = {f"evaluation {name}".strip(): identity(rows) for name, rows in self.eval.items()}
        return sets if self.train is None else {"training": self.train_identity, **sets}

    @property
    def num_eval_rows(self) -> int:
        """Rows of the evaluation data before packing."""
        return sum(
            rows.num_documents if isinstance(rows, PackedRows) else len(rows)
            for rows in self.eval.values()
        )


def load_inputs(
    config: RunConfig,
    *,
    source: ModelSource | None = None,
    device: torch.device = _CPU,
    trains: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Inputs:
    """Find the model and reads the data; loads no weights.

    Args:
        source: The model, where it was found before.
        device: Where the run computes.
        trains: False reads the evaluation data alone: eval_dataset, or a part or split of dataset.
        notify: Gets a line about a damaged or unusable cache of the data.

    Raises:
        LigerError: The model or the data cannot be had.
    """
    source = source or resolve_model(config.model)
    preprocessing, source = load_preprocessing(config, source, trains=trains, notify=notify)
    source, classes = with_scores(config, source, preprocessing, trains=trains)
    meta_model = _meta_model(config, source, trains=trains)
    dtype = compute_dtype(config, device, adapts=is_adapted(meta_model))
    check_implementation(config, meta_model, device, dtype, trains=trains)
    longest = config.max_length * config.answers_per_row
    if config.packing:
        refuse_packing(meta_model, longest)
    options = _row_options(config, meta_model, classes)
    reader = _Reader(config, preprocessing, options, notify)
    data, train_rows, eval_rows = _read(reader) if trains else _read_evaluation(reader)
    if classes is not None and trains:
        data = replace(data, notes=(*data.notes, describe_classes(data.examples, classes)))
    limit = config.max_eval_samples
    eval_rows = {name: _at_most(limit, rows) for name, rows in eval_rows.items()}
    lengths = sampled_lengths(train_rows if trains else next(iter(eval_rows.values())))
    if config.takes_kl:
        eval_rows = {name: _mismatched(config, rows, name) for name, rows in eval_rows.items()}
        if trains and not config.streaming:
            train_rows = _mismatched(config, train_rows)
    if config.packing:
        refuse_packing(meta_model, longest, has_images=data.has_images)
    if config.packing and not trains:
        eval_rows = {name: _packed(config, rows) for name, rows in eval_rows.items()}
    elif config.packing and not config.streaming:
        train_rows = _packed(config, train_rows)
    rows = Rows(config.packing, data.has_images, _padding(config, lengths, trains=trains))
    attention = plan_attention(config, meta_model, rows, device, dtype)
    collator = Collator.for_tokenizer(preprocessing.tokenizer, **attention.layout)
    return Inputs(
        source=source,
        meta_model=meta_model,
        preprocessing=preprocessing,
        collator=_collator(config, collator, options),
        data=data,
        train=train_rows,
        eval=eval_rows,
        attention=attention,
        lengths=lengths,
    )


def _row_options(config: RunConfig, meta_model: Any, classes: Classes | None) -> RowOptions:
    return RowOptions(
        max_length=config.max_length,
        vocab_size=meta_model.config.get_text_config().vocab_size,
        completion_only=config.trains_completions_only,
        assistant_only=config.trains_answers_only,
        last_only=config.train_on == "last",
        enable_thinking=config.enable_thinking,
        reasoning=config.reasoning,
        as_stream=config.text_mode == "stream",
        pairs=config.trains_pairs,
        unpaired=config.trains_unpaired,
        distills=config.objective == "distill",
        classes=classes,
    )


def _collator(
    config: RunConfig, rows: Collator, options: RowOptions
) -> Collator | PairCollator | UnpairedCollator | ClassCollator:
    if options.pairs:
        return PairCollator(rows)
    if options.unpaired:
        return UnpairedCollator(rows, config.takes_kl)
    return rows if options.classes is None else ClassCollator(rows)


def _mismatched(config: RunConfig, rows: Any, eval_set: str | None = None) -> MismatchedRows:
    """Return labelled answers with mismatched ones."""
    found = mismatch(rows, config.max_length)
    if found is None:
        what = "the training data" if eval_set is None else f"evaluation {eval_set}".strip()
        raise one_prompt(what, rows)
    return found


def _packed(config: RunConfig, rows: Any) -> PackedRows:
    return PackedRows.of(rows, config.max_length, config.packing_strategy)


def _padding(config: RunConfig, lengths: Lengths | None, *, trains: bool) -> float | None:
    """Return the share of padding in the batches of rows that are padded; None where unknown."""
    if lengths is None:
        return None
    if trains:
        return padding_share(lengths, config.per_device_train_batch_size, config.order_seed)
    return padding_share(lengths, config.per_device_eval_batch_size, seed=None)


def _meta_model(config: RunConfig, source: ModelSource, *, trains: bool) -> Any:
    """Return the model without weights, with a new adapter where the run trains one."""
    meta_model = build_meta_model(source, trains_adapter=trains)
    if not trains or config.adapter == "none":
        return meta_model
    if source.adapter is not None:
        raise ConfigError(
            f"adapter is {config.adapter}, but {config.model} is an adapter already",
            hint="--adapter none continues to train that one.",
        )
    return attach_adapter(meta_model, new_adapter(config, meta_model, source.tokens), base="")


# What was read, the rows to train on, and the rows of each evaluation set.
_Rows = tuple[Any, Any, dict[str, Any]]


@dataclass(frozen=True)
class _Reader:
    """Reads datasets as a run tokenizes them."""

    config: RunConfig
    preprocessing: Preprocessing
    options: RowOptions
    notify: Callable[[str], None] | None

    def load(
        self,
        split: Split,
        datasets: str | list[dict[str, Any]] | None = None,
        key: str = "dataset",
    ) -> Examples:
        """Read datasets; the key that names them stands before errors.

        Args:
            datasets: Those of an evaluation set; None reads those of `dataset`.
        """
        config = self.config
        with _named(key):
            return load_examples(
                config.datasets if datasets is None else read_datasets(datasets, config.naming),
                self.preprocessing.tokenizer,
                self.options,
                split=split,
                seed=self.config.order_seed,
                processor=self.preprocessing.processor,
                num_proc=self.config.dataset_num_proc,
                notify=self.notify,
            )

    def stream(self) -> Any:
        """Open the training data as a stream."""
        config = self.config
        with _named("dataset"):
            return open_stream(
                config.datasets,
                self.preprocessing.tokenizer,
                self.options,
                buffer_size=config.shuffle_buffer_size,
                seed=config.order_seed,
                packing=config.packing_strategy if config.packing else None,
                mismatches=config.takes_kl,
            )

    def load_sets(self) -> dict[str, Examples]:
        """Read the sets of eval_dataset, by name."""
        return {
            name: self.load("eval", datasets, f"eval_dataset {name}".rstrip())
            for name, datasets in self.config.eval_sets.items()
        }


def _read(reader: _Reader) -> _Rows:
    """Read the data of a training run."""
    config = reader.config
    if config.eval_fraction:
        data = reader.load("train")
        train_rows, held_out = _split(data, config)
        eval_rows = {"": held_out}
    else:
        data = reader.stream() if config.streaming else reader.load("train")
        train_rows = data.examples
        eval_rows = _eval_rows(reader)
    return data, train_rows, {} if config.eval_strategy == "no" else eval_rows


def _read_evaluation(reader: _Reader) -> _Rows:
    """Read the data of a run that only evaluates."""
    config = reader.config
    if config.eval_fraction:
        data = reader.load("train")
        train_rows, held_out = _split(data, config)
        return data, train_rows, {"": held_out}
    loaded = reader.load_sets() or {"": reader.load("eval")}
    return _together(loaded), None, {name: part.examples for name, part in loaded.items()}


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Prefix errors with the key whose data they are about."""
    try:
        yield
    except LigerError as error:
        raise type(error)(f"{key}: {error.message}", hint=error.hint) from error


def _eval_rows(reader: _Reader) -> dict[str, Any]:
    """Return the evaluation rows of a training run that keeps none of its training rows for it."""
    config = reader.config
    if config.eval_sets:
        return {name: part.examples for name, part in reader.load_sets().items()}
    asking = {
        "eval_steps": config.eval_steps > 0,
        "eval_strategy": config.eval_strategy == "epoch",
        "eval_on_start": config.eval_on_start,
    }
    key = next((key for key, asks in asking.items() if asks), None)
    if config.dataset == SAMPLE_NAME or (key and config.dataset == SYNTHETIC_NAME):
        rows = reader.load("eval").examples
        per_row = config.answers_per_row * (1 + config.takes_kl)
        num_unasked = _UNASKED_EVAL_ANSWERS // per_row
        return {"": rows if config.max_eval_samples else _at_most(num_unasked, rows)}
    if key:
        raise ConfigError(f"{key} needs eval_dataset or eval_fraction")
    return {}


def _at_most(limit: int | None, rows: Any) -> Any:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _together(sets: dict[str, Examples]) -> Examples:
    """Return the counts of all evaluation sets together, with the rows of the first."""
    first, *others = sets.values()
    if not others:
        return first
    counts = Counts()
    for part in sets.values():
        counts.add(part.counts)
    licences = [part.licence for part in sets.values() if part.licence]
    name = ",".join(f"{name}={part.name}" for name, part in sets.items())
    return replace(first, counts=counts, name=name, licence=join_licences(licences))


def _split(data: Examples, config: RunConfig) -> tuple[Any, Any]:
    """Return the rows to train on and those kept for evaluation, drawn with the data's seed."""
    examples = data.examples
    if len(examples) > data.stats.rows:
        raise ConfigError(
            "eval_fraction: the weights of dataset repeat rows, so that the same rows would be "
            "trained and evaluated on; set eval_dataset"
        )
    num_eval = math.ceil(config.eval_fraction * len(examples))
    if num_eval == len(examples):
        raise DataError(
            f"eval_fraction {config.eval_fraction} of {len(examples)} rows leaves none to train on"
        )
    generator = torch.Generator().manual_seed(config.order_seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    kept, held_out = sorted(order[num_eval:]), sorted(order[:num_eval])
    return examples.select(kept), examples.select(held_out)
