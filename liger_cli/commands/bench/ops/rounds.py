"""`liger bench ops`: each op against its limit, against torch and against its peers.

An op is checked on the very shape first; one that is worse than eager gets no figures. The sides
then take turns, round by round, so that a card that warms up slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch

from liger_cli.commands.bench.ops.arms import TRL_FUNCTIONS, check, local_arms, trl_version
from liger_cli.commands.bench.ops.plan import OpsPlan
from liger_cli.commands.bench.ops.tables import (
    OURS,
    ArmPart,
    CheckPart,
    OpRow,
    OpsReport,
    Spread,
    TargetPart,
    TimePart,
)
from liger_cli.commands.bench.peer.ops import CALLS, PACKAGE
from liger_cli.commands.bench.peer.process import PeerArm, PeerFailed, PeerProcess
from liger_cli.commands.bench.targets import TRL, Target, Workload
from liger_cli.commands.bench.timing import Part, Stopwatch, Times, copy_rate, matmul_rate
from liger_cli.common.environment import environment
from liger_cli.errors import Interrupted, RequirementFailed

__all__ = ["judge", "measure", "require_checks", "run_ops"]

# Milliseconds a side may use in a round for each part and clock, if two calls take no longer. With
# thirty-odd rows of up to five sides, 10 keep the calls of small ops under a minute in all.
_BUDGET_MS = 10.0
# Matrix products that measure in each round how fast the card is now.
_LIMIT_CALLS = 6


class Side(Protocol):
    """An Arm, or a peer's."""

    name: str

    def warm_up(self) -> bool: ...
    def times(self, part: Part, budget_ms: float) -> Times: ...
    def host_us(self) -> float: ...
    def transient_bytes(self) -> int | None: ...
    def release(self) -> None: ...


@dataclass
class _Readings:
    """The readings of one side over all rounds."""

    times: dict[Part, Times] = field(default_factory=dict)
    host_us: list[float] = field(default_factory=list)
    transient_bytes: int | None = None
    note: str | None = None
    error: str | None = None


def run_ops(plan: OpsPlan, *, on_row: Callable[[Workload], None]) -> OpsReport:
    """Return the report of a run; of one stopped by Ctrl-C or SIGTERM, the rows it had finished.

    Args:
        plan: What to measure.
        on_row: Called with each workload before it starts.

    Raises:
        ConfigError: The peer's interpreter or folder does not exist.
        KeyboardInterrupt: It was stopped before the first row.
    """
    began = time.monotonic()
    interrupted = None
    rows: list[OpRow] = []
    # The peer imports its packages while the limits of the hardware are measured.
    with plan.peer() as peer:
        stopwatch = Stopwatch(plan.device)
        bench = _Bench(plan, stopwatch, copy_rate(stopwatch), peer)
        matmul_flops_per_s = matmul_rate(stopwatch, plan.dtype)
        try:
            for workload in plan.workloads:
                on_row(workload)
                rows.append(_row(workload, bench))
                stopwatch.free()
        except KeyboardInterrupt:
            if not rows:
                raise
            interrupted = True
    for workload, row in zip(plan.workloads, rows, strict=False):
        row.targets = [judge(target, row, rows) for target in workload.targets]
    where = environment()
    return OpsReport(
        arguments=list(plan.arguments),
        date=where["date"],
        environment=where,
        device=where["devices"][0]["name"],
        device_type=plan.device.type,
        dtype=str(plan.dtype).removeprefix("torch."),
        copy_bytes_per_s=bench.copy_bytes_per_s,
        matmul_flops_per_s=matmul_flops_per_s,
        seconds=time.monotonic() - began,
        rounds=plan.rounds,
        peers=bench.peers,
        rows=rows,
        interrupted=interrupted,
    )


def require_checks(report: OpsReport) -> None:
    """End the command where an op was found wrong or rows are missing; the report has been shown.

    Raises:
        RequirementFailed: A check failed.
        Interrupted: The run was stopped.
    """
    failed = [row for row in report.rows if not row.check.ok]
    if failed:
        lines = (
            f"{' '.join(filter(None, (row.op, row.shape, row.variant)))}: {row.check.reason}"
            for row in failed
        )
        raise RequirementFailed(
            "no figures for an op whose check fails:\n" + "\n".join(lines), is_reported=True
        )
    if report.interrupted:
        raise Interrupted("interrupted; the report has what was measured", is_reported=True)


@dataclass
class _Bench:
    """A run under way, with the peer if there is one.

    Attributes:
        peers: The version of each peer, or why it did not run.
    """

    plan: OpsPlan
    stopwatch: Stopwatch
    copy_bytes_per_s: float
    peer: PeerProcess | None
    peers: dict[str, str] = field(default_factory=dict)


def _row(workload: Workload, bench: _Bench) -> OpRow:
    plan, stopwatch = bench.plan, bench.stopwatch
    row = OpRow(
        op=workload.op,
        shape=workload.shape_text,
        variant=workload.variant,
        check=CheckPart(ok=False),
    )
    try:
        sample = workload.sample(plan.dtype, plan.device)
    except torch.OutOfMemoryError as problem:
        row.check.reason = _in_a_line(problem)
        return row
    row.check = check(workload, sample, stopwatch, plan.dtype)
    if not row.check.ok:
        return row
    # The truth has filled most of the card, and the peer needs its part.
    stopwatch.free()
    peer_arm = None
    if bench.peer is not None and workload.op in CALLS:
        peer_arm = PeerArm(PACKAGE, bench.peer)
        peer_arm.begin(workload, plan.device, plan.dtype)
    sides: list[Side] = [
        *local_arms(workload, sample, stopwatch, plan.dtype, with_compile=plan.with_compile)
    ]
    if peer_arm is not None:
        sides.append(peer_arm)
    if row.op in TRL_FUNCTIONS and workload.options:
        bench.peers.setdefault(TRL, trl_version())
    _measure_row(row, workload, sides, bench)
    if peer_arm is not None and peer_arm.version is not None:
        bench.peers[PACKAGE] = peer_arm.version
    elif peer_arm is not None:
        arm = row.arm(PACKAGE)
        bench.peers.setdefault(PACKAGE, f"did not run: {arm.error if arm else None}")
    return row


def _measure_row(row: OpRow, workload: Workload, sides: Sequence[Side], bench: _Bench) -> None:
    """Measure the sides of a workload, and the limit of the hardware between them."""
    plan, flops, rates = bench.plan, workload.num_flops(), list[float]()

    def read_limit() -> None:
        # A card at its power limit slows down within seconds of such work.
        if flops:
            rates.append(
                matmul_rate(bench.stopwatch, plan.dtype, num_calls=_LIMIT_CALLS, is_awake=True)
            )

    readings = measure(
        sides,
        rounds=plan.rounds,
        parts=workload.parts,
        with_host=workload.variant == "host time",
        after_round=read_limit,
    )
    forward_bytes, full_bytes = workload.least_bytes(plan.dtype)
    least_s = forward_bytes / bench.copy_bytes_per_s, full_bytes / bench.copy_bytes_per_s
    if flops:
        row.matmul_flops_per_s = statistics.median(rates)
        # Each side chooses how much of the work its forward does, so that has no share.
        least_s = 0.0, flops / row.matmul_flops_per_s
    row.arms = [_arm_part(name, found, *least_s) for name, found in readings.items()]


def measure(
    sides: Sequence[Side],
    *,
    rounds: int,
    parts: Sequence[Part],
    with_host: bool,
    after_round: Callable[[], None] = lambda: None,
) -> Mapping[str, _Readings]:
    """Measure each side; return its readings by name.

    The sides take turns: once each for the first part, then once each for the next, and so on for
    as many rounds. A side that fails takes no further part; what it said is kept.
    """
    readings = {side.name: _Readings() for side in sides}

    def each(step: Callable[[Side, _Readings], None]) -> None:
        for side in sides:
            found = readings[side.name]
            if found.error is None:
                try:
                    step(side, found)
                except Exception as problem:
                    found.error = _in_a_line(problem)

    def prepare(side: Side, found: _Readings) -> None:
        if side.warm_up():
            found.note = "overwrites its inputs; they are restored before each turn, untimed"
        found.transient_bytes = side.transient_bytes()

    def time_part(part: Part) -> Callable[[Side, _Readings], None]:
        def step(side: Side, found: _Readings) -> None:
            kept = found.times.setdefault(part, {})
            for clock, times in side.times(part, _BUDGET_MS).items():
                kept.setdefault(clock, []).extend(times)

        return step

    def time_host(side: Side, found: _Readings) -> None:
        found.host_us.append(side.host_us())

    each(prepare)
    for _ in range(rounds):
        for part in parts:
            each(time_part(part))
        if with_host:
            each(time_host)
        after_round()
    each(lambda side, _: side.release())
    return readings


def _in_a_line(problem: Exception) -> str:
    if isinstance(problem, PeerFailed):
        return str(problem)
    return f"{type(problem).__name__}: {problem}".split("\n")[0][:200]


def _arm_part(name: str, found: _Readings, forward_s: float, full_s: float) -> ArmPart:
    """Return the figures of one side; the seconds are those of the limit."""
    if found.error is not None:
        return ArmPart(name=name, error=found.error)
    return ArmPart(
        name=name,
        forward=_time_part(found.times.get("forward"), forward_s),
        full=_time_part(found.times.get("full"), full_s),
        transient_bytes=found.transient_bytes,
        host_us=statistics.median(found.host_us) if found.host_us else None,
        note=found.note,
    )


def _time_part(times: Times | None, least_s: float) -> TimePart | None:
    if times is None:
        return None
    wall, gpu = _spread(times["wall"]), _spread(times["gpu"]) if times["gpu"] else None
    share = least_s / ((gpu or wall).median_ms / 1e3) if least_s else None
    return TimePart(wall=wall, gpu=gpu, share=share)


def _spread(times: Sequence[float]) -> Spread:
    ordered = sorted(times)
    last = len(ordered) - 1
    return Spread(
        median_ms=statistics.median(ordered),
        p20_ms=ordered[round(0.2 * last)],
        p80_ms=ordered[round(0.8 * last)],
    )


def judge(target: Target, row: OpRow, rows: Sequence[OpRow]) -> TargetPart:
    """Return a target of one row with its figure, which is None where it was not measured."""
    found = _figure(target, row, rows)
    met = None
    if found is not None:
        met = found >= target.limit if target.is_floor else found <= target.limit
    return TargetPart(**asdict(target), found=found, met=met)


def _figure(target: Target, row: OpRow, rows: Sequence[OpRow]) -> float | None:
    ours = row.arm(OURS)
    if ours is None or ours.full is None:
        return None
    if target.measure == "share":
        return ours.full.share
    if target.measure == "forward share":
        return None if ours.forward is None else ours.forward.share
    if target.measure == "memory":
        return ours.transient_bytes
    if target.measure == "time share":
        key = (row.op, row.shape, "")
        same = (other for other in rows if (other.op, other.shape, other.variant) == key)
        whole = next((other.arm(OURS) for other in same), None)
        return _ratio(ours, whole, _wall_ms)
    other_side = row.arm(target.against)
    if target.measure == "speed":
        return _ratio(other_side, ours, _wall_ms)
    if target.measure == "memory share":
        return _ratio(ours, other_side, lambda arm: arm.transient_bytes)
    return _ratio(ours, other_side, lambda arm: arm.host_us)


def _wall_ms(arm: ArmPart) -> float | None:
    return None if arm.full is None else arm.full.wall.median_ms


def _ratio(
    top: ArmPart | None, bottom: ArmPart | None, value: Callable[[ArmPart], float | None]
) -> float | None:
    if top is None or bottom is None:
        return None
    numerator, denominator = value(top), value(bottom)
    return numerator / denominator if numerator is not None and denominator else None
