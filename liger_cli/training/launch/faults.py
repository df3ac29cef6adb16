"""Why a launch ended: what its ranks say of their errors, and which of these was first.

A rank that fails writes a Fault into a file of its launcher. One error makes others: who waited for
the rank loses its connection, or waits until ddp_timeout. So a fault has a cause, and the first of
those that follow from no other is the reason.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from liger_cli.common.failures import show_error
from liger_cli.common.ranks import Rank
from liger_cli.errors import Interrupted, LigerError, OutOfMemory, error_of

__all__ = ["Ended", "Fault", "fault_of", "killed", "read_fault", "report_fault", "to_error"]

# What gloo, NCCL and the store say. They raise a plain RuntimeError as often as one of their own.
_TIMEOUT_WORDS = ("timed out waiting", "wait timeout", "collective operation timeout")
_LOST_WORDS = ("gloo/transport", "connection closed by peer", "connection reset by peer")
_LOST_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
# In the store of the process group.
_FIRST = "liger/first_fault"

Cause = Literal["error", "lost", "timeout", "abort"]


@dataclass(frozen=True)
class Fault:
    """The error that ended a rank.

    Attributes:
        cause: `error`; or what other ranks may be to blame for: `lost`, `timeout`, and `abort`, as
            NCCL ends a process whose collective takes too long.
        at: Seconds since the epoch.
        is_reported: Whether the rank has printed a report that shows it too.
    """

    rank: int
    host: str
    exit_code: int
    message: str
    hint: str | None = None
    cause: Cause = "error"
    at: float = 0.0
    is_reported: bool = False


@dataclass(frozen=True)
class Ended:
    """The ends of the ranks of one or more hosts.

    Attributes:
        faults: Of the ranks that failed.
        silent: Those that were neither done nor failed when the others had failed.
    """

    faults: tuple[Fault, ...] = ()
    silent: tuple[str, ...] = ()

    def __add__(self, other: Ended) -> Ended:
        return Ended(self.faults + other.faults, self.silent + other.silent)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Ended:
        values = json.loads(text)
        return cls(tuple(Fault(**fault) for fault in values["faults"]), tuple(values["silent"]))


def fault_of(problem: LigerError, error: BaseException, rank: Rank) -> Fault:
    """Return the fault of a rank whose command ended with an error.

    Args:
        problem: The error as a user sees it.
        error: The one that was raised.
    """
    return Fault(
        rank=rank.number,
        host=rank.host,
        exit_code=problem.exit_code,
        message=problem.message,
        hint=problem.hint,
        cause="error" if isinstance(problem, Interrupted) else _cause(error),
        at=time.time(),
        is_reported=problem.is_reported,
    )


def _cause(error: BaseException | None) -> Cause:
    while error is not None:
        text = str(error).lower()
        if not isinstance(error, LigerError):
            if any(words in text for words in _TIMEOUT_WORDS):
                return "timeout"
            is_lost = type(error).__name__ in _LOST_TYPES
            if is_lost or any(words in text for words in _LOST_WORDS):
                return "lost"
        error = error.__cause__ or error.__context__
    return "error"


def report_fault(fault: Fault, rank: Rank, stderr: TextIO) -> None:
    """Leave the fault of this rank where its launcher looks for it.

    A launcher that is not ours shows nothing of it, or of every rank: then the rank that fails
    first prints it here.
    """
    if rank.fault_file is not None:
        _write(fault, rank.fault_file)
    if rank.is_ours or not _is_first(fault, rank):
        return
    message, hint = _described(fault)
    show_error(error_of(fault.exit_code)(message, hint=hint), stderr)


def _write(fault: Fault, file: Path) -> None:
    # The form of torch's elastic launcher, with ours beside it.
    text, hint = _described(fault)
    more = {"py_callstack": f"{text}\n{hint or ''}".strip(), "timestamp": str(int(fault.at))}
    values = {"message": {"message": text, "extraInfo": more}, "liger": asdict(fault)}
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        # The error itself matters more than the file.
        sys.stderr.write(f"{file} cannot be written: {error}\n")


def read_fault(file: Path) -> Fault | None:
    """Return the fault that a rank has written, or None."""
    try:
        return Fault(**json.loads(file.read_text(encoding="utf-8"))["liger"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_first(fault: Fault, rank: Rank) -> bool:
    """Return whether no other rank has failed before; asks the store of the process group."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        # All ranks read the same words and files: one message is enough.
        return rank.local == 0 or fault.exit_code != 2
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        mine = f"{fault.rank} {fault.at}"
        return bool(store.compare_set(_FIRST, "", mine).decode() == mine)
    except (RuntimeError, ValueError):
        # The rank that holds the store is gone.
        return True


def to_error(ended: Ended, *, num_ranks: int, checkpoint: Path | None) -> LigerError:
    """Return the first fault of a launch as the error of its launcher.

    Args:
        ended: All that is known of the ranks.
        num_ranks: Ranks whose faults `ended` may have.
        checkpoint: The newest checkpoint of the run, which a person can resume from.
    """
    faults = ended.faults
    order: list[Cause] = ["error", "abort", "timeout", "lost"]
    first = min(faults, key=lambda fault: (order.index(fault.cause), fault.at))
    if first.cause in ("timeout", "abort") and ended.silent:
        late = ", ".join(ended.silent)
        first = replace(
            first, message=f"waited longer than ddp_timeout for {late}: {first.message}"
        )
    same = [fault for fault in faults if fault.message == first.message]
    is_everywhere = len(same) == num_ranks
    # Words and files of the configuration are those of all ranks.
    is_anywhere = first.exit_code in (2, 130) or first.is_reported
    message, hint = first.message, first.hint
    if not (is_everywhere or is_anywhere):
        message, hint = _described(first)
    if checkpoint is not None and str(checkpoint) not in message:
        line = f"The newest checkpoint is {checkpoint}; --resume {checkpoint} continues from it."
        hint = f"{hint}\n{line}" if hint else line
    kind = error_of(first.exit_code)
    return kind(message, hint=hint, is_reported=first.is_reported)


def _described(fault: Fault) -> tuple[str, str | None]:
    """Return the message with the rank and its host, and the hint."""
    return f"rank {fault.rank} on {fault.host}: {fault.message}", fault.hint


def killed(rank: int, host: str, code: int, log: str) -> Fault:
    """Return the fault of a rank that has ended without writing one.

    Args:
        code: The exit code; of a signal its negative number.
        log: The last lines of its output, where the launcher has them.
    """
    hint = f"The last it printed:\n{log}" if log else None
    exit_code, message = 1, f"ended with exit code {code}"
    cause: Cause = "abort" if code == -signal.SIGABRT else "error"
    if code == -signal.SIGKILL:
        exit_code = OutOfMemory.exit_code
        message = "killed (signal 9), as Linux does to a process for which there is no memory left"
    elif code in (-signal.SIGTERM, -signal.SIGINT):
        # It came before the program could handle it.
        exit_code, message = Interrupted.exit_code, "interrupted"
    elif code < 0:
        message = f"ended by signal {-code} ({signal.strsignal(-code)})"
    return Fault(rank, host, exit_code, message, hint, cause, time.time())
