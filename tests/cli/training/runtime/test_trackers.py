"""Trackers and the profiler: what they are given, and when they end."""

from __future__ import annotations

import json
import sys

import pytest
from accelerate import tracking


class Recorder:
    """Stands for a tracker of accelerate: keeps what it is told."""

    def __init__(self, **options):
        self.options = options
        self.rows = []
        self.config = None
        self.calls = []
        Recorder.made.append(self)

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None):
        self.rows.append((step, values))

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def recorders(monkeypatch):
    """Takes the place of wandb and mlflow, which need not be installed."""
    Recorder.made = []
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, sys)
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Recorder)
    return Recorder.made


def test_trackers_get_configuration_steps_and_evaluations(train, run_dir, recorders):
    words = ("--report-to", "wandb,mlflow", "--eval-fraction", 0.2, "--eval-steps", 2)
    done = train(*words)
    assert done.code == 0, done.err
    assert [
        recorder.options.get("name", recorder.options.get("run_name")) for recorder in recorders
    ]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evals = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    for recorder in recorders:
        assert recorder.calls == ["start", "finish"]
        assert recorder.config["learning_rate"] == 5e-5
        assert recorder.config["output_dir"] == str(run_dir)
        assert None not in recorder.config.values()
        steps = [(step, values) for step, values in recorder.rows if "train/loss" in values]
        assert [step for step, _ in steps] == [1, 2, 3]
        assert [values["train/loss"] for _, values in steps] == [row["loss"] for row in rows]
        assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_s"} <= {*steps[0][1]}
        found = [
            (step, values["eval/loss"])
            for step, values in recorder.rows
            if step and "eval/loss" in values
        ]
        assert found == [(row["step"], row["eval_loss"]) for row in evals]
    wandb, mlflow = (recorder.options for recorder in recorders)
    assert wandb == {"run_name": "liger", "name": "run", "dir": str(run_dir)}
    assert mlflow == {"experiment_name": "liger", "run_name": "run"}


def test_trackers_get_what_torch_compile_became(train, recorders, monkeypatch):
    """Where it is decided by a measurement, after the model is loaded."""
    from liger_cli.commands.train import prepare
    from liger_cli.training import session
    from liger_cli.training.auto_compile import Decision

    monkeypatch.setattr(prepare, "decide_early", lambda *args, **options: None)
    decision = Decision(False, "torch_compile: measured")
    monkeypatch.setattr(session, "decide_measured", lambda *args: decision)
    done = train("--report-to", "wandb")
    assert done.code == 0, done.err
    [recorder] = recorders
    assert recorder.config["torch_compile"] is False


def test_trackers_end_when_the_run_fails(train, recorders, monkeypatch):
    from liger_cli.training import session

    monkeypatch.setattr(session, "_is_finite", lambda *values: False)
    assert train("--report-to", "wandb").code == 6
    assert [recorder.calls for recorder in recorders] == [["start", "finish"]]


def test_a_tracker_that_does_not_start_is_an_environment_problem(train, recorders, monkeypatch):
    def fail(self):
        raise RuntimeError("no api key")

    monkeypatch.setattr(Recorder, "start", fail)
    done = train("--report-to", "wandb")
    assert done.code == 3
    assert "report_to wandb does not start: no api key" in done.err


def test_nothing_is_tracked_unasked(train, run_dir, recorders):
    assert train().code == 0
    assert train("--report-to", "none", "--output-dir", run_dir.with_name("other")).code == 0
    assert not recorders


def test_a_run_that_only_measures_reports_to_nobody(measure, recorders):
    assert measure(report_to="wandb")["train"]["steps"] == 3
    assert not recorders


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio", "comet_ml"])
def test_a_missing_package_is_named_before_anything_starts(train, run_dir, monkeypatch, name):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    done = train("--report-to", name)
    assert done.code == 3
    assert f"report_to {name} needs {module}" in done.err
    assert f"pip install {name}" in done.err
    assert not run_dir.exists()


def test_tensorboard_files(train, run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train("--report-to", "tensorboard")
    assert done.code == 0, done.err
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(row["step"], pytest.approx(row["loss"])) for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--report-to", "wandbb"), "report_to should be none, or some of tensorboard, wandb"),
        (("--report-to", "none,wandb"), "report_to should be none, or some of"),
        (("--profile-steps", "5-3"), "profile_steps should be a step such as 3"),
        (("--profile-steps", "0"), "profile_steps should be a step such as 3"),
        (("--profile-steps", "2-9"), "profile_steps is 2-9, and the run has 3 steps"),
    ],
)
def test_case_99_wrong_input(train, run_dir, words, message):
    done = train(*words)
    assert done.code == 2
    assert message in done.err
    assert not run_dir.exists()


@pytest.mark.parametrize(("steps", "count"), [("2", 1), ("2-3", 2)])
def test_profile_holds_the_steps_asked_for(train, run_dir, steps, count):
    done = train("--profile-steps", steps, "--optim", "adamw_torch")
    assert done.code == 0, done.err
    trace = json.loads((run_dir / f"profile-{steps}.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#AdamW") for name in names) == count
    assert any("aten::mm" in name for name in names)


def test_profile_of_a_run_that_ends_among_the_steps(train, run_dir, monkeypatch):
    from liger_cli.training import session

    finite = iter([True, True, False])
    monkeypatch.setattr(session, "_is_finite", lambda *values: next(finite))
    assert train("--profile-steps", "2-3").code == 6
    assert json.loads((run_dir / "profile-2-3.json").read_text())["traceEvents"]
