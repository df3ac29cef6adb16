"""The ops that a command is asked for, and whether they were patched."""

from __future__ import annotations

from liger_cli.errors import ConfigError, RequirementFailed
from liger_cli.report import RunReport, unmet_requirements
from liger_kernels.ops.registry import PATCH_OPS, find_op
from liger_kernels.transformers.patching.plan import PatchPlan, resolve_ops

__all__ = ["check_places", "check_required", "parse_ops"]


def parse_ops(ops: str, required: str = "") -> list[str]:
    """Check the names in `ops` and return the full names of those in `required`.

    Raises:
        ConfigError: A name is no op that patching knows, with the nearest one.
    """
    try:
        resolve_ops(ops)
        return [find_op(name, PATCH_OPS).name for name in required.split(",") if name.strip()]
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_required(report: RunReport, require: str, *, is_reported: bool = False) -> None:
    """Check the ops of --require, in the plan and again when it is known which modules ran.

    Raises:
        RequirementFailed: One is not patched wherever the model has a place for it.
    """
    if unmet := unmet_requirements(report, parse_ops("none", require)):
        raise RequirementFailed("\n".join(unmet), is_reported=is_reported)


def check_places(plan: PatchPlan) -> None:
    """Check that a model has a place for some of the ops that are asked for.

    Raises:
        RequirementFailed: It has none.
    """
    if plan.ops and not any(op in plan.coverage for op in plan.ops):
        raise RequirementFailed(
            f"{plan.model_type} has no place for any of {', '.join(plan.ops)}",
            hint="liger inspect shows its modules; --ops none trains it as it is.",
        )
