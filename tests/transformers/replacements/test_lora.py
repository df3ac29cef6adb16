"""Patched models with LoRA: loss and gradients are peft's, and the record says what runs."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import zoo
from torch import nn

from liger_kernels.compare import FLOOR
from liger_kernels.transformers import apply_liger_kernel, inspect_model, restore
from liger_kernels.transformers.replacements import adapters as lora_code
from liger_kernels.transformers.replacements import mlps as mlp_code

peft = pytest.importorskip("peft", reason="peft is not installed")

OP = "lora_linear"
# By name, since all-linear takes routers and experts too, which stock peft cannot run everywhere.
TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj"),
    *("gate_up_proj", "qkv", "proj", "fc1", "fc2"),
)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def add_lora(model, *, autocast_adapter_dtype=True, **options):
    """The model with an adapter whose matrices are all far from zero."""
    torch.manual_seed(3)
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is nn.Linear}
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [name for name in TARGETS if name in names],
        "init_lora_weights": False,
        **options,
    }
    config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            # It starts as the norm, beside which a magnitude that is not read would not show.
            parameter.data *= torch.rand(parameter.shape) + 0.5
    return model.train()


def llama(**options):
    return add_lora(zoo.build("llama").train(), **options)


def step(model, inputs, cast=None, scale=1.0):
    """Loss and gradients of all that is trained, in fp64."""
    model.zero_grad()
    torch.manual_seed(11)
    with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
        loss = model(**inputs).loss
    (loss * scale).backward()
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double(), **{n: p.grad.double() for n, p in trained.items()}}


def error(value, truth):
    return ((value - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()


def assert_close(ours, stock, tolerance=2e-5):
    assert ours.keys() == stock.keys()
    for name, value in ours.items():
        assert error(value, stock[name]) <= tolerance, name


def coverage(record):
    counts = record.coverage[OP]
    return counts["patched"], counts["candidates"]


def reasons(record):
    return {skip.name: skip.reason for skip in record.skipped if skip.op == OP}


# Families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", zoo.ALL)
def test_every_family_trains_as_stock_peft(family, dtype):
    """Every adapter gradient is within twice peft's own error, over several adapters in bf16."""
    assert_no_worse_than_peft(add_lora(zoo.build(family).train()), zoo.inputs_of(family), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dora_trains_as_stock_peft(dtype):
    """So it does with magnitudes, whose layers keep no less exactly what peft keeps in fp32."""
    assert_no_worse_than_peft(llama(use_dora=True), zoo.text_inputs(), dtype)


def assert_no_worse_than_peft(model, inputs, dtype):
    cast = None
    num_layers = sum(isinstance(m, peft.tuners.lora.Linear) for m in model.modules())
    assert num_layers >= 8
    if dtype == torch.bfloat16:
        cast, inputs = dtype, _to(inputs, dtype)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    usual, mine = [], []
    for seed in range(4 if dtype == torch.bfloat16 else 1):
        _change_adapters(model, seed)
        truth = step(_in_fp64(model), _to(inputs, torch.float64))
        usual.append(errors(step(model, inputs, cast), truth))
        record = apply_liger_kernel(model, "all")
        with record.count_calls():
            mine.append(errors(step(model, inputs, cast), truth))
        assert not reasons(record)
        assert not {patch.name for patch in record.patches if patch.op == OP} & record.unused
        assert coverage(record) == (num_layers, num_layers)
        record.undo()
    # Of one step of a small model in bf16, which gradient is off most is chance.
    for name in truth:
        by_peft, ours = (sum(e[name] ** 2 for e in each) ** 0.5 for each in (usual, mine))
        assert ours <= 2 * by_peft + 2 * FLOOR[dtype], f"{name}: {ours}, peft {by_peft}"


def _change_adapters(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 1 + 0.3 * torch.randn(parameter.shape, generator=generator)


def _in_fp64(model):
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        # Grouped products have no fp64.
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return wide


def errors(found, truth):
    """The error of each gradient, by norms, relative to its own."""
    assert found.keys() == truth.keys()
    return {
        name: ((found[name] - x).norm() / x.norm().clamp_min(1e-30)).item()
        for name, x in truth.items()
    }


def _to(inputs, dtype):
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


# Settings of an adapter ---------------------------------------------------------------------------

SETTINGS = {
    "rank-1": {"r": 1, "lora_alpha": 2},
    "rank-512": {"r": 512, "lora_alpha": 4},
    "ranks": {"rank_pattern": {"q_proj": 2, "up_proj": 8}, "alpha_pattern": {"k_proj": 32}},
    "rslora": {"use_rslora": True, "r": 6},
    "dropout": {"lora_dropout": 0.3},
    "base-bias": {"bias": "lora_only"},
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "half": {"autocast_adapter_dtype": False},
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3, "use_rslora": True},
    "dora-bias": {"use_dora": True, "bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("context", ["plain", "autocast", "checkpoint", "reentrant"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_train_as_stock_peft(setting, context):
    family = "qwen2" if setting.endswith("-bias") else "llama"
    model = add_lora(zoo.build(family).train(), **SETTINGS[setting])
    inputs, cast = zoo.text_inputs(), None
    if context == "autocast":
        cast = torch.bfloat16
    if context in ("checkpoint", "reentrant"):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": context == "reentrant"})
    stock = step(model, inputs, cast)
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        ours = step(model, inputs, cast)
    assert not reasons(record)
    assert not record.unused
    if cast is None:
        assert_close(ours, stock)
    else:
        # Two ways to round differ in bf16; test_every_family compares both with fp64.
        found = errors(ours, stock).values()
        assert sum(found) / len(found) < 0.2


def test_masks_are_those_of_peft():
    """One draw a layer, in the order of the calls, and in backward one that leaves no trace."""
    model = llama(lora_dropout=0.5)
    inputs = zoo.text_inputs()
    stock = step(model, inputs)
    state = torch.get_rng_state()
    apply_liger_kernel(model, "all")
    assert_close(step(model, inputs), stock)
    assert torch.equal(torch.get_rng_state(), state)


def spy_on(monkeypatch, module, name):
    calls = []
    function = getattr(module, name)

    @functools.wraps(function)
    def recorded(x, layers, *rest, **options):
        calls.append(len(layers))
        return function(x, layers, *rest, **options)

    monkeypatch.setattr(module, name, recorded)
    return calls


def test_q_k_v_are_one_call_and_so_is_an_mlp(monkeypatch):
    model = llama()
    apply_liger_kernel(model, "all")
    linears, mlps = (
        spy_on(monkeypatch, lora_code, "lora_linears"),
        spy_on(monkeypatch, mlp_code, "lora_mlp"),
    )
    step(model, zoo.text_inputs())
    assert linears == [3, 1] * 2
    assert mlps == [3] * 2


def test_layers_alone_where_nothing_around_them_is_patched(monkeypatch):
    model = llama()
    stock = step(model, zoo.text_inputs())
    record = apply_liger_kernel(model, OP)
    assert coverage(record) == (14, 14)
    linears = spy_on(monkeypatch, lora_code, "lora_linears")
    assert_close(step(model, zoo.text_inputs()), stock)
    assert linears == [1] * 14


@pytest.mark.parametrize("ops", ["all,-lora_linear", "rope,swiglu"])
def test_not_requested_is_not_patched(ops, monkeypatch):
    model = llama()
    record = apply_liger_kernel(model, ops)
    assert coverage(record) == (0, 14)
    assert set(reasons(record).values()) == {"not requested: add lora_linear to ops"}
    linears = spy_on(monkeypatch, lora_code, "lora_linears")
    step(model, zoo.text_inputs())
    assert not linears


# What is left to peft -----------------------------------------------------------------------------


def _two_adapters(model):
    torch.manual_seed(5)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])


def _hook(model):
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
    layer.lora_A["default"].register_forward_hook(lambda *args: None)


STATES = {
    "merged": (lambda m: m.merge_adapter(), 14, "merged into the weight"),
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), 14, "disabled"),
    "two": (_two_adapters, 2, "2 active adapters"),
    "hook": (_hook, 1, "has hooks"),
    "trained": (
        lambda m: m.get_submodule(
            "base_model.model.model.layers.0.mlp.up_proj"
        ).base_layer.weight.requires_grad_(),
        1,
        "its base layer is trained too",
    ),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_states_that_run_stock_code(state, before):
    """Patched before or after: the numbers are peft's, and a record brought up to date says why."""
    change, count, reason = STATES[state]
    stock_model, model = llama(), llama()
    change(stock_model)
    if before:
        change(model)
    record = apply_liger_kernel(model, "all")
    if not before:
        change(model)
        assert coverage(record) == (14, 14)
        record.refresh()
    assert coverage(record) == (14 - count, 14)
    assert len(reasons(record)) == count
    assert all(reason in text for text in reasons(record).values())
    inputs = zoo.text_inputs()
    if state in ("merged", "disabled"):
        with torch.no_grad():
            assert error(model(**inputs).loss, stock_model(**inputs).loss) < 2e-6
    else:
        assert_close(step(model, inputs), step(stock_model, inputs))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"alora_invocation_tokens": [1]}, "ALora adapter, whose formula is another"),
        ({"lora_bias": True}, "lora_bias"),
    ],
    ids=["variant", "lora-bias"],
)
def test_other_adapters_run_stock_code(options, reason):
    family = "qwen2" if "lora_bias" in options else "llama"
    targets = ["q_proj", "k_proj"]
    model = add_lora(zoo.build(family).train(), target_modules=targets, **options)
    stock = step(model, zoo.text_inputs())
    record = apply_liger_kernel(model, "all")
    assert coverage(record) == (0, 4)
    assert all(reason in text for text in reasons(record).values())
    assert_close(step(model, zoo.text_inputs()), stock)


def test_a_variant_that_computes_otherwise_than_dora_runs_stock_code():
    """DoRA is recognised by what it computes, whatever its class is called."""
    targets = ["q_proj", "k_proj"]
    model = llama(use_dora=True, target_modules=targets)

    class DoraLinearVariant(peft.tuners.lora.variants.DoraLinearVariant):
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            forward = peft.tuners.lora.variants.DoraLinearVariant.forward
            return 2.0 * forward(module, active_adapter, x, result, **kwargs)

    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_variant["default"] = DoraLinearVariant()
    stock = step(model, zoo.text_inputs())
    record = apply_liger_kernel(model, "all")
    assert coverage(record) == (0, 4)
    assert all("Dora adapter, whose formula" in text for text in reasons(record).values())
    assert_close(step(model, zoo.text_inputs()), stock)


def test_mixed_batches_run_stock_code():
    model = llama().eval()
    model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights=False))
    inputs = {"input_ids": zoo.text_inputs()["input_ids"], "adapter_names": ["default", "other"]}
    with torch.no_grad():
        wanted = model(**inputs).logits
        apply_liger_kernel(model, "all")
        assert torch.allclose(model(**inputs).logits, wanted, atol=1e-5)


def test_embeddings_and_the_head_have_reasons():
    model = add_lora(
        zoo.build("llama", tie_word_embeddings=False).train(),
        target_modules=["embed_tokens", "lm_head", "q_proj"],
    )
    stock = step(model, zoo.text_inputs())
    record = apply_liger_kernel(model, "all")
    assert coverage(record) == (2, 3)
    assert "LoRA on the head" in next(iter(reasons(record).values()))
    embedding = next(skip for skip in record.skipped if "embed_tokens" in skip.name)
    assert embedding.op is None
    assert "Embedding computes it" in embedding.reason
    assert_close(step(model, zoo.text_inputs()), stock)


def test_an_input_that_a_hook_replaces_is_computed_alone(monkeypatch):
    """k and v get another tensor than q: what was computed ahead for them is not theirs."""
    model, stock_model = llama(), llama()
    for one in (model, stock_model):
        layer = one.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
        layer.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))
    apply_liger_kernel(model, "all")
    inputs = zoo.text_inputs()
    assert_close(step(model, inputs), step(stock_model, inputs))


# Order of patching --------------------------------------------------------------------------------


def test_adapters_that_come_after_patching_are_patched_when_they_run(monkeypatch):
    inputs = zoo.text_inputs()
    stock = step(llama(), inputs)
    base = zoo.build("llama").train()
    record = apply_liger_kernel(base, "all")
    assert OP not in record.coverage
    model = add_lora(base)
    linears, mlps = (
        spy_on(monkeypatch, lora_code, "lora_linears"),
        spy_on(monkeypatch, mlp_code, "lora_mlp"),
    )
    assert_close(step(model, inputs), stock)
    assert (linears, mlps) == ([3, 1] * 2, [3] * 2)
    record.refresh()
    assert coverage(record) == (14, 14)
    with record.count_calls():
        assert_close(step(model, inputs), stock)
    assert not record.unused
    record.undo()
    classes = {type(m) for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert classes == {peft.tuners.lora.Linear}
    linears.clear()
    assert_close(step(model, inputs), stock)
    assert not linears


def test_undo_without_refresh_restores_adopted_layers():
    base = zoo.build("llama").train()
    record = apply_liger_kernel(base, "all")
    model = add_lora(base)
    step(model, zoo.text_inputs())
    record.undo()
    for module in model.modules():
        assert "_patch_base" not in vars(type(module))


def test_inspect_after_peft_lists_the_adapters():
    base = zoo.build("llama").train()
    apply_liger_kernel(base, "all")
    plan = inspect_model(add_lora(base), "all")
    assert plan.coverage[OP] == {"patched": 14, "candidates": 14}


def test_adapters_that_are_gone_leave_the_record():
    model = llama()
    record = apply_liger_kernel(model, "all")
    base = model.unload()
    record.refresh()
    assert OP not in record.coverage
    inputs, stock = zoo.text_inputs(), zoo.build("llama").train()
    with torch.no_grad():
        assert error(base(**inputs).loss, stock(**inputs).loss) < 2e-6


# As peft's own ------------------------------------------------------------------------------------


def test_merge_unmerge_disable_and_switch_as_peft():
    inputs = zoo.text_inputs()
    model, stock = llama(), llama()
    apply_liger_kernel(model, "all")

    def same():
        with torch.no_grad():
            assert error(model(**inputs).loss, stock(**inputs).loss) < 2e-6

    for change in (
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: torch.manual_seed(5),
        lambda m: m.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights="gaussian")),
        lambda m: m.set_adapter("other"),
        lambda m: m.set_adapter("default"),
        lambda m: m.delete_adapter("other"),
    ):
        for one in (model, stock):
            torch.manual_seed(5)
            change(one)
        same()
    with model.disable_adapter(), stock.disable_adapter():
        same()
    same()
    assert_close(step(model, inputs), step(stock, inputs))


def test_saved_loaded_copied_and_printed_as_peft(tmp_path):
    model, inputs = llama(), zoo.text_inputs()
    text, keys = repr(model), list(model.state_dict())
    stock = step(model, inputs)
    apply_liger_kernel(model, "all")
    assert repr(model) == text
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(zoo.build("llama"), tmp_path, is_trainable=True)
    assert_close(step(loaded.train(), inputs), stock)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert_close(step(other, inputs), stock)
        restore(other)
        assert_close(step(other, inputs), stock)
    merged, wanted = copy.deepcopy(model).merge_and_unload(), llama().merge_and_unload()
    for (name, mine), (_, other) in zip(
        merged.state_dict().items(), wanted.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, other), name


def test_accumulated_gradients_and_retained_graphs():
    model, inputs = llama(lora_dropout=0.2), zoo.text_inputs()

    def twice():
        model.zero_grad()
        torch.manual_seed(0)
        for _ in range(2):
            model(**inputs).loss.backward()
        return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}

    stock = twice()
    apply_liger_kernel(model, "all")
    assert_close(twice(), stock)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_layers_train_as_stock_peft(order, dora):
    inputs = zoo.text_inputs()
    stock = step(llama(use_dora=dora), inputs)
    model = llama(use_dora=dora)
    apply_liger_kernel(model, "all")
    if order == "after":
        step(model, inputs)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_close(step(model, inputs), stock)
