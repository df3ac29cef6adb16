"""liger bench: defaults, the order of runs, ratios, parity, the verdict."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_results import COVERAGE, result
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import liger_cli.commands.bench.models.comparison as comparison
from liger_cli.commands.bench.models.figures import compare_arms
from liger_cli.commands.bench.models.plan import BenchRequest, parse_bounds, parse_sizes, plan_bench
from liger_cli.commands.bench.models.reasons import Facts, no_gain
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, RequirementFailed
from liger_cli.report import AgainstPart, Arm, RatiosPart, RunReport, verdict
from liger_cli.training.runtime.arms import ArmResult

SCRIPT = Path(__file__).parents[3] / "scripts" / "performance_page.py"


NOTHING = {"rope": {"patched": 0, "candidates": 2}}


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
