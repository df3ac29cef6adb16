"""Memory that runs out: what is said, what is advised, and auto_fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from liger_cli.common.failures import is_out_of_memory
from liger_cli.config import load_config
from liger_cli.training.forward import LossOf
from liger_cli.training.memory import Batch, limits
from liger_cli.training.memory.limits import RunMemory, out_of_memory
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.objectives import sft
from liger_cli.training.runtime.auto_fit import smaller_batches

# 270 million parameters, most of them in the embedding.
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "num_hidden_layers": 8,
    "vocab_size": 100_000,
    "intermediate_size": 4096,
    "tie_word_embeddings": True,
}


def metrics(run_dir: Path, *keys: str) -> list:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in keys) for row in rows]


@pytest.fixture
def limit_rows(monkeypatch):
    """Makes memory run out in the forward pass of more rows than this; tells what was tried."""
    tried = []

    def limit(rows: int, error: Exception | None = None, first_step: int = 1) -> list[int]:
        error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

        class LimitedLossOf(LossOf):
            def __call__(self, model, batch, num_labels, **options):
                loss = super().__call__(model, batch, num_labels, **options)
                tried.append(len(batch["input_ids"]))
                if tried[-1] > rows and len(tried) >= first_step:
                    raise error
                return loss

        monkeypatch.setattr(sft, "LossOf", LimitedLossOf)
        return tried

    return limit


@pytest.mark.parametrize(
    "error",
    [
        None,
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "cpu", "cublas"],
)
def test_case_oom_is_explained(train, limit_rows, error):
    limit_rows(2, error)
    done = train("--max-length", 256, "--json")
    assert done.code == 5
    problem = json.loads(done.out)["error"]
    assert problem["kind"] == "OutOfMemory"
    first, parts = problem["message"].splitlines()
    assert first.startswith("out of memory: ")
    for name in ("weights", "optimizer", "gradients", "activations of mlp", "logits"):
        assert re.search(rf"{name} \d+(\.\d)? [kMG]B", parts), name
    *remedies, last = problem["hint"].splitlines()
    assert len(remedies) == 3
    peak = megabytes(re.search(r"at most (.*) at once", parts)[1])
    for remedy in remedies:
        assert megabytes(remedy.rpartition("predicted ")[2]) <= peak
    assert remedies[0].startswith(
        "--per-device-train-batch-size 2 --gradient-accumulation-steps 2 (the same step)"
    )
    assert "--gradient-checkpointing" in remedies[1]
    assert last.startswith("--auto-fit")


def megabytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"kB": 1e-3, "MB": 1, "GB": 1000}[unit]


def test_other_errors_are_not_taken_for_it(train, limit_rows):
    limit_rows(2, RuntimeError("shape mismatch"))
    assert train("--auto-fit").code == 1
    assert not is_out_of_memory(ValueError("out of memory"))


def test_out_of_memory_while_weights_are_loaded(train, monkeypatch):
    from liger_cli.training.model import loading

    def fail(*args, **options):
        raise torch.OutOfMemoryError("no memory for weights")

    monkeypatch.setattr(loading, "load_model", fail)
    done = train()
    assert done.code == 5
    assert "no memory for weights" in done.err
    assert "weights" in done.err.splitlines()[-6]


def test_out_of_memory_in_evaluation(train, liger, data, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("no memory for logits")

    monkeypatch.setattr(sft, "_token_sums", fail)
    for done in (
        train("--eval-fraction", 0.2),
        liger("eval", "-m", "qwen3", "-d", data, "--use-cpu", "--max-length", 64),
    ):
        assert done.code == 5
        assert "out of memory in evaluation: no memory for logits" in done.err
        assert "--per-device-eval-batch-size 4 gives the same figures" in done.err


@pytest.mark.parametrize("rows", [8, 3, 1], ids=["fits", "halved", "to-one"])
def test_auto_fit_keeps_the_steps(train, run_dir, tmp_path, limit_rows, rows):
    words = ("--per-device-train-batch-size", 8, "--learning-rate", 1e-3, "--max-steps", 5)
    assert train(*words).code == 0
    tried = limit_rows(rows)
    done = train(*words, "--auto-fit", "--output-dir", tmp_path / "fit", "--json")
    assert done.code == 0, done.err
    fitted = max(size for size in (8, 4, 2, 1) if size <= rows)
    assert max(tried[-8:]) <= fitted
    assert sum(size > rows for size in tried) == {8: 0, 3: 2, 1: 3}[rows]
    keys = ("step", "tokens", "trained_tokens")
    assert metrics(tmp_path / "fit", *keys) == metrics(run_dir, *keys)
    for key in ("loss", "grad_norm"):
        assert metrics(tmp_path / "fit", key) == [
            pytest.approx(value, rel=1e-4) for value in metrics(run_dir, key)
        ]
    config = done.json()["config"]
    assert config["per_device_train_batch_size"] == fitted
    assert config["gradient_accumulation_steps"] == 8 // fitted


def test_auto_fit_says_what_it_does(train, limit_rows, caplog):
    limit_rows(2)
    assert train("--auto-fit").code == 0
    assert (
        "out of memory in step 1: continuing with 2 rows a micro-batch and 2 micro-batches"
        in caplog.text
    )


def test_auto_fit_in_the_middle_of_a_run_and_of_a_window(train, run_dir, tmp_path, limit_rows):
    """Gradients that the window had before it failed are not counted twice."""
    words = ("--gradient-accumulation-steps", 2, "--learning-rate", 1e-3)
    assert train(*words).code == 0
    limit_rows(2, first_step=4)
    done = train(*words, "--auto-fit", "--output-dir", tmp_path / "fit")
    assert done.code == 0, done.err
    for key in ("trained_tokens", "loss", "grad_norm"):
        assert metrics(tmp_path / "fit", key) == [
            pytest.approx(value, rel=1e-4) for value in metrics(run_dir, key)
        ]


def test_auto_fit_reads_a_stream_once(train, run_dir, tmp_path, limit_rows):
    words = ("--streaming", "--learning-rate", 1e-3, "--max-steps", 8)
    assert train(*words).code == 0
    limit_rows(2, first_step=3)
    done = train(*words, "--auto-fit", "--output-dir", tmp_path / "fit")
    assert done.code == 0, done.err
    keys = ("step", "tokens", "trained_tokens")
    assert metrics(tmp_path / "fit", *keys) == metrics(run_dir, *keys)


def test_auto_fit_ends_at_one_row(train, limit_rows):
    tried = limit_rows(0)
    done = train("--auto-fit")
    assert done.code == 5
    assert tried == [4, 2, 1]
    assert "--gradient-checkpointing" in done.err


def test_resume_of_a_fitted_run_has_the_same_data(train, run_dir, limit_rows):
    limit_rows(2)
    words = ("--auto-fit", "--max-steps", 4, "--save-steps", 2)
    assert train(*words).code == 0
    whole = metrics(run_dir, "step", "tokens", "loss")
    done = train(*words, "--resume", run_dir / "checkpoint-2")
    assert done.code == 0, done.err
    assert metrics(run_dir, "step", "tokens", "loss") == whole


def test_sizes_of_smaller_batches():
    assert smaller_batches(8, 1) == (4, 2)
    assert smaller_batches(9, 2) == (3, 6)
    assert smaller_batches(7, 1) == (1, 7)
    assert smaller_batches(6, 1) == (3, 2)


def run_memory(shape=CONFIG, **flags) -> RunMemory:
    config = load_config(flags={"model": "qwen3", **flags})
    source = ModelSource("config", "large", None, shape, "", shape["model_type"])
    batch = Batch(config.per_device_train_batch_size, config.max_length)
    return RunMemory(config, source, batch, on_gpu=False)


def hints(memory: RunMemory) -> list[str]:
    hint = out_of_memory(MemoryError("x"), memory, torch.device("cpu")).hint
    return (hint or "").splitlines()


def test_remedies_that_fit_come_first(monkeypatch):
    """On a card that the optimizer's state alone fills, a smaller batch is no remedy."""
    monkeypatch.setattr(limits, "device_memory", lambda device: 80_000_000_000)
    assert hints(run_memory())[0].startswith("--per-device-train-batch-size 4")
    memory = run_memory(per_device_train_batch_size=2, max_length=128)
    monkeypatch.setattr(limits, "device_memory", lambda device: 2_000_000_000)
    assert hints(memory)[0].startswith("--adapter lora")
    assert not any(line.startswith("all of these") for line in hints(memory))
    # Nothing fits alone: the strongest first, and what they come to together.
    monkeypatch.setattr(limits, "device_memory", lambda device: 1_000_000_000)
    first, *_, together, _ = hints(memory)
    assert first.startswith("--adapter lora")
    assert together.startswith("all of these: predicted ")
    assert megabytes(together.rpartition("predicted ")[2]) <= megabytes(
        first.rpartition("predicted ")[2]
    )


def test_remedies_leave_out_what_is_done_already():
    memory = run_memory(
        gradient_checkpointing=True,
        optim="adafactor",
        per_device_train_batch_size=1,
        max_length=64,
    )
    assert [line.split()[0] for line in hints(memory)] == ["--adapter"]


def test_optimizers_have_their_own_state():
    def held(**flags) -> float:
        memory = run_memory(max_length=32, **flags)
        assert memory.found is not None
        return memory.found.optimizer / memory.found.weights

    assert held() == pytest.approx(2, rel=1e-2)
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        assert held(optim=name) == pytest.approx(0.5, rel=2e-2)
    assert held(optim="sgd") == 0
    assert held(optim="adafactor") < 0.01
    # Half the bytes of the weights, and in float32 a copy and two moments.
    assert held(dtype="bfloat16") == pytest.approx(2, rel=1e-2)
    assert held(dtype="bfloat16", master_weights=True) == pytest.approx(6, rel=1e-2)


def test_a_model_whose_step_cannot_be_followed_has_no_estimate():
    memory = run_memory({**CONFIG, "num_hidden_layers": -1})
    error = out_of_memory(MemoryError("x"), memory, torch.device("cpu"))
    assert error.message.startswith("out of memory: x")


def test_dry_run_tells_rows_batch_and_memory(train, run_dir):
    done = train("--dry-run", "--json", "--gradient-accumulation-steps", 2)
    assert done.code == 0, done.err
    report = done.json()
    assert report["row_lengths"]["rows"] == 23
    assert report["row_lengths"]["longest"] == 64
    assert report["row_lengths"]["median"] <= report["row_lengths"]["p90"] <= 64
    first = report["first_batch"]
    assert len(first["shapes"]) == 2
    places = sum(rows * length for rows, length in first["shapes"])
    assert first["padding"] == pytest.approx(1 - first["tokens"] / places)
    assert 0 < first["trained_tokens"] < first["tokens"]
    memory = report["memory"]
    assert memory["peak"] < memory["device"]
    # Tables of rotary frequencies are among them.
    assert memory["weights"] == pytest.approx(4 * report["model"]["num_parameters"], rel=1e-2)
    for word in ("in the median", "% padding", "memory of a step, estimated: weights "):
        assert word in done.err
    assert not run_dir.exists()


def test_dry_run_refuses_what_cannot_fit(train, monkeypatch):
    from liger_cli.training.memory import limits

    monkeypatch.setattr(limits, "host_memory", lambda: 1_000_000)
    done = train("--dry-run")
    assert done.code == 5
    assert "for its weights, gradients and optimizer alone" in done.err
