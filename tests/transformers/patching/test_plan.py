"""Requests, plans and coverage: what will be patched, what not, and why."""

from __future__ import annotations

import json
import re

import pytest
import torch
import zoo
from torch import nn
from transformers.models.llama import modeling_llama

from liger_kernels.compare import CheckResult
from liger_kernels.transformers import inspect_model, patched
from liger_kernels.transformers.patching.plan import PATCH_OPS, resolve_ops

ALL = tuple(op for op in PATCH_OPS if op != "cross_entropy")

REQUESTS = {
    "auto": ("auto", ALL),
    "all": ("all", ALL),
    "none": ("none", ()),
    "list": (["rms_norm", "rope"], ("rope", "rms_norm")),
    "short-names": (
        "rmsnorm, layernorm, flce",
        ("rms_norm", "layer_norm", "fused_linear_cross_entropy"),
    ),
    "dashes-and-case": ("Rms-Norm,CE", ("rms_norm", "cross_entropy")),
    "removal": ("auto,-rope", tuple(op for op in ALL if op != "rope")),
    "removal-of-alias": (["all", "-flce"], ALL[:-1]),
    "other-loss": ("all,-flce,ce", (*ALL[:-1], "cross_entropy")),
    "twice": ("rope,rope", ("rope",)),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_resolve_ops(case):
    request, wanted = REQUESTS[case]
    assert resolve_ops(request).ops == wanted


BAD_REQUESTS = {
    "typo": ("rmsnrom", "did you mean 'rmsnorm'"),
    "word-typo": ("atuo", "did you mean 'auto'"),
    "removed-typo": ("auto,-ropee", "did you mean 'rope'"),
    "empty": ("", "ops is empty"),
    "empty-list": ([], "ops is empty"),
    "hole": ("rope,,rms_norm", "unknown op ''"),
    "removal-alone": ("-rope", "write 'auto,-rope'"),
    "none-and-more": ("none,rope", "none alone"),
    "two-words": ("auto,all", "one of auto, all, none"),
    "both-losses": ("ce,flce", "compute the same loss"),
    "both-losses-by-all": ("all,ce", "compute the same loss"),
    "not-patchable": ("fused_linear_logprobs", "unknown op"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_resolve_ops_refuses(case):
    request, message = BAD_REQUESTS[case]
    with pytest.raises(ValueError, match=message):
        resolve_ops(request)


@pytest.mark.parametrize("family", [*zoo.TEXT, *zoo.MULTIMODAL])
def test_plan_on_meta_equals_plan_with_weights(family):
    model = zoo.build(family)
    with torch.device("meta"):
        meta = type(model)(model.config)
    plan, of_meta = inspect_model(model, "all"), inspect_model(meta, "all")
    assert plan.source == of_meta.source == "row"
    assert of_meta.patches == plan.patches
    assert of_meta.skips == plan.skips
    assert of_meta.backend is None


def test_plan_changes_nothing():
    model = zoo.build("mixtral").train()
    states = [(type(m), dict(vars(m))) for m in model.modules()]
    inspect_model(model, "auto")
    assert [(type(m), dict(vars(m))) for m in model.modules()] == states


def test_plan_is_the_same_while_patched():
    model = zoo.build("gemma2")
    plan = inspect_model(model)
    with patched(model):
        assert inspect_model(model).patches == plan.patches


def test_coverage_counts_candidates_that_were_not_requested():
    plan = inspect_model(zoo.build("llama"), "rope,ce")
    assert plan.coverage == {
        "rope": {"patched": 2, "candidates": 2},
        "rms_norm": {"patched": 0, "candidates": 5},
        "swiglu": {"patched": 0, "candidates": 2},
        "cross_entropy": {"patched": 1, "candidates": 1},
        "fused_linear_cross_entropy": {"patched": 0, "candidates": 1},
    }
    reasons = {skip.op: skip.reason for skip in plan.skips}
    assert reasons["rms_norm"] == "not requested: add rms_norm to ops"
    assert reasons["fused_linear_cross_entropy"] == (
        "cross_entropy was chosen for this head, which has one loss"
    )
    assert "cross_entropy" not in inspect_model(zoo.build("llama"), "rope").coverage


def test_explicit_ops_without_a_place_stay_visible():
    plan = inspect_model(zoo.build("llama"), "rope,geglu,layer_norm")
    assert plan.missing == ("geglu", "layer_norm")
    assert inspect_model(zoo.build("llama"), "all").missing == ()


def test_modules_in_order_and_json():
    plan = inspect_model(zoo.build("qwen3", num_hidden_layers=11, layer_types=None), "auto,-rope")
    rows = plan.modules
    assert [row["name"] for row in rows if row["op"] == "rope"] == [
        f"model.layers.{i}.self_attn" for i in range(11)
    ]
    source = rows[0].pop("source")
    assert re.fullmatch(r"transformers/models/qwen3/modeling_qwen3\.py:\d+", source)
    assert rows[0] == {
        "name": "model.layers.0.self_attn",
        "class": "Qwen3Attention",
        "op": "rope",
        "status": "skipped",
        "backend": None,
        "reason": "not requested: add rope to ops",
    }
    assert {row["status"] for row in rows if row["op"] == "rms_norm"} == {"patched"}
    assert {row["backend"] for row in rows if row["op"] == "rms_norm"} == {"torch"}
    document = plan.to_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["source"] == "row"


def test_modules_that_are_no_candidates_have_a_reason():
    plan = inspect_model(zoo.build("mllama"), "all")
    reasons = {skip.module_class: skip.reason for skip in plan.skips if skip.op is None}
    assert reasons == {
        "MllamaTextCrossAttention": "cross-attention without rotary positions: nothing to do",
        "MllamaVisionAttention": "attention without rotary positions: nothing to do",
        "MllamaVisionMLP": "plain MLP (no gate): nothing to fuse",
    }


def test_activation_without_a_kernel_is_no_candidate_case_21():
    plan = inspect_model(zoo.build("llama", hidden_act="relu2"), "all")
    assert "swiglu" not in plan.coverage
    (reason,) = {s.reason for s in plan.skips}
    assert reason == "activation relu2: no kernel, its own code runs; nothing to do"
    # Which gelu is meant is read from the module, not from its name.
    plan = inspect_model(zoo.build("llama", hidden_act="gelu"), "all")
    assert {p.spec.activation for p in plan.patches if p.op == "geglu"} == {"gelu"}


def test_listed_class_that_changed_is_refused(monkeypatch):
    def forward(self, hidden_states):
        return 2 * self.weight * hidden_states

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    plan = inspect_model(zoo.build("llama"), "all")
    assert plan.coverage["rms_norm"] == {"patched": 0, "candidates": 5}
    reason = next(skip.reason for skip in plan.skips if skip.op == "rms_norm")
    assert "LlamaRMSNorm does not compute what is known of model type llama" in reason
    assert plan.coverage["swiglu"]["patched"] == 2


def test_what_differs_from_the_row_is_named(monkeypatch):
    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (1 + self.weight) * x.to(hidden_states.dtype)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    plan = inspect_model(zoo.build("llama"), "all")
    (reason,) = {skip.reason for skip in plan.skips if skip.op == "rms_norm"}
    assert "model type llama (offset is 1.0, not 0.0): its own code runs; report it" in reason


def test_listed_class_with_other_layers_is_refused(monkeypatch):
    def rebuilt(self, config):
        nn.Module.__init__(self)
        self.only_proj = nn.Linear(config.hidden_size, config.hidden_size)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", rebuilt)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.only_proj(x))
    plan = inspect_model(zoo.build("llama"), "all")
    assert plan.coverage["swiglu"] == {"patched": 0, "candidates": 2}


def test_unlisted_type_is_recognised():
    plan = inspect_model(zoo.build_unlisted(), "all")
    assert plan.model_type == "smollm3"
    assert plan.source == "recognised"
    # One of its two layers has no positions.
    assert plan.coverage == {
        "rope": {"patched": 1, "candidates": 1},
        "rms_norm": {"patched": 5, "candidates": 5},
        "swiglu": {"patched": 2, "candidates": 2},
        "fused_linear_cross_entropy": {"patched": 1, "candidates": 1},
    }
    reasons = {s.reason for s in plan.skips}
    assert "attention without rotary positions in this layer: nothing to do" in reasons


def test_module_without_configuration():
    plan = inspect_model(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), "layer_norm")
    assert plan.model_type == "Sequential"
    assert plan.coverage == {"layer_norm": {"patched": 1, "candidates": 1}}


def test_auto_leaves_out_what_fails_on_the_device(monkeypatch):
    from liger_kernels.transformers.patching import plan as plan_module

    def try_op(op, *where):
        return CheckResult(op, op != "rope", "no compiler")

    monkeypatch.setattr(plan_module, "try_op", try_op)
    model = zoo.build("llama")
    skip = next(s for s in inspect_model(model, "auto").skips if s.op == "rope")
    assert skip.reason == "left out by auto, its check fails on cpu: no compiler"
    assert inspect_model(model, "all").coverage["rope"]["patched"] == 2
    # Asked for by name it is patched.
    assert inspect_model(model, "auto,rope").coverage["rope"]["patched"] == 2
