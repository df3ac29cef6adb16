"""liger inspect: what would be patched in a model, module by module, without its weights."""

from __future__ import annotations

from typing import Annotated

import typer

from liger_cli.errors import RequirementFailed

__all__ = ["command"]


def command(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Preset, directory, config.json or hub id.")
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Show module by module what would be patched, and why the rest would not. Needs no weights."""
    from liger_cli.inspection import inspect_source
    from liger_cli.report import show_report, unmet_requirements
    from liger_cli.training.model import resolve_model
    from liger_cli.training.setup import parse_ops

    required = parse_ops(ops, require)
    report = inspect_source(resolve_model(model), ops)
    show_report(report, as_json=as_json, details=True)
    if unmet := unmet_requirements(report, required):
        raise RequirementFailed("\n".join(unmet), is_reported=True)
