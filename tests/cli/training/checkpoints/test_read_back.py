"""What is read back from a run directory: strange lines, and files of another content."""

from __future__ import annotations

import json

import pytest
import torch

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, DataError
from liger_cli.report.run_files import read_run
from liger_cli.training.checkpoints.run_log import JsonLines
from liger_cli.training.checkpoints.state import _load, _restoring
from liger_cli.training.evaluations import Evaluations
from liger_cli.training.result import COUNTS, STEP_FIELDS, StepMetrics, summary


def step_row(step, **other):
    numbers = {"loss": 1.5, "learning_rate": 1e-3, "grad_norm": None, "step_ms": 2.0}
    counts = {"tokens": 8, "trained_tokens": 4, "peak_memory_bytes": 9, "tokens_per_s": 4.0}
    return {"step": step, **numbers, **counts, **other}


def eval_row(step, **other):
    figures = {"loss": 2.0, "perplexity": 7.4, "token_accuracy": 0.5, "entropy": 1.0, "tokens": 3}
    return {"step": step, **{f"eval_{key}": value for key, value in figures.items()}, **other}


STRANGE = {
    "bytes": b"\xff\xfe\x00",
    "a number": b"5",
    "a list": b"[1]",
    "text": b'"step"',
    "null": b"null",
    "no fields": b"{}",
    "no step": b'{"loss": 1.0}',
    "a text as step": b'{"step": "2", "loss": 1.0}',
    "a truth as step": b'{"step": true, "loss": 1.0}',
    "a fraction as step": b'{"step": 1.5, "loss": 1.0}',
    "a step below 0": b'{"step": -1, "loss": 1.0}',
    "a step of 5000 digits": b'{"step": ' + b"1" * 5000 + b', "loss": 1.0}',
    "depth": b'{"step": 2, "loss": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a huge line": b'{"step": 2, "x": "' + b"x" * 3_000_000 + b'"}',
    "fields missing": b'{"step": 2, "loss": 1.0}',
    "half a row": b'{"step": 2, "lo',
    "NUL": b"\x00\x00",
}


@pytest.mark.parametrize("line", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_case_233_strange_lines_are_as_if_they_were_not_finished(tmp_path, line, position):
    rows = [step_row(1), step_row(2)]
    lines = [json.dumps(row).encode() for row in rows]
    lines.insert(position, line)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if position < 2 else b""))
    log = JsonLines(path, required=STEP_FIELDS, counts=COUNTS, last_step=2)
    assert log.rows == rows
    log.write(step_row(3))
    log.sync()
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2, 3]
    assert summary([StepMetrics.from_row(row) for row in log.rows])["final_loss"] == 1.5


@pytest.mark.parametrize("line", STRANGE.values(), ids=STRANGE)
def test_case_233_strange_lines_of_evaluations(tmp_path, line):
    path = tmp_path / "eval.jsonl"
    path.write_bytes(line + b"\n" + json.dumps(eval_row(2)).encode() + b"\n")
    config = RunConfig(model="qwen3", eval_dataset="x.jsonl", output_dir=tmp_path)
    evals = Evaluations(config, tmp_path, last_step=5, write=False)
    assert evals.best is not None
    assert evals.best.step == 2
    assert evals.at(2).loss == 2.0


def test_case_233_unknown_fields_are_ignored(tmp_path):
    row = step_row(1, note="x", future={"a": 1}, more=3)
    assert StepMetrics.from_row(row) == StepMetrics.from_row(step_row(1))
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps(eval_row(2, eval_x_loss=1.0, eval_new=3, note="x")) + "\n")
    config = RunConfig(model="qwen3", eval_dataset="x.jsonl", output_dir=tmp_path)
    result = Evaluations(config, tmp_path, last_step=5, write=False).at(2)
    assert result.tokens == 3
    assert not result.sets


@pytest.mark.slow  # two trainings
@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
def test_case_233_a_run_is_resumed_over_strange_lines(train, data, run_dir, name):
    words = ["--eval-dataset", data, "--eval-steps", 1, "--save-steps", 1]
    assert train(*words, "--max-steps", 2).code == 0
    path = run_dir / name
    before = path.read_bytes()
    path.write_bytes(b"\xff\n5\n{}\n" + before + b'{"step": 2, "lo')
    done = train(*words, "--max-steps", 3, "--resume", "auto")
    assert done.code == 0, done.err
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize("name", ["config.yaml", "report.json", "metrics.jsonl", "eval.jsonl"])
@pytest.mark.parametrize(
    "content", [b"\xff\xff\n", b"5\n", b"[]\n", b'"x"\n', b"{\n", b"\x00\n"], ids=repr
)
def test_case_233_a_bad_file_is_named(tmp_path, name, content):
    (tmp_path / "config.yaml").write_text("model: qwen3\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step_row(1)) + "\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        read_run(tmp_path)


def test_case_233_a_pipe_in_a_run_directory_is_not_waited_for(tmp_path):
    import os

    (tmp_path / "metrics.jsonl").write_text(json.dumps(step_row(1)) + "\n")
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="no regular file"):
        read_run(tmp_path)


@pytest.mark.parametrize("values", [{}, {"optimizer": 1}, [1, 2], None], ids=repr)
def test_case_233_a_trainer_state_of_another_shape_is_named(tmp_path, values):
    path = tmp_path / "trainer_state.pt"
    torch.save(values, path)
    with pytest.raises(DataError, match=r"trainer_state.pt cannot be read"), _restoring(path):
        _load(path)["optimizer"]["state"]
