"""inspect_model on live models: the tree, where forwards are written, wrappers, kernels of others.

The packages of others are fakes: functions and classes with their module names.
"""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zoo
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama import modeling_llama

from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import apply_liger_kernel, inspect_model, restore
from liger_kernels.transformers.patching.plan import PatchPlan
from liger_kernels.transformers.patching.render import module_tree
from liger_kernels.transformers.patching.third_party import source_of

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")

LLAMA = {
    "rope": {"patched": 2, "candidates": 2},
    "rms_norm": {"patched": 5, "candidates": 5},
    "swiglu": {"patched": 2, "candidates": 2},
    "fused_linear_cross_entropy": {"patched": 1, "candidates": 1},
}


def reasons_of(plan: PatchPlan, op: str) -> set[str]:
    return {skip.reason for skip in plan.skips if skip.op == op}


# The tree ---------------------------------------------------------------------------------------


def tree_of(plan: PatchPlan) -> list[tuple[str, int, str]]:
    return [
        (line.label, line.row.num_modules, line.row.op) if line.row else (line.label, 0, "")
        for line in module_tree(plan.modules)
    ]


def test_equal_layers_stand_once():
    plan = inspect_model(zoo.build("llama", num_hidden_layers=12))
    assert tree_of(plan) == [
        ("model", 0, ""),
        ("  .layers.0-11", 0, ""),
        ("    .self_attn", 12, "rope"),
        ("    .input_layernorm", 12, "rms_norm"),
        ("    .post_attention_layernorm", 12, "rms_norm"),
        ("    .mlp", 12, "swiglu"),
        ("  .norm", 1, "rms_norm"),
        ("lm_head", 1, "fused_linear_cross_entropy"),
    ]


def test_a_layer_that_differs_below_stands_apart():
    model = zoo.build("llama", num_hidden_layers=4)
    mlp = model.model.layers[2].mlp
    mlp.forward = lambda x: mlp.down_proj(x)
    labels = [label for label, *_ in tree_of(inspect_model(model))]
    assert labels[:2] == ["model", "  .layers.0-1,3"]
    assert "  .layers.2" in labels
    assert labels.count("    .mlp") == 2


def test_layers_within_layers_are_counted_together():
    rows = [
        {"name": f"h.{layer}.experts.{i}", "class": "Expert", "op": "swiglu", "status": "patched"}
        for layer in range(3)
        for i in range(4)
    ]
    (line,) = module_tree(rows)
    assert line.label == "h.0-2.experts.0-3"
    assert line.row is not None
    assert (line.row.num_modules, line.row.name) == (12, "h.0-2.experts.0-3")


def test_a_row_of_the_model_itself_and_two_rows_of_one_module():
    rows = [
        {"name": "", "class": "Model", "op": None, "status": "skipped"},
        {"name": "head", "class": "Linear", "op": "cross_entropy", "status": "patched"},
        {"name": "head", "class": "Linear", "op": "rope", "status": "skipped"},
    ]
    assert [(line.label, line.row and line.row.op) for line in module_tree(rows)] == [
        ("(model)", ""),
        ("head", "cross_entropy"),
        ("head", "rope"),
    ]


def test_print_of_a_plan_is_for_a_person():
    lines = str(inspect_model(zoo.build("llama"), "auto,-rope")).splitlines()
    assert lines[0] == "model type llama (a listed family)"
    assert lines[1].split() == ["module", "class", "op", "status", "why"]
    (row,) = [line for line in lines if ".self_attn" in line]
    wanted = ".self_attn x2 LlamaAttention rope skipped not requested: add rope to ops"
    assert row.split() == wanted.split()
    assert lines[-1].startswith("rope 0/2  rms_norm 5/5  ")


# Sources ----------------------------------------------------------------------------------------


def test_every_row_says_where_its_forward_is_written():
    plan = inspect_model(zoo.build("mixtral"), "all")
    assert plan.patches
    for row in plan.modules:
        assert re.fullmatch(r"(transformers/models|torch/nn)/[\w/]+\.py:\d+", row["source"] or "")
    (norm,) = {row["source"] for row in plan.modules if row["op"] == "rms_norm"}
    path, line = norm.split(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    written = Path(module.__file__).read_text(encoding="utf-8").splitlines()
    assert written[int(line) - 1].strip().startswith("def forward(")
    record = apply_liger_kernel(zoo.build("mixtral"), "all")
    assert [row["source"] for row in record.modules] == [row["source"] for row in plan.modules]


def test_source_of_odd_forwards():
    class Typed(nn.Module):
        exec("def forward(self, x): return x")

    assert source_of(Typed) is None
    assert source_of(nn.Linear).startswith("torch/nn/modules/linear.py:")
    assert re.fullmatch(r"(\w+/)*test_inspection\.py:\d+", source_of(HubFunction) or "")


# Models that are wrapped or patched -------------------------------------------------------------


def test_a_patched_model_says_so():
    model = zoo.build("llama")
    fresh = inspect_model(model)
    assert fresh.num_patched == 0
    record = apply_liger_kernel(model)
    plan = inspect_model(model)
    assert plan.num_patched == len(record.patches) == 10
    assert plan.modules == fresh.modules
    assert "10 modules are patched already" in str(plan)
    assert plan.to_dict()["num_patched"] == 10
    restore(model)
    assert "patched already" not in str(inspect_model(model))


def test_an_adapted_model():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"])
    plan = inspect_model(peft.get_peft_model(zoo.build("llama"), settings))
    assert plan.model_type == "llama"
    # The head's adapter is left to peft.
    assert plan.coverage == {**LLAMA, "lora_linear": {"patched": 4, "candidates": 5}}
    assert plan.patches[0].name == "base_model.model.model.layers.0.self_attn"
    assert str(plan).splitlines()[2] == "base_model.model"


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_wrapped_model(one_process):
    for model in (
        DistributedDataParallel(zoo.build("llama")),
        torch.compile(zoo.build("llama")),
        torch.compile(DistributedDataParallel(zoo.build("llama"))),
    ):
        plan = inspect_model(model)
        assert (plan.model_type, plan.coverage) == ("llama", LLAMA)


def test_hooks_of_accelerate_are_no_kernels_of_others():
    model = zoo.build("llama")
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    assert inspect_model(model).others == {}


# Kernels of others ------------------------------------------------------------------------------


def theirs(module: str, name: str = "forward") -> Any:
    """A function that must not be called, and says it comes from another package."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("code of others was run")

    forward.__module__, forward.__qualname__ = module, name
    return forward


def hold(model: nn.Module, part: str, forward: Any) -> None:
    for module in model.modules():
        if part in type(module).__name__:
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


LIGER = "liger_kernel.transformers.rms_norm"


@pytest.mark.parametrize("is_hooked", [False, True], ids=["bare", "hooked"])
def test_forwards_that_instances_hold(is_hooked):
    model = zoo.build("llama")
    hold(model, "RMSNorm", theirs(LIGER, "LigerRMSNorm.forward"))
    if is_hooked:
        for layer in model.model.layers:
            accelerate.hooks.add_hook_to_module(layer.input_layernorm, accelerate.hooks.ModelHook())
    plan = inspect_model(model, "all")
    assert plan.others == {"liger-kernel": 5}
    assert plan.coverage["rms_norm"] == {"patched": 0, "candidates": 5}
    assert plan.coverage["rope"]["patched"] == plan.coverage["swiglu"]["patched"] == 2
    (reason,) = reasons_of(plan, "rms_norm")
    assert reason == (
        f"liger-kernel computes it ({LIGER}.LigerRMSNorm.forward): load the model without "
        "liger-kernel to patch it"
    )
    assert plan.summary().endswith("(kernels of others: liger-kernel in 5 modules)")
    assert plan.to_dict()["others"] == {"liger-kernel": 5}
    # Left to it, and still patched elsewhere.
    record = apply_liger_kernel(model, "all")
    assert record.coverage == plan.coverage
    assert all(skip.op != "rms_norm" or skip.owner for skip in record.skipped)


def test_forwards_that_instances_of_an_unlisted_type_hold():
    model = zoo.build_unlisted()
    hold(model, "MLP", theirs("liger_kernel.transformers.swiglu"))
    plan = inspect_model(model, "all")
    assert plan.coverage["swiglu"] == {"patched": 0, "candidates": 2}


def test_classes_of_others(monkeypatch):
    for part, name in (("RMSNorm", "LigerRMSNorm"), ("MLP", "LigerSwiGLUMLP")):
        stock = getattr(modeling_llama, f"Llama{part}")
        body = {"forward": theirs("liger_kernel.transformers.x"), "__module__": "liger_kernel.x"}
        monkeypatch.setattr(modeling_llama, f"Llama{part}", type(name, (stock,), body))
    plan = inspect_model(zoo.build("llama"), "all")
    assert plan.others == {"liger-kernel": 7}
    assert plan.coverage["rms_norm"] == {"patched": 0, "candidates": 5}
    assert plan.coverage["swiglu"] == {"patched": 0, "candidates": 2}
    assert {skip.module_class for skip in plan.skips} == {"LigerRMSNorm", "LigerSwiGLUMLP"}


def test_a_forward_that_a_class_was_given(monkeypatch):
    forward = theirs("unsloth.models.llama", "LlamaAttention_fast_forward")
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    plan = inspect_model(zoo.build("llama"), "all")
    assert plan.others == {"unsloth": 2}
    assert plan.coverage["rope"] == {"patched": 0, "candidates": 2}
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", theirs("unsloth_compiled_module_llama", "f")
    )
    assert inspect_model(zoo.build("llama"), "all").others == {"unsloth": 4}


@pytest.mark.parametrize("family", ["llama", "unlisted"])
def test_a_rotary_function_of_others(family, monkeypatch):
    model = zoo.build("llama") if family == "llama" else zoo.build_unlisted()
    (cls,) = {type(m) for m in model.modules() if type(m).__name__.endswith("Attention")}
    module = sys.modules[cls.__module__]
    rotary = theirs("liger_kernel.transformers.rope", "liger_rotary_pos_emb")
    monkeypatch.setattr(module, "apply_rotary_pos_emb", rotary)
    plan = inspect_model(model, "all")
    assert plan.coverage["rope"] == {"patched": 0, "candidates": 2}
    (reason,) = reasons_of(plan, "rope")
    assert reason.startswith("liger-kernel computes its apply_rotary_pos_emb (")


def hub_forward(folder: Any) -> Any:
    """The forward of a kernel as the hub's cache holds it, imported under a name of its own."""
    path = folder / "models--kernels-community--norms/snapshots/1a2b/build/torch29-cu126/norms"
    path.mkdir(parents=True)
    file = path / "layers.py"
    file.write_text("def forward(self, x):\n    raise AssertionError('code of others was run')\n")
    names: dict[str, Any] = {"__name__": "norms_7f0a.layers"}
    exec(compile(file.read_text(), str(file), "exec"), names)
    return names["forward"]


def test_kernels_of_the_hub(tmp_path):
    model = zoo.build("llama")
    hold(model, "RMSNorm", hub_forward(tmp_path))
    hold(model, "MLP", theirs("kernels.layer.layer"))
    plan = inspect_model(model, "all")
    assert plan.others == {"HF kernels": 7}
    assert plan.coverage["rms_norm"]["patched"] == plan.coverage["swiglu"]["patched"] == 0


class HubFunction(nn.Module):
    """What the `kernels` package makes of a function, whether or not it is replaced."""

    def forward(self, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return modeling_llama.stock_rotary(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def test_a_function_that_the_hub_may_replace(tmp_path, monkeypatch):
    stock = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "stock_rotary", stock, raising=False)
    monkeypatch.setattr(HubFunction, "__module__", "kernels.layer.func")
    function = HubFunction()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function)
    assert inspect_model(zoo.build("llama"), "all").coverage["rope"]["patched"] == 2
    function.forward = types.MethodType(hub_forward(tmp_path), function)  # type: ignore
    plan = inspect_model(zoo.build("llama"), "all")
    assert plan.coverage["rope"] == {"patched": 0, "candidates": 2}
    assert plan.others == {"HF kernels": 2}


@pytest.mark.parametrize("way", ["class", "instance", "loss", "loss-function"])
def test_a_loss_of_others(way, monkeypatch):
    model = zoo.build("llama")
    forward = theirs("liger_kernel.transformers.model.llama", "lce_forward")
    if way == "class":
        monkeypatch.setattr(type(model), "forward", forward)
    elif way == "instance":
        model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    elif way == "loss":
        monkeypatch.setattr(F, "cross_entropy", forward)
    else:
        model.__dict__["_loss_function"] = forward
    plan = inspect_model(model, "all")
    assert plan.others == {"liger-kernel": 1}
    assert plan.coverage["fused_linear_cross_entropy"] == {"patched": 0, "candidates": 1}
    assert plan.coverage["rms_norm"]["patched"] == 5
    # The head stands for the model's forward: one row, not two.
    assert [(skip.name, skip.owner) for skip in plan.skips] == [("lm_head", "liger-kernel")]


def test_a_model_of_others_without_a_head():
    model = zoo.build("llama").model
    model.forward = types.MethodType(theirs("unsloth.models.llama"), model)
    (skip,) = inspect_model(model, "all").skips
    assert (skip.name, skip.op, skip.owner) == ("", None, "unsloth")


def test_the_drop_in_is_not_of_others():
    from liger_kernels.compat.modules import LigerRMSNorm

    model = nn.Sequential(LigerRMSNorm(8))
    assert inspect_model(model, "all").others == {}
