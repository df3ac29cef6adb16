"""liger config: configuration files, written, checked and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liger_cli.config import ResolvedConfig, config_flags, find_problems
from liger_cli.errors import ConfigError

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
    from liger_cli.report import show_lines

    write_template(template, file, overwrite=force)
    verb = "eval" if template == "eval" else "train"
    show_lines(f"wrote {file} (template {template}); run it: liger {verb} -c {file}")


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
    from liger_cli.report import show_json, show_lines

    problems = {str(file): find_problems(file) for file in files}
    found = [problem for of_file in problems.values() for problem in of_file]
    if as_json:
        show_json({"command": "config validate", "problems": problems})
    else:
        show_lines(*(f"{file}: ok" for file, of_file in problems.items() if not of_file))
    if found:
        raise ConfigError("\n".join(found), is_reported=True)


@command.command("schema")
def _schema() -> None:
    """Print the JSON schema of a file, for editors: # yaml-language-server: $schema=FILE."""
    from liger_cli.config.describe import json_schema
    from liger_cli.report import show_json

    show_json(json_schema())
