"""liger train: the loop's numbers, the run directory, resume, the report."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from liger_cli.config import load_config
from liger_cli.data.batches import BatchPlan, count_labels, load_windows
from liger_cli.errors import ConfigError
from liger_cli.training.checkpoints.files import find_checkpoints
from liger_cli.training.inputs import load_inputs
from liger_cli.training.memory.limits import RunMemory
from liger_cli.training.model.source import load_model, resolve_model
from liger_cli.training.runtime import arms

METRICS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "trained_tokens",
    "step_ms",
    "tokens_per_s",
    "peak_memory_bytes",
}


def metrics(run_dir: Path, *keys: str) -> list:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in keys) for row in rows] if keys else rows


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


def test_run_directory_and_json(train, run_dir):
    done = train("--json", "--eval-fraction", 0.2)
    assert done.code == 0, done.err
    report = done.json()
    assert json.loads((run_dir / "report.json").read_text()) == report
    assert report["command"] == "train"
    assert report["coverage"]["fused_linear_cross_entropy"] == {"patched": 1, "candidates": 1}
    assert {row["status"] for row in report["modules"] if row["op"]} == {"patched"}
    assert set(report["train"]) == {
        "batch",
        "steps",
        "tokens",
        "trained_tokens",
        "first_loss",
        "final_loss",
        "tokens_per_s",
        "step_ms",
        "peak_memory_bytes",
    }
    assert report["gain"]["source"] == "estimated"
    assert report["gain"]["speed"] is None
    assert set(report["eval"]) == {"loss", "perplexity", "token_accuracy", "entropy", "tokens"}
    rows = metrics(run_dir)
    assert [set(row) for row in rows] == [METRICS] * 3
    assert report["train"]["tokens"] == sum(row["tokens"] for row in rows)
    assert report["train"]["first_loss"] == rows[0]["loss"]
    assert report["train"]["final_loss"] == rows[-1]["loss"]
    config = load_config(run_dir / "config.yaml")
    assert config.output_dir == run_dir
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == report["config"]


def test_last_line_is_the_coverage(train):
    done = train()
    assert done.code == 0, done.err
    last = done.out.splitlines()[-1]
    ops = "rope 2/2  rms_norm 9/9  swiglu 2/2  fused_linear_cross_entropy"
    assert last.startswith(f"kernels: {ops} 1/1  ")
    assert "tokens/s" in last
    # case 96: how many tokens are trained on is said.
    assert "trained on" in done.err


def test_patched_run_equals_eager_run(train, tmp_path):
    train("--output-dir", tmp_path / "eager", "--ops", "none")
    train("--output-dir", tmp_path / "patched", "--ops", "all")
    keys = ("step", "tokens", "trained_tokens")
    assert metrics(tmp_path / "eager", *keys) == metrics(tmp_path / "patched", *keys)
    for key in ("loss", "grad_norm"):
        eager, patched = (metrics(tmp_path / name, key) for name in ("eager", "patched"))
        assert patched == [pytest.approx(value, rel=1e-4) for value in eager]


@pytest.mark.parametrize("ops", ["all", "none"])
def test_case_59_95_accumulation_equals_one_batch(train, tmp_path, ops):
    """Windows of ragged micro-batches, the last one short, are the mean over their tokens."""
    common = ("--ops", ops, "--max-steps", 4, "--learning-rate", 1e-3)
    whole = ("--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 1)
    parts = ("--per-device-train-batch-size", 3, "--gradient-accumulation-steps", 1)
    accumulated = ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 4)
    for name, words in (("whole", whole), ("accumulated", accumulated), ("other", parts)):
        done = train("--output-dir", tmp_path / name, *common, *words)
        assert done.code == 0, done.err
    keys = ("trained_tokens", "loss", "grad_norm")
    one, many = (metrics(tmp_path / name, *keys) for name in ("whole", "accumulated"))
    # 23 rows in windows of 8: the third has 7 rows, in micro-batches of 2, 2, 2 and 1.
    assert many == [pytest.approx(values, rel=2e-4) for values in one]
    assert metrics(tmp_path / "other", *keys) != one
    first, second = (weights(tmp_path / n / "checkpoint-4") for n in ("whole", "accumulated"))
    assert first.keys() == second.keys()
    # Adam's first steps divide a gradient by itself, so rounding of a tiny one is not tiny.
    assert all((first[key] - second[key]).abs().max() < 1e-4 for key in first)


@pytest.mark.parametrize("model", ["mixtral", "qwen3-moe"])
def test_case_95_balance_of_experts_is_a_mean_too(train, tmp_path, model):
    """One batch, or each row by itself: transformers adds that loss once a batch."""
    losses = {}
    for rows, parts in ((6, 1), (1, 6)):
        name = tmp_path / f"{rows}"
        words = ("--per-device-train-batch-size", rows, "--gradient-accumulation-steps", parts)
        assert train("-m", model, "--max-steps", 1, "--output-dir", name, *words).code == 0
        ((losses[rows],),) = metrics(name, "loss")
    # Balance over a row is not quite that over all of them; six times it is 0.1 and more away.
    assert losses[1] == pytest.approx(losses[6], abs=0.01)


@pytest.mark.parametrize("ops", ["all", "none"])
def test_case_95_last_window_of_an_epoch(train, run_dir, data, ops):
    """10 micro-batches in windows of 4: the third step of an epoch has the 2 that are left.

    Its update is that of the mean over the tokens it really has, by torch alone.
    """
    rows = data.read_text().splitlines(keepends=True)[:20]
    data.write_text("".join(rows))
    words = ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 4, "--ops", ops)
    words += ("--optim", "sgd", "--lr-scheduler-type", "constant", "--max-grad-norm", 0)
    done = train(*words, "--learning-rate", 0.5, "--max-steps", 6, "--save-steps", 1)
    assert done.code == 0, done.err
    assert "3 an epoch" in done.err

    config = load_config(run_dir / "config.yaml")
    inputs = load_inputs(config)
    order = [
        [row for batch in window for row in batch]
        for window in BatchPlan(20, 2, 4, config.order_seed).windows(1, 6)
    ]
    assert [len(window) for window in order] == [8, 8, 4, 8, 8, 4]
    assert sorted(sum(order[:3], [])) == sorted(sum(order[3:], [])) == list(range(20))
    for step in (3, 6):
        before, after = (weights(run_dir / f"checkpoint-{n}") for n in (step - 1, step))
        source = resolve_model(str(run_dir / f"checkpoint-{step - 1}"))
        model = load_model(source, dtype=torch.float32)
        loss_sum, num_labels = 0.0, 0
        for row in order[step - 1]:
            ids, labels = (torch.tensor(inputs.train[row][key]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss_sum += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            num_labels += int((labels[1:] != -100).sum())
        loss = loss_sum / num_labels
        loss.backward()
        assert metrics(run_dir, "loss", "trained_tokens")[step - 1] == (
            pytest.approx(loss.item(), rel=1e-4),
            num_labels,
        )
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, value in before.items():
            torch.testing.assert_close(
                after[name], value - 0.5 * gradients[name], rtol=1e-4, atol=1e-5
            )


def test_loss_falls_and_is_learned(train):
    done = train(
        *("--max-steps", 30, "--learning-rate", 3e-3, "--per-device-train-batch-size", 23),
        *("--json", "--lr-scheduler-type", "constant", "--max-length", 32),
    )
    result = done.json()["train"]
    assert result["final_loss"] < 0.5 * result["first_loss"]


def test_schedule_and_clipping(train, run_dir):
    words = ("--max-steps", 5, "--warmup-steps", 2, "--learning-rate", 1e-2)
    train(*words, "--lr-scheduler-type", "cosine", "--weight-decay", 0.1, "--max-grad-norm", 1e-9)
    rates = [rate for (rate,) in metrics(run_dir, "learning_rate")]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 3)) for i in (0, 1, 2)]
    assert rates == pytest.approx([0.0, 5e-3, *(1e-2 * value for value in cosine)])
    # Clipped to almost nothing the weights hardly move, but vectors do not decay and matrices do.
    assert all(norm > 1 for (norm,) in metrics(run_dir, "grad_norm"))


def test_seed_decides_and_data_seed_moves_only_the_data(train, tmp_path):
    for name, words in {
        "a": ("--seed", 1),
        "same": ("--seed", 1),
        "other": ("--seed", 2),
        "data": ("--seed", 1, "--data-seed", 2),
    }.items():
        train("--output-dir", tmp_path / name, "--max-steps", 1, *words)
    runs = {n: metrics(tmp_path / n, "tokens", "loss") for n in ("a", "same", "other", "data")}
    assert runs["a"] == runs["same"]
    assert runs["data"] != runs["a"] != runs["other"]
    assert runs["data"][0][0] == runs["other"][0][0]


@pytest.mark.parametrize("precision", ["--bf16", "--dtype=bfloat16"])
def test_precisions_train(train, run_dir, tmp_path, precision):
    done = train(precision, "--gradient-checkpointing", "--json")
    assert done.code == 0, done.err
    assert done.json()["coverage"]["fused_linear_cross_entropy"]["patched"] == 1
    dtype = torch.bfloat16 if "dtype" in precision else torch.float32
    assert {value.dtype for value in weights(run_dir / "checkpoint-3").values()} == {dtype}
    assert train("--output-dir", tmp_path / "exact").code == 0
    (loss,), (exact,) = (metrics(path, "loss")[0] for path in (run_dir, tmp_path / "exact"))
    # Computed in bfloat16: near, and not the same.
    assert loss == pytest.approx(exact, rel=1e-2)
    assert loss != exact


@pytest.mark.parametrize("words", [(), ("--adapter", "lora")], ids=["full", "lora"])
def test_gradient_checkpointing_recomputes_every_layer(
    train, run_dir, tmp_path, monkeypatch, words
):
    from torch._subclasses import FakeTensor
    from transformers import modeling_utils

    original, calls = modeling_utils.checkpoint, []

    def checkpoint(*args, **options):
        # The estimate of the memory, at the end, runs a step on tensors without data.
        if not any(isinstance(value, FakeTensor) for value in args):
            calls.append(options["use_reentrant"])
        return original(*args, **options)

    monkeypatch.setattr(modeling_utils, "checkpoint", checkpoint)
    assert train(*words).code == 0
    assert not calls
    done = train(*words, "--gradient-checkpointing", "--output-dir", tmp_path / "less")
    assert done.code == 0, done.err
    assert calls == [False] * (3 * 2)
    for key in ("loss", "grad_norm"):
        plain = [value for (value,) in metrics(run_dir, key)]
        assert [value for (value,) in metrics(tmp_path / "less", key)] == pytest.approx(plain)


@pytest.mark.parametrize("words", [("--fp16",), ("--adapter", "lora", "--dtype", "float16")])
def test_float16_on_a_cpu_is_refused(train, words):
    """accelerate would compute in float32 without a word."""
    done = train(*words)
    assert done.code == 3
    assert "fp16 autocast needs a GPU, and this run is on cpu" in done.err


@pytest.mark.gpu
@pytest.mark.parametrize("words", [("--fp16",), ("--adapter", "lora", "--fp16")])
def test_float16_scales_its_loss(train, run_dir, words):
    """The scale starts so high that the first steps overflow and are left out, then it learns."""
    done = train(*words, "--no-use-cpu", "--max-steps", 12, "--save-steps", 6, "--json")
    assert done.code == 0, done.err
    state = torch.load(run_dir / "checkpoint-12" / "trainer_state.pt", weights_only=True)
    assert state["scaler"]["scale"] > 0
    assert any(norm is not None for (norm,) in metrics(run_dir, "grad_norm"))
    assert train(*words, "--no-use-cpu", "--max-steps", 14, "--resume", "auto").code == 0


def test_checkpoints_are_kept_to_the_limit(train, run_dir):
    train("--max-steps", 5, "--save-steps", 1, "--save-total-limit", 2)
    assert [path.name for path in find_checkpoints(run_dir)] == ["checkpoint-4", "checkpoint-5"]
    assert not list(run_dir.glob(".*"))


def test_checkpoints_of_a_later_step_are_left_alone(train, run_dir):
    """They belong to the run that was resumed from before them."""
    train("--max-steps", 4, "--save-steps", 1)
    shutil.rmtree(run_dir / "checkpoint-3")
    resume = ("--resume", run_dir / "checkpoint-1", "--max-steps", 3)
    assert train(*resume, "--save-steps", 1, "--save-total-limit", 1).code == 0
    assert [path.name for path in find_checkpoints(run_dir)] == ["checkpoint-3", "checkpoint-4"]


def test_case_93_resume_is_exact(train, run_dir, tmp_path):
    """A run that stopped after step 3 of 8 goes on as if it had not: data, optimizer, schedule."""
    words = ("--max-steps", 8, "--gradient-accumulation-steps", 2, "--save-steps", 3)
    words += ("--lr-scheduler-type", "cosine", "--learning-rate", 1e-3, "--eval-fraction", 0.2)
    done = train(*words)
    assert done.code == 0, done.err
    unbroken = (run_dir / "metrics.jsonl").read_text()
    stopped = tmp_path / "stopped"
    shutil.copytree(run_dir, stopped)
    shutil.rmtree(stopped / "checkpoint-6")
    shutil.rmtree(stopped / "checkpoint-8")
    # The process died while it wrote line 5.
    lines = unbroken.splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    done = train(*words, "--output-dir", stopped, "--resume", "auto", "--json")
    assert done.code == 0, done.err
    keys = ("step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens")
    assert metrics(stopped, *keys) == metrics(run_dir, *keys)
    assert done.json()["train"]["steps"] == 8
    one, two = (weights(path / "checkpoint-8") for path in (run_dir, stopped))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_resume_of_a_finished_run(train, run_dir):
    output = train("--json")
    first = output.json()
    done = train("--json", "--resume", run_dir / "checkpoint-3")
    assert done.code == 0
    assert f"saved: {run_dir / 'checkpoint-3'}" in output.err.splitlines()
    assert "is finished: 3 of 3 steps; a larger --max-steps or" in done.err
    assert done.json() == first


def test_resume_after_a_kill_before_the_last_evaluation(train, run_dir):
    words = ("--eval-fraction", 0.2, "--json")
    first = train(*words).json()
    for name in ("report.json", "eval.jsonl"):
        (run_dir / name).unlink()
    done = train(*words, "--resume", "auto")
    assert done.code == 0, done.err
    assert done.json()["eval"] == pytest.approx(first["eval"])
    assert done.json()["train"] == first["train"]


def test_resume_refuses_other_data(train):
    train()
    done = train("--resume", "auto", "--max-steps", 5, "--gradient-accumulation-steps", 2)
    assert done.code == 2
    assert "gradient_accumulation_steps is 2, but" in done.err


def test_resume_auto_starts_where_there_is_nothing(train, run_dir):
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n')
    assert train("--resume", "auto").code == 0
    assert [step for (step,) in metrics(run_dir, "step")] == [1, 2, 3]


def test_dry_run_trains_nothing(train, run_dir):
    done = train("--dry-run", "--json", "--gradient-accumulation-steps", 2)
    assert done.code == 0
    assert done.json()["coverage"]["rope"] == {"patched": 2, "candidates": 2}
    assert "first step: 4x" in done.err
    assert not run_dir.exists()


def test_baseline_measures_the_gain(train, run_dir):
    done = train("--baseline", 2, "--json")
    assert done.code == 0, done.err
    gain = done.json()["gain"]
    assert gain["source"] == "measured"
    assert 0 < gain["speed"] < 100
    assert 0 < gain["memory"] < 10
    assert "against eager" in done.err
    assert "(measured)" in done.err


def test_a_run_that_only_measures_estimates_nothing(measure, monkeypatch):
    """Every arm of a comparison is one, and nobody reads its estimate."""
    monkeypatch.setattr(RunMemory, "of", lambda *given: pytest.fail("a step was followed"))
    found = measure()
    assert found["train"]["steps"] == 3
    assert "gain" not in found


def test_an_arm_fails_as_the_program_does(measure, capsys):
    """run_arm reads the message behind "error: " and the exit code of its process."""
    with pytest.raises(SystemExit) as stop:
        measure(dataset="nowhere.jsonl")
    output = capsys.readouterr()
    assert (stop.value.code, output.out) == (4, "")
    assert output.err == "error: dataset: there is no data file nowhere.jsonl\n"


def test_baseline_is_plain_eager(train, monkeypatch):
    """What it is compared with is neither patched nor compiled."""
    seen = {}

    def stop(command, environment):
        seen.update(yaml.safe_load(Path(command[3]).read_text()))
        raise ConfigError("that is enough")

    monkeypatch.setattr(arms, "_run", stop)
    assert train("--baseline", 2, "--torch-compile").code == 2
    assert (seen["ops"], seen["max_steps"], seen["torch_compile"]) == ("none", 2, False)


def test_small_configuration_runs_as_it_is(liger, run_dir):
    path = Path(__file__).parents[3] / "configs" / "train" / "pretrain.yaml"
    done = liger("train", "-c", path, "-o", run_dir, "--use-cpu", "--max-steps", 2, "--json")
    assert done.code == 0, done.err
    assert done.json()["train"]["tokens"] == 2 * 8 * 256


def test_default_directory_is_named_after_the_model(liger, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--max-steps", 1, "--max-length", 16, "--use-cpu", "--save-steps", 0)
    assert liger("train", "-m", "qwen3", "-d", data, *words).code == 0
    [run] = (tmp_path / "runs").iterdir()
    assert run.name.startswith("qwen3-20")


def test_case_88_89_two_processes_equal_one(train, run_dir, data, tmp_path):
    """Ranks with other label counts, and a last window with a row for one of them only."""
    words = ["--max-steps", 6, "--learning-rate", 1e-3, "--eval-fraction", 0.2]
    words += ["--gradient-accumulation-steps", 2, "--per-device-train-batch-size"]
    assert train(*words, 4).code == 0
    two = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    launch += ["-m", "liger_cli", "train", "-m", "qwen3", "-d", data, "-o", two, "--use-cpu"]
    done = subprocess.run(
        [str(word) for word in (*launch, *words, 2, "--max-length", 64, "--json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["steps"] == 6
    keys = ("step", "tokens", "trained_tokens", "loss", "grad_norm")
    assert metrics(two, *keys) == [pytest.approx(row, rel=1e-4) for row in metrics(run_dir, *keys)]
    ours, theirs = (json.loads((path / "eval.jsonl").read_text()) for path in (run_dir, two))
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert sorted(path.name for path in (two / "checkpoint-6").glob("rng*")) == [
        "rng-0.pt",
        "rng-1.pt",
    ]


def test_windows_cover_every_row_once_an_epoch():
    plan = BatchPlan(num_rows=10, batch_size=2, accumulation=2, seed=3)
    steps = list(plan.windows(1, 6))
    for epoch in (steps[:3], steps[3:]):
        rows = [row for window in epoch for batch in window for row in batch]
        assert sorted(rows) == list(range(10))
        assert [len(window) for window in epoch] == [2, 2, 1]
    assert steps[:3] != steps[3:]
    assert list(plan.windows(5, 6)) == steps[4:]


def test_processes_share_a_window_and_stay_in_step():
    """The last window has a row for one process only; the other joins in with a row unlabelled."""
    plans = [BatchPlan(9, 2, 2, seed=0, rank=rank, num_processes=2) for rank in (0, 1)]
    ours, theirs = ([*plan.windows(1, 2)] for plan in plans)
    assert [len(window) for window in ours] == [len(window) for window in theirs] == [2, 1]
    rows = [row for window in (*ours, *theirs) for batch in window for row in batch if row >= 0]
    assert sorted(rows) == list(range(9))
    examples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}] * 9

    def collate(rows):
        return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}

    *_, [batch] = load_windows(examples, iter(theirs), collate)
    assert count_labels(batch) == 0


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 20])
def test_rows_of_so_many_steps_are_those_of_their_windows(num_rows):
    plans = [BatchPlan(num_rows, 2, 2, seed=0, rank=rank, num_processes=2) for rank in (0, 1)]
    for num_steps in range(1, 8):
        rows = [
            row
            for plan in plans
            for window in plan.windows(1, num_steps)
            for batch in window
            for row in batch
        ]
        assert plans[0].num_rows_of(num_steps) == sum(row >= 0 for row in rows)
    assert BatchPlan(0, 2, 2, seed=0).num_rows_of(3) is None


def test_results_come_first_with_the_batches_as_they_were(train, run_dir):
    """23 rows in windows of 8: the last of an epoch has 7."""
    done = train("--gradient-accumulation-steps", 2)
    assert done.code == 0, done.err
    first, batch, *_ = done.out.splitlines()
    assert first.startswith("trained 3 steps: loss ")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((run_dir / "report.json").read_text())["train"]["batch"]
    assert found == {
        "rows": pytest.approx(23 / 3),
        "tokens": pytest.approx(sum(row["tokens"] for row in rows) / 3),
        "trained_tokens": pytest.approx(sum(row["trained_tokens"] for row in rows) / 3),
        "micro_batch_rows": 4,
        "micro_batches": 2,
        "processes": 1,
    }
    assert batch.startswith("batch of a step: 7.7 rows, ")
    assert batch.endswith("; at most 4 rows x 2 micro-batches")
