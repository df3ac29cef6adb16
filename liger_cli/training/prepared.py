"""A run before its weights are loaded: everything that is computed once and read afterwards."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from liger_cli.config import RunConfig
from liger_cli.data.batches import BatchPlan
from liger_cli.training.checkpoints.files import step_of
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory.limits import RunMemory
from liger_cli.training.model.source import ModelSource, resolve_model
from liger_cli.training.objectives.objective import Objective
from liger_cli.training.parallel.engine import Engine, make_engine
from liger_cli.training.parallel.mesh import ParallelPlan
from liger_kernels.transformers.patching.plan import PatchPlan

__all__ = ["PreparedRun"]


@dataclass(frozen=True)
class PreparedRun:
    """A validated run: its model, data, device, length and directory.

    Attributes:
        config: The resolved configuration; its output_dir is run_dir.
        accelerator: An Accelerator with one accumulation step: the loop accumulates itself.
        inputs: The model that was found, without weights, and its data.
        batches: The order of the training data on this process.
        num_steps: Optimizer steps of the whole run.
        run_dir: The directory of logs, checkpoints and report.
        checkpoint: The checkpoint to resume from, if any.
        patch_plan: The ops planned on the model without weights.
        parallel: How the processes share the model.
        host_bytes: What activation_offloading may take of the host.
        measure_only: Whether to write no checkpoint, evaluate nothing and report to no tracker.
        objective: In place of the one of ours that the configuration names: by a loss of a peer.
    """

    config: RunConfig
    accelerator: Any
    inputs: Inputs
    batches: BatchPlan
    num_steps: int
    run_dir: Path
    checkpoint: Path | None
    patch_plan: PatchPlan
    parallel: ParallelPlan = ParallelPlan()
    host_bytes: int | None = None
    measure_only: bool = False
    objective: Objective | None = None

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def source(self) -> ModelSource:
        """The model whose weights are loaded: the checkpoint's where the run is resumed."""
        return resolve_model(str(self.checkpoint)) if self.checkpoint else self.inputs.source

    @property
    def first_step(self) -> int:
        """Steps that the checkpoint has behind it."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def evaluates(self) -> bool:
        return bool(self.inputs.eval) and not self.measure_only

    @property
    def report_file(self) -> Path:
        return self.run_dir / "report.json"

    @functools.cached_property
    def engine(self) -> Engine:
        """How steps run in this layout."""
        return make_engine(self.accelerator, self.parallel)

    @functools.cached_property
    def memory(self) -> RunMemory:
        """The memory of a step. It reads many rows: ask for it only where it is needed."""
        config = self.inputs.attention.applied(self.config)
        found = RunMemory.of(config, self.inputs, self.device)
        return replace(found, plan=self.parallel, host_bytes=self.host_bytes)
