"""The model of a run without its weights, as the run would have it, and what its step takes."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch

from liger_cli.config import RunConfig
from liger_cli.training.attention import AttentionPlan, Rows, plan_attention
from liger_cli.training.memory.probe_copy import assumed_gpu
from liger_cli.training.memory.step import step_memory
from liger_cli.training.memory.values import Batch, MemoryEstimate
from liger_cli.training.model.adapters import adapts, attach_adapter, new_adapter
from liger_cli.training.model.dtypes import parameter_dtype
from liger_cli.training.model.loading import tile_layers
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.model.source import build_meta_model
from liger_cli.training.parallel.mesh import ParallelPlan
from liger_cli.training.scores import assumed_scores
from liger_kernels.transformers.api import apply_liger_kernel
from liger_kernels.transformers.patching.upstream_fixes import repair_model
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["assumed_attention", "estimate_memory", "meta_model_of"]

_CPU = torch.device("cpu")


def estimate_memory(
    config: RunConfig,
    source: ModelSource,
    batch: Batch,
    *,
    on_gpu: bool = True,
    plan: ParallelPlan | None = None,
    host_bytes: int | None = None,
) -> MemoryEstimate:
    """Return the memory of a training step of a run, from the model's configuration alone.

    Args:
        config: The run; its rows do not count.
        source: Its model.
        batch: A micro-batch.
        on_gpu: Whether it runs on a GPU that has bfloat16, or on a CPU.
        plan: How ranks share the model; one process by default. The bytes are those of a rank.
        host_bytes: That activation_offloading may take of the host; None: what it needs.

    Raises:
        ValueError: The forward of this model cannot run without data.
        LigerError: The model cannot be built, or the adapter not be put on it.
    """
    model = meta_model_of(config, assumed_scores(config, source), on_gpu=on_gpu)
    return step_memory(config, model, batch, on_gpu=on_gpu, plan=plan, host_bytes=host_bytes)


def assumed_attention(
    config: RunConfig, source: ModelSource, *, is_padded: bool, on_gpu: bool
) -> AttentionPlan:
    """Return the attention that a run has on a data center GPU, or on a CPU, whatever is here."""
    dtype = _dtype(config, is_adapted=adapts(config, source), on_gpu=on_gpu)
    if config.bf16 or config.fp16:
        dtype = torch.bfloat16 if config.bf16 else torch.float16
    rows = Rows(config.packing, padding=float(is_padded))
    with assumed_gpu() if on_gpu else contextlib.nullcontext():
        return plan_attention(config, build_meta_model(source), rows, _CPU, dtype)


def meta_model_of(config: RunConfig, source: ModelSource, *, on_gpu: bool = True) -> Any:
    """Return a run's model without weights: in its dtype, with its adapter and its patches."""
    is_adapted = adapts(config, source)
    model: Any = build_meta_model(
        source,
        dtype=_dtype(config, is_adapted=is_adapted, on_gpu=on_gpu),
        attn_implementation=config.attn_implementation,
        trains_adapter=True,
    )
    repair_model(inner_model(model))
    if config.adapter != "none" and source.adapter is None:
        model = attach_adapter(model, new_adapter(config, model, source.tokens), base="")
    with warnings.catch_warnings():
        # Those of the run itself say the same.
        warnings.simplefilter("ignore", UserWarning)
        apply_liger_kernel(model, config.ops, save_memory=config.save_memory)
    tile_layers(model, config)
    return model


def _dtype(config: RunConfig, *, is_adapted: bool, on_gpu: bool) -> torch.dtype:
    has_autocast = config.bf16 or config.fp16
    if on_gpu and config.dtype == "auto" and (is_adapted or not has_autocast):
        return torch.float16 if config.fp16 else torch.bfloat16
    return parameter_dtype(config, _CPU, adapts=is_adapted)
