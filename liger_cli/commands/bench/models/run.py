"""`liger bench --model M` from its flags to its report."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from liger_cli.commands.bench.models.comparison import run_bench
from liger_cli.commands.bench.models.plan import BenchRequest, plan_bench
from liger_cli.commands.bench.models.scaling import parse_nproc, run_scaling
from liger_cli.commands.bench.models.summary import require_bounds
from liger_cli.common.outputs import check_files
from liger_cli.config import Launch, RunConfig
from liger_cli.errors import ConfigError
from liger_cli.report import show_lines, show_report
from liger_cli.report.scaling import show_scaling

__all__ = ["bench_model"]


def bench_model(
    config: RunConfig, launch: Launch, request: BenchRequest, *, html: Path | None, as_json: bool
) -> None:
    """Run a comparison of sides, or with --nproc of numbers of processes, and show its report.

    Raises:
        LigerError: A flag has no meaning, or a run failed; with --assert also a bound that does
            not hold.
    """
    counts = parse_nproc(launch, request, config)
    if counts and html is not None:
        raise ConfigError("--html: the report of --nproc has no page", hint="--json has it all.")
    plan = plan_bench(config, request, has_gpu=torch.cuda.is_available())
    check_files({"--html": html})
    say = partial(show_lines, stderr=True)
    say(plan.summary)
    if counts:
        show_scaling(run_scaling(plan, counts, say), as_json=as_json)
        return
    report = run_bench(plan, on_run=say)
    show_report(report, as_json=as_json, html=html)
    require_bounds(report)
