"""liger merge: an adapter into its base model, or the shards of a checkpoint into one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from liger_cli.commands.merge.merge import Merged, Whole

__all__ = ["command"]

# A share of the adapter's change that shows in the loss.
_WORTH_SAYING = 0.1


def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Directory of an adapter, of a sharded checkpoint, or of their run.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write; new or empty.")
    ],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            "--dtype", help="Of the result; auto: as the files of the base or checkpoint."
        ),
    ] = "auto",
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template", metavar="FILE|NAME", help="Of the result; its own by default."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Put an adapter into its base model, or a sharded checkpoint together, as safetensors."""
    import torch

    from liger_cli.commands.merge.merge import find_checkpoint, merge
    from liger_cli.report import notify
    from liger_cli.training.runtime.launch import quiet_libraries

    quiet_libraries()
    merged = merge(
        find_checkpoint(checkpoint, notify),
        output,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        chat_template=chat_template,
        notify=notify,
    )
    _show(merged, as_json=as_json)


def _show(merged: Merged | Whole, *, as_json: bool) -> None:
    from dataclasses import asdict

    from liger_cli.report import notify, show_json, show_lines

    if as_json:
        show_json({"command": "merge", **asdict(merged)})
        return
    show_lines(*merged.lines)
    if merged.rounding > _WORTH_SAYING:
        notify(
            f"rounding to {merged.dtype} takes {merged.rounding:.0%} of what the adapter changes; "
            "--dtype float32 keeps it"
        )
