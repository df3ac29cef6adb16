"""The rows of scripts/bench_models.sh, and what the page says of those with an adapter."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liger_cli.report import AgainstPart, Arm, ParityPart, RatiosPart, RunReport

SCRIPTS = Path(__file__).parents[3] / "scripts"

# A Python that writes down what it is called with, and answers as bench does.
RECORDER = """#!/usr/bin/env bash
if [ "$1" = - ]; then
  cat > /dev/null
  # A configuration of a few layers, or weights.
  if [ $# -eq 4 ]; then echo "{}" > "$4"; else mkdir -p "$3" && echo "{}" > "$3/config.json"; fi
fi
echo "$@" >> "$CALLS"
case "$*" in *qwen3-0.6b*) echo "error: it does not fit" >&2; exit 5 ;; esac
echo "eager, run 1 of 2 ..." >&2
echo '{"arms": []}'
"""


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Runs the script and returns what ended and the command lines it gave."""
    python = tmp_path / "python"
    python.write_text(RECORDER)
    python.chmod(0o755)

    def run(*words: object, **more: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            [SCRIPTS / "bench_models.sh", tmp_path / "out", *map(str, words)],
            env={**os.environ, "PYTHON": str(python), "CARD": "b1", "CALLS": str(calls), **more},
            capture_output=True,
            text=True,
            check=False,
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_rows_of_one_preset_have_files_apart(rows, tmp_path) -> None:
    done, calls = rows("--peer-path", tmp_path, "llama-8b:lora-r64", "llama-8b:lora", "llama-1b")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").glob("*.json")}
    assert names == {
        f"bench-{row}-b1.json" for row in ("llama-1b", "llama-8b-lora", "llama-8b-lora-r64")
    }
    full, lora, large = calls
    assert f"--against eager,liger-kernel,compile,patched+compile --peer-path {tmp_path}" in full
    assert "--model llama-8b --against eager,liger-kernel --peer-path" in lora
    assert lora.endswith("--max-length 2048 --adapter lora --lora-r 16 --json")
    assert large.endswith("--adapter lora --lora-r 64 --json")


def test_a_model_to_be_quantised_has_its_weights_written_once(rows, tmp_path) -> None:
    weights = tmp_path / "weights"
    for number in range(2):
        done, calls = rows("llama-8b:qlora", WEIGHTS=str(weights))
        assert done.returncode == 0, done.stderr
        assert calls[: 1 - number] == [f"- llama-8b {weights}/llama-8b"][: 1 - number]
        assert f"--model {weights}/llama-8b --against eager --repeats" in calls[-1]
        assert "--load-in-4bit" in calls[-1]
        assert len(calls) == 2 - number


def test_every_row_runs_and_one_without_a_report_is_said(rows, tmp_path) -> None:
    done, calls = rows(WEIGHTS=str(tmp_path / "weights"))
    assert done.returncode == 1
    benches = [call for call in calls if call.startswith("-m liger_cli bench ")]
    assert len(list((tmp_path / "out").glob("*.json"))) == len(benches) - 1 > 9
    assert "qwen3-0.6b: exit 5" in done.stdout
    assert "error: it does not fit" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama-8b"], "no row is called llama-8b; rows: llama-1b llama-3b"),
        (["--peer-path"], "usage: "),
        (["--peer", "x"], "usage: "),
    ],
)
def test_wrong_words_are_refused(rows, words: list[str], message: str) -> None:
    done, calls = rows(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not calls


def report_of(keys: dict[str, Any], speed: float, memory: float) -> RunReport:
    config = {"per_device_train_batch_size": 4, "max_length": 2048, "max_steps": 12, **keys}
    where = {"devices": [{"name": "NVIDIA B1"}], "torch": "2", "triton": "3", "transformers": "5"}
    names = ("eager", "patched", "liger-kernel")
    arms = [Arm(name=name, runs=2, step_ms=600.0, tokens_per_s=100.0) for name in names]
    parity = ParityPart(
        steps=12,
        max_loss_difference=0.0,
        max_relative_difference=0.0,
        tolerance=1e-2,
        equal=True,
    )
    part = AgainstPart(ratios=RatiosPart(speed=speed, memory=memory), parity=parity, verdict="so")
    return RunReport(
        command="bench",
        config=config,
        environment=where,
        arms=arms,
        against={"eager": part, "liger-kernel": part},
    )


LORA = {"model": "llama-8b", "adapter": "lora", "lora_r": 16}


@pytest.mark.parametrize(
    ("keys", "title", "flags", "lines"),
    [
        (
            LORA,
            "lora of rank 16",
            "--adapter lora --lora-r 16",
            [
                "| liger-kernel | speed | >= 1.33x | 1.32x | MISSED |",
                "| liger-kernel | memory | <= 0.70x | 0.70x | met |",
            ],
        ),
        (
            {**LORA, "lora_r": 64},
            "lora of rank 64",
            "--adapter lora --lora-r 64",
            ["| liger-kernel | speed | >= 1.33x | 1.32x | MISSED |"],
        ),
        (
            {**LORA, "gradient_checkpointing": True},
            "lora of rank 16, with gradient checkpointing",
            "--lora-r 16 --gradient-checkpointing",
            ["| liger-kernel | memory | <= 1.00x | 0.70x | met |"],
        ),
        (
            {**LORA, "model": "/tmp/w/llama-8b", "load_in_4bit": True},
            "lora of rank 16 in 4 bits",
            "liger bench --model llama-8b --against eager,liger-kernel",
            ["| eager | speed | >= 1.30x | 1.32x | met |"],
        ),
    ],
    ids=["lora", "r64", "checkpointing", "qlora"],
)
def test_the_page_judges_adapters_by_their_targets(
    tmp_path: Path, keys: dict[str, Any], title: str, flags: str, lines: list[str]
) -> None:
    page = runpy.run_path(str(SCRIPTS / "performance_page.py"))["page"]
    (tmp_path / "bench-llama-8b-lora-b1.json").write_text(report_of(keys, 1.32, 0.70).to_json())
    text = page(tmp_path)
    assert f"### llama-8b, 4 x 2048 tokens a step, {title}\n" in text
    assert flags in text
    for line in lines:
        assert line in text
    assert "| llama-8b, 4 x 2048, lora of rank" in text, "in the summary too"


@pytest.mark.parametrize("sides", ["eager,liger-kernel", "compile,patched+compile"])
def test_every_side_trains_an_adapter(
    liger: Callable[..., Any], tmp_path: Path, sides: str
) -> None:
    package = tmp_path / "peer" / "liger_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    # It knows models of transformers, and no adapter around them.
    (package / "transformers.py").write_text(
        "def _apply_liger_kernel_to_instance(*, model):\n"
        "    assert type(model).__name__ == 'MistralForCausalLM', type(model)\n"
    )
    words = ["bench", "--model", "mistral", "--use-cpu", "--max-length", 32, "--steps", 2]
    words += ["--repeats", 1, "--adapter", "lora", "--lora-r", 4, "--against", sides, "--json"]
    words += ["--peer-path", package.parent] * ("liger-kernel" in sides)
    done = liger(*words)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    names = [arm["name"] for arm in report["arms"]]
    assert set(names) == {"patched", *sides.split(",")}
    assert all(part["parity"]["equal"] for part in report["against"].values())
