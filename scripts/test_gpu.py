"""Run the GPU tests and write their log, with card and versions, to a results folder.

python3 scripts/test_gpu.py --output docs/results
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

ROOT = Path(__file__).parents[1]


def versions() -> str:
    import transformers
    import triton

    # The script's own folder is on the path, not the checkout.
    sys.path.insert(0, str(ROOT))
    from liger_cli.common.environment import commit

    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"transformers {transformers.__version__}, Python {sys.version.split()[0]}, "
        f"commit {commit()}"
    )


def run_pytest(log: TextIO, *arguments: str) -> int:
    """Run pytest and write its output here and to the log as it comes."""
    # Warnings of the libraries would fill the log with paths of this machine.
    command = [sys.executable, "-m", "pytest", "-q", "--disable-warnings", "-p", "no:benchmark"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([*command, *arguments], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for stream in (sys.stdout, log):
                stream.write(line)
                stream.flush()
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--workers", default="8", help="processes that share the GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: make test-gpu runs on a machine with one", file=sys.stderr)
        return 3
    options.output.mkdir(parents=True, exist_ok=True)
    shared = ("-n", options.workers, "-m")
    with (options.output / "test-gpu.log").open("w") as log:
        log.write(f"{datetime.date.today()}  {versions()}\n$ make test-gpu\n")
        codes = [
            run_pytest(log, *shared, "not whole_card", "tests/ops"),
            run_pytest(log, *shared, "gpu", "tests/transformers", "tests/compat", "tests/cli"),
            run_pytest(log, "-m", "gpu and whole_card", "tests/ops"),
        ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
