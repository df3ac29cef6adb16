"""The figures of an arm out of its runs, and of two arms beside each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from liger_cli.report import MIN_MEMORY_NOISE, MIN_SPEED_NOISE, Arm, ParityPart, RatiosPart
from liger_cli.training.runtime.arms import ArmResult

__all__ = ["compare_arms", "merge_runs", "noise_of"]


def merge_runs(name: str, results: Sequence[ArmResult]) -> Arm:
    """Return medians over the steps of all runs but their first, and the highest peak."""
    steps = [step for run in results for step in (run.steps[1:] or run.steps)]
    times = sorted(step["step_ms"] for step in steps)
    peer = results[0].peer
    return Arm(
        name=name,
        tokens_per_s=statistics.median(step["tokens_per_s"] for step in steps),
        step_ms=statistics.median(times),
        step_p20_ms=times[round(0.2 * (len(times) - 1))],
        step_p80_ms=times[round(0.8 * (len(times) - 1))],
        first_step_ms=max(run.steps_ms[0] for run in results),
        peak_memory_bytes=max(run.peak_memory_bytes for run in results),
        losses=results[0].losses,
        grad_norms=results[0].grad_norms,
        runs=len(results),
        note=None if peer is None else _peer_note(peer),
    )


def _peer_note(peer: Mapping[str, Any]) -> str:
    unchanged = None if peer["num_changed"] else "it changed no module of this model"
    parts = (peer["version"] or "of unknown version", unchanged, peer.get("loss"))
    return "; ".join(filter(None, parts))


def noise_of(arms: Iterable[Sequence[ArmResult]], key: str, least: float) -> float | None:
    """Return how far apart a figure of equal runs is, relative to the smallest.

    None is unknown: one of the arms ran once.
    """
    spreads = []
    for runs in arms:
        values = [getattr(run, key) for run in runs]
        if len(values) < 2:
            return None
        spreads.append(max(values) / min(values) - 1)
    return max(least, *spreads)


def compare_arms(
    base: Arm,
    patched: Arm,
    *,
    tolerance: float,
    grad_norm_tolerance: float | None = None,
    noise: float | None = MIN_SPEED_NOISE,
    memory_noise: float | None = MIN_MEMORY_NOISE,
) -> tuple[RatiosPart, ParityPart]:
    """Return the ratios of patched to another arm, and how far their losses are apart.

    Args:
        tolerance: Largest relative difference of a loss that still counts as equal.
        grad_norm_tolerance: The same of the norm of a step's gradient; None leaves them out.
        noise: Relative difference in speed of equal runs, None if unknown.
        memory_noise: The same of peak memory.
    """
    ratios = RatiosPart(
        speed=_ratio(patched.tokens_per_s, base.tokens_per_s),
        memory=_ratio(patched.peak_memory_bytes, base.peak_memory_bytes),
        noise=noise,
        memory_noise=memory_noise,
    )
    pairs = list(zip(base.losses, patched.losses, strict=True))
    finite = [(a, b) for a, b in pairs if a is not None and b is not None]
    difference = max((abs(a - b) for a, b in finite), default=None)
    relative = max((_relative_difference(a, b) for a, b in finite), default=None)
    norms = None
    if grad_norm_tolerance is not None:
        both = zip(base.grad_norms, patched.grad_norms, strict=True)
        known = ((a, b) for a, b in both if a is not None and b is not None)
        norms = max((_relative_difference(a, b) for a, b in known), default=None)
    parity = ParityPart(
        steps=len(pairs),
        max_loss_difference=difference,
        max_relative_difference=relative,
        tolerance=tolerance,
        max_grad_norm_difference=norms,
        grad_norm_tolerance=None if norms is None else grad_norm_tolerance,
        equal=relative is not None
        and len(finite) == len(pairs)
        and relative <= tolerance
        and (norms is None or norms <= (grad_norm_tolerance or 0.0)),
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
