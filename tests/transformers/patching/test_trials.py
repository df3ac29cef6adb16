"""auto tries every op in the forms of the model, and leaves out what is wrong on this device."""

from __future__ import annotations

import pytest
import torch
import zoo

import liger_kernels.ops.glu as glu
import liger_kernels.transformers.patching.self_check as trials
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import apply_liger_kernel, inspect_model
from liger_kernels.transformers.patching.plan import build_plan

pytestmark = pytest.mark.skipif(INTERPRETED, reason="auto tries nothing in the interpreter")


@pytest.fixture(autouse=True)
def forgotten_trials():
    """What a process has tried is remembered; a broken op must not be."""
    trials._try.cache_clear()
    yield
    trials._try.cache_clear()


@pytest.fixture
def tried(monkeypatch):
    """The cases that were tried."""
    found = []
    check_op = trials.check_op

    def noted(op, device, *, case, dtype):
        found.append((op, case.shape, dict(case.options), dtype))
        return check_op(op, device, case=case, dtype=dtype)

    monkeypatch.setattr(trials, "check_op", noted)
    return found


def break_swiglu(monkeypatch):
    right = glu._glu_bwd

    def wrong(dy, *args, **kwargs):
        return right(dy * 1.1, *args, **kwargs)

    monkeypatch.setattr(glu, "_glu_bwd", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*zoo.TEXT, *zoo.MULTIMODAL])
def test_a_right_op_is_never_left_out(family, dtype):
    plan = inspect_model(zoo.build(family).to(dtype))
    assert plan.failures == []
    assert plan.patches == inspect_model(zoo.build(family), "all").patches
    assert {trial.op for trial in plan.trials} == {patch.op for patch in plan.patches}


def test_an_op_with_a_wrong_gradient_falls_back_with_its_reason(monkeypatch):
    break_swiglu(monkeypatch)
    model = zoo.build("llama")
    record = apply_liger_kernel(model)
    assert record.coverage["swiglu"] == {"patched": 0, "candidates": 2}
    assert record.coverage["rope"] == {"patched": 2, "candidates": 2}
    [failure] = record.plan.failures
    assert (failure.op, failure.ok) == ("swiglu", False)
    reasons = {row["reason"] for row in record.modules if row["op"] == "swiglu"}
    assert reasons == {f"left out by auto, its check fails on cpu: {failure.reason}"}
    assert "gradient of argument" in failure.reason
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("ops", ["all", "auto,swiglu", "swiglu"])
def test_an_op_that_is_asked_for_is_patched_whatever_its_check_says(ops, monkeypatch):
    break_swiglu(monkeypatch)
    assert inspect_model(zoo.build("llama"), ops).coverage["swiglu"]["patched"] == 2


def test_trials_take_the_widths_forms_and_dtype_of_the_model(tried):
    model = zoo.build("gemma2").to(torch.bfloat16)
    config = model.config
    inspect_model(model)
    cases = {op: (shape, options) for op, shape, options, _ in tried}
    assert {dtype for *_, dtype in tried} == {torch.bfloat16}
    assert cases["rms_norm"][0][-1] == config.hidden_size
    assert cases["rms_norm"][1] == {"offset": 1.0, "cast": "after_weight", "has_weight": True}
    assert cases["geglu"] == ((33, config.intermediate_size), {"approximate": "tanh"})
    assert cases["rope"][0][-1] == config.head_dim
    assert cases["fused_linear_cross_entropy"][0][-1] == config.vocab_size
    assert cases["fused_linear_cross_entropy"][1] == {"softcap": config.final_logit_softcapping}


def test_a_form_is_tried_once_and_a_model_without_weights_never(tried):
    model = zoo.build("llama")
    first = inspect_model(model).trials
    # The MLPs are tried as one function too.
    assert len(tried) == len(first) + 1 == 5
    assert build_plan(zoo.build("llama")).trials == first
    assert len(tried) == 5
    with torch.device("meta"):
        meta = type(model)(model.config)
    assert inspect_model(meta).trials == ()
    inspect_model(model.to(torch.float64))
    assert len(tried) == 10


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")]
)
def test_trials_do_not_mind_where_they_are_called(context):
    model = zoo.build("llama")
    state = torch.get_rng_state()
    with context():
        plan = inspect_model(model)
    assert len(plan.trials) == 4
    assert plan.failures == []
    assert torch.equal(torch.get_rng_state(), state)
