"""stdout and stderr that a run survives: a closed pipe or a full disk behind them ends nothing."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import TextIO

__all__ = ["SafeStreams"]


class SafeStreams:
    """Replace sys.stdout and sys.stderr inside a `with` block by ones that never fail.

    Output that cannot be written is dropped, with all that follows it in the same stream. Streams
    without a file descriptor, such as a test's, are left as they are.
    """

    def __init__(self) -> None:
        self._files: dict[str, _Forgiving] = {}
        self._previous: dict[str, TextIO | None] = {}

    def __enter__(self) -> SafeStreams:
        for name in ("stdout", "stderr"):
            stream: TextIO | None = getattr(sys, name)
            if (file := _file_of(stream)) is None:
                continue
            self._previous[name], self._files[name] = stream, file
            setattr(sys, name, _text(file, stream))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, stream in self._previous.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)

    def stdout_failure(self) -> OSError | None:
        """Return why stdout could not be written up to here; None where it could."""
        if "stdout" not in self._files:
            return None
        sys.stdout.flush()
        return self._files["stdout"].failure


class _Forgiving(io.FileIO):
    """A file descriptor that accepts everything, and remembers why it could not write it."""

    failure: OSError | None = None

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        rest = view
        while rest and self.failure is None:
            try:
                written = super().write(rest)
                if written is None:
                    # A pipe that does not block, and is full.
                    select.select([], [self], [])
                rest = rest[written or 0 :]
            except OSError as error:
                self.failure = error
        return len(view)


def _file_of(stream: TextIO | None) -> _Forgiving | None:
    if stream is not None:
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError):
            return None
        with contextlib.suppress(OSError):
            stream.flush()
        return _Forgiving(descriptor, "wb", closefd=False)
    # Closed before the program began. The number must not become that of a file of the run.
    file = _Forgiving(os.open(os.devnull, os.O_WRONLY), "wb", closefd=False)
    file.failure = OSError(errno.EBADF, os.strerror(errno.EBADF))
    return file


def _text(file: _Forgiving, like: TextIO | None) -> TextIO:
    if isinstance(like, io.TextIOWrapper):
        # Unbuffered where Python was started so.
        is_direct = like.write_through
        return io.TextIOWrapper(
            file if is_direct else io.BufferedWriter(file),
            encoding=like.encoding,
            errors=like.errors,
            line_buffering=like.line_buffering,
            write_through=is_direct,
        )
    return io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8", errors="backslashreplace")
