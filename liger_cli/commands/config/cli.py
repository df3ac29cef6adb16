"""liger config: configuration files, written, checked and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liger_cli.config import ResolvedConfig, config_flags

__all__ = ["command"]

command = typer.Typer(
    help="Write, check and show configuration files, and print their JSON schema.",
    add_completion=False,
    no_args_is_help=True,
)
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


@command.command("init")
def _init(
    file: Annotated[Path, typer.Argument(help="File to write.")] = Path("train.yaml"),
    template: Annotated[str, typer.Option("--template", help="sft, full, eval, ...")] = "sft",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented configuration that runs as it is."""
    from liger_cli.commands.config.templates import write_template

    write_template(template, file, overwrite=force)


@command.command("import")
def _import(
    file: Annotated[Path, typer.Argument(help="YAML of axolotl or LLaMA-Factory.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Translate a configuration of axolotl or LLaMA-Factory; name every key that cannot be."""
    from liger_cli.commands.config.importing import import_to

    import_to(file, output, overwrite=force)


@command.command("show")
@config_flags
def _show(
    config: ResolvedConfig,
    sources: Annotated[bool, typer.Option("--sources", help="Say where values come from.")] = False,
    as_json: _AsJson = False,
) -> None:
    """Print every key as a run would take it: default, then file, then --set, then flag."""
    from liger_cli.report import show_json, show_lines

    if as_json:
        show_json({"command": "config show", "keys": config.describe()})
    else:
        show_lines(*config.to_yaml(with_sources=sources).splitlines())


@command.command("validate")
def _validate(
    files: Annotated[list[Path], typer.Argument(help="Configuration files.")],
    as_json: _AsJson = False,
) -> None:
    """Check files and name every problem in them; exit 2 if there is one."""
    from liger_cli.commands.config.validate import validate_files

    validate_files(files, as_json=as_json)


@command.command("schema")
def _schema() -> None:
    """Print the JSON schema of a file, for editors: # yaml-language-server: $schema=FILE."""
    from liger_cli.config.describe import json_schema
    from liger_cli.report import show_json

    show_json(json_schema())
