"""The lock on a directory that a run writes into: a second run is refused at its start.

The file holds host, process id and start time of the process. It is locked for the operating system
too (a POSIX record lock, which ends with the process and is not inherited by a fork), so judging a
lock that was left behind and taking it over are one step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from liger_cli.common.outputs import write_problem
from liger_cli.errors import ConfigError

__all__ = ["LOCK", "locked"]

# In the directory of a run, as long as the run is on.
LOCK = "run.lock"


@dataclass(frozen=True)
class _Holder:
    """A process on a host; `started` distinguishes it from a later one with the same id."""

    host: str
    pid: int
    started: str | None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def locked(file: Path, what: str, notify: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock for a block; it is released however the block ends.

    Args:
        file: The lock. Directories above it are created, and removed again if they stay empty.
        what: Flag and path of the directory that is locked, for messages.
        notify: Called with a line about a lock that a dead process left behind.

    Raises:
        ConfigError: Another process holds it, or one on another host has left it.
        EnvironmentProblem: It cannot be written.
    """
    created = [path for path in file.absolute().parents if not path.exists()]
    try:
        descriptor = _open_locked(file, what)
        try:
            _take(descriptor, file, what, notify)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    file.unlink()
        finally:
            os.close(descriptor)
    finally:
        for path in created:
            # One that has content by now stays, with all above it.
            with contextlib.suppress(OSError):
                path.rmdir()


def _open_locked(file: Path, what: str) -> int:
    """Return a descriptor of the file that holds the lock of the operating system."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            # Another run has removed the directory that it had created.
            continue
        except OSError as error:
            raise write_problem(file, error) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = _read(descriptor)
                os.close(descriptor)
                raise _in_use(what, holder) from None
            # A file system without locks: the content of the file has to do.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        # Released and deleted between the two calls.
        os.close(descriptor)


def _take(descriptor: int, file: Path, what: str, notify: Callable[[str], None]) -> None:
    """Judge the holder that the file names, and write this process in its place."""
    this = _Holder(socket.gethostname(), os.getpid(), _start_of(os.getpid()))
    holder = _read(descriptor)
    if holder is not None:
        if holder.host != this.host:
            raise ConfigError(
                f"{what} is locked by {holder}; whether that run has ended cannot be found out on "
                f"{this.host}",
                hint=f"If it has ended, delete {file} and start again.",
            )
        if _is_alive(holder):
            raise _in_use(what, holder)
    if os.fstat(descriptor).st_size:
        left_by = "a process" if holder is None else str(holder)
        notify(f"{file} was left by {left_by} that has ended; taking it over")
    try:
        content = json.dumps(asdict(this)).encode() + b"\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise write_problem(file, error) from error


def _in_use(what: str, holder: _Holder | None) -> ConfigError:
    by = "another process" if holder is None else str(holder)
    return ConfigError(
        f"{what} is in use by a run, {by}",
        hint="Wait until that run has ended, or take another directory.",
    )


def _read(descriptor: int) -> _Holder | None:
    """Return the holder that the file names; None where the file is empty or of another kind."""
    try:
        values = json.loads(os.pread(descriptor, 4096, 0))
        return _Holder(str(values["host"]), int(values["pid"]), values["started"])
    except (ValueError, KeyError, TypeError):
        return None


def _is_alive(holder: _Holder) -> bool:
    """Return whether a process of this host runs, and is not a later one with the same id."""
    if Path("/proc/self/stat").exists():
        return holder.started is not None and _start_of(holder.pid) == holder.started
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _start_of(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses, the second field, may hold anything.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
