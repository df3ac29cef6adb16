"""liger verify: right models, broken ops, truths, and the exit code with the worst offender."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import liger_cli.commands.verify.model as verification
from liger_cli.commands.verify.errors import errors_of, judge, largest, norm
from liger_cli.commands.verify.precision import in_precision
from liger_cli.report.verify import SCHEMA_VERSION
from liger_kernels.compare import CheckResult
from liger_kernels.ops.registry import OPS
from liger_kernels.transformers.api import apply_liger_kernel
from liger_kernels.transformers.lazy_logits import logprobs
from liger_kernels.transformers.patching.engine import PatchRecord

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "dtype", "truth"),
    [("mistral", "float32", "fp64"), ("qwen3-moe", "bfloat16", "fp64")],
)
def test_a_right_model(model: str, dtype: str, truth: str, liger: Callable[..., Any]) -> None:
    ran = liger("verify", "--model", model, "--dtype", dtype, "--use-cpu", "--json")
    assert ran.code == 0, ran.err
    found = ran.json()
    assert (found["schema_version"], found["command"], found["ok"]) == (
        SCHEMA_VERSION,
        "verify",
        True,
    )
    assert (found["truth"], found["dtype"], found["backend"]) == (truth, dtype, "torch")
    assert [part["op"] for part in found["ops"]] == list(OPS)
    used = {part["op"] for part in found["ops"] if part["reason"] is None}
    gated = "moe_experts" if model == "qwen3-moe" else "swiglu"
    assert used >= {"rope", "rms_norm", gated, "fused_linear_cross_entropy"}
    # Every patched module has a row and was compared, the head too.
    counts = sum(counts["patched"] for counts in found["coverage"].values())
    assert len(found["modules"]) == counts
    assert all(part["tensor"]["ok"] for part in found["modules"])
    assert found["modules"][-1]["name"] == "lm_head"
    assert all(part["ours"] is not None for part in found["gradients"])
    names = {part["name"] for part in found["gradients"]}
    assert "gradient of model.embed_tokens.weight" in names
    assert f"{len(names)} gradients compared; nearest to its limit: " in ran.err
    assert "errors are against the stock model in fp64" in ran.err


OBJECTIVES = {
    "dpo": ("--loss-type", "sigmoid,aot"),
    "distill": ("--teacher-model", "qwen2", "--ce-weight", 0.5),
    "orpo": (),
    "cpo": (),
    "kto": (),
    "reward": ("--center-rewards-coefficient", 0.01),
    "classify": ("--class-weights", "1,2,3"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_an_objective_is_compared(name: str, liger: Callable[..., Any]) -> None:
    words = ("--model", "qwen3", "--objective", name, *OBJECTIVES[name], "--use-cpu", "--json")
    ran = liger("verify", *words)
    assert ran.code == 0, ran.err
    found = ran.json()
    assert (found["objective"], found["truth"], found["ok"]) == (name, "fp64", True)
    assert found["loss"]["eager"] < 1e-6
    names = {part["name"] for part in found["gradients"]}
    assert "gradient of model.layers.0.mlp.up_proj.weight" in names
    # The stock model makes logits, which is no warning here.
    assert f"objective {name}, " in ran.err
    assert "warning" not in ran.err


def test_a_wrong_log_probability_is_found(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = logprobs.linear_logprobs

    def wrong(*args: Any, **keys: Any) -> Any:
        values = right(*args, **keys)
        return values._replace(logprob=1.01 * values.logprob)

    monkeypatch.setattr(logprobs, "linear_logprobs", wrong)
    words = ("--model", "qwen3", "--objective", "orpo", "--use-cpu", "--json")
    ran = liger("verify", *words)
    assert ran.code == 7
    assert not ran.json()["loss"]["ok"]
    assert "worst offender: lm_head (fused_linear_cross_entropy)" in ran.err


def test_distill_is_compared_with_a_teacher(liger: Callable[..., Any]) -> None:
    ran = liger("verify", "--model", "qwen3", "--objective", "distill", "--use-cpu")
    assert ran.code == 2
    assert "objective distill needs a teacher" in " ".join(ran.err.split())


class _WrongGradient(torch.autograd.Function):
    """What is given, with a gradient that is a tenth too large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy * 1.1


def test_a_wrong_gradient_of_one_module_is_found_in_that_module(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def apply_and_break(model: nn.Module, ops: str) -> PatchRecord:
        record = apply_liger_kernel(model, ops)
        patched_mlp: Any = type(model.get_submodule("model.layers.0.mlp"))
        right = patched_mlp.forward
        monkeypatch.setattr(
            patched_mlp, "forward", lambda self, x: _WrongGradient.apply(right(self, x))
        )
        return record

    monkeypatch.setattr(verification, "apply_liger_kernel", apply_and_break)
    words = ["verify", "--model", "mistral", "--use-cpu", "--ops", "rope,swiglu"]
    ran = liger(*words, "--json")
    assert ran.code == 7
    found = ran.json()
    assert found["ok"] is False
    # The gradients of all layers below are wrong too; the module is told from them.
    assert found["worst"]["op"] == "swiglu"
    assert found["worst"]["where"] in ("model.layers.0.mlp", "model.layers.1.mlp")
    wrong_ones = {part["op"] for part in found["modules"] if not part["tensor"]["ok"]}
    assert wrong_ones == {"swiglu"}
    assert not all(part["ok"] for part in found["gradients"])
    assert found["loss"]["ok"]
    assert f"worst offender: {found['worst']['where']} (swiglu), gradient of " in ran.err
    # All ops are right by themselves: it is the module that is not.
    assert all(part["ok"] for part in found["ops"])


def test_an_op_that_fails_its_check_ends_with_its_reason(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        verification,
        "check_op",
        lambda op, device: CheckResult(op, op != "rope", None if op != "rope" else "off by 1e-1"),
    )
    words = ["verify", "--model", "mistral", "--use-cpu", "--json"]
    ran = liger(*words, "--ops", "rope,rmsnorm")
    assert ran.code == 7
    assert [part["op"] for part in ran.json()["ops"] if not part["ok"]] == ["rope"]
    assert "rope is wrong here: off by 1e-1" in ran.err
    # No module is to blame for it.
    assert "worst offender: rope by itself, off by 1e-1" in ran.err
    # A model that does not use it is none the worse.
    ran = liger(*words, "--ops", "rmsnorm")
    assert ran.code == 0, ran.err
    assert {part["op"]: part["reason"] for part in ran.json()["ops"]} == {
        op: {"rms_norm": None, "rope": "off by 1e-1"}.get(op, "not used by this run") for op in OPS
    }


def test_a_model_too_big_for_a_truth_is_compared_with_eager(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_may_fit", lambda model, precision: False)
    ran = liger("verify", "--model", "mistral", "--use-cpu", "--json")
    assert ran.code == 0, ran.err
    found = ran.json()
    assert (found["truth"], found["loss"]["eager"]) == ("eager", None)
    assert {part["allowed"] for part in found["gradients"]} == {found["loss"]["allowed"]}
    assert "eager's own error is unknown and the limit a fixed one" in ran.err


def test_fp32_is_the_truth_where_fp64_does_not_fit(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        verification, "_may_fit", lambda model, precision: precision == torch.float32
    )
    ran = liger("verify", "--model", "mistral", "--use-cpu", "--dtype", "bfloat16", "--json")
    assert (ran.code, ran.json()["truth"]) == (0, "fp32"), ran.err
    assert "fp64 does not fit" in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "mistrall"], "mistral"),
        (["--model", "mistral", "--ops", "rop"], "rope"),
        (["--model", "mistral", "--dtype", "float64"], "float64"),
    ],
)
def test_wrong_words_are_usage_errors(
    words: list[str], message: str, liger: Callable[..., Any]
) -> None:
    ran = liger("verify", *words, "--json")
    assert (ran.code, list(ran.json())) == (2, ["error"])
    assert message in ran.err


class _Norm(nn.Module):
    """A norm as transformers writes it: in float32 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        self.register_buffer("steps", torch.arange(64, dtype=torch.float32) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.float().pow(2).mean(-1, keepdim=True))
        return self.weight * normed.softmax(-1, dtype=torch.float32).to(x.dtype)


def test_a_truth_is_in_its_precision_throughout_and_leaves_the_model_as_it_was() -> None:
    module, x = _Norm(), torch.randn(4, 64, dtype=torch.float64)
    buffer = module.steps.clone()
    with in_precision(module, torch.float64):
        found = module(x)
        found.sum().backward()
        assert module.steps.dtype == module.weight.grad.dtype == torch.float64
    wanted = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))).softmax(-1)
    assert torch.equal(found, wanted)
    assert (module.weight.dtype, module.weight.grad) == (torch.bfloat16, None)
    assert module.steps.dtype == torch.float32
    assert torch.equal(module.steps, buffer)


def test_errors_that_must_never_pass() -> None:
    truth = {"gradient of a": torch.ones(3), "gradient of b": torch.ones(3)}
    nan = torch.tensor([1.0, float("nan"), 1.0])
    found = errors_of({"gradient of a": nan}, truth, norm)
    assert found == {"gradient of a": float("inf"), "gradient of b": float("inf")}
    parts = judge(found, dict.fromkeys(found, 1.0), 2.0, torch.float32, CPU)
    assert [(part.ok, part.ours) for part in parts] == [(False, None)] * 2


def test_a_gradient_of_rounding_alone_has_the_scale_of_the_others() -> None:
    truth = {"gradient of w": torch.ones(3), "gradient of bias": torch.full((3,), 1e-9)}
    values = {"gradient of w": torch.ones(3), "gradient of bias": torch.full((3,), -1e-9)}
    found = errors_of(values, truth, largest)
    assert found == {"gradient of w": 0.0, "gradient of bias": pytest.approx(2e-7)}


def test_what_is_allowed_goes_by_the_same_tensor_of_all_layers() -> None:
    eager = {"gradient of layers.0.w": 1e-3, "gradient of layers.1.w": 4e-3, "loss": 1e-3}
    ours = {"gradient of layers.0.w": 7e-3, "gradient of layers.1.w": 9e-3, "loss": 3e-3}
    parts = {part.name: part for part in judge(ours, eager, 2.0, torch.float32, CPU)}
    limits = [part.allowed for part in parts.values()]
    assert limits == [pytest.approx(limit, abs=2e-6) for limit in (8e-3, 8e-3, 2e-3)]
    assert [part.ok for part in parts.values()] == [True, False, False]


def test_an_adapter_is_compared_in_training(liger: Callable[..., Any], tmp_path: Path) -> None:
    words = ["--model", "qwen3", "--dataset", "synthetic", "--use-cpu", "--max-length", 16]
    words += ["--adapter", "lora", "--lora-r", 2, "--max-steps", 1, "-o", tmp_path / "run"]
    assert liger("train", *words).code == 0
    found = liger("verify", "--model", tmp_path / "run", "--use-cpu", "--json")
    assert found.code == 0, found.err
    gradients = [part["name"] for part in found.json()["gradients"]]
    assert gradients
    assert all("lora_" in name for name in gradients)
