"""The result of a whole comparison: the sizes that fit, and the bounds that hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from liger_cli.commands.bench.models.plan import Bound
from liger_cli.errors import Interrupted, LigerError, RequirementFailed
from liger_cli.report import AssertPart, FitPart, RunReport, SweepPoint

__all__ = ["INTERRUPTED", "OUT_OF_MEMORY", "find_fits", "judge_bounds", "require_bounds"]

# How the error of an arm begins that is a result and no failure.
OUT_OF_MEMORY = "out of memory"
# That of an arm for which there was no time.
INTERRUPTED = "interrupted"


def find_fits(points: Sequence[SweepPoint], names: Iterable[str]) -> list[FitPart]:
    """Return for each arm what fits at every sequence length."""
    fits = []
    for name in names:
        by_sequence: dict[int, int | None] = {}
        for point in points:
            by_sequence.setdefault(point.sequence_length, None)
            # Batches rise, so the last that ran is the largest.
            if any(arm.name == name and arm.error is None for arm in point.arms):
                by_sequence[point.sequence_length] = point.batch_size
        ran = {length: batch for length, batch in by_sequence.items() if batch is not None}
        fits.append(
            FitPart(
                arm=name,
                largest_batch_size=max(ran.values(), default=None),
                longest_sequence=max(ran, default=None),
                by_sequence=by_sequence,
            )
        )
    return fits


def judge_bounds(
    bounds: Iterable[Bound], points: Sequence[SweepPoint], base: str
) -> list[AssertPart]:
    """Return every bound at every size that both sides ran; a wrong loss breaks a separate one."""
    parts = []
    compared = [point for point in points if base in point.against]
    for bound in bounds:
        if not compared:
            where = f"{base} and patched did not both run"
            parts.append(AssertPart(bound=str(bound), where=where, met=False))
        for point in compared:
            found = getattr(point.against[base].ratios, bound.quantity)
            where = f"{point.batch_size} x {point.sequence_length} against {base}"
            met = bound.holds(found)
            parts.append(AssertPart(bound=str(bound), where=where, found=found, met=met))
    for point in compared:
        parity = point.against[base].parity
        if not parity.equal:
            where = f"{point.batch_size} x {point.sequence_length} against {base}"
            found = parity.max_relative_difference
            parts.append(AssertPart(bound="losses agree", where=where, found=found, met=False))
    return parts


def require_bounds(report: RunReport) -> None:
    """End the command where a bound does not hold or an arm failed; the report has been shown.

    Raises:
        Interrupted: The comparison was stopped.
        RequirementFailed: A bound of --assert does not hold.
        LigerError: An arm failed, and not for want of memory.
    """
    if report.interrupted:
        raise Interrupted("interrupted; the report has what was measured", is_reported=True)
    broken = [part for part in report.asserted or () if not part.met]
    if broken:
        lines = (
            f"{part.bound} does not hold: "
            + ("not measured" if part.found is None else f"{part.found:.3f}")
            + f" ({part.where})"
            for part in broken
        )
        raise RequirementFailed("\n".join(lines), is_reported=True)
    points = report.sweep or ()
    arms = [*(report.arms or ()), *(arm for point in points for arm in point.arms)]
    errors = {arm.error for arm in arms if arm.error and not arm.error.startswith(OUT_OF_MEMORY)}
    if errors:
        raise LigerError("\n".join(sorted(errors)), is_reported=True)
