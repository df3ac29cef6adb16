"""Batches with images for any image-text model, made from its configuration and its signature.

No class says how it wants an image, so a batch is made in each of the few ways there are; the one
to use is the first that reaches weights that text alone does not reach.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from tiny_fields import IMAGE_TOKEN, VISION_START
from torch import Tensor
from transformers import PreTrainedModel

_BATCH = 2
# Patches of an image of the models that take patches: a square of this many a side.
_GRID = 4


def image_batches(model: PreTrainedModel, text: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Yield batches of two samples with an image each, in the ways that the model may take them."""
    names = set(inspect.signature(model.forward).parameters)
    for pixels in _pixels(model, names):
        for count in _token_counts(model, pixels):
            yield with_text(model, pixels, text, count)


def _pixels(model: PreTrainedModel, names: set[str]) -> Iterator[dict[str, Any]]:
    vision = _vision_config(model.config)
    size = _first(vision, "image_size", "img_size", default=16)
    patch = _first(vision, "patch_size", default=4)
    frames = _first(vision, "temporal_patch_size", default=1)
    channels = _first(vision, "num_channels", "in_channels", "in_chans", default=3)
    area, num_patches = channels * patch * patch, _BATCH * _GRID * _GRID
    shapes: list[tuple[int, ...]] = []
    if names & {"image_grid_thw", "image_grid_hw"}:
        shapes += [(num_patches, n * area) for n in dict.fromkeys((frames, 1, 2))]
        shapes += [(num_patches, channels, patch, patch)]
    if names & {"image_position_ids", "spatial_shapes"}:
        shapes += [(_BATCH, _GRID * _GRID, area)]
    if "flattened_patches" in names:
        # Each with its row and column.
        shapes += [(_BATCH, _GRID * _GRID, 2 + area)]
    if "target_sizes" in names:
        shapes += [(1, channels, patch, num_patches * patch)]
    if "image_patches" in names:
        shapes += [(_BATCH, _GRID * _GRID, area)]
    shapes += [(_BATCH, channels, size, size), (_BATCH, 1, channels, size, size)]
    shapes += [(_BATCH, 1, 1, channels, size, size), (_BATCH, 2, channels, size, size)]
    generator = torch.Generator().manual_seed(2)
    for shape in shapes:
        pixels = torch.randn(shape, generator=generator)
        given = _named(model, pixels, size)
        given = {name: value for name, value in given.items() if name in names}
        yield given
        if "image_sizes" in given:
            # Which some towers of the same class take and others do not.
            del given["image_sizes"]
            yield given


def _named(model: PreTrainedModel, pixels: Tensor, size: int) -> dict[str, Any]:
    """Return the inputs a processor may add to these pixels, by the name of the argument."""
    pair = torch.tensor([[_GRID, _GRID]] * _BATCH)
    lead = (_BATCH, _GRID * _GRID) if pixels.dim() == 3 else (_BATCH, 1, size, size)
    rows, columns = torch.meshgrid(torch.arange(_GRID), torch.arange(_GRID), indexing="ij")
    places = torch.stack((rows, columns), -1).view(1, -1, 2).expand(_BATCH, -1, -1)
    given: dict[str, Any] = {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, _GRID, _GRID]] * _BATCH),
        "image_grid_hw": pair,
        "image_position_ids": places,
        "spatial_shapes": pair,
        "target_sizes": pair,
        "pixel_attention_mask": torch.ones(lead, dtype=torch.long),
        "image_sizes": torch.tensor([[size, size]] * _BATCH),
        "image_merge_sizes": torch.tensor(
            [_first(model.config, "spatial_merge_size", default=2)] * _BATCH
        ),
        "aspect_ratio_ids": torch.ones(_BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(_BATCH, 1, 1, dtype=torch.long),
        "qformer_input_ids": torch.ones(_BATCH, 3, dtype=torch.long),
        "high_res_pixel_values": torch.randn(
            _BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(3)
        ),
        "num_local_patches": torch.zeros(_BATCH, dtype=torch.long),
    }
    if pixels.dim() == 3:
        flat = pixels.clone()
        flat[..., :2] = places + 1
        given["flattened_patches"] = flat
    return given


def _token_counts(model: PreTrainedModel, pixels: dict[str, Any]) -> list[int]:
    """Return the numbers of tokens an image may have in a sample, the likeliest first."""
    inner = getattr(model, "model", None)
    features: Any = getattr(model, "get_image_features", getattr(inner, "get_image_features", None))
    # A joint embedding has no place for an image in the text; the others are guesses.
    guesses = [0, 1, _GRID, _GRID * _GRID]
    if features is None:
        return guesses
    known = inspect.signature(features).parameters
    has_rest = any(p.kind is p.VAR_KEYWORD for p in known.values())
    given = {name: value for name, value in pixels.items() if has_rest or name in known}
    try:
        with torch.no_grad():
            found = features(**given)
    except Exception:
        return []
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (tuple, list)) else [found]
    total = sum(math.prod(part.shape[:-1]) for part in parts if isinstance(part, Tensor))
    return [total // _BATCH, *guesses]


def with_text(
    model: PreTrainedModel, pixels: dict[str, Any], text: dict[str, Tensor], count: int
) -> dict[str, Any]:
    """Return a batch of text and images, each of which takes `count` of its tokens."""
    names = set(inspect.signature(model.forward).parameters)
    ids, labels = text["input_ids"], text["labels"]
    head = torch.tensor([1, VISION_START] + [IMAGE_TOKEN] * count).expand(_BATCH, -1)
    if count:
        ids = torch.cat((head, ids), dim=1)
        labels = torch.cat((torch.full_like(head, -100), labels), dim=1)
    is_image = (ids == IMAGE_TOKEN).long()
    batch: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "token_type_ids": is_image,
        "mm_token_type_ids": is_image,
        "moe_mm_token_type_ids": is_image,
        "image_embeds_position_mask": is_image,
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
        "bbox": torch.zeros(*ids.shape, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(*ids.shape, 1, 1, dtype=torch.long),
    }
    if "input_ids" not in names:
        # An encoder of images alone: the labels are the decoder's.
        batch = {"labels": labels}
    return {name: value for name, value in batch.items() if name in names} | pixels


def _vision_config(config: Any) -> Any:
    for name in ("vision_config", "vision_tower_config", "visual_config", "vq_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def _first(config: Any, *names: str, default: int) -> int:
    """Return the first of these fields that a configuration has, as one number."""
    for part in (config, getattr(config, "vision_config", None)):
        for name in names:
            value = getattr(part, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    return default
