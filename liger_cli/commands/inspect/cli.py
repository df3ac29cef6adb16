"""liger inspect: what would be patched in a model, module by module, without its weights."""

from __future__ import annotations

from typing import Annotated

import typer

from liger_cli.config import RunConfig, adapter_flags
from liger_cli.training.model.names import check_model_name

__all__ = ["command"]


@adapter_flags
def command(
    adapter: RunConfig,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Preset, directory (of a run too), config.json or hub id."
        ),
    ],
    ops: Annotated[
        str, typer.Option("--ops", help="auto, all, none, a list, or auto,-rope.")
    ] = "auto",
    require: Annotated[
        str,
        typer.Option(
            "--require", metavar="OPS", help="Exit 7 unless these are patched throughout."
        ),
    ] = "",
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc", min=1, metavar="N", help="Also what each of N ranks has of each parameter."
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also the file and line of each forward.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Show module by module what would be patched, and why the rest would not. Needs no weights.

    With --adapter the model has that adapter, as in train. With --nproc and the dp keys each
    parameter has its group, its placement and its bytes on a rank; no ranks are started.
    """
    # Before torch and transformers are imported.
    check_model_name(model)

    from functools import partial

    from liger_cli.commands.inspect.layout import describe_layout
    from liger_cli.report import show_lines, show_report
    from liger_cli.report.inspection import find_model, inspect_source
    from liger_cli.report.required_ops import check_required, parse_ops

    parse_ops(ops, require)
    source = find_model(model, notify=partial(show_lines, stderr=True))
    report = inspect_source(source, ops, adapter)
    if nproc is not None or adapter.dp_shard_size is not None or adapter.dp_replicate_size != 1:
        report.layout = describe_layout(adapter, source, report.modules or [], nproc or 1)
    show_report(report, as_json=as_json, details=True, verbose=verbose)
    check_required(report, require, is_reported=True)
