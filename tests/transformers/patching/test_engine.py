"""Applying and undoing: exactly, per instance, beneath hooks and adapters; counting calls."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
import textwrap

import accelerate.hooks
import pytest
import torch
import zoo
from checks import assert_same, run, snapshot
from torch import nn

from liger_kernels.transformers import apply_liger_kernel, inspect_model, patched, restore
from liger_kernels.transformers.patching.engine import apply
from liger_kernels.transformers.recognise import reachable_functions
from liger_kernels.transformers.replacements import subclasses as swap_module


class CountingHook(accelerate.hooks.ModelHook):
    def __init__(self):
        self.num_calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.num_calls += 1
        return args, kwargs


def _add_hooks(model):
    hooks = []
    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention"):
            hooks.append(CountingHook())
            accelerate.hooks.add_hook_to_module(module, hooks[-1])
    return hooks


def test_patched_twice_is_an_error_before_anything_is_touched():
    model = zoo.build("llama")
    record = apply_liger_kernel(model, "rope,rms_norm")
    state = snapshot(model)
    with pytest.raises(ValueError, match="already patched"):
        apply_liger_kernel(model, "swiglu,rope")
    assert snapshot(model) == state
    record.undo()
    apply_liger_kernel(model, "all").undo()


def test_second_record_of_other_modules_is_fine():
    model = zoo.build("llama").train()
    before = snapshot(model)
    first, second = apply_liger_kernel(model, "rope"), apply_liger_kernel(model, "rms_norm")
    first.undo()
    assert sum(swap_module.is_patched(m) for m in model.modules()) == 5
    second.undo()
    assert snapshot(model) == before


def test_plan_of_another_model_is_an_error():
    plan = inspect_model(zoo.build("llama", num_hidden_layers=3), "all")
    model = zoo.build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="another model"):
        apply(model, plan)
    with pytest.raises(ValueError, match="another model"):
        apply(zoo.build("qwen2"), inspect_model(model, "all"))
    assert snapshot(model) == before


def test_failure_while_applying_leaves_the_model_as_it_was(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no")

    model = zoo.build("llama")
    before = snapshot(model)
    plan = inspect_model(model, "all")
    monkeypatch.setattr("liger_kernels.transformers.patching.engine.patched_class", fail)
    with pytest.raises(RuntimeError, match="no"):
        apply(model, plan)
    assert snapshot(model) == before


def test_with_block_undoes_after_an_error():
    model = zoo.build("llama")
    before = snapshot(model)

    def fail():
        with patched(model) as record:
            assert record.coverage["rms_norm"]["patched"] == 5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert snapshot(model) == before


def test_restore_undoes_a_copy():
    model = zoo.build("qwen2").train()
    before = snapshot(model)
    apply_liger_kernel(model, "all")
    twin = copy.deepcopy(model)
    restore(twin)
    assert not any(swap_module.is_patched(m) for m in twin.modules())
    assert vars(twin).keys() == before[""][1].keys()
    assert sum(swap_module.is_patched(m) for m in model.modules()) == 10
    restore(model)
    assert snapshot(model) == before


def test_undo_refuses_when_a_class_was_changed_since():
    model = zoo.build("llama")
    record = apply_liger_kernel(model, "rms_norm")
    norm = model.model.norm
    cls = type(norm)
    # What fully_shard does.
    norm.__class__ = type("FSDPLlamaRMSNorm", (cls,), {})
    with pytest.raises(ValueError, match=r"'model\.norm' cannot be restored"):
        record.undo()
    with pytest.raises(ValueError, match="was changed after patching, to FSDPLlamaRMSNorm"):
        restore(model)
    norm.__class__ = cls
    record.undo()


class Wrapper(nn.Module):
    """What DistributedDataParallel looks like from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile], ids=["ddp", "compile"])
def test_patch_through_a_wrapper(wrap):
    model = zoo.build("llama").train()
    reference = run(model, zoo.text_inputs())
    plan = inspect_model(model, "all")
    model.zero_grad(set_to_none=True)
    wrapped = wrap(model)
    before = snapshot(model)
    record = apply_liger_kernel(wrapped, "all")
    assert record.coverage == plan.coverage
    assert record.plan.model_type == "llama"
    with record.count_calls():
        assert_same(run(model, zoo.text_inputs()), reference)
    assert not record.unused
    model.zero_grad(set_to_none=True)
    record.undo()
    assert snapshot(model) == before


# Hooks ------------------------------------------------------------------------------------------


def test_patch_beneath_accelerate_hooks():
    model = zoo.build("llama").train()
    reference = run(model, zoo.text_inputs())
    hooks = _add_hooks(model)
    before = snapshot(model)
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        ours = run(model, zoo.text_inputs())
    assert not record.unused
    assert all(hook.num_calls == 1 for hook in hooks)
    assert_same(ours, reference)
    model.zero_grad(set_to_none=True)
    record.undo()
    assert snapshot(model) == before


def test_hooks_removed_while_patched():
    model = zoo.build("llama").train()
    reference = run(model, zoo.text_inputs())
    _add_hooks(model)
    record = apply_liger_kernel(model, "all")
    accelerate.hooks.remove_hook_from_submodules(model)
    with record.count_calls():
        assert_same(run(model, zoo.text_inputs()), reference)
    assert not record.unused
    record.undo()
    assert run(model, zoo.text_inputs()).loss == reference.loss
    again = apply_liger_kernel(model, "all")
    with again.count_calls():
        run(model, zoo.text_inputs())
    assert not again.unused


def test_hooks_added_while_patched():
    model = zoo.build("llama").train()
    reference = run(model, zoo.text_inputs())
    record = apply_liger_kernel(model, "all")
    hooks = _add_hooks(model)
    with record.count_calls():
        assert_same(run(model, zoo.text_inputs()), reference)
    assert not record.unused
    record.undo()
    assert run(model, zoo.text_inputs()).loss == reference.loss
    assert all(hook.num_calls == 2 for hook in hooks)


def test_module_with_a_forward_of_its_own_is_skipped():
    model = zoo.build("llama").train()
    norm = model.model.norm
    norm.forward = lambda x: 2 * x
    record = apply_liger_kernel(model, "all")
    assert record.coverage["rms_norm"] == {"patched": 4, "candidates": 5}
    skip = next(skip for skip in record.skipped if skip.op == "rms_norm")
    assert "another forward is set on the module" in skip.reason
    assert torch.equal(norm(torch.ones(2, 32)), torch.full((2, 32), 2.0))


# Calls the op does not serve --------------------------------------------------------------------


def test_other_calls_reach_the_stock_forward():
    model = zoo.build("llama")
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    x = torch.randn(2, 3, 32)
    wanted = norm(x.double()), mlp(x)
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        assert torch.equal(norm(x.double()), wanted[0])
        assert torch.equal(mlp(x=x), wanted[1])
    assert record.coverage["rms_norm"]["patched"] == 0
    assert record.coverage["swiglu"]["patched"] == 0


def test_patched_model_runs_on_meta():
    if not zoo.IS_V5:
        pytest.skip("the rotary embedding of version 4 does not run on meta")
    with torch.device("meta"):
        model = type(zoo.build("llama"))(zoo.config_of("llama"))
        apply_liger_kernel(model, "all")
        assert model(torch.zeros(2, 5, dtype=torch.long)).logits.shape == (2, 5, 128)


def test_rotary_function_keeps_its_signature_case_26():
    model = zoo.build("llama")
    attention = model.model.layers[0].self_attn
    apply_liger_kernel(model, "rope")
    forward = type(attention).forward
    functions = [
        f for f in reachable_functions(forward) if "apply_rotary_pos_emb" in f.__code__.co_names
    ]
    ours = functions[-1].__globals__["apply_rotary_pos_emb"]
    stock = sys.modules["transformers.models.llama.modeling_llama"].apply_rotary_pos_emb
    assert ours is not stock
    assert inspect.signature(ours) == inspect.signature(stock)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    cos, sin = torch.randn(2, 2, 5, 4).repeat(1, 1, 1, 2)
    for call in (
        lambda f: f(q, k, cos, sin),
        lambda f: f(q=q, k=k, cos=cos, sin=sin),
        lambda f: f(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2),
        # What the op does not take is the stock function's affair.
        lambda f: f(q.double(), k.double(), cos.double(), sin.double()),
    ):
        for got, wanted in zip(call(ours), call(stock), strict=True):
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted)
    # Outside autocast a wider cos widens the result, as in the stock function.
    assert ours(q.bfloat16(), k.bfloat16(), cos, sin)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(q.bfloat16(), k.bfloat16(), cos, sin)[0].dtype == torch.bfloat16
    # Angles that already have the head axis broadcast in the stock function.
    wide = cos[:, None], sin[:, None]
    for got, wanted in zip(
        ours(q[..., None, :, :], k, *wide, 2), stock(q[..., None, :, :], k, *wide, 2), strict=True
    ):
        assert torch.equal(got, wanted)
    with pytest.raises(TypeError):
        ours(q, k)
    with pytest.raises(RuntimeError):
        ours(q, k, cos[..., :3], sin[..., :3])


# Case 25: half of a head turns, the rest passes bit by bit; pairs are neighbours (glm4).
def test_partial_rotation_case_25():
    model = zoo.build("glm4")
    apply_liger_kernel(model, "rope")
    forward = type(model.model.layers[0].self_attn).forward
    functions = [
        f for f in reachable_functions(forward) if "apply_rotary_pos_emb" in f.__code__.co_names
    ]
    ours = functions[-1].__globals__["apply_rotary_pos_emb"]
    stock = sys.modules["transformers.models.glm4.modeling_glm4"].apply_rotary_pos_emb
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    angles = torch.randn(2, 5, 2).repeat(1, 1, 2)
    for got, wanted in zip(
        ours(q, k, angles.cos(), angles.sin()), stock(q, k, angles.cos(), angles.sin()), strict=True
    ):
        torch.testing.assert_close(got, wanted)
        assert torch.equal(got[..., 4:], wanted[..., 4:])


# Counting ---------------------------------------------------------------------------------------


def test_unused_modules_are_told():
    model = zoo.build("llama").train()
    model.lonely = type(model.model.norm)(32)
    record = apply_liger_kernel(model, "all")
    assert record.coverage["rms_norm"] == {"patched": 6, "candidates": 6}
    with record.count_calls():
        model(**{k: v for k, v in zoo.text_inputs().items() if k != "labels"})
    assert record.unused == {"lonely", "lm_head"}
    assert record.coverage["rms_norm"] == {"patched": 5, "candidates": 6}
    assert record.coverage["fused_linear_cross_entropy"] == {"patched": 0, "candidates": 1}
    row = next(row for row in record.modules if row["name"] == "lonely")
    assert row["status"] == "unused"
    assert row["reason"].startswith("no call reached the op in the step that was counted")
    assert record.summary().endswith("(2 unused)")


def test_record_tells_what_was_done_case_107():
    model = zoo.build("gemma2")
    record = apply_liger_kernel(model, "auto,-rope")
    assert record.summary() == ("rope 0/2  rms_norm 9/9  geglu 2/2  fused_linear_cross_entropy 1/1")
    assert "gemma2" in repr(record)
    document = record.to_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["coverage"]["rope"] == {"patched": 0, "candidates": 2}
    assert {row["backend"] for row in document["modules"] if row["status"] == "patched"} == {
        "torch"
    }
    # After undo the record still tells what was done.
    record.undo()
    assert record.to_dict() == document


# Case 72: the grouped, batched and eager paths of experts all reach the op.
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_case_72(implementation):
    if not zoo.IS_V5:
        pytest.skip("version 4 has one MLP an expert")
    model = zoo.build("mixtral", num_local_experts=8).train()
    model.set_experts_implementation(implementation)
    # Few tokens: some experts get none.
    inputs = zoo.text_inputs(batch=1, length=3)
    inputs["labels"] = inputs["input_ids"]
    reference = run(model, inputs)
    assert any((g == 0).flatten(1).all(1).any() for g in reference.grads.values() if g.dim() == 3)
    record = apply_liger_kernel(model, "moe_experts")
    with record.count_calls():
        ours = run(model, inputs)
    assert_same(ours, reference)
    assert record.coverage["moe_experts"] == {"patched": 2, "candidates": 2}
    assert not record.unused


@pytest.mark.slow
def test_compiled_modules_are_not_called_unused():
    model = zoo.build("llama", num_hidden_layers=1).train()
    inputs = zoo.text_inputs()
    reference = run(model, inputs)
    record = apply_liger_kernel(model, "rope,rms_norm,swiglu")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with record.count_calls():
        loss = compiled(**inputs).loss
        loss.backward()
    assert not record.unused
    assert loss.item() == pytest.approx(reference.loss, rel=1e-5)
    torch.compiler.reset()


# Adapters ---------------------------------------------------------------------------------------


# Case 54: modules_to_save wraps norms and the head; the original and the active copy are patched.
@pytest.mark.parametrize("order", ["patch-then-peft", "peft-then-patch"])
def test_modules_to_save_case_54(order, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["norm", "lm_head"]
    )

    def wrap(model):
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        return wrapped.train()

    inputs = zoo.text_inputs()
    stock = wrap(zoo.build("qwen2"))
    reference = run(stock, inputs)
    assert any("modules_to_save" in name for name in reference.grads)
    if order == "patch-then-peft":
        model = zoo.build("qwen2")
        record = apply_liger_kernel(model, "all")
        wrapped = wrap(model)
    else:
        wrapped = wrap(zoo.build("qwen2"))
        record = apply_liger_kernel(wrapped, "all")
    kept = [m for n, m in wrapped.named_modules() if n.endswith(("norm.original_module",))]
    copies = [m for n, m in wrapped.named_modules() if n.endswith("norm.modules_to_save.default")]
    assert kept
    assert copies
    assert all(swap_module.is_patched(m) for m in (*kept, *copies))
    ours = run(wrapped, inputs)
    assert_same(ours, reference)
    assert ours.grads.keys() == reference.grads.keys()
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(zoo.build("qwen2"), tmp_path, is_trainable=True).train()
    assert run(loaded, inputs).loss == pytest.approx(reference.loss, rel=1e-6)
    record.undo()
    assert run(wrapped, inputs).loss == pytest.approx(reference.loss, rel=1e-6)


def test_adapter_calls_linear_layers_as_modules():
    peft = pytest.importorskip("peft")
    model = zoo.build("llama")
    config = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config).train()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    reference = run(wrapped, zoo.text_inputs())
    record = apply_liger_kernel(wrapped, "swiglu,rms_norm,rope")
    # The same draws: dropout of gate, up and down in the order of the stock forward.
    torch.manual_seed(5)
    with record.count_calls():
        ours = run(wrapped, zoo.text_inputs())
    assert_same(ours, reference, tolerance=1e-4)
    assert not record.unused


# Processes --------------------------------------------------------------------------------------


def test_pickle_loads_in_another_process_case_50(tmp_path):
    wanted = {}
    for family in zoo.FAMILIES:
        # transformers records router logits only of models whose class was built in the process.
        options = {"output_router_logits": False} if family == "mixtral" else {}
        model = zoo.build(family, **options).train()
        apply_liger_kernel(model, "all")
        torch.save(model, tmp_path / f"{family}.pt")
        wanted[family] = run(model, zoo.text_inputs()).loss
    torch.save(zoo.text_inputs(), tmp_path / "inputs.pt")
    script = f"""
        import json, torch
        from liger_kernels.transformers.replacements.subclasses import is_patched
        inputs = torch.load({str(tmp_path / "inputs.pt")!r})
        losses = {{}}
        for family in {zoo.FAMILIES!r}:
            model = torch.load(f"{tmp_path}/{{family}}.pt", weights_only=False)
            assert sum(map(is_patched, model.modules())) >= 8
            losses[family] = model(**inputs).loss.item()
        print(json.dumps(losses))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.strip().splitlines()[-1])
    assert losses == pytest.approx(wanted, rel=1e-6)


# Case 75: ops need no transformers, nor does patching; only loading does, and says so.
def test_ops_import_without_transformers_case_75():
    script = """
        import sys
        sys.modules["transformers"] = None
        import liger_kernels, liger_kernels.ops, liger_kernels.transformers
        from liger_kernels import rms_norm
        from liger_kernels.transformers.patching.plan import build_plan
        import torch
        plan = build_plan(torch.nn.Sequential(torch.nn.LayerNorm(8)), "all")
        assert plan.coverage["layer_norm"]["patched"] == 1
        try:
            liger_kernels.transformers.AutoLigerKernelForCausalLM
        except ImportError as problem:
            print("transformers" in str(problem))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
