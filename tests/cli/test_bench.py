"""liger bench: defaults, the order of runs, ratios, parity, the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import liger_cli.comparison as comparison
from liger_cli.comparison import check_against, compare_arms, plan_bench
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, RequirementFailed
from liger_cli.report import Arm, RatiosPart, verdict
from liger_cli.training.arms import ArmResult

COVERAGE = {"rope": {"patched": 2, "candidates": 2}, "rms_norm": {"patched": 5, "candidates": 5}}


@pytest.fixture
def fake_arms(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the processes and returns what they were asked for."""
    asked: list[dict[str, Any]] = []

    def run_arm(config: RunConfig, *, name: str, ops: str, steps: int) -> ArmResult:
        asked.append({"name": name, "ops": ops, "steps": steps, "config": config})
        number = len(asked)
        is_patched = name == "patched"
        return ArmResult(
            name=name,
            tokens_per_s=(2000.0 if is_patched else 1000.0) - number,
            step_ms=(50.0 if is_patched else 100.0) + number,
            peak_memory_bytes=500_000_000 + number if is_patched else 1_000_000_000,
            losses=[4.0 + number * 1e-6, 3.0],
            coverage=COVERAGE,
            modules=[],
        )

    monkeypatch.setattr(comparison, "run_arm", run_arm)
    return asked


def test_json_has_the_keys_of_the_design(
    liger: Callable[..., Any], fake_arms: list[dict[str, Any]]
) -> None:
    ran = liger("bench", "--model", "mistral", "--use-cpu", "--json")
    assert ran.code == 0
    result = ran.json()
    assert [arm["name"] for arm in result["arms"]] == ["eager", "patched"]
    for arm in result["arms"]:
        assert set(arm) == {"name", "tokens_per_s", "step_ms", "peak_memory_bytes", "losses"}
        assert len(arm["losses"]) == 2
    assert result["ratios"]["speed"] == pytest.approx(1999 / 998)
    assert result["ratios"]["memory"] == pytest.approx(0.5)
    assert result["parity"]["max_loss_difference"] == pytest.approx(1e-6)
    assert result["parity"]["equal"] is True
    assert result["gain"]["source"] == "measured"
    assert result["coverage"] == COVERAGE
    assert result["config"]["model"] == "mistral"
    assert "patched against eager: 2.00x faster; 2.00x less memory; losses agree" in ran.err


def test_last_line_and_verdict_for_a_person(
    liger: Callable[..., Any], fake_arms: list[dict[str, Any]]
) -> None:
    ran = liger("bench", "--model", "mistral", "--use-cpu")
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == (
        "kernels: rope 2/2  rms_norm 5/5   peak 0.5 GB   1 999 tokens/s   "
        "against eager: 2.00x speed, 0.50x memory (measured)"
    )
    assert "eager    998       102.0    1.0 GB" in ran.out
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


def test_repeats_give_the_run_of_median_speed_and_the_highest_peak(
    liger: Callable[..., Any], fake_arms: list[dict[str, Any]]
) -> None:
    ran = liger("bench", "--model", "mistral", "--repeats", "3", "--json")
    eager, patched = ran.json()["arms"]
    # Patched ran as numbers 1, 3, 5; eager as 2, 4, 6.
    assert (patched["tokens_per_s"], eager["tokens_per_s"]) == (1997, 996)
    assert patched["peak_memory_bytes"] == 500_000_005


def test_noise_is_how_far_apart_equal_runs_are(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter([1500.0, 1000.0, 1600.0, 1400.0])

    def run_arm(config: RunConfig, *, name: str, ops: str, steps: int) -> ArmResult:
        speed = next(speeds)
        return ArmResult(name, speed, 1e5 / speed, 10**9, [1.0], COVERAGE, [])

    monkeypatch.setattr(comparison, "run_arm", run_arm)
    ran = liger("bench", "--model", "mistral", "--json")
    ratios = ran.json()["ratios"]
    assert ratios["noise"] == pytest.approx(0.4)
    assert ratios["speed"] == pytest.approx(1600 / 1400)
    assert "no gain in speed (1.14x), where equal runs are up to 1.40x apart" in ran.err


def test_defaults_of_the_device() -> None:
    config = RunConfig(model="mistral")
    cpu = plan_bench(config, steps=None, repeats=None, has_gpu=False)
    assert (cpu.config.per_device_train_batch_size, cpu.config.max_length) == (2, 512)
    assert (cpu.steps, cpu.repeats, cpu.config.dataset) == (5, 2, "synthetic")
    gpu = plan_bench(config, steps=None, repeats=None, has_gpu=True)
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
    plan = plan_bench(config, steps=None, repeats=None, has_gpu=True)
    assert plan.config == config
    assert (plan.steps, plan.repeats) == (3, 2)
    with pytest.raises(ConfigError, match="--steps and --max-steps"):
        plan_bench(config, steps=4, repeats=None, has_gpu=False)


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("compile", "--against compile is not available yet; available: eager"),
        ("eager,liger-kernel", "--against liger-kernel is not available yet; available: eager"),
        ("egaer", "--against egaer is unknown; available: eager"),
    ],
)
def test_other_sides_are_refused(
    against: str, message: str, liger: Callable[..., Any], fake_arms: list[dict[str, Any]]
) -> None:
    check_against("eager")
    ran = liger("bench", "--model", "mistral", "--against", against, "--json")
    assert (ran.code, list(ran.json()), fake_arms) == (2, ["error"], [])
    assert message in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mistrall"], "mistral"),
        (["--model", "mistral", "--ops", "rop"], "rope"),
        (["--model", "mistral", "--learning-rat", "1"], "--learning-rate"),
        (["--model", "mistral", "--steps", "1"], "--steps"),
        ([], "--model"),
    ],
    ids=["preset", "op", "flag", "steps", "no-model"],
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
