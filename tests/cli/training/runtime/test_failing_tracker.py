"""A tracker that fails in the middle of a run is reported once, and the run continues."""

from __future__ import annotations

import json
import sys

import pytest
from accelerate import tracking


class Failing:
    """A tracker whose calls raise, from the step and in the method that a test names."""

    fails_in = "log"
    rows: list[int]

    def __init__(self, **options):
        Failing.rows = []

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None):
        if Failing.fails_in == "log" and step == 2:
            raise ConnectionError("the server\nis away")
        Failing.rows.append(step)

    def finish(self):
        if Failing.fails_in == "finish":
            raise ConnectionError("the server is away")


class Healthy(Failing):
    """A tracker of the same run that works."""

    steps: list[int]

    def __init__(self, **options):
        Healthy.steps = []

    def log(self, values, step=None):
        Healthy.steps.append(step)

    def finish(self):
        Healthy.steps.append(-1)


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_tracker_that_fails_ends_no_run(train, run_dir, monkeypatch, method):
    for name, tracker in (("wandb", Failing), ("mlflow", Healthy)):
        monkeypatch.setitem(sys.modules, name, sys)
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, tracker)
    monkeypatch.setattr(Failing, "fails_in", method)
    done = train("--report-to", "wandb,mlflow")
    assert done.code == 0, done.err
    assert " ".join(done.err.split()).count("report_to wandb") == 1
    assert "the server is away" in " ".join(done.err.split())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (run_dir / "checkpoint-3").is_dir()
    assert set(Healthy.steps) >= {1, 2, 3, -1}
    # It is not called again: its own series would have a hole that nobody sees.
    assert 3 not in Failing.rows or method == "finish"
