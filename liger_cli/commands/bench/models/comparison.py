"""`liger bench`: the patched model and others on the same data, and what lies between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from liger_cli.commands.bench.models.figures import compare_arms, merge_runs, noise_of
from liger_cli.commands.bench.models.plan import BenchPlan
from liger_cli.commands.bench.models.reasons import Facts, no_gain
from liger_cli.commands.bench.models.summary import (
    INTERRUPTED,
    OUT_OF_MEMORY,
    find_fits,
    judge_bounds,
)
from liger_cli.common.environment import environment
from liger_cli.config import RunConfig
from liger_cli.errors import Interrupted, LigerError, OutOfMemory
from liger_cli.report import (
    MIN_MEMORY_NOISE,
    MIN_SPEED_NOISE,
    AgainstPart,
    Arm,
    GainPart,
    RunReport,
    SweepPoint,
    verdict,
)
from liger_cli.report.inspection import describe_model
from liger_cli.report.required_ops import parse_ops
from liger_cli.training.model.extended import extend_source
from liger_cli.training.model.source import ModelSource, build_meta_model, resolve_model
from liger_cli.training.runtime.arms import ArmResult, ArmSpec, run_arm
from liger_cli.training.runtime.peer_interpreter import PeerInterpreter
from liger_cli.training.runtime.peer_patch import PEER, PEER_PACKAGE
from liger_cli.training.scores import assumed_scores
from liger_kernels.transformers.api import inspect_model

__all__ = ["run_bench"]

PATCHED, EAGER = "patched", "eager"
_SMALLER_DID_NOT_FIT = f"{OUT_OF_MEMORY} at a smaller size"


@dataclass
class _Runs:
    """The runs of one arm, or why there are none."""

    results: list[ArmResult] = field(default_factory=list)
    error: str | None = None


@dataclass
class _Measured:
    """Every size with its arms, a run of the patched one, and whether nobody stopped it."""

    points: list[SweepPoint]
    patched: ArmResult
    is_whole: bool


def run_bench(plan: BenchPlan, *, on_run: Callable[[str], None]) -> RunReport:
    """Return the report of a comparison.

    Arms alternate, so that a card that warms up slows all of them. The patched one goes first: a
    model without a place for any op is refused before time is spent on others. In a sweep, and for
    the other arms, running out of memory is a result. Stopped by Ctrl-C or SIGTERM it returns what
    was measured until then.

    Args:
        plan: What to run.
        on_run: Called with the arm and the number of its run before it starts.

    Raises:
        ConfigError: The model or an op is unknown.
        EnvironmentProblem: The peer is not installed where the user says.
        LigerError: The patched arm failed, with its message and exit code.
        KeyboardInterrupt: It was stopped before the patched arm had run.
    """
    parse_ops(plan.config.ops)
    source = extend_source(plan.config, resolve_model(plan.config.model))
    source = assumed_scores(plan.config, source)
    with plan.peer() as peer:
        if peer is not None:
            peer.require(PEER_PACKAGE)
        specs = _specs(plan, source, peer)
        measured = _measure(plan, specs, source, on_run)
    return _report(plan, source, specs, measured)


def _report(
    plan: BenchPlan, source: ModelSource, specs: Sequence[ArmSpec], measured: _Measured
) -> RunReport:
    points, base = measured.points, plan.against[0]
    shown = _largest_compared(points, base)
    first = shown.against.get(base)
    model = build_meta_model(source)
    return RunReport(
        command="bench",
        model=describe_model(source, model, inspect_model(model, plan.config.ops)),
        config={
            **plan.config.model_dump(mode="json"),
            "max_steps": plan.steps,
            "repeats": plan.repeats,
        },
        environment=environment(),
        coverage=measured.patched.coverage,
        modules=measured.patched.modules,
        gain=_gain(shown),
        arms=shown.arms,
        ratios=first.ratios if first else None,
        parity=first.parity if first else None,
        against={name: shown.against[name] for name in plan.against if name in shown.against},
        ablation=_ablation(shown) if plan.ablate else None,
        sweep=points if plan.is_sweep else None,
        fits=find_fits(points, [spec.name for spec in specs]) if plan.is_sweep else None,
        asserted=judge_bounds(plan.bounds, points, base) if plan.bounds else None,
        interrupted=None if measured.is_whole else True,
    )


def _gain(shown: SweepPoint) -> GainPart | None:
    to_eager = shown.against.get(EAGER)
    if to_eager is None:
        return None
    ratios = to_eager.ratios
    return GainPart(source="measured", speed=ratios.speed, memory=ratios.memory)


def _specs(plan: BenchPlan, source: ModelSource, peer: PeerInterpreter | None) -> list[ArmSpec]:
    """Return the arms in the order of a round."""
    ops = plan.config.ops
    known = {
        EAGER: ArmSpec(EAGER, "none"),
        "compile": ArmSpec("compile", "none", torch_compile=True),
        "patched+compile": ArmSpec("patched+compile", ops, torch_compile=True),
        PEER: ArmSpec(PEER, "none", peer=peer),
    }
    specs = [ArmSpec(PATCHED, ops), *(known[name] for name in plan.against)]
    if plan.ablate:
        # An op alone says something beside eager only.
        specs += [known[EAGER]] if EAGER not in plan.against else []
        coverage = inspect_model(build_meta_model(source), ops).coverage
        for op, counts in coverage.items():
            specs += [ArmSpec(f"{EAGER}+{op}", op)] * (counts["patched"] > 0)
    return specs


def _measure(
    plan: BenchPlan,
    specs: Sequence[ArmSpec],
    source: ModelSource,
    on_run: Callable[[str], None],
) -> _Measured:
    """Run every arm at every size."""
    config = plan.config
    lengths = plan.sequence_lengths or (config.max_length,)
    batches = plan.batch_sizes or (config.per_device_train_batch_size,)
    points: list[SweepPoint] = []
    patched: ArmResult | None = None
    is_whole = True
    for length, batch in itertools.product(lengths, batches):
        size = {"per_device_train_batch_size": batch, "max_length": length}
        where = f"{batch} x {length}: " if plan.is_sweep else ""
        runs = {spec.name: _Runs(error=_known_error(points, spec.name, size)) for spec in specs}
        here = config.model_copy(update=size)
        is_whole = _run_rounds(plan, here, specs, runs, where, on_run, is_first=not points)
        patched = next(iter(runs[PATCHED].results), patched)
        if not is_whole and patched is None:
            raise KeyboardInterrupt
        points.append(_point(plan, source, here, runs))
        if not is_whole:
            break
    if patched is None:
        raise OutOfMemory("the patched run is out of memory at every size")
    return _Measured(points, patched, is_whole)


def _known_error(points: Iterable[SweepPoint], name: str, size: Mapping[str, int]) -> str | None:
    """Return the error of an arm that did not run at a smaller size, if there is one."""
    for point in points:
        is_within = (
            point.batch_size <= size["per_device_train_batch_size"]
            and point.sequence_length <= size["max_length"]
        )
        error = next((arm.error for arm in point.arms if arm.name == name), None)
        if error is not None and error.startswith(OUT_OF_MEMORY):
            if is_within:
                return _SMALLER_DID_NOT_FIT
        elif error is not None:
            # Whatever it was, it was not the size.
            return error
    return None


def _run_rounds(
    plan: BenchPlan,
    config: RunConfig,
    specs: Sequence[ArmSpec],
    runs: Mapping[str, _Runs],
    where: str,
    on_run: Callable[[str], None],
    *,
    is_first: bool,
) -> bool:
    """Run each arm in turn at one size and return whether nobody stopped that.

    is_first: nothing was measured yet that could be lost.
    """
    for repeat in range(1, plan.repeats + 1):
        for spec in specs:
            found = runs[spec.name]
            if found.error is not None:
                continue
            on_run(f"{where}{spec.name}, run {repeat} of {plan.repeats} ...")
            try:
                found.results.append(
                    run_arm(
                        config,
                        name=spec.name,
                        ops=spec.ops,
                        steps=plan.steps,
                        torch_compile=spec.torch_compile,
                        peer=spec.peer,
                    )
                )
            except (KeyboardInterrupt, Interrupted):
                for other in runs.values():
                    if not other.results:
                        other.error = other.error or INTERRUPTED
                return False
            except LigerError as problem:
                is_memory = isinstance(problem, OutOfMemory)
                if spec.name == PATCHED and is_first and not (is_memory and plan.is_sweep):
                    raise
                found.error = OUT_OF_MEMORY if is_memory else problem.message
                found.results.clear()
    return True


def _point(
    plan: BenchPlan, source: ModelSource, config: RunConfig, runs: Mapping[str, _Runs]
) -> SweepPoint:
    """Compare the runs of one size."""
    arms = {
        name: merge_runs(name, found.results)
        if found.results
        else Arm(name=name, runs=0, error=found.error)
        for name, found in runs.items()
    }
    facts = None
    if patched := runs[PATCHED].results:
        facts = Facts.of(
            source.config,
            on_gpu=plan.on_gpu,
            num_tokens=config.per_device_train_batch_size * config.max_length,
            coverage=patched[0].coverage,
            modules=patched[0].modules,
        )
    against: dict[str, AgainstPart] = {}
    for name in runs:
        is_alone = name.startswith(f"{EAGER}+")
        base, arm = (EAGER, name) if is_alone else (name, PATCHED)
        if name != PATCHED and runs[base].results and runs[arm].results:
            against[name] = _compare(plan, runs, arms[base], arms[arm], facts)
    # The side that all are measured against comes first, the patched one beside it.
    order = dict.fromkeys((plan.against[0], PATCHED, *runs))
    return SweepPoint(
        batch_size=config.per_device_train_batch_size,
        sequence_length=config.max_length,
        arms=[arms[name] for name in order],
        against=against,
    )


def _compare(
    plan: BenchPlan, runs: Mapping[str, _Runs], base: Arm, arm: Arm, facts: Facts | None
) -> AgainstPart:
    """Compare an arm with a base at one size, and say in words how they differ."""
    both = (runs[base.name].results, runs[arm.name].results)
    # An allocator's peak is the same in equal runs; a process's is not.
    least = MIN_MEMORY_NOISE
    ratios, parity = compare_arms(
        base,
        arm,
        tolerance=plan.tolerance,
        grad_norm_tolerance=plan.grad_norm_tolerance,
        noise=noise_of(both, "tokens_per_s", MIN_SPEED_NOISE),
        memory_noise=least if plan.on_gpu else noise_of(both, "peak_memory_bytes", least),
    )
    patches = runs[arm.name].results[0].coverage.values()
    is_same = base.name == EAGER and not any(counts["patched"] for counts in patches)
    words = [verdict(ratios, parity, names=(arm.name, base.name), is_same_code=is_same)]
    if facts is not None and arm.name == PATCHED and not is_same:
        words += no_gain(ratios, facts, base)
    return AgainstPart(ratios=ratios, parity=parity, verdict="; ".join(words))


def _largest_compared(points: Sequence[SweepPoint], base: str) -> SweepPoint:
    """Return the size with the most tokens at which both sides ran, or the last one."""
    both = [point for point in points if base in point.against]
    return max(both, key=lambda p: p.batch_size * p.sequence_length, default=points[-1])


def _ablation(point: SweepPoint) -> dict[str, AgainstPart]:
    prefix = f"{EAGER}+"
    parts = point.against.items()
    return {name[len(prefix) :]: part for name, part in parts if name.startswith(prefix)}
