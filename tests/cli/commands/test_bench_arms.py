"""liger bench with real arms: sides in turn, out of memory, bounds, signals, the peer."""

from __future__ import annotations

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
from bench_results import Run, result

import liger_cli.training.runtime.arms as arms_module
from liger_cli.config import RunConfig
from liger_cli.errors import LigerError, OutOfMemory
from liger_cli.training.model.source import build_meta_model, resolve_model
from liger_cli.training.runtime.arms import ArmResult
from liger_kernels.transformers.api import inspect_model


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
