"""Tiny random models of any model type: the fields of its configuration made small by their names.

A configuration class does not say which of its numbers must fit each other, so a type is built from
the first of a few variations that makes a model which trains.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny_fields import DEPTHS, OWN, SIZES, VARIATIONS
from tiny_images import image_batches, with_text
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from liger_kernels.transformers.patching.upstream_fixes import repair_model

# Model type to class. A type with a vision part is its image-text class; the text configuration
# inside is another type, with another line.
MODEL_CLASSES: dict[str, str] = {
    **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
MAX_PARAMETERS = 60_000_000


def training_inputs() -> dict[str, torch.Tensor]:
    """Return a batch of text: ids and labels, some of them ignored."""
    ids = torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@dataclass(frozen=True)
class TinyModel:
    """A model in training mode and what it was seen to train on."""

    model: PreTrainedModel
    # "text" and "image", one of them at least: each with a finite loss.
    batches: dict[str, dict[str, Any]]


def build(model_type: str) -> TinyModel:
    """Return a tiny model of a type with the batches that it takes.

    Raises:
        Exception: The first variation's, when no variation gives such a model.
    """
    model_class = getattr(transformers, MODEL_CLASSES[model_type])
    sizes = _merge(_fields(CONFIG_MAPPING[model_type]), OWN.get(model_type, {}))
    problem = None
    for without, depth in VARIATIONS:
        try:
            return _build(model_class, CONFIG_MAPPING[model_type], _vary(sizes, without, depth))
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _build(model_class: Any, config_class: Any, fields: dict[str, Any]) -> TinyModel:
    torch.manual_seed(0)
    config = config_class(**fields)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in model_class(config).parameters())
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"{num_parameters / 1e6:.0f} million parameters are not tiny")
    model = model_class(config_class(**fields))
    repair_model(model)
    model.train()
    # Weights wide enough for every part to matter; some types overflow with them.
    _spread(model, 5.0)
    try:
        return TinyModel(model, _batches(model))
    except OverflowError:
        _spread(model, 0.2)
        return TinyModel(model, _batches(model))


def _batches(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Return the batches that a model trains on: text, and images that reach more weights."""
    text = training_inputs()
    batches: dict[str, dict[str, Any]] = {}
    reached: set[str] = set()
    problem = None
    # Some require the type of every token, also where all are text.
    for batch in (text, with_text(model, {}, text, 0)):
        try:
            reached = _reached(model, batch)
            batches["text"] = batch
            break
        except Exception as error:
            problem = problem or error
    for batch in image_batches(model, text) if _takes_images(model) else ():
        try:
            if _reached(model, batch) - reached:
                batches["image"] = batch
                break
        except Exception:
            # Another way of passing an image may be the model's.
            continue
    if problem is not None and not batches:
        raise problem
    return batches


def _takes_images(model: PreTrainedModel) -> bool:
    names = inspect.signature(model.forward).parameters
    return bool({"pixel_values", "flattened_patches"} & set(names))


def _reached(model: PreTrainedModel, batch: dict[str, Any]) -> set[str]:
    """Return the parameters that a training step gives a gradient.

    Raises:
        OverflowError: The loss is not finite.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = model(**batch).loss
    if loss is None:
        raise ValueError("its loss is None")
    if not loss.isfinite():
        raise OverflowError(f"its loss is {loss}")
    loss.backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad(set_to_none=True)
    return names


def _spread(model: torch.nn.Module, scale: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            elif parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))


def _fields(config_class: Any, depth: int = 0) -> dict[str, Any]:
    """Return the small values of the fields that a configuration class and its parts have."""
    names = set(getattr(config_class, "__dataclass_fields__", ()))
    names |= set(inspect.signature(config_class.__init__).parameters)
    # A mapped name is another spelling of a field.
    names -= set(getattr(config_class, "attribute_map", ()))
    default = _default(config_class)
    # A list where most types have a number stays as it is.
    fields = {
        name: value
        for name, value in SIZES.items()
        if name in names and isinstance(_value(default, name), list) <= isinstance(value, list)
    }
    for name, part in _parts(config_class) if depth < 3 else ():
        fields[name] = {**_fields(part, depth + 1), "model_type": part.model_type}
    return fields


def _parts(config_class: Any) -> Iterator[tuple[str, Any]]:
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = config_class.sub_configs[name]
        if not getattr(part, "model_type", ""):
            # Any configuration may stand here; the default one does.
            default = _default(config_class)
            part = type(_value(default, name))
        if getattr(part, "model_type", ""):
            yield name, part


@functools.cache
def _default(config_class: Any) -> Any:
    try:
        return config_class()
    except Exception:
        return None


def _value(config: Any, name: str) -> Any:
    # A field that differs from layer to layer refuses to be read.
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _merge(fields: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in own.items():
        is_part = isinstance(value, dict) and isinstance(fields.get(name), dict)
        merged[name] = _merge(fields[name], value) if is_part else value
    return merged


def _vary(fields: dict[str, Any], without: tuple[str, ...], depth: int) -> dict[str, Any]:
    varied = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            varied[name] = _vary(value, without, depth)
        elif name not in without:
            varied[name] = depth if name in DEPTHS else value
    return varied
