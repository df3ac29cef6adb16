"""Run the GPU tests and write their log, with card and versions, to a results folder.

python3 scripts/test_gpu.py --output docs/results
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def versions() -> str:
    import transformers
    import triton

    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"transformers {transformers.__version__}, Python {sys.version.split()[0]}"
    )


def run_pytest(*arguments: str) -> tuple[int, str]:
    # Warnings of the libraries would fill the log with paths of this machine.
    command = [sys.executable, "-m", "pytest", "-q", "--disable-warnings", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--workers", default="8", help="processes that share the GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: make test-gpu runs on a machine with one", file=sys.stderr)
        return 3
    runs = (
        run_pytest("-n", options.workers, "-m", "not whole_card", "tests/ops"),
        run_pytest("-m", "gpu and whole_card", "tests/ops"),
        run_pytest("-n", options.workers, "-m", "gpu", "tests/transformers"),
    )
    log = f"{datetime.date.today()}  {versions()}\n$ make test-gpu\n"
    log += "\n".join(text for _, text in runs)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "test-gpu.log").write_text(log)
    print(log[-6000:])
    return max(code for code, _ in runs)


if __name__ == "__main__":
    sys.exit(main())
