"""liger bench: a model patched and not, or the kernels one by one."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from liger_cli.commands.bench.models.cli import command as bench_model
from liger_cli.commands.bench.ops.cli import command as bench_ops

__all__ = ["command"]


class _Bench(TyperGroup):
    """`liger bench ops ...` is a separate command; anything else compares a model."""

    def make_context(
        self, info_name: Any, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        if args[:1] == ["ops"]:
            return super().make_context(info_name, args, parent, **extra)
        return self.commands["model"].make_context(info_name, args, parent, **extra)


command = typer.Typer(cls=_Bench, add_completion=False)
command.command("ops")(bench_ops)
command.command("model")(bench_model)
