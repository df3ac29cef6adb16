"""What the commands say of an op that runs as a part of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import liger_cli.commands.doctor.checks as checks
import liger_cli.commands.verify.model as verification
from liger_kernels.compare import CheckResult
from liger_kernels.ops.registry import OPS


def _only_fails(name: str) -> Callable[..., CheckResult]:
    return lambda op, *rest, **more: CheckResult(op, op != name, "off" if op == name else None)


@pytest.mark.parametrize(("ops", "code"), [("auto", 7), ("rope", 0)], ids=["used", "unused"])
def test_verify_fails_for_a_part_of_an_op_that_the_model_uses(
    ops: str, code: int, liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "check_op", _only_fails("glu_mlp"))
    ran = liger("verify", "--model", "mistral", "--use-cpu", "--ops", ops, "--json")
    assert ran.code == code, ran.err
    wrong = {part["op"]: part["reason"] for part in ran.json()["ops"] if not part["ok"]}
    assert wrong == {"glu_mlp": "off"}


def test_verify_says_which_ops_the_model_does_not_use(liger: Callable[..., Any]) -> None:
    ran = liger("verify", "--model", "mistral", "--use-cpu", "--ops", "swiglu", "--json")
    assert ran.code == 0, ran.err
    reasons = {part["op"]: part["reason"] for part in ran.json()["ops"]}
    assert {op for op, reason in reasons.items() if reason is None} == {"swiglu", "glu_mlp"}
    assert "glu_mlp" not in ran.json()["coverage"]


@pytest.mark.parametrize("name", OPS)
def test_doctor_advises_only_what_ops_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernels.transformers.patching.plan import resolve_ops

    monkeypatch.setattr("liger_kernels.compare.check_op", _only_fails(name))
    [failed] = [check for check in checks._kernels() if check.status == "fail"]
    assert failed.name == name
    _, found, advised = failed.advice.rpartition("or --ops ")
    assert bool(found) == bool(OPS[name].patch_names)
    if found:
        assert not set(OPS[name].patch_names) & set(resolve_ops(advised).ops)
