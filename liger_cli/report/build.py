"""The report of a run: its parts from what was planned, patched, trained and evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from liger_cli.common.environment import environment
from liger_cli.common.readers import read_file_bytes
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.report import (
    AttentionPart,
    BestPart,
    DataPart,
    EvalPart,
    GainPart,
    LayerPart,
    RunReport,
    StopPart,
    TrainPart,
)
from liger_cli.report.inspection import describe_model
from liger_cli.training.attention import AttentionPlan
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory.limits import RunMemory
from liger_cli.training.result import TrainResult
from liger_cli.training.runtime.arms import ArmResult
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["add_evaluation", "add_training", "find_gain", "read_report", "report_of"]


def report_of(command: str, config: RunConfig, inputs: Inputs, patches: Any) -> RunReport:
    """Return the report of a PatchPlan, or of the PatchRecord of a patched model."""
    plan = getattr(patches, "plan", patches)
    return RunReport(
        command=command,
        model=describe_model(inputs.source, inner_model(inputs.meta_model), plan),
        config=config.model_dump(mode="json"),
        environment=environment(),
        coverage=patches.coverage,
        modules=patches.modules,
        missing=list(plan.missing),
        attention=_attention_part(inputs.attention),
        data=DataPart(
            name=inputs.data.name,
            eval_rows=inputs.num_eval_rows,
            **asdict(inputs.data.stats),
        ),
    )


def _attention_part(plan: AttentionPlan) -> AttentionPart | None:
    if not plan.has_documents:
        return None
    return AttentionPart(
        implementation=plan.implementation,
        padding_free=plan.padding_free,
        layers=[LayerPart(**asdict(layer)) for layer in plan.layers],
        reason=plan.reason,
    )


def add_training(report: RunReport, result: TrainResult) -> None:
    """Add what training did to a report."""
    report.train = TrainPart(**result.summary())
    report.best = BestPart(**asdict(result.best)) if result.best else None
    report.stop = StopPart(**asdict(result.stop)) if result.stop else None
    if result.eval is not None:
        add_evaluation(report, result.eval)


def add_evaluation(report: RunReport, found: EvalResult) -> None:
    """Add an evaluation to a report."""
    report.eval = _eval_part(found)
    report.eval_sets = {name: _eval_part(part) for name, part in found.sets.items()} or None


def _eval_part(found: EvalResult) -> EvalPart:
    figures = found.figures()
    if found.confusion is not None:
        figures["confusion"] = found.confusion
    return EvalPart(**figures)


def find_gain(
    memory_of_step: Callable[[], RunMemory],
    report: RunReport,
    result: TrainResult,
    eager: ArmResult | None,
    num_steps: int,
) -> GainPart | None:
    """Return the gain over the same steps of an eager run, else an estimate of the memory's."""
    if eager is not None:
        patched = result.speed(num_steps)
        return GainPart(
            source="measured",
            speed=patched["tokens_per_s"] / eager.tokens_per_s,
            memory=patched["peak_memory_bytes"] / eager.peak_memory_bytes,
        )
    if not any(counts["patched"] for counts in (report.coverage or {}).values()):
        return None
    share = memory_of_step().share_of_eager()
    return None if share is None else GainPart(source="estimated", memory=share)


def read_report(path: Path) -> RunReport:
    """Return the report of a finished run.

    Raises:
        ConfigError: The file is none.
    """
    try:
        return RunReport.from_json(read_file_bytes(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as a report: {str(error).splitlines()[0]}",
            hint="Delete that file, and --resume writes a new one.",
        ) from error
