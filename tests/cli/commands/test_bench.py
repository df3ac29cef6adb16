"""liger bench: defaults, the order of runs, ratios, parity, the verdict."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import liger_cli.commands.bench.models.comparison as comparison
import liger_cli.training.runtime.arms as arms_module
from liger_cli.commands.bench.models.figures import compare_arms
from liger_cli.commands.bench.models.plan import BenchRequest, parse_bounds, parse_sizes, plan_bench
from liger_cli.commands.bench.models.reasons import Facts, no_gain
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, LigerError, OutOfMemory, RequirementFailed
from liger_cli.report import AgainstPart, Arm, RatiosPart, RunReport, verdict
from liger_cli.training.model.source import build_meta_model, resolve_model
from liger_cli.training.runtime.arms import ArmResult
from liger_kernels.transformers.api import inspect_model

SCRIPT = Path(__file__).parents[3] / "scripts" / "performance_page.py"
COVERAGE = {"rope": {"patched": 2, "candidates": 2}, "rms_norm": {"patched": 5, "candidates": 5}}
NOTHING = {"rope": {"patched": 0, "candidates": 2}}


def result(
    name: str,
    speed: float,
    *,
    peak: int = 10**9,
    losses: tuple[float, ...] = (4.0, 3.0),
    norms: tuple[float, ...] | None = None,
    coverage: dict[str, dict[str, int]] = COVERAGE,
    peer: dict[str, Any] | None = None,
) -> ArmResult:
    """An arm of equal steps behind a first one that took a second."""
    steps = [
        {
            "loss": loss,
            "grad_norm": (norms or (1.0,) * len(losses))[i],
            "tokens_per_s": speed if i else speed / 10,
            "step_ms": 1e5 / speed if i else 1000.0,
            "peak_memory_bytes": peak,
        }
        for i, loss in enumerate(losses)
    ]
    return ArmResult(name, steps, coverage, [], peer)


@pytest.fixture
def fake_arms(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the processes and returns what they were asked for."""
    asked: list[dict[str, Any]] = []

    def run_arm(config: RunConfig, *, name: str, **more: Any) -> ArmResult:
        asked.append({"name": name, "config": config, **more})
        number = len(asked)
        is_patched = name == "patched"
        return result(
            name,
            (2000.0 if is_patched else 1000.0) - number,
            peak=500_000_000 + number if is_patched else 1_000_000_000,
            losses=(4.0 + number * 1e-6, 3.0),
        )

    monkeypatch.setattr(comparison, "run_arm", run_arm)
    return asked


def test_json_has_the_keys_of_the_design(
    liger: Callable[..., Any], fake_arms: list[dict[str, Any]]
) -> None:
    ran = liger("bench", "--model", "mistral", "--use-cpu", "--json")
    assert ran.code == 0
    found = ran.json()
    assert [arm["name"] for arm in found["arms"]] == ["eager", "patched"]
    for arm in found["arms"]:
        assert set(arm) >= {"name", "tokens_per_s", "step_ms", "peak_memory_bytes", "losses"}
        assert len(arm["losses"]) == len(arm["grad_norms"]) == 2
        assert (arm["first_step_ms"], arm["runs"]) == (1000.0, 2)
    # Patched ran as numbers 1 and 3, eager as 2 and 4: medians over both.
    assert found["ratios"]["speed"] == pytest.approx(1998 / 997)
    assert found["ratios"]["memory"] == pytest.approx(0.5)
    assert found["parity"]["max_loss_difference"] == pytest.approx(1e-6)
    assert found["parity"]["equal"] is True
    assert found["parity"]["max_grad_norm_difference"] == 0
    assert list(found["against"]) == ["eager"]
    assert found["against"]["eager"]["ratios"] == found["ratios"]
    assert found["gain"]["source"] == "measured"
    assert found["coverage"] == COVERAGE
    assert found["config"]["model"] == "mistral"
    assert "patched against eager: 2.00x faster; 2.00x less memory; losses agree" in ran.err


def test_last_line_and_verdict_for_a_person(
    liger: Callable[..., Any], fake_arms: list[dict[str, Any]]
) -> None:
    ran = liger("bench", "--model", "mistral", "--use-cpu")
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == (
        "kernels: rope 2/2  rms_norm 5/5   peak 0.5 GB   1 998 tokens/s   "
        "against eager: 2.00x speed, 0.50x memory (measured)"
    )
    assert "eager    997       100.3" in ran.out
    assert "eager, run 2 of 2 ..." in ran.err


def test_arms_alternate_with_the_same_configuration_and_their_own_ops(
    liger: Callable[..., Any], fake_arms: list[dict[str, Any]]
) -> None:
    ran = liger(
        "bench", "--model", "mistral", "--ops", "rope", "--repeats", "2", "--learning-rate", "0.5"
    )
    assert ran.code == 0
    assert [(arm["name"], arm["ops"]) for arm in fake_arms] == [
        ("patched", "rope"),
        ("eager", "none"),
    ] * 2
    assert len({arm["config"].to_yaml() for arm in fake_arms}) == 1
    assert fake_arms[0]["config"].learning_rate == 0.5


def test_figures_are_medians_over_all_runs_with_the_first_steps_apart_case_103(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"patched": [2000.0, 2100.0, 1900.0], "eager": [1000.0, 1010.0, 990.0]}
    left = {name: list(values) for name, values in speeds.items()}

    def run_arm(config: RunConfig, *, name: str, **more: Any) -> ArmResult:
        speed = left[name].pop(0)
        return result(name, speed, peak=int(1e9 + speed), losses=(4.0, 3.0, 2.0))

    monkeypatch.setattr(comparison, "run_arm", run_arm)
    ran = liger("bench", "--model", "mistral", "--repeats", "3", "--use-cpu", "--json")
    eager, patched = ran.json()["arms"]
    # The first step of each run took a second, and a tenth of the speed.
    assert (patched["tokens_per_s"], patched["step_ms"]) == (2000.0, 50.0)
    assert patched["step_p20_ms"] == pytest.approx(1e5 / 2100)
    assert patched["step_p80_ms"] == pytest.approx(1e5 / 1900)
    assert (patched["first_step_ms"], patched["runs"]) == (1000.0, 3)
    assert patched["peak_memory_bytes"] == 1_000_002_100
    assert "47.6 - 52.6" in ran.err
    assert "the first step of a run compiles and warms up" in ran.err
    assert "the resident size of the whole process" in ran.err


@pytest.mark.parametrize("words", [(), ("--no-use-regional-compilation",)], ids=["layers", "whole"])
def test_a_compiled_side_compiles_in_its_first_step_alone_case_103(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: compile_module(model, backend=counter))
    torch.compiler.reset()
    ran = train("--torch-compile", *words, "--dataset", "synthetic", "--max-length", 16)
    assert ran.code == 0, ran.err
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_noise_is_how_far_apart_equal_runs_are(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter([1500.0, 1000.0, 1600.0, 1400.0])
    monkeypatch.setattr(
        comparison, "run_arm", lambda config, *, name, **more: result(name, next(speeds))
    )
    ran = liger("bench", "--model", "mistral", "--json")
    ratios = ran.json()["ratios"]
    assert ratios["noise"] == pytest.approx(0.4)
    assert ratios["speed"] == pytest.approx(1550 / 1200)
    assert "no gain in speed (1.29x), where equal runs are up to 1.40x apart" in ran.err


def test_one_run_knows_no_noise_and_judges_nothing_case_104(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter([900.0, 1000.0])
    monkeypatch.setattr(
        comparison, "run_arm", lambda config, *, name, **more: result(name, next(speeds))
    )
    ran = liger("bench", "--model", "mistral", "--repeats", "1", "--use-cpu", "--json")
    assert ran.json()["ratios"]["noise"] is None
    words = ran.json()["against"]["eager"]["verdict"]
    assert "patched against eager: 0.90x the speed in one run; 1.00x the memory in one run" in words
    assert "the noise is unknown (--repeats 2 measures it)" in words
    assert "slower" not in words
    assert "no speed is gained" not in words


def test_slower_and_larger_are_said_with_a_reason_case_104(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"patched": (900.0, 1_200_000_000), "eager": (1000.0, 1_000_000_000)}

    def run_arm(config: RunConfig, *, name: str, **more: Any) -> ArmResult:
        speed, peak = figures[name]
        return result(name, speed, peak=peak)

    monkeypatch.setattr(comparison, "run_arm", run_arm)
    sizes = ["--per-device-train-batch-size", "1", "--max-length", "128"]
    ran = liger("bench", "--model", "mistral", *sizes, "--use-cpu", "--json")
    assert ran.code == 0
    words = ran.json()["against"]["eager"]["verdict"]
    assert words.startswith(
        "patched against eager: 1.11x slower; 1.20x more memory; losses agree over 2 steps"
    )
    assert "no speed is gained here, because on a CPU the ops are torch code" in words
    assert "no memory is saved here, because the loss, where most can be saved" in words
    assert words in ran.err


def test_equal_code_is_never_called_slower_case_104(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"patched": 500.0, "eager": 1000.0}
    monkeypatch.setattr(
        comparison,
        "run_arm",
        lambda config, *, name, **more: result(name, speeds[name], coverage=NOTHING),
    )
    ran = liger("bench", "--model", "mistral", "--ops", "none", "--json")
    words = ran.json()["against"]["eager"]["verdict"]
    assert "nothing was patched, so both sides ran the same code" in words
    assert "slower" not in words


def test_defaults_of_the_device() -> None:
    config = RunConfig(model="mistral")
    cpu = plan_bench(config, BenchRequest(), has_gpu=False)
    assert (cpu.config.per_device_train_batch_size, cpu.config.max_length) == (2, 512)
    assert (cpu.steps, cpu.repeats, cpu.config.dataset) == (3, 2, "synthetic")
    gpu = plan_bench(config, BenchRequest(), has_gpu=True)
    assert (gpu.config.per_device_train_batch_size, gpu.config.max_length) == (8, 2048)
    assert (gpu.steps, gpu.repeats) == (20, 2)
    assert gpu.tolerance > cpu.tolerance


def test_what_the_user_says_is_kept() -> None:
    config = RunConfig(
        model="mistral",
        per_device_train_batch_size=8,
        max_length=1024,
        dataset="chitchat",
        max_steps=3,
        use_cpu=True,
    )
    plan = plan_bench(config, BenchRequest(), has_gpu=True)
    assert plan.config == config
    assert (plan.steps, plan.repeats) == (3, 2)
    with pytest.raises(ConfigError, match="--steps and --max-steps"):
        plan_bench(config, BenchRequest(steps=4), has_gpu=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mistrall"], "mistral"),
        (["--model", "mistral", "--ops", "rop"], "rope"),
        (["--model", "mistral", "--learning-rat", "1"], "--learning-rate"),
        (["--model", "mistral", "--steps", "1"], "--steps"),
        ([], "--model"),
        (["--model", "mistral", "--against", "egaer"], "--against egaer is unknown; available: e"),
        (["--model", "mistral", "--seq", "8k..2k"], "'8k..2k' is not a size above 0"),
        (["--model", "mistral", "--batch", "0"], "'0' is not a size above 0"),
        (["--model", "mistral", "--seq", "64", "--max-length", "64"], "--seq and --max-length"),
        (["--model", "mistral", "--seq", "64", "--dataset", "chitchat"], "differ in length"),
        (["--model", "mistral", "--assert", "sped>=1"], "'sped' is not one of speed, memory"),
        (["--model", "mistral", "--assert", "speed=1"], "'=' is not one of >=, <=, >, <"),
        (["--model", "mistral", "--assert", "speed>=fast"], "'fast' is not a number above 0"),
        (["--model", "mistral", "--assert", "speed>=1,"], "'' is not one of speed, memory"),
        (["--model", "mistral", "--torch-compile"], "torch_compile is a side of the comparison"),
        (["--model", "mistral", "--auto-fit"], "auto_fit would measure a side at another size"),
        (["--model", "mistral", "--peer-path", "."], "which --against does not name"),
    ],
    ids=[
        *("preset", "op", "flag", "steps", "no-model", "against", "range", "zero", "seq-twice"),
        *("seq-data", "bound-name", "bound-sign", "bound-number", "bound-empty", "compile"),
        "auto-fit",
        "peer-unused",
    ],
)
def test_wrong_words_start_nothing_case_99(
    arguments: list[str], message: str, liger: Callable[..., Any], fake_arms: list[dict[str, Any]]
) -> None:
    ran = liger("bench", *arguments, "--json")
    assert (ran.code, list(ran.json()), fake_arms) == (2, ["error"], [])
    assert message in ran.err


def test_the_code_of_a_failed_arm_is_passed_on(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_arm(config: RunConfig, **arguments: object) -> ArmResult:
        raise RequirementFailed("the patched run failed (exit code 7): no op has a place")

    monkeypatch.setattr(comparison, "run_arm", run_arm)
    ran = liger("bench", "--model", "mistral", "--json")
    assert (ran.code, ran.json()["error"]["exit_code"]) == (7, 7)
    assert "no op has a place" in ran.err


Run = Callable[[RunConfig, str], ArmResult]


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], list[str]]:
    """Replaces the processes by a function of configuration and name; returns the names run."""

    def replace(run: Run) -> list[str]:
        names: list[str] = []

        def run_arm(config: RunConfig, *, name: str, **more: Any) -> ArmResult:
            names.append(name)
            return run(config, name)

        monkeypatch.setattr(comparison, "run_arm", run_arm)
        return names

    return replace


def test_every_side_takes_its_turn_and_is_compared(
    liger: Callable[..., Any],
    fake_arms: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    fake_peer: Path,
) -> None:
    words = ["--against", "compile,eager,patched+compile,liger-kernel", "--peer-path", fake_peer]
    ran = liger("bench", "--model", "mistral", "--ops", "auto,-rope", *words, "--json")
    assert ran.code == 0
    asked = [(arm["name"], arm["ops"], arm["torch_compile"]) for arm in fake_arms]
    assert asked[: len(asked) // 2] == asked[len(asked) // 2 :]
    assert asked[: len(asked) // 2] == [
        ("patched", "auto,-rope", False),
        ("compile", "none", True),
        ("eager", "none", False),
        ("patched+compile", "auto,-rope", True),
        ("liger-kernel", "none", False),
    ]
    assert [arm["name"] for arm in fake_arms if arm["peer"]] == ["liger-kernel"] * 2
    found = ran.json()
    assert [arm["name"] for arm in found["arms"]] == [
        *("compile", "patched", "eager", "patched+compile", "liger-kernel"),
    ]
    assert list(found["against"]) == ["compile", "eager", "patched+compile", "liger-kernel"]
    assert found["ratios"] == found["against"]["compile"]["ratios"]
    assert found["gain"]["speed"] == found["against"]["eager"]["ratios"]["speed"]
    for name, part in found["against"].items():
        assert part["verdict"].startswith(f"patched against {name}: 2.0")
        assert part["verdict"] in ran.err


def test_ablation_runs_each_op_alone_beside_eager(
    liger: Callable[..., Any], fake_arms: list[dict[str, Any]]
) -> None:
    ran = liger("bench", "--model", "mistral", "--against", "compile", "--ablate", "--json")
    plan = inspect_model(build_meta_model(resolve_model("mistral")))
    alone = [op for op, counts in plan.coverage.items() if counts["patched"]]
    assert len(alone) >= 4
    half = [(arm["name"], arm["ops"]) for arm in fake_arms][: len(fake_arms) // 2]
    assert half[:3] == [("patched", "auto"), ("compile", "none"), ("eager", "none")]
    assert half[3:] == [(f"eager+{ops}", ops) for ops in alone]
    assert list(ran.json()["ablation"]) == alone
    words = ran.json()["ablation"]["rope"]["verdict"]
    assert words.startswith("eager+rope against eager: no gain in speed (")


def test_gradient_norms_are_compared_too(
    liger: Callable[..., Any], arms: Callable[[Run], list[str]]
) -> None:
    norms = {"patched": (1.0, 2.2), "eager": (1.0, 2.0)}
    arms(lambda config, name: result(name, 1000.0, norms=norms[name]))
    found = liger("bench", "--model", "mistral", "--use-cpu", "--json").json()
    assert found["parity"]["max_grad_norm_difference"] == pytest.approx(0.1)
    assert found["parity"]["equal"] is False
    assert (
        "GRADIENTS DIFFER: their norms by 10.0%, where 0.5% is allowed"
        in (found["against"]["eager"]["verdict"])
    )


def _runs_out(limits: dict[str, int]) -> Run:
    """Each arm has room for so many tokens."""

    def run(config: RunConfig, name: str) -> ArmResult:
        tokens = config.per_device_train_batch_size * config.max_length
        if tokens > limits[name]:
            raise OutOfMemory(f"the {name} run failed (exit code 5): CUDA out of memory")
        return result(name, 2000.0 if name == "patched" else 1000.0, peak=tokens)

    return run


def test_sweep_runs_until_out_of_memory_and_says_what_fits(
    liger: Callable[..., Any], arms: Callable[[Run], list[str]]
) -> None:
    ran_arms = arms(_runs_out({"patched": 1024, "eager": 256}))
    words = ["bench", "--model", "mistral", "--seq", "128..512", "--batch", "1,2,4"]
    ran = liger(*words, "--json")
    assert ran.code == 0
    found = ran.json()
    sizes = [(p["sequence_length"], p["batch_size"]) for p in found["sweep"]]
    assert sizes == [(s, b) for s in (128, 256, 512) for b in (1, 2, 4)]
    patched, eager = found["fits"]
    assert patched["by_sequence"] == {"128": 4, "256": 4, "512": 2}
    assert eager["by_sequence"] == {"128": 2, "256": 1, "512": None}
    assert (patched["largest_batch_size"], patched["longest_sequence"]) == (4, 512)
    assert (eager["largest_batch_size"], eager["longest_sequence"]) == (2, 256)
    # Once each where it fits and where it first does not; larger sizes are not tried.
    assert ran_arms.count("eager") == 3 + 3
    errors = {
        (p["sequence_length"], p["batch_size"]): arm["error"]
        for p in found["sweep"]
        for arm in p["arms"]
        if arm["name"] == "eager"
    }
    assert errors[128, 2] is None
    assert errors[128, 4] == errors[512, 1] == "out of memory"
    assert errors[256, 4] == "out of memory at a smaller size"
    # The figures at the top are those of the largest size that both sides ran.
    assert found["arms"][0]["peak_memory_bytes"] == 256
    assert found["ratios"]["noise"] is None
    assert ["512", "2", "none"] in [line.split() for line in ran.err.splitlines()]


def test_a_side_that_does_not_fit_is_a_result_where_patched_fits(
    liger: Callable[..., Any], arms: Callable[[Run], list[str]]
) -> None:
    names = arms(_runs_out({"patched": 10**6, "eager": 0}))
    ran = liger("bench", "--model", "mistral", "--json")
    assert (ran.code, names) == (0, ["patched", "eager", "patched"])
    eager, patched = ran.json()["arms"]
    assert (eager["error"], eager["tokens_per_s"]) == ("out of memory", None)
    assert patched["tokens_per_s"] == 2000
    assert "gain" not in ran.json()
    ran = liger("bench", "--model", "mistral", "--assert", "speed>=1", "--json")
    assert (ran.code, ran.json()["asserted"][0]["met"]) == (7, False)
    assert "speed>=1 does not hold: not measured (eager and patched did not both run)" in ran.err


def test_a_side_that_fails_otherwise_is_shown_and_fails_the_command(
    liger: Callable[..., Any], arms: Callable[[Run], list[str]]
) -> None:
    def run(config: RunConfig, name: str) -> ArmResult:
        if name == "compile":
            raise LigerError("the compile run failed (exit code 1): no compiler")
        return result(name, 1000.0)

    arms(run)
    ran = liger("bench", "--model", "mistral", "--against", "eager,compile", "--json")
    assert ran.code == 1
    assert list(ran.json()["against"]) == ["eager"]
    assert ran.json()["arms"][2]["error"] == "the compile run failed (exit code 1): no compiler"
    assert "error: the compile run failed" in ran.err


@pytest.mark.parametrize(
    ("bounds", "code"),
    [
        ("speed>=1.9,memory<=0.6", 0),
        ("speed>=2.1", 7),
        (" memory < 0.5 , speed > 1 ", 7),
    ],
)
def test_assert_says_what_was_measured(
    bounds: str, code: int, liger: Callable[..., Any], arms: Callable[[Run], list[str]]
) -> None:
    speeds, peaks = {"patched": 2000.0, "eager": 1000.0}, {"patched": 500, "eager": 1000}
    arms(lambda config, name: result(name, speeds[name], peak=peaks[name]))
    ran = liger("bench", "--model", "mistral", "--use-cpu", "--assert", bounds, "--json")
    assert ran.code == code
    parts = ran.json()["asserted"]
    assert [part["met"] for part in parts].count(False) == (code == 7)
    assert {round(part["found"], 3) for part in parts} <= {2.0, 0.5}
    if code:
        assert "does not hold: " in ran.err
        assert "(2 x 512 against eager)" in ran.err


def test_assert_does_not_hold_where_losses_differ(
    liger: Callable[..., Any], arms: Callable[[Run], list[str]]
) -> None:
    losses = {"patched": (4.0, 2.0), "eager": (4.0, 3.0)}
    arms(lambda config, name: result(name, 1000.0, losses=losses[name]))
    ran = liger("bench", "--model", "mistral", "--assert", "speed>=0.1", "--json")
    assert ran.code == 7
    assert "losses agree does not hold: 0.333 (2 x 512 against eager)" in ran.err


def test_sizes_and_bounds_are_read() -> None:
    assert parse_sizes("--seq", "512,1024,2k..8k") == (512, 1024, 2048, 4096, 8192)
    assert parse_sizes("--batch", "1..6, 3") == (1, 2, 3, 4, 6)
    first, second = parse_bounds("speed >= 1.10, memory<7e-1")
    assert (str(first), str(second)) == ("speed>=1.1", "memory<0.7")
    assert (first.holds(1.1), first.holds(1.09), first.holds(None)) == (True, False, False)


FACTS = Facts(
    on_gpu=True,
    num_tokens=16384,
    hidden_size=2048,
    vocab_size=128256,
    patched=("rope", "fused_linear_cross_entropy"),
    loss_reason=None,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"on_gpu": False}, "on a CPU the ops are torch code"),
        ({"num_tokens": 128}, "128 tokens of 2048 elements are too few to keep a GPU busy"),
        ({}, "what is patched (rope, fused_linear_cross_entropy) takes little of this step"),
        ({"patched": ("rope",), "loss_reason": "not requested"}, "is not fused (not requested)"),
        ({"vocab_size": 300}, "are about 49 MB of a peak of 60.0 GB"),
    ],
    ids=["cpu", "host-bound", "small-part", "no-fused-loss", "small-logits"],
)
def test_no_gain_has_a_reason_case_104(changes: dict[str, Any], words: str) -> None:
    facts = Facts(**{**vars(FACTS), **changes})
    other = Arm(name="eager", peak_memory_bytes=60 * 10**9)
    sentences = no_gain(RatiosPart(speed=0.95, memory=1.0), facts, other)
    assert len(sentences) == 2
    assert words in "; ".join(sentences)
    assert no_gain(RatiosPart(speed=1.2, memory=0.5), facts, other) == []
    [hidden] = no_gain(RatiosPart(speed=1.2, memory=0.5, noise=0.3), facts, other)
    assert "the noise hides whether there is a gain" in hidden


@pytest.mark.parametrize("other", ["compile", "patched+compile"])
def test_who_is_behind_torch_compile_is_told_to_compile_too(other: str) -> None:
    [sentence] = no_gain(RatiosPart(speed=0.82, memory=0.4), FACTS, Arm(name=other))
    assert "no speed is gained here" in sentence
    assert "--torch-compile compiles the patched model too" in sentence


@pytest.fixture
def fake_peer(tmp_path: Path) -> Path:
    """A folder with a liger_kernel whose patch changes nothing."""
    package = tmp_path / "peer" / "liger_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "transformers.py").write_text(
        "def _apply_liger_kernel_to_instance(*, model):\n    return None\n"
    )
    return package.parent


TINY = ["bench", "--model", "mistral", "--use-cpu", "--max-length", 32, "--steps", 2]
TINY += ["--repeats", 1, "--json"]


def test_the_peer_patches_our_model_in_our_loop(liger: Callable[..., Any], fake_peer: Path) -> None:
    ran = liger(*TINY, "--against", "liger-kernel", "--peer-path", fake_peer)
    assert ran.code == 0, ran.err
    peer, patched = ran.json()["arms"]
    assert peer["name"] == "liger-kernel"
    assert peer["note"] == "of unknown version; it changed no module of this model"
    # The same weights, data and seed as ours.
    assert peer["losses"] == pytest.approx(patched["losses"], rel=1e-4)
    assert peer["grad_norms"] == pytest.approx(patched["grad_norms"], rel=1e-3)


def test_a_peer_that_is_not_installed_is_found_before_anything_runs(
    liger: Callable[..., Any], fake_arms: list[dict[str, Any]], tmp_path: Path
) -> None:
    words = ["bench", "--model", "mistral", "--against", "liger-kernel"]
    ran = liger(*words, "--peer-path", tmp_path, "--json")
    assert (ran.code, fake_arms) == (3, [])
    assert "liger_kernel is not installed for" in ran.err
    ran = liger(*words, "--peer-python", "no-such-python", "--json")
    assert (ran.code, fake_arms) == (2, [])


@pytest.mark.parametrize(
    ("stop_at", "runs", "errors"),
    [
        (2, {"eager": 0, "patched": 1, "compile": 0}, {"eager", "compile"}),
        (5, {"eager": 1, "patched": 2, "compile": 1}, set()),
    ],
)
def test_a_stopped_comparison_keeps_what_was_measured(
    stop_at: int,
    runs: dict[str, int],
    errors: set[str],
    liger: Callable[..., Any],
    arms: Callable[[Run], list[str]],
) -> None:
    names: list[str] = []

    def run(config: RunConfig, name: str) -> ArmResult:
        if len(names) == stop_at:
            raise KeyboardInterrupt
        return result(name, 1000.0)

    names = arms(run)
    ran = liger("bench", "--model", "mistral", "--against", "eager,compile", "--json")
    assert ran.code == 130
    found = ran.json()
    assert found["interrupted"] is True
    assert {arm["name"]: arm["runs"] for arm in found["arms"]} == runs
    assert {arm["name"] for arm in found["arms"] if arm["error"] == "interrupted"} == errors
    assert "error: interrupted; the report has what was measured" in ran.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_run_in_progress_too(number: int) -> None:
    words = [*map(str, TINY), "--max-length", "512"]
    words[words.index("--steps") + 1] = "100000"
    process = subprocess.Popen(
        [sys.executable, "-m", "liger_cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        children = []
        deadline = time.monotonic() + 60
        while not children and time.monotonic() < deadline:
            time.sleep(0.1)
            found = psutil.Process(process.pid).children(recursive=True)
            children = [child for child in found if arms_module._PROCESS in child.cmdline()]
        assert children
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130, errors
        assert "error: interrupted" in errors
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def _arm(name: str, tokens_per_s: float | None, peak: int | None, *losses: float) -> Arm:
    return Arm(
        name=name,
        tokens_per_s=tokens_per_s,
        step_ms=1.0,
        peak_memory_bytes=peak,
        losses=list(losses),
    )


def test_compare_arms() -> None:
    eager = _arm("eager", 100.0, 1000, 4.0, 2.0)
    patched = _arm("patched", 150.0, 400, 4.004, 2.0)
    ratios, parity = compare_arms(eager, patched, tolerance=2e-3)
    assert ratios == RatiosPart(speed=1.5, memory=0.4)
    assert parity.max_loss_difference == pytest.approx(0.004)
    assert parity.max_relative_difference == pytest.approx(0.001)
    assert parity.steps == 2
    assert parity.equal
    assert not compare_arms(eager, patched, tolerance=1e-4)[1].equal


def test_compare_arms_nan_is_not_equal() -> None:
    ratios, parity = compare_arms(
        _arm("eager", 100.0, None, 4.0, 2.0),
        _arm("patched", 150.0, 400, 4.0, math.nan),
        tolerance=1e-3,
    )
    assert not parity.equal
    assert ratios.memory is None
    assert verdict(ratios, parity).endswith(
        "1.50x faster; memory not measured; LOSSES DIFFER: some are not finite"
    )


def test_performance_page_judges_whole_steps_by_their_targets() -> None:
    spec = importlib.util.spec_from_file_location("performance_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = page
    spec.loader.exec_module(page)
    arms = [
        _arm("eager", 100.0, 1000, 4.0),
        _arm("patched", 150.0, 400, 4.0),
        _arm("compile", 130.0, 900, 4.0),
        _arm("liger-kernel", 130.0, 450, 4.0),
    ]
    against = {}
    for arm in (arms[0], *arms[2:]):
        ratios, parity = compare_arms(arm, arms[1], tolerance=1e-2)
        words = verdict(ratios, parity, names=("patched", arm.name))
        against[arm.name] = AgainstPart(ratios=ratios, parity=parity, verdict=words)
    config = {"model": "llama-1b", "per_device_train_batch_size": 8, "max_length": 2048}
    config["max_steps"] = 12
    where = {"devices": [{"name": "a card"}], "torch": "2", "triton": "3", "transformers": "5"}
    where["date"] = "2026-11-29"
    # Cut off, it is compared with nothing.
    arms.append(Arm(name="patched+compile", error="interrupted"))
    report = RunReport(
        command="bench", config=config, environment=where, arms=arms, against=against
    )
    text = page._step(report)
    assert "    a card, torch 2, triton 3, transformers 5, 2026-11-29\n" in text
    sides = "eager,compile,liger-kernel,patched+compile"
    assert f"$ liger bench --model llama-1b --against {sides} --steps " in text
    assert "| liger-kernel | speed | >= 1.10x | 1.15x | met |" in text
    assert "| compile | speed | >= 1.20x | 1.15x | MISSED |" in text
    assert "| liger-kernel | memory | <= 0.80x | 0.89x | MISSED |" in text
    assert "patched against compile: 1.15x faster; 2.25x less memory; losses agree" in text
