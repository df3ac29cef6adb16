"""What would be patched in a model, found from its configuration alone."""

from __future__ import annotations

from typing import Any

import torch

from liger_cli.environment import environment
from liger_cli.report import RunReport
from liger_cli.training.model import ModelSource, build_meta_model
from liger_kernels.ops.launch import backend
from liger_kernels.transformers.api import inspect_model
from liger_kernels.transformers.plan import PatchPlan

__all__ = ["describe_model", "inspect_source"]


def inspect_source(source: ModelSource, ops: str) -> RunReport:
    """Returns coverage and one row a module; the backend is the one a run here would use.

    Raises:
        ConfigError: The configuration builds no model.
        ValueError: ops is not as resolve_ops wants it.
    """
    model = build_meta_model(source)
    plan = inspect_model(model, ops)
    here = backend(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return RunReport(
        command="inspect",
        model=describe_model(source, model, plan),
        config={"model": source.name, "ops": ops},
        environment=environment(),
        coverage=plan.coverage,
        modules=[
            {**row, "backend": here} if row["status"] == "patched" else row for row in plan.modules
        ],
        missing=list(plan.missing),
    )


def describe_model(source: ModelSource, model: Any, plan: PatchPlan) -> dict[str, Any]:
    """Returns the `model` part of a report."""
    return {
        "name": source.name,
        "kind": source.kind,
        "model_type": plan.model_type,
        "source": plan.source,
        "class": type(model).__name__,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
