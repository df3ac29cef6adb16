"""Errors as a user sees them: a message, a hint and an exit code, for every entry point alike.

Warnings too: a line each.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from liger_cli.common.text import printable, shorten
from liger_cli.errors import (
    ConfigError,
    EnvironmentProblem,
    Interrupted,
    LigerError,
    OutOfMemory,
)

__all__ = ["describe_error", "is_out_of_memory", "is_usage_error", "show_error", "shown_warnings"]

# The directory of liger_cli and liger_kernels.
_OURS = Path(__file__).parents[2]

# What CPUs and libraries say, which raise a plain RuntimeError.
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "_ALLOC_FAILED")
_RED, _RESET = "\x1b[31m", "\x1b[0m"


@contextlib.contextmanager
def shown_warnings() -> Iterator[None]:
    """Print the warnings of this program as lines, each once; those of libraries as they are."""
    usual, seen = warnings.showwarning, set[str]()

    def show(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        text = str(message)
        path = Path(filename)
        if not any(path.is_relative_to(_OURS / name) for name in ("liger_cli", "liger_kernels")):
            usual(message, category, filename, *rest, **more)
        elif text not in seen:
            seen.add(text)
            sys.stderr.write(printable(f"warning: {text}") + "\n")

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no memory left."""
    # An error of torch exists only where torch has been imported.
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)


def is_usage_error(error: BaseException) -> bool:
    """Return whether typer raised an error about the words of the command line."""
    # Known by its method: the class is click's, or that of typer's own copy of click.
    return hasattr(error, "format_message")


def describe_error(error: BaseException, *, was_interrupted: bool = False) -> LigerError:
    """Return any error as one with a message, a hint and an exit code.

    Args:
        error: What ended the command.
        was_interrupted: Whether a signal came. Libraries turn a KeyboardInterrupt into other
            errors, so it decides.
    """
    if was_interrupted and not isinstance(error, Interrupted):
        return Interrupted("interrupted")
    if isinstance(error, LigerError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted")
    if is_usage_error(error):
        return ConfigError(error.format_message())  # type: ignore[attr-defined]
    if is_out_of_memory(error):
        return OutOfMemory(
            f"out of memory: {_first_line(error)}",
            hint="Lower --per-device-train-batch-size (and raise --gradient-accumulation-steps), "
            "lower --max-length, or add --gradient-checkpointing; to it, --tile-tokens 8192 or "
            "--activation-offloading true.",
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return ConfigError(f"no file system has such long names: {shorten(str(error.filename))}")
    if isinstance(error, OSError):
        return EnvironmentProblem(
            f"{type(error).__name__}: {_first_line(error)}",
            hint="`liger --debug COMMAND ...` shows where it comes from.",
        )
    return LigerError(
        f"{type(error).__name__}: {_first_line(error)}",
        hint="This is not an error that liger expects. `liger --debug COMMAND ...` shows where it "
        "comes from.",
    )


def show_error(problem: LigerError, stream: TextIO | None = None) -> None:
    """Print the message of an error, red on a terminal, and its hint below.

    Args:
        stream: stderr by default.
    """
    stream = stream or sys.stderr
    message = printable(f"error: {problem.message}")
    lines = [f"{_RED}{message}{_RESET}" if stream.isatty() else message]
    if problem.hint:
        lines.append(printable(problem.hint))
    stream.write("\n".join(lines) + "\n")
    stream.flush()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
