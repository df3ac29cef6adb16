"""A model for other programs: an adapter put into its base model, or shards put together.

The sum of a weight and its change is made in float32 and rounded once to the dtype of the weight.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from liger_cli.common.numbers import format_count
from liger_cli.common.readers import read_json
from liger_cli.errors import ConfigError
from liger_cli.training.checkpoints.files import write_failure, written_aside
from liger_cli.training.checkpoints.run_lock import locked
from liger_cli.training.checkpoints.shards import has_shards
from liger_cli.training.model.adapter_names import bare_name
from liger_cli.training.model.dtypes import stored_dtype
from liger_cli.training.model.run_models import check_in_run
from liger_cli.training.model.source import ModelSource, load_model, resolve_model
from liger_cli.training.model.tokenizers import Preprocessing
from liger_cli.training.parallel.checkpoint import consolidate

__all__ = ["Merged", "Whole", "find_checkpoint", "merge"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """A merged model and what it is made of.

    Attributes:
        num_merged: Modules with an adapter; those that were trained whole are not counted.
        rounding: Length of what rounding to dtype takes, over that of the adapter's change.
    """

    adapter: str
    base: str
    output: str
    dtype: str
    num_parameters: int
    num_merged: int
    rounding: float

    @property
    def lines(self) -> tuple[str, ...]:
        return (
            f"{self.adapter}: {self.num_merged} modules merged into {self.base}",
            f"{self.output}: {format_count(self.num_parameters)} parameters in {self.dtype}",
        )


@dataclass(frozen=True)
class Whole:
    """A model that was put together from the files of several processes.

    Attributes:
        dtype: Of most parameters.
        rounding: 0: no adapter is changed.
    """

    checkpoint: str
    output: str
    dtype: str
    num_parameters: int
    num_files: int
    rounding: float = 0.0

    @property
    def lines(self) -> tuple[str, ...]:
        size = f"{format_count(self.num_parameters)} parameters in {self.dtype}"
        return f"{self.checkpoint}: put together", f"{self.output}: {size}"


def find_checkpoint(checkpoint: Path, notify: Callable[[str], None]) -> ModelSource:
    """Return the source of a checkpoint, or of the best or last one of a run.

    Raises:
        ConfigError: It is not a directory, or holds no model.
    """
    check_in_run(checkpoint)
    if not checkpoint.is_dir():
        raise ConfigError(
            f"{checkpoint} is not a directory",
            hint="An adapter of the hub: hf download ID --local-dir DIR.",
        )
    # From the current directory, so that no preset and no hub id is meant.
    return resolve_model(os.path.join(".", checkpoint), notify)


def merge(
    source: ModelSource,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> Merged | Whole:
    """Write a model that needs no peft and no shards: safetensors, configuration and tokenizer.

    Args:
        source: An adapter or a sharded checkpoint, as resolve_model found it.
        output: A new or empty directory.
        dtype: Of the result; that of the files of the base model or checkpoint by default.
        chat_template: A file or a name, in place of the checkpoint's own.
        notify: Called with notices on the base model.

    Raises:
        ConfigError: The source is neither, or the directory is taken or in use.
        DataError: A file of the checkpoint cannot be read.
        EnvironmentProblem: The directory cannot be written.
    """
    is_sharded = source.path is not None and has_shards(source.path)
    if source.adapter is None and not is_sharded:
        raise ConfigError(
            f"{source.name} is not an adapter but a whole model: there is nothing to merge",
            hint="It is used as it is: liger generate --model, liger eval --model.",
        )
    if source.adapter is not None and "quantization_config" in (source.config or {}):
        raise ConfigError(
            f"the base model of {source.name} is quantized: a merge would round the adapter away",
            hint=f"write a model that is not as base_model_name_or_path in {source.adapter}",
        )
    preprocessing = Preprocessing.of(source, chat_template)
    place = output.resolve()
    # Two merges into one directory would write aside under one name.
    with locked(place.with_name(f".{place.name}.lock"), f"output {output}", notify or _log.warning):
        _check_free(output)
        if source.adapter is None:
            return _put_together(output, source, preprocessing, dtype)
        return _merge_into(output, source, preprocessing, dtype, notify)


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"output {output} exists and is not an empty directory",
            hint="Take another --output, or delete it.",
        )


def _put_together(
    output: Path, source: ModelSource, preprocessing: Preprocessing, dtype: torch.dtype | None
) -> Whole:
    assert source.path is not None
    try:
        with written_aside(output.resolve()) as directory:
            found = consolidate(source.path, directory, dtype=dtype)
            _copy_configuration(source.path, directory, found.dtype)
            preprocessing.save_pretrained(directory)
    except Exception as error:
        raise write_failure(error, output) from error
    return Whole(
        checkpoint=str(source.path),
        output=str(output),
        dtype=found.dtype,
        num_parameters=found.num_parameters,
        num_files=sum(name.endswith(".safetensors") for name in found.files),
    )


def _copy_configuration(checkpoint: Path, directory: Path, dtype: str) -> None:
    values = {**read_json(checkpoint / "config.json"), "dtype": dtype}
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    if (generation := checkpoint / "generation_config.json").is_file():
        shutil.copyfile(generation, directory / generation.name)


def _merge_into(
    output: Path,
    source: ModelSource,
    preprocessing: Preprocessing,
    dtype: torch.dtype | None,
    notify: Callable[[str], None] | None,
) -> Merged:
    assert source.adapter is not None
    base = replace(source, adapter=None)
    adapted: Any = load_model(source, dtype=dtype or stored_dtype(base), notify=notify)
    dtypes = {bare_name(name): p.dtype for name, p in adapted.named_parameters()}
    num_merged, rounding = _merge(adapted)
    _merge_tokens(adapted)
    merged = adapted.unload()
    for name, parameter in merged.named_parameters():
        # Modules that were trained whole are float32 whatever the base model is.
        parameter.data = parameter.data.to(dtypes.get(name, merged.dtype))
    _settle_tie(merged)
    try:
        # The current directory has no name to write aside under until it is resolved.
        with written_aside(output.resolve()) as directory:
            merged.save_pretrained(directory)
            preprocessing.save_pretrained(directory)
    except Exception as error:
        raise write_failure(error, output) from error
    return Merged(
        adapter=str(source.adapter),
        base=str(base.path or base.name),
        output=str(output),
        dtype=str(merged.dtype).removeprefix("torch."),
        num_parameters=merged.num_parameters(),
        num_merged=num_merged,
        rounding=rounding,
    )


@torch.no_grad()
def _merge(adapted: Any) -> tuple[int, float]:
    """Put every adapter into the weight beside it.

    Returns:
        How many there were, and the share of their change that rounding takes: weights that were
        on the grid of their dtype stay where they are under a change that is small enough.
    """
    layers = [module for module in adapted.modules() if hasattr(module, "get_delta_weight")]
    users = Counter(id(weight) for _, weight in adapted.named_parameters(remove_duplicate=False))
    change = rounding = 0.0
    for layer in layers:
        base = layer.get_base_layer()
        # An adapter of a parameter is around the module that has it.
        name = getattr(layer, "parameter_name", "weight")
        weight = getattr(base, name)
        dtype = weight.dtype
        if users[id(weight)] > 1:
            # Head and embedding are one matrix, and the adapter is of one of them.
            setattr(base, name, torch.nn.Parameter(weight.clone(), requires_grad=False))
        # One layer at a time: a whole model in float32 may not fit.
        base.float()
        before = getattr(base, name).clone()
        layer.merge()
        exact = getattr(base, name).clone()
        base.to(dtype)
        change += float((exact - before).square().sum())
        rounding += float((exact - getattr(base, name).float()).square().sum())
    return len(layers), (rounding / change) ** 0.5 if change else 0.0


def _merge_tokens(adapted: Any) -> None:
    """Put the trained rows of new tokens into the embeddings."""
    for module in adapted.modules():
        tokens = module._modules.get("token_adapter")
        # Of a head that is tied to the embedding the rows are the embedding's.
        if tokens is not None and tokens.tied_adapter is None:
            tokens.merge()


def _settle_tie(model: Any) -> None:
    """Make head and embedding one matrix if they still are equal, else mark them as untied."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is table.weight:
        return
    parts = {id(part): part for part in (model.config, model.config.get_text_config())}.values()
    if not any(getattr(part, "tie_word_embeddings", False) for part in parts):
        return
    if torch.equal(head.weight, table.weight):
        head.weight = table.weight
        return
    for part in parts:
        part.tie_word_embeddings = False
