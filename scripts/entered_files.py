"""Count the files of ours that `liger train` enters before its first logged step.

A file is entered when one of its functions is called; importing it alone does not count. The run is
the smallest one: a tiny random model, synthetic rows, one step on a CPU.

    python scripts/entered_files.py [--files]
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tuple(f"{ROOT / package}{os.sep}" for package in ("liger_cli", "liger_kernels"))
# The class whose `write` appends the metrics of a step to the log.
STEP_LOG = "run_log.py", "write"
WORDS = ["train", "--model", "qwen3", "--dataset", "synthetic", "--max-length", "64"]
WORDS += ["--max-steps", "1", "--use-cpu"]


class Entered:
    """Counts calls into our files until the first step is logged."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGES):
            return
        # The body of a module or class runs when it is imported.
        if not code.co_name.startswith("<module") and code.co_flags & 2:
            self.calls[code.co_filename] += 1
            if (Path(code.co_filename).name, code.co_name) == STEP_LOG:
                sys.setprofile(None)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from liger_cli.app import main as liger

    entered = Entered()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(SystemExit):
        sys.setprofile(entered)
        liger([*WORDS, "--output-dir", str(Path(folder) / "run")])
    sys.setprofile(None)
    if "--files" in sys.argv[1:]:
        for name, count in sorted(entered.calls.items()):
            print(f"{count:6} {Path(name).relative_to(ROOT)}")
    print(f"{len(entered.calls)} files, {entered.calls.total()} calls")


if __name__ == "__main__":
    main()
