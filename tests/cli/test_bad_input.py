"""What goes wrong for users: exit code, the name of what is wrong, and nothing started or lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from liger_cli.report import TrainProgress
from liger_cli.training.checkpoints.files import find_checkpoints
from liger_cli.training.memory import limits


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--model", "qwen33"), 2, "did you mean qwen3?"),
        (("--ops", "rope,rmsnrm"), 2, "did you mean 'rmsnorm'"),
        (("--require", "ropes"), 2, "did you mean 'rope'"),
        (("--ops", "ce,flce"), 2, "the same loss"),
        (("--learning-rte", "1"), 2, "--learning-rate"),
        (("--set", "learning_rte=1"), 2, "did you mean 'learning_rate'?"),
        (("--set", "bf16=1"), 2, "--set bf16=1: bf16 should be a valid boolean"),
        (("--max-steps", "many"), 2, "--max-steps"),
        (("--max-steps", "-3"), 2, "--max-steps: max_steps should be greater than or equal to -1"),
        (("--dataset", "chitchatt"), 2, "did you mean chitchat?"),
        (("--dataset", "nowhere.jsonl"), 4, "nowhere.jsonl"),
        (("--eval-steps", "1"), 2, "eval_steps needs eval_dataset or eval_fraction"),
        (("--eval-fraction", "0.99"), 4, "leaves none to train on"),
        (("--resume", "runs/none"), 2, "there is no checkpoint"),
        (("--model", ""), 2, "--model: model should have at least 1 character"),
        (("--seed", "99999999999999999999"), 2, "--seed: seed should be less than 2147483648"),
        (("--attn-implementation", "nonsense"), 2, "attn_implementation 'nonsense' is unknown"),
        (("--require", "nonsense"), 2, "unknown op 'nonsense'. Known: rope"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, tuple) else None,
)
def test_refused_before_anything_starts(train, run_dir, words, code, message):
    done = train(*words)
    assert done.code == code, done.err
    assert message in " ".join(done.err.replace("│", " ").split())
    assert done.out == ""
    # A directory that was made is empty, so the same command runs once it is mended.
    assert not run_dir.exists() or not list(run_dir.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("train", "--max-stps", 3), 2, "No such option"),
        (("inspect",), 2, "Missing option '--model'"),
        (("inspekt",), 2, "No such command"),
        (("inspect", "--model", "lama"), 2, "did you mean llama?"),
        (("train", "-m", "qwen3", "-d", "nowhere.jsonl", "--use-cpu"), 4, "nowhere.jsonl"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_failure_is_one_json_document(liger, tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    done = liger(*words, "--json")
    assert done.code == code
    error = done.json()["error"]
    assert (error["exit_code"], set(error)) == (code, {"kind", "exit_code", "message", "hint"})
    assert message in error["message"]


def test_unmet_requirement_leaves_the_report_the_one_document(liger):
    done = liger("inspect", "--model", "qwen3", "--require", "geglu", "--json")
    assert done.code == 7
    assert done.json()["command"] == "inspect"


@pytest.mark.parametrize("command", ["train", "eval"])
def test_unknown_key_of_a_file(liger, tmp_path, command):
    path = tmp_path / "run.yaml"
    path.write_text("model: qwen3\n\ngradient_acumulation_steps: 2\n")
    done = liger(command, "-c", path)
    assert done.code == 2
    assert f"{path}:3:1: unknown key 'gradient_acumulation_steps'; did you mean " in done.err


def test_hub_out_of_reach(train, run_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = train("--model", "somebody/some-model")
    assert done.code == 3
    assert "somebody/some-model" in done.err
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"text": "a b"}', '{"text": '], ":2"),
        (['{"question": "a", "reply": "b"}'], "question"),
        (['{"text": 3}'], ":1"),
        ([], "empty"),
    ],
    ids=["malformed", "columns", "type", "empty"],
)
def test_bad_data(train, run_dir, tmp_path, lines, words):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    done = train("--dataset", path)
    assert done.code == 4
    assert "bad.jsonl" in done.err
    assert words in done.err
    assert not run_dir.exists()


def test_taken_directory(train, run_dir):
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    done = train()
    assert done.code == 2
    assert f"output_dir {run_dir} exists and is not empty" in done.err
    assert [path.name for path in run_dir.iterdir()] == ["notes.txt"]


def test_output_directory_that_cannot_be(train, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    done = train("--output-dir", file)
    assert done.code == 2
    assert f"output_dir {file} is a file, not a directory" in done.err
    done = train("--output-dir", file / "run")
    assert done.code == 3
    assert str(file / "run") in done.err


def test_resume_into_another_run(train, run_dir, tmp_path):
    other = tmp_path / "other"
    assert train("--output-dir", other, "--max-steps", 1).code == 0
    assert train("--save-steps", 2).code == 0
    before = (other / "metrics.jsonl").read_text()
    done = train("--resume", run_dir / "checkpoint-2", "--output-dir", other)
    assert done.code == 2
    assert f"output_dir {other} exists and is not empty" in done.err
    assert (other / "metrics.jsonl").read_text() == before
    assert train("--resume", run_dir / "checkpoint-2", "--output-dir", run_dir).code == 0


def test_resume_of_another_model(train):
    assert train("--max-steps", 1).code == 0
    done = train("--model", "mistral", "--resume", "auto")
    assert done.code == 2
    assert "model is 'mistral', but" in done.err


def test_resume_with_a_damaged_report(train, run_dir):
    assert train().code == 0
    (run_dir / "report.json").write_text("{")
    done = train("--resume", "auto")
    assert done.code == 2
    assert f"{run_dir / 'report.json'} cannot be read as a report" in done.err


def test_resume_with_nothing_left_to_train(train, run_dir, tmp_path):
    assert train().code == 0
    done = train("--resume", run_dir / "checkpoint-3", "--output-dir", tmp_path / "other")
    assert done.code == 2
    assert "is at step 3 of 3: nothing is left to train" in done.err


@pytest.mark.parametrize(("command", "num_copies"), [("train", 4), ("eval", 1)])
def test_model_that_cannot_fit(liger, data, run_dir, monkeypatch, command, num_copies):
    num_bytes = 403_200 * 4 * num_copies
    words = ("-m", "qwen3", "-d", data, "-o", run_dir, "--use-cpu", "--max-steps", 1)
    monkeypatch.setattr(limits, "host_memory", lambda: num_bytes)
    assert liger(command, *words).code == 0
    monkeypatch.setattr(limits, "host_memory", lambda: num_bytes - 1)
    done = liger(command, *words[:4], "--use-cpu")
    assert done.code == 5
    assert f"qwen3 needs {num_bytes / 1e6:.0f} MB for its weights" in done.err


def test_nothing_patched_is_told_in_plain_words(liger, data):
    done = liger("eval", "-m", "qwen3", "-d", data, "--use-cpu", "--ops", "geglu")
    assert done.code == 0
    assert "model type 'qwen3' stays unpatched: no place for geglu" in done.err
    assert "Warning" not in done.err


def test_named_op_without_a_place_is_told(train):
    done = train("--ops", "rope,geglu", "--json")
    assert done.code == 0
    assert done.json()["missing"] == ["geglu"]
    assert "geglu" in done.err


def test_case_70_required_op_without_a_place(train, run_dir):
    done = train("--require", "rope,geglu")
    assert done.code == 7
    assert "geglu is required, but the model has no place for it" in done.err
    assert not run_dir.exists()


def test_required_op_not_asked_for(train):
    done = train("--ops", "auto,-rope", "--require", "rope")
    assert done.code == 7
    assert "rope is required, but 0 of 2 modules have it" in done.err


def test_case_70_107_no_place_for_any_op(train, run_dir):
    done = train("--ops", "geglu")
    assert done.code == 7
    assert "qwen3 has no place for any of geglu" in done.err
    assert not run_dir.exists()


def test_loss_not_finite(train, run_dir):
    done = train("--learning-rate", "1e30", "--save-steps", 1, "--max-steps", 5)
    assert done.code == 6
    [checkpoint] = find_checkpoints(run_dir)
    # The norms of the model keep its loss finite for a step longer than its gradient.
    assert "error: step 2: the norm of the gradient is nan" in done.err
    assert f"; the last checkpoint is {checkpoint}" in done.err
    steps = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1]
    assert not (run_dir / "report.json").exists()


def test_failed_baseline_keeps_its_exit_code(train, run_dir, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho noise >&2\necho 'error: step 2: the loss is nan' >&2\nexit 6\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    done = train("--baseline", 3)
    assert done.code == 6
    assert "error: the eager run failed (exit code 6): step 2: the loss is nan\n" in done.err
    assert not run_dir.exists()


def test_terminate_finishes_the_step_and_saves(train, run_dir, monkeypatch):
    reported = TrainProgress.update

    def update(progress, step, **values):
        reported(progress, step, **values)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(TrainProgress, "update", update)
    done = train("--max-steps", 9, "--logging-steps", 1)
    assert done.code == 130
    [checkpoint] = find_checkpoints(run_dir)
    assert checkpoint.name == "checkpoint-2"
    assert "interrupted after step 2" in done.err
    assert "--resume auto" in done.err
    monkeypatch.undo()
    assert train("--max-steps", 9, "--resume", "auto").code == 0
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 9


def test_interrupt_in_a_terminal(data, run_dir):
    words = ["train", "-m", "qwen3", "-d", data, "-o", run_dir, "--max-steps", 100000, "--use-cpu"]
    words += ["--per-device-train-batch-size", 2, "--save-steps", 0, "--max-length", 64]
    process = subprocess.Popen(
        [sys.executable, "-m", "liger_cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    [checkpoint] = find_checkpoints(run_dir)
    assert checkpoint.name == f"checkpoint-{last}"
    assert f"interrupted after step {last}; its checkpoint is {checkpoint}" in err
    assert "Traceback" not in err
