"""case_231: pairs of whole runs that begin together, by scripts/kill_runs.py in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[4] / "scripts" / "kill_runs.py"


@pytest.mark.slow  # Nine runs of a small model.
def test_case_231_kills_and_pairs():
    words = ("--kills", "2", "--pairs", "2")
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exit codes [0, 2]") == 2
    assert done.stdout.splitlines()[-1].startswith("ok, ")
