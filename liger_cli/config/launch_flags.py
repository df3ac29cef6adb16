"""The flags by which a command starts several processes; they are no keys of the configuration."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import typer

from liger_cli.config.command_flags import own_parameters, shows_parameters
from liger_cli.errors import ConfigError

__all__ = ["Launch", "launch_flags", "without_launch_flags"]

_Result = TypeVar("_Result")
_PANEL = "Several processes"


@dataclass(frozen=True)
class Launch:
    """The launch that the words of a command ask for, not yet checked.

    Attributes:
        nproc: Processes on this host: a number, "auto" or None where the flag was not given.
        nnodes: Hosts.
        node_rank: Number of this host.
        rdzv_endpoint: HOST:PORT where hosts meet.
        log_rank: The rank whose messages are shown.
        words: The words of the command line.
    """

    nproc: str | None = None
    nnodes: int | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    log_rank: int = 0
    words: tuple[str, ...] = ()

    @property
    def is_asked_for(self) -> bool:
        """Whether any flag says how to start processes."""
        given = (self.nproc, self.nnodes, self.node_rank, self.rdzv_endpoint)
        return any(value is not None for value in given)

    def refuse_several(self, command: str, hint: str) -> None:
        """Check that a command that runs in one process is not asked for more.

        Raises:
            ConfigError: A flag asks for more.
        """
        if self.nproc not in (None, "1") or self.nnodes not in (None, 1) or self.log_rank:
            asked = f"--nproc {self.nproc}" if self.nproc not in (None, "1") else "several ranks"
            raise ConfigError(f"{asked}: `liger {command}` runs in one process", hint=hint)


# Field of Launch: (names of the flag, type, more of typer.Option).
_FLAGS: dict[str, tuple[tuple[str, ...], Any, dict[str, Any]]] = {
    "nproc": (
        ("--nproc", "--nproc-per-node"),
        str | None,
        {"metavar": "N|auto", "help": "Processes on this host; auto: one for each GPU."},
    ),
    "nnodes": (("--nnodes",), int | None, {"metavar": "N", "help": "Hosts of the launch."}),
    "node_rank": (
        ("--node-rank",),
        int | None,
        {"metavar": "N", "help": "Number of this host, from 0; host 0 has rank 0."},
    ),
    "rdzv_endpoint": (
        ("--rdzv-endpoint",),
        str | None,
        {"metavar": "HOST:PORT", "help": "Where hosts meet: host 0 and a free port of it."},
    ),
    "log_rank": (
        ("--log-rank",),
        int,
        {"metavar": "RANK", "help": "The rank whose messages are shown."},
    ),
}


def launch_flags(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """Give a typer command the flags of a launch; it receives them as `launch`, a Launch.

    Its other parameters stay as they are.
    """
    own = own_parameters(command, "launch")

    @functools.wraps(command)
    def with_launch(*, context: typer.Context, **arguments: Any) -> _Result:
        flags = {name: arguments.pop(name) for name in _FLAGS}
        words = (context.obj or {}).get("words", ())
        return command(launch=Launch(**flags, words=tuple(words)), **arguments)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", keyword, annotation=typer.Context), *own]
    for name, (names, kind, more) in _FLAGS.items():
        default = 0 if name == "log_rank" else None
        option = typer.Option(default, *names, rich_help_panel=_PANEL, show_default=False, **more)
        parameters.append(inspect.Parameter(name, keyword, annotation=kind, default=option))
    return shows_parameters(with_launch, parameters)


def without_launch_flags(words: tuple[str, ...]) -> list[str]:
    """Return the words of a command line without the flags of a launch: those of a rank."""
    flags = {flag for names, _, _ in _FLAGS.values() for flag in names}
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name.replace("_", "-") not in flags:
            found.append(word)
        elif not equals:
            next(rest, None)
    return found
