"""The `liger` program: finds the command, and turns every error into a message and an exit code.

Commands are imported when they run, so `liger --help` needs neither torch nor pydantic.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from liger_cli.errors import LigerError, OutOfMemory

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "Fine-tune a model with fused kernels and measure what they gain.",
    "eval": "Loss, perplexity and token accuracy of a model, without making logits.",
    "inspect": "Show module by module what would be patched, and why the rest would not.",
    "bench": "Run patched and eager side by side, with parity beside every speed.",
    "models": "List the presets and the model types with a row.",
    "ops": "List the operations, their short names and what they need.",
    "doctor": "Check this machine: versions, devices, kernels.",
}

# typer is built on click, or carries its own copy of it, by version; both spell snake_case and
# kebab-case flags alike through this function, and commands inherit it from the group.
_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


class _LazyGroup(TyperGroup):
    """Knows the commands by their line of help; imports the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, line in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=line)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # Older releases of typer name no nearest command.
        near = difflib.get_close_matches(args[0], self.commands, n=1)
        if near and args[0] not in self.commands and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _import_command(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            # Usage errors and typer.Exit carry an exit code as well; typer reports those itself.
            known = isinstance(error, LigerError)
            if not known and (hasattr(error, "exit_code") or isinstance(error, typer.Abort)):
                raise
            if isinstance(error, BrokenPipeError):
                raise
            if ctx.params["debug"]:
                traceback.print_exc()
            problem = error if isinstance(error, LigerError) else _describe(error)
            typer.secho(f"error: {problem.message}", err=True, fg=typer.colors.RED)
            if problem.hint:
                typer.echo(problem.hint, err=True)
            raise typer.Exit(problem.exit_code) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `liger` and exits with the code of the command.

    Args:
        arguments: The words after `liger`; those of the process by default.
    """
    get_command(_app)(args=arguments, prog_name="liger")


def _describe(error: Exception) -> LigerError:
    """An error nobody foresaw, as a message."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    # On a CPU torch raises a plain RuntimeError.
    if isinstance(error, kinds) or "can't allocate memory" in str(error):
        return OutOfMemory(
            f"out of memory: {_first_line(error)}",
            hint="Lower --per-device-train-batch-size (and raise --gradient-accumulation-steps), "
            "lower --max-length, or add --gradient-checkpointing.",
        )
    return LigerError(
        f"{type(error).__name__}: {_first_line(error)}",
        hint="This is not an error that liger expects. `liger --debug COMMAND ...` shows where it "
        "comes from.",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _import_command(name: str) -> Any:
    command = importlib.import_module(f"liger_cli.commands.{name}").command
    if not isinstance(command, typer.Typer):
        function, command = command, typer.Typer(add_completion=False)
        command.command(name)(function)
    return get_command(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"liger {version('liger-kernels')}")
        raise typer.Exit


_app = typer.Typer(cls=_LazyGroup, context_settings=_CONTEXT, no_args_is_help=True)


@_app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", "-v", help="Show the traceback of an error.")
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Make fine-tuning of Hugging Face models faster and smaller, and prove it."""
