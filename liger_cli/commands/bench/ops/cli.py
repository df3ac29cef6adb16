"""liger bench ops: each kernel against the limit of the hardware, torch and its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def _option(name: str, text: str, metavar: str | None = None, **more: object) -> object:
    return typer.Option(name, metavar=metavar, help=text, **more)  # type: ignore[arg-type]


def command(
    ops: Annotated[str | None, _option("--ops", "Ops to measure; all by default.", "LIST")] = None,
    shapes: Annotated[
        str | None, _option("--shapes", "Shapes to measure, as the tables show them.", "LIST")
    ] = None,
    quick: Annotated[bool, _option("--quick", "The first shape of each op, in one round.")] = False,
    compiled: Annotated[
        bool, _option("--compile/--no-compile", "Compare with torch.compile, or not.")
    ] = True,
    rounds: Annotated[
        int | None, _option("--rounds", "Turns that each side takes (default 3).", min=1)
    ] = None,
    peer_python: Annotated[
        Path | None, _option("--peer-python", "Python that has liger-kernel.", "FILE")
    ] = None,
    peer_path: Annotated[
        Path | None, _option("--peer-path", "Folder that liger-kernel is in.", "DIR")
    ] = None,
    markdown: Annotated[
        Path | None, _option("--markdown", "Also write the tables there.", "FILE")
    ] = None,
    save: Annotated[Path | None, _option("--save", "Also write the JSON there.", "FILE")] = None,
    as_json: Annotated[bool, _option("--json", "One JSON document.")] = False,
) -> None:
    """Measure each op: time, share of the limit, memory and error, beside torch and the peers.

    An op that is worse than eager on a shape gets no figures, and the exit code is 7.
    """
    import torch

    from liger_cli.commands.bench.ops.plan import OpsRequest, plan_ops
    from liger_cli.commands.bench.ops.rounds import require_checks, run_ops
    from liger_cli.commands.bench.ops.tables import show_ops_report, write_reports
    from liger_cli.common.outputs import check_files
    from liger_cli.report import show_lines

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    request = OpsRequest(ops, shapes, quick, compiled, rounds, peer_python, peer_path)
    plan = plan_ops(request, device)
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
