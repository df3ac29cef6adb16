"""A model without weights that a run can put an adapter on and patch as if it had them.

Every parameter is one zero, expanded to its shape: it has a device and a dtype and takes no memory.
Buffers, as of rotary embeddings, are computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from liger_cli.training.model.adapters import load_adapter
from liger_cli.training.model.classifiers import draw_head
from liger_cli.training.model.dtypes import check_device, choose_dtype
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.model.source import build_meta_model

__all__ = ["is_hollow", "load_hollow", "replace_parameters"]

_log = logging.getLogger(__name__)


def load_hollow(
    source: ModelSource,
    *,
    dtype: Literal["auto"] | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    seed: int = 0,
    trains_adapter: bool = False,
    notify: Callable[[str], None] | None = None,
    **options: Any,
) -> Any:
    """Return the model that load_model returns (model/source.py), with hollow parameters.

    Those of the source's adapter are whole, and so is the head of a classifier, which is random.

    Args:
        source: A model whose weights are in files.
        dtype: As load_model's arguments, all of them.
    """
    from liger_kernels.transformers.patching.upstream_fixes import repair_model

    device = check_device(device)
    model: Any = build_meta_model(
        replace(source, adapter=None),
        dtype=choose_dtype(dtype, device),
        attn_implementation=options.get("attn_implementation"),
        has_buffers=True,
    )
    if (repair := repair_model(model)) is not None:
        (notify or _log.warning)(f"{source.name}: {repair}")
    replace_parameters(
        model, lambda p: torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)
    )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    if source.is_classifier:
        # Whole: its files may not have it, and a new adapter copies it.
        draw_head(model, seed)
    if source.adapter is not None:
        model = load_adapter(model, source.adapter, trains=trains_adapter)
    return model.eval()


def is_hollow(parameter: Tensor) -> bool:
    """Return whether a parameter is one element, expanded."""
    return parameter.numel() > 1 and not any(parameter.stride())


def replace_parameters(model: nn.Module, make: Callable[[nn.Parameter], Tensor | None]) -> None:
    """Replace parameters of a model by others, one that has several places in all of them.

    Args:
        make: Returns the data of the new parameter, or None to keep the old one.
    """
    # Both: the identity of one that is gone may come again.
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                data = make(old)
                new = old if data is None else nn.Parameter(data, old.requires_grad)
                made[id(old)] = old, new
            module._parameters[name] = made[id(old)][1]
