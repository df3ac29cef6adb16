"""The process of an arm: it runs `liger train ...` and ends with the process that started it.

Its standard input is a pipe that whoever started it holds and writes nothing into. When that
process is gone, by SIGKILL too, the pipe ends, and this one with all that it started.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from liger_cli.app import main

__all__: list[str] = []


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main(sys.argv[1:])
