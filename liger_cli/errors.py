"""The errors that end a run with a message instead of a traceback, each with its exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

__all__ = [
    "ConfigError",
    "DataError",
    "EnvironmentProblem",
    "ExtensionPanic",
    "Interrupted",
    "LigerError",
    "NonFiniteLoss",
    "OutOfMemory",
    "RequirementFailed",
    "error_of",
    "panics_raised",
]


class LigerError(Exception):
    """Say what went wrong, for the person who started the run.

    Args:
        message: One or more sentences naming the argument, the value and what is allowed.
        hint: What to do next, shown apart from the message.
        is_reported: Whether the command has printed its report, which shows it too.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, is_reported: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.is_reported = is_reported


class ConfigError(LigerError):
    """A flag, key or value that is unknown or not allowed."""

    exit_code = 2


class EnvironmentProblem(LigerError):
    """A package, device, file system or network that the run needs is missing."""

    exit_code = 3


class DataError(LigerError):
    """Training data that cannot be read, or cannot be labelled right."""

    exit_code = 4


class OutOfMemory(LigerError):
    """The device has less memory than the run needs."""

    exit_code = 5


class NonFiniteLoss(LigerError):
    """The loss or a gradient is NaN or infinite."""

    exit_code = 6


class RequirementFailed(LigerError):
    """A check that the user asked for does not hold."""

    exit_code = 7


class Interrupted(LigerError):
    """The user stopped the run; what it had is saved."""

    exit_code = 130


def error_of(exit_code: int) -> type[LigerError]:
    """Return the kind of error that has an exit code, for an error of another process."""
    kinds = {kind.exit_code: kind for kind in LigerError.__subclasses__()}
    return kinds.get(exit_code, LigerError)


class ExtensionPanic(Exception):
    """A compiled extension gave up, as a tokenizer in Rust does by a panic."""


@contextmanager
def panics_raised() -> Iterator[None]:
    """Raise what a compiled extension ends with as an ExtensionPanic.

    Such an exception is a BaseException, which passes every `except Exception` and ends a worker
    without a word. What ends a program on purpose passes through.

    Raises:
        ExtensionPanic: With the first line of what the extension says.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        line = (str(error).splitlines() or [""])[0]
        raise ExtensionPanic(f"{type(error).__name__}: {line}") from error
