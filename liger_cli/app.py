"""The `liger` program: find the command, and turn every error into a message and an exit code.

Commands are imported when they run, so `liger --help` needs neither torch nor pydantic.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from liger_cli.common.failures import describe_error, is_usage_error, show_error, shown_warnings
from liger_cli.common.ranks import Rank, adopt_slurm, find_rank
from liger_cli.common.streams import SafeStreams
from liger_cli.common.text import printable
from liger_cli.errors import EnvironmentProblem, LigerError, panics_raised
from liger_cli.training.launch.faults import fault_of, report_fault
from liger_cli.training.runtime.stop_signals import Interruption
from liger_kernels.nearest import nearest_name

__all__ = ["COMMANDS", "main"]

# The commands, in the groups of `liger --help`.
_GROUPS = {
    "Train": {
        "train": "Fine-tune a model with fused kernels and measure what they gain.",
        "eval": "Loss, perplexity and token accuracy of a model, without making logits.",
        "report": "Show what a run or a comparison found: text, markdown, a page, pictures.",
        "compare": "Compare runs: losses, evaluations, speed, memory and settings.",
    },
    "Before a run": {
        "inspect": "Show module by module what would be patched, and why the rest would not.",
        "estimate": "Estimate a training step's memory by part, before a card is rented.",
        "data": "Show what training sees of a dataset: rendered rows, lengths, cuts, packing.",
        "config": "Write, check and show configuration files, and print their JSON schema.",
    },
    "Proof": {
        "verify": "Check the ops and your model against stock on this machine, gradients included.",
        "bench": "Run patched and eager side by side, with parity beside every speed.",
    },
    "After training": {
        "generate": "Continue a prompt, or chat with a model or a checkpoint.",
        "merge": "Put an adapter into its base model, or a sharded checkpoint together.",
        "export": "Write a model as GGUF, or our layers for Hugging Face's kernels.",
        "push": "Push the model of a run and its card to the Hugging Face hub.",
    },
    "This installation": {
        "models": "List the presets and the model types with a row.",
        "ops": "List the operations, their short names and what they need.",
        "doctor": "Check this machine: versions, devices, kernels.",
    },
}
COMMANDS = {name: line for group in _GROUPS.values() for name, line in group.items()}

# typer is built on click, or carries its own copy of it, by version; both spell snake_case and
# kebab-case flags alike through this function, and commands inherit it from the group.
_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


# Flags that may stand without a value, and their values, the first of which is meant then.
_ALONE = {
    "--padding-free": ("true", "false", "auto"),
    "--torch-compile": ("true", "false", "auto"),
}

# Commands that may be one of several processes.
_LAUNCHED = {"train", "eval", "bench", "verify"}


class _LazyGroup(TyperGroup):
    """Lists the commands by their line of help, and imports the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for title, group in _GROUPS.items():
            for name, line in group.items():
                self.commands[name] = TyperCommand(name, help=line, rich_help_panel=title)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # Older releases of typer name no nearest command.
        near = nearest_name(args[0], self.commands)
        if near and args[0] not in self.commands and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near!r}?")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _import_command(str(name)), _with_values(rest)

    def invoke(self, ctx: Any) -> Any:
        with Interruption() as interruption:
            return self._invoke(ctx, interruption)

    def _invoke(self, ctx: Any, interruption: Interruption) -> Any:
        try:
            with panics_raised():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            problem = describe_error(error, was_interrupted=interruption.requested)
            ending: _Ending = ctx.obj["ending"]
            if ctx.obj["as_json"] and not problem.is_reported and ending.shows_document:
                _show_as_json(problem)
            if is_usage_error(error) and not interruption.requested and ending.rank is None:
                # typer shows these itself, with the usage line.
                if isinstance(getattr(error, "message", None), str):
                    error.message = printable(error.message)  # type: ignore[union-attr]
                raise
            if ctx.params["debug"]:
                typer.echo(printable(traceback.format_exc()), err=True, nl=False)
            ending.show(problem, error)
            raise typer.Exit(problem.exit_code) from None


@dataclass(frozen=True)
class _Ending:
    """Shows the error that ends the program, once for all ranks of a launch."""

    rank: Rank | None
    stderr: TextIO

    @property
    def shows_document(self) -> bool:
        return self.rank is None or not self.rank.is_ours

    def show(self, problem: LigerError, error: BaseException) -> None:
        if self.rank is None:
            show_error(problem)
        else:
            report_fault(fault_of(problem, error, self.rank), self.rank, self.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `liger` and exit with the code of the command, or 3 where --json cannot be written.

    Args:
        arguments: The words after `liger`; those of the process by default.
    """
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    rank = _find_rank(words)
    with SafeStreams() as streams, _shown(rank, words) as stderr, shown_warnings():
        ending = _Ending(rank, stderr)
        obj = {"as_json": as_json, "words": tuple(words), "ending": ending}
        try:
            get_command(_app)(args=arguments, prog_name="liger", obj=obj)
        except SystemExit as end:
            failure = streams.stdout_failure()
            # Text is for people, who close a pipe when they have read enough. A document is whole.
            if failure is None or not as_json or end.code:
                raise
            problem = EnvironmentProblem(f"stdout cannot be written: {failure.strerror}")
            ending.show(problem, failure)
            raise SystemExit(problem.exit_code) from None


def _find_rank(words: Sequence[str]) -> Rank | None:
    """Return the rank of this process in a launch, if the command may be one of several."""
    if _LAUNCHED.isdisjoint(words):
        return None
    flags = [word.partition("=")[0].replace("_", "-") for word in words]
    if not any(flag.startswith(("--nproc", "--nnodes")) for flag in flags):
        adopt_slurm()
    rank = find_rank()
    if rank is not None:
        rank.end_with_launcher()
    return rank


def _shown(rank: Rank | None, words: Sequence[str]) -> contextlib.AbstractContextManager[TextIO]:
    """Return the output of a process: dropped on ranks other than 0 and that of --log-rank."""
    if rank is None:
        return contextlib.nullcontext(sys.stderr)
    text = " ".join(words).replace("--log_rank", "--log-rank")
    found = re.search(r"--log-rank[ =](\d+)", text)
    return rank.output(int(found[1]) if found else 0)


def _with_values(words: Sequence[str]) -> list[str]:
    """Give flags that may stand alone their value, where none follows."""
    found = list(words)
    for i in reversed(range(len(found))):
        flag = found[i].replace("_", "-")
        values = _ALONE.get(flag)
        if values and (i + 1 == len(found) or found[i + 1] not in values):
            found[i] = f"{flag}={values[0]}"
    return found


def _show_as_json(problem: LigerError) -> None:
    """Print the one document of a command that fails before it has another."""
    from liger_cli.report import show_json

    values = {"exit_code": problem.exit_code, "message": problem.message, "hint": problem.hint}
    show_json({"error": {"kind": type(problem).__name__, **values}})


def _import_command(name: str) -> Any:
    command = importlib.import_module(f"liger_cli.commands.{name}.cli").command
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
