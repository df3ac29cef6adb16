"""An adapter, or a whole model, as files that peft and transformers load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from liger_cli.training.model.adapters import is_adapted
from liger_cli.training.model.classifiers import is_classifier
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["save_weights", "stage_adapter"]

_WEIGHTS = "adapter_model.safetensors"


def save_weights(model: Any, directory: Path, state: dict[str, Any]) -> None:
    """Write the model, of an adapted one the adapter alone.

    Args:
        state: The values to write, under the names of its state_dict.
    """
    # An embedding is saved where it is trained; else peft would ask the hub for its size.
    options = {"save_embedding_layers": False} if is_adapted(model) else {}
    model.save_pretrained(directory, state_dict=state, **options)
    if is_adapted(model):
        _save_labels(model, directory)


def stage_adapter(model: Any, state: dict[str, Any]) -> Callable[[Path], None]:
    """Return the function that writes the adapter alone, as peft does, while the model trains on.

    peft asks modules for their state as it writes, and those of a sharded model, when asked, give
    up the weights that they have gathered. Here they are asked before.

    Args:
        state: The values to write, under the names of the model's state_dict.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    names: dict[int, str] = {}
    # safetensors takes no matrix under two names.
    tensors: dict[str, torch.Tensor] = {
        name: value.contiguous() if names.setdefault(id(value), name) == name else value.clone()
        for name, value in own.items()
    }
    settings = copy.copy(model.peft_config["default"])
    settings.inference_mode = True

    def write(directory: Path) -> None:
        save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
        settings.save_pretrained(directory)
        model.create_or_update_model_card(directory)
        _save_labels(model, directory)

    return write


def _save_labels(model: Any, directory: Path) -> None:
    """Write the configuration of a classifier beside its adapter."""
    if is_classifier(model):
        # The names of its classes are nowhere else.
        inner_model(model).config.save_pretrained(directory)
