"""Memory of a training step before the run, from a model's configuration alone."""

from __future__ import annotations

from liger_cli.training.memory.build import assumed_attention, estimate_memory, meta_model_of
from liger_cli.training.memory.step import step_memory
from liger_cli.training.memory.values import Batch, MemoryEstimate

__all__ = [
    "Batch",
    "MemoryEstimate",
    "assumed_attention",
    "estimate_memory",
    "meta_model_of",
    "step_memory",
]
