"""The flags of `liger estimate` for the speed of cards and links."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from liger_cli.commands.estimate.machine import Machine
from liger_cli.config.command_flags import own_parameters, shows_parameters

__all__ = ["rate_flags"]

_Result = TypeVar("_Result")
_PANEL = "Speed of cards and links, for the time of a step"

# Field of Machine: (flag, of how many units one is, help).
_FLAGS = {
    "flops": ("--tflops", 1e12, "Rate of a card in products of 16 bits, TFLOP/s."),
    "copy": ("--copy-gbs", 1e9, "Rate at which a card copies, GB/s."),
    "intra": ("--intra-node-gbs", 1e9, "Rate of an all-gather between GPUs of a host, GB/s."),
    "inter": ("--inter-node-gbs", 1e9, "Rate of a GPU's share of the network of hosts, GB/s."),
    "per_host": ("--gpus-per-node", 1, "GPUs of a host."),
}


def rate_flags(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """Give a typer command a flag for each rate; it receives them as `machine`, a Machine.

    Its other parameters stay as they are.
    """
    own = own_parameters(command, "machine")

    @functools.wraps(command)
    def with_machine(**arguments: Any) -> _Result:
        rates = {name: arguments.pop(name) * unit for name, (_, unit, _) in _FLAGS.items()}
        return command(machine=Machine(**rates), **arguments)

    parameters = list(own)
    for name, (flag, unit, text) in _FLAGS.items():
        default = getattr(Machine, name) / unit
        kind, least = (int, 1) if unit == 1 else (float, 1e-3)
        option = typer.Option(kind(default), flag, min=least, rich_help_panel=_PANEL, help=text)
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, keyword, annotation=kind, default=option))
    return shows_parameters(with_machine, parameters)
