"""`liger bench`: the patched and the eager model on the same data, and what lies between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liger_cli.config import RunConfig
from liger_cli.environment import environment
from liger_cli.errors import ConfigError
from liger_cli.report import (
    MIN_SPEED_NOISE,
    Arm,
    GainPart,
    ParityPart,
    RatiosPart,
    RunReport,
)
from liger_cli.training.arms import ArmResult, run_arm
from liger_cli.training.model import resolve_model
from liger_cli.training.setup import parse_ops

__all__ = ["AGAINST", "BenchPlan", "check_against", "compare_arms", "plan_bench", "run_bench"]

# What a patched model can be compared with: name -> the --ops of that arm.
AGAINST = {"eager": "none"}
_NOT_YET = ("compile", "liger-kernel")

# Largest relative difference of a loss between two correct arms over some tens of steps.
_TOLERANCE_FP32 = 1e-3
_TOLERANCE_LOW_PRECISION = 2e-2


@dataclass(frozen=True)
class BenchPlan:
    """A comparison, resolved: the run of each arm, its steps, and how often each arm runs."""

    config: RunConfig
    steps: int
    repeats: int
    tolerance: float


def check_against(text: str) -> None:
    """Checks the names of --against.

    Raises:
        ConfigError: One is unknown or not available yet.
    """
    for name in (part.strip() for part in text.split(",")):
        if name not in AGAINST:
            state = "is not available yet" if name in _NOT_YET else "is unknown"
            raise ConfigError(f"--against {name} {state}; available: {', '.join(AGAINST)}")


def plan_bench(
    config: RunConfig, *, steps: int | None, repeats: int | None, has_gpu: bool
) -> BenchPlan:
    """Returns the comparison with the defaults of the device for what the user left open.

    A CPU gets 2 x 512 tokens and 5 steps a run; a GPU 8 x 2048 and 20. Two runs of each arm tell
    what the machine's noise is.

    Raises:
        ConfigError: The number of steps is given twice.
    """
    if steps is not None and config.max_steps > 0:
        raise ConfigError("--steps and --max-steps are the same; give one of them")
    on_gpu = has_gpu and not config.use_cpu
    defaults = {
        "dataset": "synthetic",
        "per_device_train_batch_size": 8 if on_gpu else 2,
        "max_length": 2048 if on_gpu else 512,
    }
    left_open = {
        key: value for key, value in defaults.items() if key not in config.model_fields_set
    }
    is_auto_bf16 = config.dtype == "auto" and on_gpu
    is_low_precision = config.bf16 or config.fp16 or is_auto_bf16 or "16" in config.dtype
    return BenchPlan(
        config=config.model_copy(update=left_open),
        steps=steps or (config.max_steps if config.max_steps > 0 else 20 if on_gpu else 5),
        repeats=repeats or 2,
        tolerance=_TOLERANCE_LOW_PRECISION if is_low_precision else _TOLERANCE_FP32,
    )


def run_bench(plan: BenchPlan, *, on_run: Callable[[str, int], None]) -> RunReport:
    """Returns the report of a comparison.

    Arms alternate, so that a card that warms up slows both. The patched one goes first: a model
    without a place for any op is refused before time is spent on eager.

    Args:
        plan: What to run.
        on_run: Told the arm and the number of its run, from 1, before it starts.

    Raises:
        ConfigError: The model or an op is unknown.
        LigerError: An arm failed, with its message and exit code.
    """
    parse_ops(plan.config.ops)
    resolve_model(plan.config.model)
    ops = {"patched": plan.config.ops, "eager": AGAINST["eager"]}
    runs: dict[str, list[ArmResult]] = {name: [] for name in ops}
    for repeat in range(1, plan.repeats + 1):
        for name, value in ops.items():
            on_run(name, repeat)
            runs[name].append(run_arm(plan.config, name=name, ops=value, steps=plan.steps))
    eager, patched = _merge(runs["eager"]), _merge(runs["patched"])
    noise = max(MIN_SPEED_NOISE, *map(_spread, runs.values()))
    ratios, parity = compare_arms(eager, patched, tolerance=plan.tolerance, noise=noise)
    return RunReport(
        command="bench",
        config={
            **plan.config.model_dump(mode="json"),
            "max_steps": plan.steps,
            "repeats": plan.repeats,
        },
        environment=environment(),
        coverage=runs["patched"][0].coverage,
        modules=runs["patched"][0].modules,
        gain=GainPart(source="measured", speed=ratios.speed, memory=ratios.memory),
        arms=[eager, patched],
        ratios=ratios,
        parity=parity,
    )


def _merge(runs: Sequence[ArmResult]) -> Arm:
    """The run of median speed (of two the faster), and the highest peak of all."""
    middle = sorted(runs, key=lambda run: run.step_ms)[(len(runs) - 1) // 2]
    return Arm(
        name=middle.name,
        tokens_per_s=middle.tokens_per_s,
        step_ms=middle.step_ms,
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
        losses=list(middle.losses),
    )


def _spread(runs: Sequence[ArmResult]) -> float:
    """How far apart the speeds of equal runs are, relative to the slowest."""
    speeds = [run.tokens_per_s for run in runs]
    return max(speeds) / min(speeds) - 1


def compare_arms(
    eager: Arm, patched: Arm, *, tolerance: float, noise: float = MIN_SPEED_NOISE
) -> tuple[RatiosPart, ParityPart]:
    """Returns the ratios of patched to eager, and how far their losses are apart.

    Args:
        tolerance: Largest relative difference of a loss that still counts as equal.
        noise: Relative difference in speed of equal runs.
    """
    ratios = RatiosPart(
        speed=_ratio(patched.tokens_per_s, eager.tokens_per_s),
        memory=_ratio(patched.peak_memory_bytes, eager.peak_memory_bytes),
        noise=noise,
    )
    pairs = list(zip(eager.losses, patched.losses, strict=True))
    finite = [(a, b) for a, b in pairs if a is not None and b is not None]
    difference = max((abs(a - b) for a, b in finite), default=None)
    relative = max((_relative_difference(a, b) for a, b in finite), default=None)
    parity = ParityPart(
        steps=len(pairs),
        max_loss_difference=difference,
        max_relative_difference=relative,
        tolerance=tolerance,
        equal=relative is not None and len(finite) == len(pairs) and relative <= tolerance,
    )
    return ratios, parity


def _relative_difference(a: float, b: float) -> float:
    if a == b:
        return 0.0
    return abs(a - b) / abs(a) if a else math.inf


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    if numerator is None or not denominator:
        return None
    return numerator / denominator
