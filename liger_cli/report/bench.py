"""The comparison of `liger bench` in tables and in words."""

from __future__ import annotations

from collections.abc import Sequence

from liger_cli.common.numbers import format_bytes, format_count
from liger_cli.report.tables import Table
from liger_cli.report.values import (
    MIN_SPEED_NOISE,
    AgainstPart,
    Arm,
    FitPart,
    GainPart,
    ParityPart,
    RatiosPart,
    RunReport,
    SweepPoint,
)

__all__ = [
    "ARM_COLUMNS",
    "arm_cells",
    "arms_table",
    "asserted_table",
    "bench_notes",
    "comparisons",
    "fits_table",
    "gain_text",
    "is_noise",
    "loss_text",
    "parity_table",
    "percent_text",
    "sweep_table",
    "times_text",
    "verdict",
    "verdicts",
]

ARM_COLUMNS = (
    "arm",
    "tokens/s",
    "step ms",
    "p20 - p80",
    "first step ms",
    "peak",
    "speed",
    "memory",
    "first loss",
    "last loss",
    "note",
)


def arms_table(report: RunReport) -> Table:
    """Return the arms side by side; speed and memory are times those of the first one's."""
    return Table.with_used_columns("Arms", ARM_COLUMNS, _arm_rows(report.arms or ()))


def sweep_table(points: Sequence[SweepPoint]) -> Table:
    """Return the arms of every size."""
    rows = [
        (f"{point.batch_size} x {point.sequence_length}", *cells)
        for point in points
        for cells in _arm_rows(point.arms)
    ]
    return Table.with_used_columns("Sweep", ("size", *ARM_COLUMNS), rows)


def fits_table(fits: Sequence[FitPart]) -> Table:
    """Return by sequence length the largest batch of each arm that fits."""
    rows = []
    for length in fits[0].by_sequence if fits else ():
        batches = (fit.by_sequence[length] for fit in fits)
        rows.append((str(length), *("none" if batch is None else str(batch) for batch in batches)))
    return Table("What fits", ("largest batch at", *(fit.arm for fit in fits)), rows)


def asserted_table(report: RunReport) -> Table:
    """Return every bound of --assert with what was measured."""
    rows = [
        (
            part.bound,
            "not measured" if part.found is None else f"{part.found:.3f}",
            part.where,
            "met" if part.met else "NOT MET",
        )
        for part in report.asserted or ()
    ]
    return Table("Bounds", ("--assert", "measured", "in", ""), rows)


def parity_table(report: RunReport) -> Table:
    """Return how far losses and gradients of every comparison are apart, and what is allowed."""
    named = {f"patched against {name}": part for name, part in comparisons(report).items()}
    named |= {f"eager+{op} against eager": part for op, part in (report.ablation or {}).items()}
    rows = []
    for name, parity in ((name, part.parity) for name, part in named.items()):
        apart = parity.max_loss_difference
        cells = (
            str(parity.steps),
            "" if apart is None else f"{apart:.2g}",
            percent_text(parity.max_relative_difference),
            percent_text(parity.tolerance),
            percent_text(parity.max_grad_norm_difference),
            percent_text(parity.grad_norm_tolerance),
        )
        rows.append((name, *cells, "equal" if parity.equal else "DIFFERENT"))
    columns = ("compared", "steps", "loss apart by", "in %", "allowed")
    more = ("gradient norm apart by", "allowed", "result")
    return Table.with_used_columns("Parity", (*columns, *more), rows)


def percent_text(share: float | None) -> str:
    """Return a difference in percent; nothing where it was not measured."""
    if share is None:
        return ""
    return "< 0.001 %" if 0 < share < 1e-5 else f"{100 * share:.2g} %"


def comparisons(report: RunReport) -> dict[str, AgainstPart]:
    """Return patched against each other arm, by its name, also of a report that has one alone."""
    if report.against or report.ratios is None or report.parity is None:
        return report.against or {}
    is_same_code = not any(counts["patched"] for counts in (report.coverage or {}).values())
    words = verdict(report.ratios, report.parity, is_same_code=is_same_code)
    return {"eager": AgainstPart(ratios=report.ratios, parity=report.parity, verdict=words)}


def verdicts(report: RunReport) -> list[str]:
    """Return the verdict of each comparison, in words."""
    if report.sweep:
        return [
            f"{point.batch_size} x {point.sequence_length}: {part.verdict}"
            for point in report.sweep
            for part in point.against.values()
        ]
    return [part.verdict for part in (comparisons(report) | (report.ablation or {})).values()]


def _arm_rows(arms: Sequence[Arm]) -> list[tuple[str, ...]]:
    return [arm_cells(arm, arms[0]) for arm in arms]


def arm_cells(arm: Arm, base: Arm) -> tuple[str, ...]:
    """Return the row of an arm as text, with its ratios to another."""
    has_spread = arm.step_p20_ms is not None and arm.step_p80_ms is not None
    return (
        arm.name,
        "" if arm.tokens_per_s is None else format_count(arm.tokens_per_s),
        "" if arm.step_ms is None else f"{arm.step_ms:.1f}",
        f"{arm.step_p20_ms:.1f} - {arm.step_p80_ms:.1f}" if has_spread else "",
        "" if arm.first_step_ms is None else f"{arm.first_step_ms:.0f}",
        "" if arm.peak_memory_bytes is None else format_bytes(arm.peak_memory_bytes),
        times_text(arm.tokens_per_s, base.tokens_per_s),
        times_text(arm.peak_memory_bytes, base.peak_memory_bytes),
        loss_text(arm.losses[:1]),
        loss_text(arm.losses[-1:]),
        arm.error or arm.note or "",
    )


def gain_text(gain: GainPart) -> str:
    """Return the gain of a run in words; an empty string where it is unknown."""
    parts = []
    if gain.speed is not None:
        parts.append(f"{gain.speed:.2f}x speed")
    if gain.memory is not None:
        parts.append(f"{gain.memory:.2f}x memory")
    return f"against eager: {', '.join(parts)} ({gain.source})" if parts else ""


def times_text(value: float | None, base: float | None) -> str:
    """Return a ratio as '1.23x', or nothing where it was not measured."""
    return f"{value / base:.2f}x" if value is not None and base else ""


def loss_text(losses: Sequence[float | None]) -> str:
    """Return a loss, or that it is not finite; nothing where there is none."""
    return "".join("not finite" if loss is None else f"{loss:.4f}" for loss in losses)


def bench_notes(report: RunReport) -> list[str]:
    """Return notes on reading the figures, a sentence a line."""
    arms = [*(report.arms or ()), *(arm for point in report.sweep or () for arm in point.arms)]
    notes = []
    if any(arm.first_step_ms is not None for arm in arms):
        notes.append("the first step of a run compiles and warms up; no other figure counts it")
    devices = (report.environment or {}).get("devices") or [{}]
    uses_cpu = (report.config or {}).get("use_cpu") or devices[0].get("type") == "cpu"
    if arms and uses_cpu:
        notes.append(
            "on a CPU the peak is the resident size of the whole process, with Python and its "
            "libraries, which is most of it for a small model"
        )
    return notes


def verdict(
    ratios: RatiosPart,
    parity: ParityPart,
    *,
    names: tuple[str, str] = ("patched", "eager"),
    is_same_code: bool = False,
) -> str:
    """Return the comparison in words: faster, slower or no gain, and whether the losses agree.

    Args:
        names: The arm that is judged, and the one that it is measured against.
        is_same_code: Whether both run the same code, so that any difference is noise.
    """
    if is_same_code:
        parts = ["nothing was patched, so both sides ran the same code"]
    else:
        memory = ratios.memory and 1 / ratios.memory
        parts = [
            _judge(ratios.speed, "faster", "slower", "speed", ratios.noise),
            _judge(memory, "less memory", "more memory", "memory", ratios.memory_noise),
        ]
        if ratios.speed is not None and ratios.noise is None:
            parts.append("each side ran once, so the noise is unknown (--repeats 2 measures it)")
        elif ratios.noise is not None and ratios.noise > MIN_SPEED_NOISE:
            parts[0] += f", where equal runs are up to {1 + ratios.noise:.2f}x apart"
    parts.append(_parity_text(parity))
    return f"{names[0]} against {names[1]}: " + "; ".join(parts)


def is_noise(ratio: float, noise: float) -> bool:
    """Return whether two figures are no further apart than those of equal runs."""
    return max(ratio, 1 / ratio) <= 1 + noise


def _judge(gain: float | None, better: str, worse: str, quantity: str, noise: float | None) -> str:
    if gain is None:
        return f"{quantity} not measured"
    if noise is None:
        # Neither better nor worse: one run of equal code is often that far from another.
        ratio = gain if quantity == "speed" else 1 / gain
        return f"{ratio:.2f}x the {quantity} in one run"
    if is_noise(gain, noise):
        return f"no gain in {quantity} ({gain:.2f}x)"
    return f"{gain:.2f}x {better}" if gain > 1 else f"{1 / gain:.2f}x {worse}"


def _parity_text(parity: ParityPart) -> str:
    relative, norms = parity.max_relative_difference, parity.max_grad_norm_difference
    absolute = parity.max_loss_difference
    apart = "?" if absolute is None else f"{absolute:.2g}"
    if relative is None:
        return "no losses to compare, or none that is finite"
    if parity.equal:
        beside = "" if norms is None else f", norms of the gradient within {norms:.1%}"
        return f"losses agree over {parity.steps} steps (at most {apart} apart{beside})"
    if relative > parity.tolerance:
        return (
            f"LOSSES DIFFER: {apart} apart, {relative:.1%} where {parity.tolerance:.1%} is allowed"
        )
    allowed = parity.grad_norm_tolerance
    if norms is not None and allowed is not None and norms > allowed:
        return f"GRADIENTS DIFFER: their norms by {norms:.1%}, where {allowed:.1%} is allowed"
    return "LOSSES DIFFER: some are not finite"
