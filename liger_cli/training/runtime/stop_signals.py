"""The ends of a run before its last step: a signal, or values that are not finite."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

from liger_cli.errors import Interrupted, NonFiniteLoss

__all__ = ["Interruption", "SignalRelay", "StopRequest", "interrupted", "non_finite"]

_log = logging.getLogger(__name__)

# A launcher may forward at once the Ctrl-C that the terminal has sent to the run as well.
_ECHO_S = 1.0


class _Handler:
    """Handles SIGINT and SIGTERM inside a `with` block, in the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread, and lets no other thread ask for them.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            self._first()
        elif time.monotonic() - self._since > _ECHO_S:
            self._later(number)

    def _first(self) -> None:
        raise NotImplementedError

    def _later(self, number: int) -> None:
        raise NotImplementedError


class Interruption(_Handler):
    """Makes SIGINT and SIGTERM a KeyboardInterrupt, wherever a command is."""

    def _first(self) -> None:
        raise KeyboardInterrupt

    def _later(self, number: int) -> None:
        raise KeyboardInterrupt


class StopRequest(_Handler):
    """Turns the first SIGINT or SIGTERM into a flag; a later one acts as it would without this."""

    def __enter__(self) -> Self:
        super().__enter__()
        outer = getattr(self._previous.get(signal.SIGTERM), "__self__", None)
        # A library may have swallowed the KeyboardInterrupt.
        self.requested = isinstance(outer, Interruption) and outer.requested
        return self

    def _first(self) -> None:
        _log.warning("stopping after this step; once more stops at once")

    def _later(self, number: int) -> None:
        self.__exit__()
        signal.raise_signal(number)


class SignalRelay(_Handler):
    """Counts the signals, for a launcher that has other processes stop."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _first(self) -> None:
        self.count = 1

    def _later(self, number: int) -> None:
        self.count += 1


def interrupted(step: int, checkpoint: Path | None) -> Interrupted:
    """Return the error of a run that was stopped after a step."""
    if checkpoint is None:
        return Interrupted(f"interrupted after step {step}")
    return Interrupted(
        f"interrupted after step {step}; its checkpoint is {checkpoint}",
        hint="The same command with --resume auto continues from there.",
    )


def non_finite(step: int, loss: float, norm: float, checkpoint: Path | None) -> NonFiniteLoss:
    """Return the error of a step whose loss or gradient is NaN or infinite."""
    what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradient is {norm}"
    kept = f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written"
    return NonFiniteLoss(
        f"step {step}: the {what}; {kept}",
        hint="A lower --learning-rate, a longer --warmup-steps or --dtype float32 may help; "
        "--save-steps sets how often a checkpoint is written.",
    )
