"""liger data: what training sees of a dataset."""

from __future__ import annotations

from typing import Annotated

import typer

from liger_cli.config import RunConfig, config_flags
from liger_cli.training.model.names import check_model_name

__all__ = ["command"]

command = typer.Typer(
    help="Show what training sees of a dataset.", add_completion=False, no_args_is_help=True
)


@command.callback()
def _group() -> None:
    # A group with one command would otherwise be that command.
    pass


@command.command("preview")
@config_flags
def _preview(
    config: RunConfig,
    num_rows: Annotated[int, typer.Option("-n", "--rows", min=0, help="Rows to render.")] = 3,
    index: Annotated[
        int | None, typer.Option("--index", min=1, help="Render this row alone, from 1 on.")
    ] = None,
    ids: Annotated[
        bool, typer.Option("--ids", help="Also list each token: id, piece and label.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Render rows with their trained tokens marked; show lengths, cuts and what packing gains."""
    # Before torch and transformers are imported.
    check_model_name(config.model)

    from liger_cli.commands.data.preview import preview_data
    from liger_cli.report.data import show_preview
    from liger_cli.training.runtime.launch import quiet_libraries

    quiet_libraries()
    show_preview(preview_data(config, num_rows, index=index, with_ids=ids), as_json=as_json)
