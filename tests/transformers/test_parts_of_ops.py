"""A whole gated MLP runs as glu_mlp: auto tries it as a part of swiglu and geglu."""

from __future__ import annotations

import pytest
import torch
import zoo

import liger_kernels.transformers.patching.self_check as trials
from liger_kernels.compare import CheckResult
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import inspect_model

pytestmark = pytest.mark.skipif(INTERPRETED, reason="auto tries nothing in the interpreter")

CASES = {
    "llama": ("swiglu", {"activation": "silu", "layout": "separate"}),
    "phi3": ("swiglu", {"activation": "silu", "layout": "halves"}),
    "gemma": ("geglu", {"activation": "gelu_tanh", "layout": "separate"}),
}


@pytest.fixture
def tried(monkeypatch):
    """The cases of glu_mlp that were tried; set `reason` to have it fail."""
    found = {"cases": [], "reason": None}
    check_op = trials.check_op

    def noted(op, device, *, case, dtype):
        if op != "glu_mlp":
            return check_op(op, device, case=case, dtype=dtype)
        found["cases"].append((case.shape, dict(case.options), dtype))
        if found["reason"]:
            return CheckResult(op, False, found["reason"], 1.0)
        return check_op(op, device, case=case, dtype=dtype)

    monkeypatch.setattr(trials, "check_op", noted)
    trials._try.cache_clear()
    yield found
    trials._try.cache_clear()


@pytest.mark.parametrize("family", CASES)
def test_an_mlp_is_tried_as_one_function_in_its_form(family, tried):
    op, options = CASES[family]
    model = zoo.build(family).to(torch.bfloat16)
    plan = inspect_model(model)
    [(shape, found, dtype)] = tried["cases"]
    assert (shape[-1], found, dtype) == (model.config.intermediate_size, options, torch.bfloat16)
    assert plan.failures == []
    assert op in plan.coverage
    assert "glu_mlp" not in plan.coverage


@pytest.mark.parametrize("family", CASES)
def test_auto_leaves_an_mlp_out_whose_one_function_is_wrong(family, tried):
    op, _ = CASES[family]
    tried["reason"] = "glu_mlp[1x2x3] float32 on torch: off by 1e-1"
    plan = inspect_model(zoo.build(family))
    assert plan.coverage[op]["patched"] == 0
    assert [(failure.op, failure.reason) for failure in plan.failures] == [(op, tried["reason"])]
    # Asked for by name it is patched, whatever the check would say.
    assert inspect_model(zoo.build(family), op).coverage[op]["patched"] > 0
