"""liger merge: an adapter into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from liger_cli.commands.merge.merge import Merged

__all__ = ["command"]

# A share of the adapter's change that shows in the loss.
_WORTH_SAYING = 0.1


def command(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Directory of an adapter, or of its run.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write; new or empty.")
    ],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Of the result; auto is what the base model's files hold."),
    ] = "auto",
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template", metavar="FILE|NAME", help="Of the result; the adapter's by default."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Put an adapter into its base model: safetensors, configuration and tokenizer."""
    import torch

    from liger_cli.commands.merge.merge import find_adapter, merge_adapter
    from liger_cli.report import notify
    from liger_cli.training.runtime.launch import quiet_libraries

    quiet_libraries()
    merged = merge_adapter(
        find_adapter(checkpoint, notify),
        output,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        chat_template=chat_template,
        notify=notify,
    )
    _show(merged, as_json=as_json)


def _show(merged: Merged, *, as_json: bool) -> None:
    from dataclasses import asdict

    from liger_cli.common.numbers import format_count
    from liger_cli.report import notify, show_json, show_lines

    if as_json:
        show_json({"command": "merge", **asdict(merged)})
        return
    show_lines(
        f"{merged.adapter}: {merged.num_merged} modules merged into {merged.base}",
        f"{merged.output}: {format_count(merged.num_parameters)} parameters in {merged.dtype}",
    )
    if merged.rounding > _WORTH_SAYING:
        notify(
            f"rounding to {merged.dtype} takes {merged.rounding:.0%} of what the adapter changes; "
            "--dtype float32 keeps it"
        )
