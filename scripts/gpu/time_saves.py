"""Run `liger WORDS` as a rank and write how long its steps waited for checkpoints, in seconds.

    torchrun --nproc-per-node 2 scripts/gpu/time_saves.py OUT.json train ...

The last checkpoint is left out: the run waits for it in any case.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from liger_cli.app import main
from liger_cli.training.checkpoints.saver import Saver


def time_saves(seconds: list[float]) -> None:
    """Append the time of each save to a list."""
    save = Saver.save_if_due

    def timed(self: Saver, step: int, **options: Any) -> bool:
        began = time.perf_counter()
        is_saved = save(self, step, **options)
        if is_saved and not options["is_final"]:
            seconds.append(round(time.perf_counter() - began, 4))
        return is_saved

    Saver.save_if_due = timed  # type: ignore[method-assign]


if __name__ == "__main__":
    found: list[float] = []
    time_saves(found)
    out, words = Path(sys.argv[1]), sys.argv[2:]
    try:
        main(words)
    finally:
        if os.environ.get("RANK", "0") == "0":
            out.write_text(json.dumps(found), encoding="utf-8")
