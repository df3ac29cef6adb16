"""liger export: a model as GGUF, or our layers for Hugging Face's `kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["command"]

command = typer.Typer(
    help="Write a model as GGUF, or our layers as a repository of Hugging Face's kernels.",
    add_completion=False,
    no_args_is_help=True,
)
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


@command.command("gguf")
def _gguf(
    model: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run, a checkpoint, a merged model or a preset."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, *.gguf.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Of matrices; auto: as the files of the model."),
    ] = "auto",
    as_json: _AsJson = False,
) -> None:
    """Write a model and its tokenizer as one file for llama.cpp, Ollama and LM Studio."""
    from dataclasses import asdict

    from liger_cli.commands.export.gguf_file import export_gguf
    from liger_cli.report import notify, show_json, show_lines
    from liger_cli.training.runtime.launch import quiet_libraries

    quiet_libraries()
    written = export_gguf(model, output, dtype, notify)
    if as_json:
        show_json({"command": "export gguf", **asdict(written)})
    else:
        show_lines(*written.lines)


@command.command("kernels")
def _kernels(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty.")],
    as_json: _AsJson = False,
) -> None:
    """Write our layers for kernelize and use_kernels of transformers, which load them offline."""
    from dataclasses import asdict

    from liger_cli.commands.export.kernels import export_kernels
    from liger_cli.report import show_json, show_lines

    written = export_kernels(directory)
    if as_json:
        show_json({"command": "export kernels", **asdict(written)})
    else:
        show_lines(*written.lines)
