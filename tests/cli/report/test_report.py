"""Reports: JSON there and back, folding, tables, the last line, the verdict, progress."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from liger_cli.common.numbers import format_bytes, format_count
from liger_cli.report import (
    Arm,
    EvalPart,
    GainPart,
    ParityPart,
    RatiosPart,
    RunReport,
    TrainPart,
    TrainProgress,
    arms_table,
    coverage_table,
    fold_modules,
    last_line,
    modules_table,
    show_report,
    verdict,
)


def _row(
    name: str, op: str | None, status: str = "patched", reason: str | None = None
) -> dict[str, str | None]:
    backend = "torch" if status == "patched" else None
    return {
        "name": name,
        "class": "Module",
        "op": op,
        "status": status,
        "backend": backend,
        "reason": reason,
    }


def _train(**changes: object) -> TrainPart:
    values = {
        "steps": 20,
        "tokens": 20480,
        "trained_tokens": 9000,
        "first_loss": 2.5,
        "final_loss": 1.25,
        "tokens_per_s": 12345.4,
        "step_ms": 82.9,
        "peak_memory_bytes": 5_100_000_000,
    }
    return TrainPart.model_validate(values | changes)


def _report(**changes: object) -> RunReport:
    """A run of a model with 30 layers."""
    layers = [
        row
        for i in range(30)
        for row in (
            _row(f"model.layers.{i}.self_attn", "rope"),
            _row(f"model.layers.{i}.input_layernorm", "rms_norm"),
            _row(f"model.layers.{i}.post_attention_layernorm", "rms_norm"),
            _row(f"model.layers.{i}.mlp", "swiglu"),
        )
    ]
    values = {
        "command": "train",
        "config": {"model": "llama"},
        "environment": {"python": "3.11.2"},
        "coverage": {
            "rope": {"patched": 30, "candidates": 30},
            "rms_norm": {"patched": 61, "candidates": 61},
            "swiglu": {"patched": 30, "candidates": 30},
            "fused_linear_cross_entropy": {"patched": 1, "candidates": 1},
        },
        "modules": [
            *layers,
            _row("model.norm", "rms_norm"),
            _row("lm_head", "fused_linear_cross_entropy"),
        ],
        "train": _train(),
        "gain": GainPart(source="measured", speed=1.312, memory=0.43),
    }
    return RunReport.model_validate(values | changes)


def _render(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200, markup=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


# The line of the design, word for word.
LAST_LINE = (
    "kernels: rope 30/30  rms_norm 61/61  swiglu 30/30  fused_linear_cross_entropy 1/1   "
    "peak 5.1 GB   12 345 tokens/s   against eager: 1.31x speed, 0.43x memory (measured)"
)


def test_last_line() -> None:
    assert last_line(_report()) == LAST_LINE


def test_last_line_with_an_estimated_gain_has_no_speed() -> None:
    line = last_line(_report(gain=GainPart(source="estimated", memory=0.5)))
    assert line.endswith("12 345 tokens/s   against eager: 0.50x memory (estimated)")


def test_last_line_names_unused_modules() -> None:
    report = _report()
    assert report.modules is not None
    report.modules[0]["status"] = "unused"
    assert last_line(report).startswith("kernels: rope 29/30 (1 unused)  rms_norm 61/61  ")


def test_last_line_without_training_is_the_coverage() -> None:
    report = _report(train=None, gain=None, coverage={"rope": {"patched": 0, "candidates": 2}})
    assert last_line(report) == "kernels: rope 0/2"


def test_last_line_without_a_candidate_says_none_case_107() -> None:
    assert last_line(_report(coverage={}, train=None, gain=None)) == "kernels: none"


def test_last_line_of_a_comparison_is_about_the_patched_arm() -> None:
    arms = [
        Arm(name="eager", tokens_per_s=10, step_ms=1, peak_memory_bytes=2 * 10**9, losses=[]),
        Arm(name="patched", tokens_per_s=2000, step_ms=1, peak_memory_bytes=10**9, losses=[]),
    ]
    line = last_line(_report(train=None, gain=None, arms=arms))
    assert line.endswith("1/1   peak 1.0 GB   2 000 tokens/s")


@pytest.mark.parametrize(
    ("number", "text"),
    [(12345.4, "12 345"), (1234567, "1 234 567"), (999, "999"), (3.25, "3.2"), (0, "0")],
)
def test_format_count(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (5_100_000_000, "5.1 GB"),
        (123_000_000, "0.1 GB"),
        (35_400_000, "35 MB"),
        (7_400, "7 kB"),
        (512, "512 B"),
        (0, "0 B"),
    ],
)
def test_format_bytes_counts_a_gb_as_1e9(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_json_there_and_back(tmp_path: Path) -> None:
    report = _report(
        eval=EvalPart(loss=1.5, perplexity=math.exp(1.5), token_accuracy=0.5, tokens=7)
    )
    path = tmp_path / "run" / "report.json"
    report.write(path)
    assert RunReport.from_json(path.read_text()) == report
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]


def test_json_has_the_keys_of_the_design_and_no_absent_part() -> None:
    values = json.loads(_report().to_json())
    assert list(values) == [
        "schema_version",
        "command",
        "config",
        "environment",
        "coverage",
        "modules",
        "train",
        "gain",
    ]
    assert set(values["train"]) == {
        "steps",
        "tokens",
        "trained_tokens",
        "first_loss",
        "final_loss",
        "tokens_per_s",
        "step_ms",
        "peak_memory_bytes",
        "batch",
    }
    assert values["gain"] == {"source": "measured", "speed": 1.312, "memory": 0.43}
    # A null within a part stays: the row says that there is no reason.
    assert values["modules"][0] == {
        "name": "model.layers.0.self_attn",
        "class": "Module",
        "op": "rope",
        "status": "patched",
        "backend": "torch",
        "reason": None,
    }


def test_nan_is_null_in_json() -> None:
    report = _report(train=_train(final_loss=math.nan), config={"learning_rate": math.inf})
    text = report.to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["train"]["final_loss"] is None
    assert json.loads(text)["config"]["learning_rate"] is None


def test_unknown_key_and_other_schema_are_refused() -> None:
    with pytest.raises(ValidationError, match="speedup"):
        RunReport.from_json('{"schema_version": 1, "command": "train", "speedup": 2}')
    with pytest.raises(ValueError, match="schema_version is 2"):
        RunReport.from_json('{"schema_version": 2, "command": "train"}')
    with pytest.raises(ValueError, match="schema_version is None"):
        RunReport.from_json("[]")


def test_fold_repeated_layers() -> None:
    folded = {row.name: row.num_modules for row in fold_modules(_report().modules or [])}
    assert folded == {
        "model.layers.0-29.self_attn": 30,
        "model.layers.0-29.input_layernorm": 30,
        "model.layers.0-29.post_attention_layernorm": 30,
        "model.layers.0-29.mlp": 30,
        "model.norm": 1,
        "lm_head": 1,
    }


def test_fold_keeps_layers_apart_that_differ() -> None:
    rows = [_row(f"layers.{i}.mlp", "swiglu") for i in range(6)]
    rows[2] = _row("layers.2.mlp", "swiglu", "skipped", "has a bias")
    folded = [(row.name, row.num_modules, row.reason) for row in fold_modules(rows)]
    assert folded == [("layers.0-1,3-5.mlp", 5, ""), ("layers.2.mlp", 1, "has a bias")]


def test_fold_experts_within_layers() -> None:
    rows = [_row(f"h.{i}.experts.{j}", "swiglu") for i in range(2) for j in range(4)]
    assert [(row.name, row.num_modules) for row in fold_modules(rows)] == [("h.0-1.experts.0-3", 8)]


def test_fold_leaves_numbers_inside_words_and_the_root() -> None:
    rows = [_row("block2.norm1", "rms_norm"), _row("block3.norm1", "rms_norm"), _row("", None)]
    assert [row.name for row in fold_modules(rows)] == ["block2.norm1", "block3.norm1", "(model)"]


def test_modules_table() -> None:
    rows = [_row(f"h.{i}.mlp", None, "skipped", "plain [ungated] MLP") for i in range(12)]
    assert _render(modules_table(_report(modules=rows))) == (
        "module      count  class   status   why\n"
        "h.0-11.mlp  x12    Module  skipped  plain [ungated] MLP"
    )


def test_coverage_table_gives_reasons_and_missing_ops() -> None:
    report = _report(
        coverage={"rope": {"patched": 1, "candidates": 3}},
        modules=[
            _row("a", "rope"),
            _row("b", "rope", "skipped", "odd width"),
            _row("c", "rope", "skipped", "odd width"),
        ],
        missing=["geglu"],
    )
    assert _render(coverage_table(report)) == (
        "op     patched  backend  not patched\n"
        "rope   1/3      torch    2: odd width\n"
        "geglu  0/0               this model has no place for it"
    )


def test_arms_table_is_side_by_side() -> None:
    arms = [
        Arm(
            name="eager",
            tokens_per_s=10000,
            step_ms=100.04,
            peak_memory_bytes=2 * 10**9,
            losses=[2, 1],
        ),
        Arm(
            name="patched",
            tokens_per_s=20000,
            step_ms=50,
            peak_memory_bytes=10**9,
            losses=[2, math.nan],
        ),
    ]
    assert _render(arms_table(_report(arms=arms))) == (
        "arm      tokens/s  step ms  peak    speed  memory  first loss  last loss\n"
        "eager    10 000    100.0    2.0 GB  1.00x  1.00x   2.0000      1.0000\n"
        "patched  20 000    50.0     1.0 GB  2.00x  0.50x   2.0000      not finite"
    )


EQUAL = ParityPart(
    steps=5, max_loss_difference=1e-5, max_relative_difference=1e-6, tolerance=1e-3, equal=True
)


@pytest.mark.parametrize(
    ("speed", "memory", "words"),
    [
        (1.31, 0.5, "1.31x faster; 2.00x less memory"),
        (0.8, 1.25, "1.25x slower; 1.25x more memory"),
        (1.01, 1.0, "no gain in speed (1.01x); no gain in memory (1.00x)"),
        (None, None, "speed not measured; memory not measured"),
    ],
    ids=["gain", "slower", "no-gain", "unmeasured"],
)
def test_verdict_is_honest_case_104(speed: float | None, memory: float | None, words: str) -> None:
    text = verdict(RatiosPart(speed=speed, memory=memory), EQUAL)
    assert text == (
        f"patched against eager: {words}; losses agree over 5 steps (at most 1e-05 apart)"
    )


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.3])
def test_verdict_of_single_runs_judges_nothing_case_104(speed: float) -> None:
    ratios = RatiosPart(speed=speed, memory=0.5, noise=None, memory_noise=None)
    text = verdict(ratios, EQUAL, names=("patched", "compile"))
    assert text.startswith(
        f"patched against compile: {speed:.2f}x the speed in one run; 0.50x the memory in one run; "
        "each side ran once, so the noise is unknown (--repeats 2 measures it); losses agree"
    )


def test_arms_table_says_why_there_are_no_figures_and_shows_the_spread() -> None:
    arms = [
        Arm(name="eager", runs=0, error="out of memory"),
        Arm(name="patched", step_ms=5, step_p20_ms=4, step_p80_ms=6.5, first_step_ms=900),
    ]
    assert _render(arms_table(_report(arms=arms))) == (
        "arm      step ms  p20 - p80  first step ms  note\n"
        "eager                                       out of memory\n"
        "patched  5.0      4.0 - 6.5  900"
    )


def test_verdict_within_the_noise_of_the_machine_is_no_gain() -> None:
    text = verdict(RatiosPart(speed=1.4, memory=0.5, noise=0.6), EQUAL)
    assert text.startswith(
        "patched against eager: no gain in speed (1.40x), where equal runs are up to 1.60x apart; "
        "2.00x less memory"
    )
    text = verdict(RatiosPart(speed=1.4, memory=0.5, noise=0.1), EQUAL)
    assert "1.40x faster, where equal runs are up to 1.10x apart" in text


def test_verdict_says_that_losses_differ() -> None:
    parity = ParityPart(
        steps=5,
        max_loss_difference=0.2,
        max_relative_difference=0.1,
        tolerance=0.001,
        equal=False,
    )
    text = verdict(RatiosPart(speed=1.5, memory=0.5), parity)
    assert text.endswith("; LOSSES DIFFER: 0.2 apart, 10.0% where 0.1% is allowed")


def test_show_report_puts_the_last_line_last(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(_report(), as_json=False, details=True)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == LAST_LINE
    assert "\n  .layers.0-29 " in out
    assert "\n    .mlp " in out


def test_show_report_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(_report(), as_json=True, details=True)
    out, err = capsys.readouterr()
    assert json.loads(out)["command"] == "train"
    assert err.splitlines()[-1] == LAST_LINE


def test_show_report_says_that_nothing_was_patched(capsys: pytest.CaptureFixture[str]) -> None:
    report = _report(
        coverage={"rope": {"patched": 0, "candidates": 30}},
        ratios=RatiosPart(speed=2.0, memory=1.0),
        parity=EQUAL,
    )
    show_report(report, as_json=False)
    assert "nothing was patched, so both sides ran the same code" in capsys.readouterr().out


def test_show_report_of_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    part = EvalPart(loss=1.5, perplexity=4.4817, token_accuracy=0.512, tokens=1200)
    show_report(_report(train=None, gain=None, eval=part), as_json=False)
    assert capsys.readouterr().out.splitlines()[-2] == (
        "loss 1.5000  perplexity 4.48  token accuracy 51.2%  1 200 tokens"
    )


def test_no_escape_codes_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(_report(), as_json=False)
    with TrainProgress(2) as progress:
        progress.update(1, loss=1.0)
        progress.update(2, loss=0.5)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err


def test_progress_without_a_terminal_writes_a_line_an_update(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with TrainProgress(40, description="eager") as progress:
        for step in range(1, 41):
            progress.update(step, loss=1.0, tokens_per_s=2000, peak_memory_bytes=10**9)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 40
    assert err.splitlines()[-1] == "eager 40/40  loss 1.0000  2 000 tokens/s  1.0 GB"
