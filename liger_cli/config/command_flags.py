"""A typer command with flags that it receives as one value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

__all__ = ["own_parameters", "shows_parameters"]

_Wrapped = TypeVar("_Wrapped", bound=Callable[..., Any])


def own_parameters(command: Callable[..., Any], received: str) -> list[inspect.Parameter]:
    """Return the parameters of a command without the one for which it gets flags.

    Args:
        received: The name of that one.
    """
    hints = get_type_hints(command, include_extras=True)
    return [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != received
    ]


def shows_parameters(wrapped: _Wrapped, parameters: Sequence[inspect.Parameter]) -> _Wrapped:
    """Let typer see these parameters at a function that functools.wraps made."""
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # typer would otherwise read the hints of the function inside, which has the one value.
    del wrapped.__wrapped__  # type: ignore[attr-defined]
    return wrapped
