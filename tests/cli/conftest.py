"""Fixtures of the command-line tests: the program in this process, and a small dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Outcome:
    """What a run of the program left."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


Liger = Callable[..., Outcome]

# Keys that no estimate of memory reads: where data and results are, and when things happen.
_NOT_ESTIMATED = {
    "auto_fit", "columns", "data_seed", "dataloader_num_workers", "dataset", "dataset_num_proc",
    "early_stopping_patience", "early_stopping_threshold", "eval_dataset", "eval_fraction",
    "eval_on_start", "eval_steps", "eval_strategy", "greater_is_better", "learning_rate",
    "load_best_model_at_end", "logging_steps", "lr_scheduler_kwargs", "lr_scheduler_type",
    "max_eval_samples", "max_steps", "message_fields", "metric_for_best_model",
    "num_train_epochs", "output_dir", "packing_strategy", "profile_steps", "report_to", "roles",
    "save_minutes", "save_steps", "save_total_limit", "seed", "shuffle_buffer_size", "streaming",
    "text_mode", "warmup_ratio", "warmup_steps",
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def kept_estimates() -> Iterator[None]:
    """Estimate the memory of a step once for all runs that differ in what no estimate reads.

    The report of each run has the estimate, which takes longer than most runs of these tests.
    """
    from liger_cli.training.memory import limits

    estimate, kept = limits.estimate_memory, {}

    def look_up(config: Any, source: Any, batch: Any, **where: Any) -> Any:
        key = repr((config.model_dump(exclude=_NOT_ESTIMATED), source, batch, where))
        if key not in kept:
            kept[key] = estimate(config, source, batch, **where)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "estimate_memory", look_up)
        yield


@pytest.fixture
def liger(capsys: pytest.CaptureFixture[str]) -> Iterator[Liger]:
    """Runs `liger WORDS` in this process."""
    from accelerate.state import AcceleratorState, GradientState

    from liger_cli.app import main

    def run(*words: object) -> Outcome:
        # A run sets up its device once in a process; these tests are many runs in one.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        output = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), output.out, output.err)

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """23 rows of very different lengths, so that every batch and window has other label counts."""
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"say {i} ", "completion": "word " * (1 + 3 * (i % 5) + i % 2)}
        for i in range(23)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def train(liger: Liger, data: Path, run_dir: Path) -> Liger:
    """Runs `liger train` on the small data with a tiny model; more words override."""
    words = ["train", "--model", "qwen3", "--dataset", data, "--output-dir", run_dir, "--use-cpu"]
    words += ["--per-device-train-batch-size", 4, "--max-length", 64, "--max-steps", 3]

    def run(*more: object) -> Outcome:
        return liger(*words, *more)

    return run


@pytest.fixture
def measure(
    liger: Liger, data: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Runs what the process of an arm runs, on the small data with a tiny model."""
    from liger_cli.commands.train import arm

    def run(**keys: object) -> dict[str, Any]:
        config = {"model": "qwen3", "dataset": str(data), "output_dir": str(run_dir)}
        config |= {"use_cpu": True, "max_length": 64, "max_steps": 3, **keys}
        file = data.with_name("arm.yaml")
        # JSON is YAML.
        file.write_text(json.dumps(config))
        arm.main([str(file)])
        return dict(json.loads(capsys.readouterr().out))

    return run
