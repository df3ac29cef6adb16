"""A model of a sharded run: patched, and each process with its shards of the weights.

The model is built, adapted, patched and sharded without weights. Then each process reads its rows
of each matrix from the safetensors, or from the shards of a checkpoint; only what transformers
converts as it loads is read whole, one conversion at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from liger_cli.common.hub import fetch_weights
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.checkpoints.sharded_state import read_named
from liger_cli.training.model.adapter_names import bare_name
from liger_cli.training.model.adapters import is_quantised
from liger_cli.training.model.classifiers import missing_line, without_new_head
from liger_cli.training.model.demo_model import converted_model
from liger_cli.training.model.loading import load_patched
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.model.shard_loading import check_complete, has_only_shards
from liger_cli.training.model.source import build_meta_model, load_model
from liger_cli.training.parallel.collectives import local_part
from liger_cli.training.parallel.hollow import is_hollow, load_hollow, replace_parameters
from liger_cli.training.parallel.mesh import Layout
from liger_cli.training.parallel.weights import WeightFiles, Weights, find_files
from liger_cli.training.parallel.wrapping import shard_model
from liger_kernels.transformers.patching.engine import PatchRecord
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["load_sharded"]


def load_sharded(
    layout: Layout,
    source: ModelSource,
    notify: Callable[[str], None],
    *,
    trains: bool = True,
    keep_base: Path | None = None,
) -> tuple[Any, PatchRecord]:
    """Load, patch and shard the model of a run; every process calls it.

    Args:
        layout: A sharded one.
        source: The model, or a checkpoint of it.
        notify: Called with notices, such as weights that are missing.
        trains: False puts no new adapter on.
        keep_base: Where the base model of an adapter is saved that is nowhere else.
    """
    found = _weights_of(layout.config, source, notify, trains=trains)
    if isinstance(found, str):
        notify(f"parallel: every rank loads the whole model before it is sharded: {found}")
    load = load_model if isinstance(found, str) else load_hollow
    model, record = load_patched(
        layout.config,
        source,
        layout.device,
        notify,
        trains=trains,
        keep_base=keep_base,
        load=load,
    )
    if isinstance(found, str):
        shard_model(model, layout)
        return model, record
    replace_parameters(model, lambda p: p.to("meta") if is_hollow(p) else None)
    shard_model(model, layout)
    home = torch.device("cpu") if layout.config.cpu_offload else layout.device
    replace_parameters(model, lambda p: _materialized(p, home))
    found(model)
    return model, record


def _weights_of(
    config: RunConfig, source: ModelSource, notify: Callable[[str], None], *, trains: bool
) -> Callable[[Any], None] | str:
    """Return a function that reads the weights into shards, or why they cannot be read in parts.

    Raises:
        DataError: A sharded checkpoint lacks a part of the model.
    """
    is_new = trains and source.adapter is None and config.adapter != "none"
    if source.kind in ("random", "config"):
        return "its weights are random"
    if source.tokens is not None:
        return "the rows of new tokens are made of all others"
    if is_quantised(config, source):
        return "weights of 4 bits are packed as they load"
    if is_new and config.adapter == "dora":
        return "a new dora adapter starts from the norms of the weights"
    if is_new and config.lora_modules_to_save:
        return "lora_modules_to_save copies weights"
    bare = replace(source, adapter=None)
    # transformers builds the bare model in an instant.
    model = build_meta_model(bare)
    fill: Callable[[Any], None]
    if has_only_shards(bare):
        assert source.path is not None
        missing = check_complete(bare, model)
        fill = functools.partial(_fill_from_shards, source.path)
    else:
        paths = _paths(source)
        if paths is None:
            return "its weights are not in safetensors"
        with (files := WeightFiles(paths)):
            weights = Weights.of(model, files)
        missing = weights.missing
        fill = functools.partial(_fill, files, weights)
    if absent := without_new_head(source, missing):
        return f"{absent[0]} is in none of its files"
    if is_new and source.is_classifier and not missing:
        return "a new adapter copies its head"
    if line := missing_line(source, missing):
        notify(line)
    return fill


def _paths(source: ModelSource) -> list[Path] | None:
    """Return the safetensors of a source; None where it has none."""
    if source.kind == "package":
        return find_files(source, converted_model(source))
    folder = fetch_weights(source.name) if source.path is None else source.path
    return find_files(source, folder)


def _materialized(parameter: Tensor, home: torch.device) -> Tensor | None:
    """Return a shard without values yet in place of one on the meta device."""
    if not (isinstance(parameter, DTensor) and parameter.to_local().is_meta):
        return None
    return DTensor.from_local(
        torch.empty_like(parameter.to_local(), device=home),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _places(model: Any) -> dict[str, Tensor]:
    """Return the shards of a model and its buffers, by the names that they have in files."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {bare_name(name): tensor for name, tensor in named}


def _fill_from_shards(checkpoint: Path, model: Any) -> None:
    """Read the shards of a model, and its saved buffers, from those of a checkpoint."""
    read_named(checkpoint, _places(model))


def _fill(files: WeightFiles, weights: Weights, model: Any) -> None:
    """Read the shards of a model, and its saved buffers, from safetensors.

    Raises:
        ConfigError: A tensor of the files has another shape.
    """
    with files, torch.no_grad():
        _copy(files, weights, model)


def _copy(files: WeightFiles, weights: Weights, model: Any) -> None:
    places = _places(model)
    done: set[int] = set()
    for name, stored in weights.direct.items():
        place = places[name]
        if id(place) in done:
            continue
        done.add(id(place))
        if files.shape(stored) != list(place.shape):
            raise ConfigError(
                f"{stored} is {files.shape(stored)} in the files, and {list(place.shape)} in the "
                "model of its configuration"
            )
        rows = _rows(place)
        local_part(place).copy_(files.read(stored, rows))
    for name, value in weights.converted(inner_model(model), files):
        place = places[name]
        local_part(place).copy_(value[_rows(place)] if place.ndim else value)


def _rows(tensor: Tensor) -> slice:
    """Return the rows of a tensor that this process holds: all of one that is no DTensor."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return slice(offset[0], offset[0] + shape[0])
