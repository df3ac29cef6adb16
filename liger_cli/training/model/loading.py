"""A model with its weights, as a run wants it: its adapter on, patched and compiled."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.model.adapters import (
    adapts,
    attach_adapter,
    base_place,
    new_adapter,
    quantization,
)
from liger_cli.training.model.dtypes import parameter_dtype
from liger_cli.training.model.source import ModelSource, load_model
from liger_kernels.ops.backend import backend
from liger_kernels.transformers.api import apply_liger_kernel
from liger_kernels.transformers.patching.engine import PatchRecord
from liger_kernels.transformers.patching.plan import PatchPlan
from liger_kernels.transformers.replacements.tiles import TILED_OPS, tile_modules
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["check_tiles", "layers_of", "load_patched", "tile_layers"]

# Checks whose kernels are in Triton's cache take less.
_NOTICE_AFTER_S = 2.0


def load_patched(
    config: RunConfig,
    source: ModelSource,
    device: torch.device,
    notify: Callable[[str], None],
    *,
    trains: bool = True,
    keep_base: Path | None = None,
    load: Callable[..., Any] | None = None,
) -> tuple[Any, PatchRecord]:
    """Load the model on a device, attach its adapter, patch it and compile it.

    Args:
        source: The model, or a checkpoint of it.
        notify: Called with notices, such as weights that are missing.
        trains: False puts no new adapter on.
        keep_base: Where the base model of an adapter is saved that is nowhere else.
        load: A function of load_model's arguments that loads in its place.
    """
    model: Any = (load or load_model)(
        source,
        dtype=parameter_dtype(config, device, adapts=adapts(config, source, trains=trains)),
        device=device,
        seed=config.seed,
        attn_implementation=config.attn_implementation,
        quantization_config=quantization(config, source, device),
        trains_adapter=True,
        notify=notify,
    )
    if trains and config.adapter != "none" and source.adapter is None:
        base = base_place(source, model, keep_base)
        settings = new_adapter(config, model, source.tokens)
        model = attach_adapter(model, settings, base=base, seed=config.seed, notify=notify)
    with warnings.catch_warnings(record=True) as caught, _notice(device, notify):
        warnings.simplefilter("always", UserWarning)
        record = apply_liger_kernel(model, config.ops, save_memory=config.save_memory)
        tile_layers(model, config)
    for warning in caught:
        notify(str(warning.message))
    for failure in record.plan.failures:
        notify(f"{failure.op} runs as it was, its check fails here: {failure.reason}")
    if trains:
        _compile(model, config, notify)
    return model, record


def tile_layers(model: nn.Module, config: RunConfig) -> None:
    """Let MLPs and experts of a patched model run over pieces of tokens where tile_tokens says so.

    Raises:
        ConfigError: It has none that is patched.
    """
    if config.tile_size is not None and not tile_modules(model, config.tile_size):
        raise _no_tiles(model)


def check_tiles(config: RunConfig, plan: PatchPlan, model: nn.Module) -> None:
    """Refuse tile_tokens before weights are loaded, as tile_layers would after it.

    Args:
        config: The run.
        plan: Of the model's patches.
        model: Without weights.

    Raises:
        ConfigError: No gated MLP and no experts are patched.
    """
    if config.tile_size is None:
        return
    if not any(plan.coverage[op]["patched"] for op in TILED_OPS & plan.coverage.keys()):
        raise _no_tiles(model)


def _no_tiles(model: nn.Module) -> ConfigError:
    return ConfigError(
        f"tile_tokens: {type(inner_model(model)).__name__} has no patched gated MLP or experts",
        hint="Set tile_tokens to none; `liger inspect` shows what is patched, and why not.",
    )


def _compile(model: nn.Module, config: RunConfig, notify: Callable[[str], None]) -> None:
    if config.torch_compile is not True:
        if config.use_regional_compilation and config.torch_compile is False:
            notify("use_regional_compilation does nothing without torch_compile")
        return
    by_layers = config.use_regional_compilation
    if by_layers is None:
        by_layers = not config.gradient_checkpointing
    parts = layers_of(model) if by_layers else []
    if by_layers and not parts:
        notify("use_regional_compilation: no list of layers found, the model is compiled as one")
    form = f"{len(parts)} layers, one by one" if parts else "the model as one graph"
    notify(f"torch_compile: {form}; the first step, and each new shape of a batch, takes long")
    for part in parts or [model]:
        part.compile()


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a model: the modules of its outermost module lists."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in layers_of(child)]


@contextlib.contextmanager
def _notice(device: torch.device, notify: Callable[[str], None]) -> Iterator[None]:
    """Say what a run waits for while its ops are checked, if it takes long."""
    text = "checking the ops of the model on this device ..."
    if backend(device) == "triton":
        text = "compiling kernels, which the next run finds in Triton's cache ..."
    timer = threading.Timer(_NOTICE_AFTER_S, notify, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
