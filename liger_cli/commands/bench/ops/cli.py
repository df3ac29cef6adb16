"""liger bench ops: each kernel against the limit of the hardware, torch and its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    ops: Annotated[
        str | None, typer.Option("--ops", metavar="LIST", help="Ops to measure; all by default.")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes", metavar="LIST", help="Shapes to measure, as the tables show them."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The first shape of each op, in one round.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compare with torch.compile, or not.")
    ] = True,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Turns that each side takes (default 3).")
    ] = None,
    peer_python: Annotated[
        Path | None,
        typer.Option("--peer-python", metavar="FILE", help="Python that has liger-kernel."),
    ] = None,
    peer_path: Annotated[
        Path | None,
        typer.Option("--peer-path", metavar="DIR", help="Folder that liger-kernel is in."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the tables there.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Also write the JSON there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Measure each op: time, share of the limit, memory and error, beside torch and the peers.

    An op that is worse than eager on a shape gets no figures, and the exit code is 7.
    """
    import torch

    from liger_cli.commands.bench.ops.rounds import plan_ops, require_checks, run_ops
    from liger_cli.commands.bench.ops.tables import show_ops_report, write_reports
    from liger_cli.common.outputs import check_files
    from liger_cli.report import show_lines

    plan = plan_ops(
        ops,
        shapes,
        is_quick=quick,
        with_compile=compiled,
        rounds=rounds,
        peer_python=peer_python,
        peer_path=peer_path,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    check_files({"--save": save, "--markdown": markdown})
    report = run_ops(
        plan,
        on_row=lambda work: show_lines(
            f"{work.op} {work.shape_text} {work.variant} ...", stderr=True
        ),
    )
    write_reports(report, json_file=save, markdown_file=markdown)
    show_ops_report(report, as_json=as_json)
    require_checks(report)
