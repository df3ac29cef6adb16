"""liger bench --nproc 1,2: how much faster a run is on several ranks, and what they wait for."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from liger_cli.commands.bench.models.plan import BenchPlan, BenchRequest
from liger_cli.config import Launch, RunConfig
from liger_cli.errors import ConfigError
from liger_cli.report.scaling import ScalingReport, ScalingRow
from liger_cli.training.runtime.arms import ArmRanks, ArmResult, run_arm

__all__ = ["exposed_share", "parse_nproc", "run_scaling"]

_Spans = list[tuple[float, float]]


def parse_nproc(launch: Launch, request: BenchRequest, config: RunConfig) -> tuple[int, ...]:
    """Return the numbers of processes of --nproc 1,2 in rising order; without the flag none.

    Raises:
        ConfigError: It is no such list, or other flags have no meaning beside it.
    """
    if launch.nproc in (None, "1"):
        launch.refuse_several("bench", "--nproc 1,2 compares numbers of processes of one host.")
        return ()
    words = str(launch.nproc).split(",")
    if len(words) < 2 or not all(re.fullmatch(r"[1-9]\d{0,3}", w, re.ASCII) for w in words):
        raise ConfigError(
            f"--nproc {launch.nproc}: should be the numbers of processes to compare",
            hint="--nproc 1,2 says what the second process gains.",
        )
    if launch.nnodes not in (None, 1) or launch.log_rank:
        raise ConfigError("--nnodes and --log-rank: `liger bench` compares processes of one host")
    if request != BenchRequest(steps=request.steps, repeats=request.repeats):
        raise ConfigError(
            "--nproc compares numbers of processes, each with the patched model",
            hint="Leave out --against, --ablate, --seq, --batch and --assert.",
        )
    counts = tuple(sorted({int(word) for word in words}))
    copies, shards = config.dp_replicate_size, config.dp_shard_size
    follows = shards == -1 and all(count == 1 or count % copies == 0 for count in counts)
    if not follows and (copies != 1 or shards not in (None, 1)):
        raise ConfigError(
            "the layout must follow the number of processes",
            hint="--dp-shard-size -1 shards the model over all, or over those that a "
            "--dp-replicate-size leaves which divides all numbers above 1; without it train "
            "chooses.",
        )
    return counts


def run_scaling(
    plan: BenchPlan, counts: tuple[int, ...], on_run: Callable[[str], None]
) -> ScalingReport:
    """Run the patched model on each number of processes and return their rates.

    Args:
        plan: The run; a batch is that of a process.
        on_run: Called with a line before each run.

    Raises:
        LigerError: A run failed.
    """
    runs: dict[int, list[ArmResult]] = {count: [] for count in counts}
    for number in range(plan.repeats):
        for count in counts:
            on_run(
                f"{count} process{'es' if count > 1 else ''}, run {number + 1} of {plan.repeats}"
            )
            config = plan.config
            if count == 1 and config.dp_shard_size is not None:
                config = config.model_copy(update={"dp_shard_size": None, "dp_replicate_size": 1})
            elif config.dp_shard_size == 1:
                config = config.model_copy(update={"dp_replicate_size": count})
            ranks = ArmRanks(count, is_traced=plan.on_gpu and number == plan.repeats - 1)
            # A step more, which is traced and not counted.
            steps = plan.steps + ranks.is_traced
            name = f"--nproc {count}"
            runs[count].append(run_arm(config, name=name, ops=config.ops, steps=steps, ranks=ranks))
    rates = {count: _rate(results, plan.steps) for count, results in runs.items()}
    least = counts[0]
    rows = [
        ScalingRow(
            nproc=count,
            tokens_per_s=rate,
            efficiency=rate / rates[least] * least / count,
            exposed=_exposed(runs[count][-1].trace),
            peak_memory_bytes=max(run.peak_memory_bytes for run in runs[count]),
        )
        for count, rate in rates.items()
    ]
    return ScalingReport(
        model=plan.config.model,
        summary=plan.summary,
        on_gpu=plan.on_gpu,
        repeats=plan.repeats,
        rows=rows,
    )


def _rate(results: Iterable[ArmResult], steps: int) -> float:
    """Return the median of tokens a second of all ranks over all steps but the first of a run."""
    return statistics.median(
        step["tokens_per_s"] for run in results for step in run.steps[1:steps] or run.steps
    )


def _exposed(trace: dict[str, Any] | None) -> float | None:
    return None if trace is None else exposed_share(trace.get("traceEvents") or [])


def exposed_share(events: Iterable[dict[str, Any]]) -> float | None:
    """Return the share of a trace in which a GPU runs collectives and nothing else.

    Args:
        events: Of torch's profiler, times in us.

    Returns:
        The share of the time from the first to the last kernel; None without kernels.
    """
    collectives: _Spans = []
    others: _Spans = []
    for event in events:
        if event.get("ph") != "X" or event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        begin = float(event["ts"])
        is_collective = str(event.get("name", "")).lower().startswith("nccl")
        (collectives if is_collective else others).append((begin, begin + float(event["dur"])))
    spans = collectives + others
    if not spans:
        return None
    whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return (_covered(spans) - _covered(others)) / whole if whole > 0 else None


def _covered(spans: _Spans) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
