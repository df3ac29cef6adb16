"""liger push: the model of a run, with its card, to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run, a checkpoint, or what liger merge wrote."),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="organisation/name, or a name of your own.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and their sizes; no network.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Of a repository that is created.")
    ] = True,
    message: Annotated[
        str, typer.Option("--message", "-m", help="Of the commit.")
    ] = "Upload model trained with liger",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Push the model of a run and its card to the Hugging Face hub; a network only for that."""
    from liger_cli.report import notify, show_json, show_lines
    from liger_cli.report.publication import publication
    from liger_cli.training.runtime.launch import quiet_libraries

    quiet_libraries()
    found = publication(run, repository, private=private, notify=notify)
    if not as_json:
        show_lines(*found.lines)
    address = None if dry_run else found.push(message)
    if as_json:
        what = {"directory": str(found.directory), "repository": repository, "private": private}
        files = {"files": found.sizes, "dry_run": dry_run, "url": address}
        show_json({"command": "push", **what, **files})
    elif address is not None:
        show_lines(f"pushed: {address}")
