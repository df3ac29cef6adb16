"""The layout of a launch that is not there: of so many ranks, before any of them is started."""

from __future__ import annotations

import torch

from liger_cli.config import RunConfig
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.model.source import build_meta_model
from liger_cli.training.parallel.mesh import ParallelPlan, explicit_plan
from liger_cli.training.parallel.refusals import check_model, check_sharded

__all__ = ["assumed_plan", "check_layout"]


def assumed_plan(config: RunConfig, source: ModelSource, num_processes: int) -> ParallelPlan | None:
    """Return the layout that the keys ask for; None where they leave it to the memory of a card.

    Raises:
        LigerError: The keys do not make up the ranks, or ask for what a sharded run cannot do.
    """
    plan = explicit_plan(config, num_processes)
    if plan is not None:
        check_layout(config, source, plan)
    return plan


def check_layout(config: RunConfig, source: ModelSource, plan: ParallelPlan) -> None:
    """Check that a run can have a layout, as far as its data do not matter.

    Raises:
        ConfigError: With the nearest that works.
    """
    if not plan.is_sharded:
        return
    check_sharded(config, source, torch.device("cpu" if config.use_cpu else "cuda"))
    check_model(build_meta_model(source))
