"""A model whose weights are in the files of the processes that trained it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from liger_cli.errors import ConfigError, DataError
from liger_cli.training.checkpoints.sharded_state import missing_names, read_named
from liger_cli.training.checkpoints.shards import SHARDS, has_shards
from liger_cli.training.model.classifiers import without_new_head
from liger_cli.training.model.presets import ModelSource

__all__ = ["check_complete", "check_plain", "has_only_shards", "has_weights", "load_shards"]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")


def has_weights(path: Path) -> bool:
    """Return whether a directory has files of weights that transformers loads."""
    return any(next(path.glob(pattern), None) for pattern in _WEIGHTS)


def has_only_shards(source: ModelSource) -> bool:
    """Return whether the weights of a model are in the shards of a checkpoint alone."""
    path = source.path
    if source.kind != "directory" or path is None:
        return False
    return has_shards(path) and not has_weights(path)


def check_plain(source: ModelSource, options: Mapping[str, Any]) -> None:
    """Check that shards are to be loaded as they are.

    Raises:
        ConfigError: They are to be quantised.
    """
    if "quantization_config" in options:
        raise ConfigError(
            f"{source.path} is a sharded checkpoint, whose weights cannot be quantised",
            hint=f"liger merge {source.path} -o DIR writes a model whose weights can.",
        )


def load_shards(
    source: ModelSource, build: Callable[[], Any], device: torch.device
) -> tuple[Any, list[str]]:
    """Return the model of a sharded checkpoint, each weight read straight into its place.

    With it come the names of weights that the checkpoint does not have: of a new head.

    Args:
        source: One that has only shards.
        build: Returns the model on the device of the context, with any weights.

    Raises:
        DataError: A file cannot be read, or a part of the model is missing.
    """
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        # Before transformers 5.
        from transformers.modeling_utils import no_init_weights
    assert source.path is not None
    with no_init_weights(), device:
        model = build()
    model.tie_weights()
    missing = check_complete(source, model)
    read_named(source.path, model.state_dict(keep_vars=True), alone=True)
    return model.eval(), missing


def check_complete(source: ModelSource, model: Any) -> list[str]:
    """Check that the shards of a checkpoint have all of a model, but for a new head.

    Args:
        source: One that has only shards.
        model: It may be without weights.

    Returns:
        The names of weights that are new.

    Raises:
        DataError: They lack a part of it.
    """
    assert source.path is not None
    missing = missing_names(source.path, model)
    if absent := without_new_head(source, missing):
        raise DataError(f"{source.path / SHARDS} holds no {absent[0]}, which the model has")
    return missing
