"""The patches of a model, found from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from liger_cli.common.environment import environment
from liger_cli.common.readers import expand_path
from liger_cli.config import RunConfig
from liger_cli.config.yaml_file import read_mapping
from liger_cli.errors import ConfigError
from liger_cli.report import RunReport
from liger_cli.training.checkpoints.files import find_checkpoints
from liger_cli.training.model.adapters import attach_adapter, new_adapter
from liger_cli.training.model.source import ModelSource, build_meta_model, resolve_model
from liger_kernels.ops.backend import backend
from liger_kernels.transformers.api import inspect_model
from liger_kernels.transformers.patching.plan import PatchPlan
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["describe_model", "find_model", "inspect_source"]


def find_model(name: str, notify: Callable[[str], None]) -> ModelSource:
    """Resolve the source of a model; the directory of a run is the model that it trained.

    Args:
        name: As --model takes it, or the directory of a run.
        notify: Called with the checkpoint that a run's directory resolves to.

    Raises:
        ConfigError: As resolve_model.
        EnvironmentProblem: As resolve_model.
    """
    run = expand_path(name, "model")
    config_file = run / "config.yaml"
    if not config_file.is_file() or (run / "config.json").is_file():
        return resolve_model(name)
    # All checkpoints of a run are of one model, and no weights are read: any will do.
    if checkpoints := find_checkpoints(run):
        model = str(checkpoints[-1].absolute())
    else:
        found = read_mapping(config_file).get("model")
        if not isinstance(found, str):
            raise ConfigError(f"{config_file}: model does not name the model of the run")
        model = found
    notify(f"{name} is the directory of a run; its model is {model}")
    return resolve_model(model)


def inspect_source(source: ModelSource, ops: str, adapter: RunConfig | None = None) -> RunReport:
    """Return coverage and one row a module; the backend is the one a run here would use.

    Args:
        source: The model.
        ops: As resolve_ops takes them.
        adapter: The keys of a new adapter to put on it; none by default.

    Raises:
        ConfigError: The configuration builds no model, or it cannot have the adapter.
        EnvironmentProblem: peft is missing.
        ValueError: ops is not as resolve_ops wants it.
    """
    whole: Any = build_meta_model(source)
    asked = {"model": source.name, "ops": ops}
    if adapter is not None and adapter.adapter != "none":
        if source.adapter is not None:
            raise ConfigError(
                f"{source.name} is an adapter already, and --adapter {adapter.adapter} asks for "
                "another",
                hint="leave --adapter out, or give the base model",
            )
        whole = attach_adapter(whole, new_adapter(adapter, whole), base="")
        asked["adapter"] = adapter.adapter
    # Of an adapted model the base with the adapter in it, whose names are those of the model.
    model = inner_model(whole)
    plan = inspect_model(model, ops)
    here = backend(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return RunReport(
        command="inspect",
        model=describe_model(source, model, plan),
        config=asked,
        environment=environment(),
        coverage=plan.coverage,
        modules=[
            {**row, "backend": here} if row["status"] == "patched" else row for row in plan.modules
        ],
        missing=list(plan.missing),
        others=plan.others,
    )


def describe_model(source: ModelSource, model: Any, plan: PatchPlan) -> dict[str, Any]:
    """Return the `model` part of a report."""
    return {
        "name": source.name,
        "kind": source.kind,
        "model_type": plan.model_type,
        "source": plan.source,
        "class": type(model).__name__,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
