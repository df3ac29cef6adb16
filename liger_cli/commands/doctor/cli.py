"""liger doctor: checks this machine before a run does."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from liger_cli.errors import EnvironmentProblem

__all__ = ["command"]


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Check this machine: versions, device, every kernel, disk, demo packages. Needs no network."""
    from liger_cli.commands.doctor.checks import run_checks
    from liger_cli.common.environment import environment
    from liger_cli.report import show_json, show_table

    checks = list(run_checks())
    rows = [(check.status, check.name, check.found, check.advice) for check in checks]
    show_table(("", "check", "found", "what to do"), rows, stderr=as_json)
    failed = [check.name for check in checks if check.status == "fail"]
    if as_json:
        show_json(
            {
                "command": "doctor",
                "ok": not failed,
                "environment": environment(),
                "checks": [asdict(check) for check in checks],
            }
        )
    if failed:
        raise EnvironmentProblem(
            f"liger cannot work here as it is: {', '.join(failed)} failed", is_reported=True
        )
