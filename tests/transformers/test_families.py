"""Patched models compute what stock ones do: loss, logits and every gradient, in every mode."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from checks import Run, assert_same, run, snapshot

from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.patching.families import FAMILIES
from liger_kernels.transformers.patching.upstream_fixes import repair_model

# Modules of each op in the models of zoo.py; every one of them is patched.
PLACES: dict[str, dict[str, int]] = {
    "llama": {"rope": 2, "rms_norm": 5, "swiglu": 2},
    "mistral": {"rope": 2, "rms_norm": 5, "swiglu": 2},
    "qwen2": {"rope": 2, "rms_norm": 5, "swiglu": 2},
    "qwen3": {"rope": 2, "rms_norm": 9, "swiglu": 2},
    "gemma": {"rope": 2, "rms_norm": 5, "geglu": 2},
    "gemma2": {"rope": 2, "rms_norm": 9, "geglu": 2},
    "gemma3_text": {"rope": 2, "rms_norm": 13, "geglu": 2},
    "phi3": {"rope": 2, "rms_norm": 5, "swiglu": 2},
    "granite": {"rope": 2, "rms_norm": 5, "swiglu": 2},
    # Norms on the full width of q and k.
    "olmo2": {"rope": 2, "rms_norm": 9, "swiglu": 2},
    "glm4": {"rope": 2, "rms_norm": 9, "swiglu": 2},
    "mixtral": {"rope": 2, "rms_norm": 5, "moe_experts": 2},
    "qwen3_moe": {"rope": 2, "rms_norm": 9, "swiglu": 1, "moe_experts": 1},
    # One layer has no positions; a dense MLP, the shared expert, and a block of experts.
    "llama4_text": {"rope": 1, "rms_norm": 6, "swiglu": 2, "moe_experts": 1},
    "llama4": {"rope": 3, "rms_norm": 6, "layer_norm": 6, "swiglu": 2, "moe_experts": 1},
    "mllama": {"rope": 2, "rms_norm": 9, "layer_norm": 8, "swiglu": 3},
    "gemma3": {"rope": 2, "rms_norm": 14, "layer_norm": 6, "geglu": 2},
    "paligemma": {"rope": 2, "rms_norm": 5, "layer_norm": 6, "geglu": 2},
    # Two attentions of the text and two of the vision tower.
    "qwen2_vl": {"rope": 4, "rms_norm": 5, "layer_norm": 5, "swiglu": 2},
    "qwen2_5_vl": {"rope": 4, "rms_norm": 10, "swiglu": 4},
}
LOSSES = ("fused_linear_cross_entropy", "cross_entropy")


def _requests(family: str) -> list[str]:
    places = {*PLACES[family], "fused_linear_cross_entropy"}
    ops = [op for op in FAMILIES[family].options if op in places]
    return [*ops, "cross_entropy", "all", "all,-fused_linear_cross_entropy,cross_entropy"]


STEPS = [
    (family, kind, ops)
    for family in zoo.ALL
    for kind in zoo.kinds_of(family)
    for ops in (_requests(family) if kind != "labelled-image" else ["all"])
]


@functools.cache
def _stock_step(family: str, kind: str) -> Run:
    return run(zoo.build(family).train(), zoo.inputs_of(family, kind))


# Case 42: every option alone; case 17: gemma2 reads a gradient again after a norm's backward; case
# 57: cross_entropy reaches a loss in every family; cases 71, 73: vision and text parts, dense and
# sparse layers, each patched by what it is; case 83: granite scales its logits.
@pytest.mark.parametrize(("family", "kind", "ops"), STEPS)
def test_step_case_17_42_57_71_73_83(family, kind, ops):
    model = zoo.build(family).train()
    record = apply_liger_kernel(model, ops)
    with record.count_calls():
        ours = run(model, zoo.inputs_of(family, kind))
    assert_same(ours, _stock_step(family, kind))
    assert record.plan.source == "row"
    assert record.patches
    if kind == "text" and family in zoo.MULTIMODAL:
        # Without an image the vision part and the cross-attention to it do not run.
        assert len(record.unused) < len(record.patches) or ops == "layer_norm"
    else:
        assert not record.unused
    if not record.unused:
        assert {op: n["candidates"] for op, n in record.coverage.items()} == {
            **PLACES[family],
            **{loss: 1 for loss in LOSSES if loss in record.coverage},
        }
        assert all(
            n["patched"] == (n["candidates"] if op in record.plan.ops else 0)
            for op, n in record.coverage.items()
        )


def test_places_are_those_of_the_rows():
    assert PLACES.keys() == FAMILIES.keys() == set(zoo.ALL)
    for family, places in PLACES.items():
        wanted = {*places, *LOSSES}
        if "moe_experts" in FAMILIES[family].options:
            # Version 4 has one MLP an expert, which later versions have not.
            wanted |= {"moe_experts", "swiglu"}
        assert set(FAMILIES[family].options) == wanted


def _shifted(inputs: dict[str, Any]) -> torch.Tensor:
    return F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()


# mode: (train, what the model is given besides ids)
MODES = {
    "train-labels": (True, lambda i: {"labels": i["labels"]}),
    "train-shift": (True, lambda i: {"labels": i["labels"], "shift_labels": _shifted(i)}),
    "train-items": (True, lambda i: {"labels": i["labels"], "num_items_in_batch": 37}),
    "train-items-tensor": (
        True,
        lambda i: {"labels": i["labels"], "num_items_in_batch": torch.tensor(37)},
    ),
    "train-none": (True, lambda i: {}),
    "train-keep": (True, lambda i: {"labels": i["labels"], "logits_to_keep": i["labels"].shape[1]}),
    "eval-labels": (False, lambda i: {"labels": i["labels"]}),
    "eval-shift": (False, lambda i: {"labels": i["labels"], "shift_labels": _shifted(i)}),
    "eval-none": (False, lambda i: {}),
    "eval-keep": (False, lambda i: {"logits_to_keep": 3}),
    "eval-keep-tensor": (False, lambda i: {"logits_to_keep": torch.tensor([1, 4])}),
}


# Cases 59, 62, 63: accumulation counts, kept positions, labels that are shifted already.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", zoo.ALL)
def test_mode_case_59_62_63(family, mode):
    is_training, given = MODES[mode]
    model = zoo.build(family).train(is_training)
    inputs = zoo.inputs_of(family)
    inputs = {k: v for k, v in inputs.items() if k != "labels"} | given(inputs)
    reference = run(model, inputs)
    apply_liger_kernel(model, "all")
    assert_same(run(model, inputs), reference)


@pytest.mark.parametrize("family", zoo.ALL)
def test_generate_case_62(family):
    # Version 4 cannot generate with router logits.
    options = {"output_router_logits": False} if "moe" in family or family == "mixtral" else {}
    model = zoo.build(family, **options).eval()
    ids = zoo.text_inputs()["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    apply_liger_kernel(model, "all")
    assert torch.equal(model.generate(ids, **options), wanted)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("family", zoo.ALL)
def test_gradient_checkpointing_case_91(family, use_reentrant):
    model = zoo.build(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    # The embedding's output needs a gradient for a reentrant checkpoint to have one.
    model.enable_input_require_grads()
    reference = run(model, zoo.inputs_of(family))
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        ours = run(model, zoo.inputs_of(family))
    assert_same(ours, reference)
    assert not record.unused


@pytest.mark.parametrize("family", zoo.ALL)
def test_nothing_but_behaviour_changes_case_48_50_51(family):
    model, other = zoo.build(family).train(), zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    # transformers puts hooks on mixtral's routers in the first forward.
    run(model, inputs)
    model.zero_grad(set_to_none=True)
    before, printed = snapshot(model), str(model)
    classes = {name: type(module) for name, module in other.named_modules()}
    stock_run = run(other, inputs)
    tensors = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()

    record = apply_liger_kernel(model, "all")

    assert torch.equal(torch.get_rng_state(), rng)
    assert str(model) == printed
    assert record.model is model
    for name, module in model.named_modules():
        assert isinstance(module, classes[name])
        assert type(module).__name__ == classes[name].__name__
        repr(module)
    after = model.state_dict()
    assert after.keys() == tensors.keys()
    for key, (pointer, value) in tensors.items():
        # A list of experts, as in version 4, is moved to lie together.
        assert after[key].data_ptr() == pointer or ".experts." in key
        assert torch.equal(after[key], value)
    assert {name: type(module) for name, module in other.named_modules()} == classes
    again = run(other, inputs)
    assert again.loss == stock_run.loss
    assert all(torch.equal(again.grads[k], g) for k, g in stock_run.grads.items())

    run(model, inputs)
    model.zero_grad(set_to_none=True)
    record.undo()
    assert snapshot(model) == before
    record.undo()
    assert snapshot(model) == before
    assert run(model, inputs).loss == stock_run.loss


@pytest.mark.parametrize("family", zoo.ALL)
def test_copies_case_50(family, tmp_path):
    inputs = zoo.inputs_of(family)
    reference = run(zoo.build(family).train(), inputs)
    # Before its first forward, in which transformers puts hooks on mixtral that pickle refuses.
    model = zoo.build(family).train()
    record = apply_liger_kernel(model, "all")
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    record.undo()
    assert run(model, inputs).loss == reference.loss
    for made in copies:
        for (name, module), original in zip(made.named_modules(), model.modules(), strict=True):
            assert module is not original, name
        assert_same(run(made, inputs), reference)
        # A copy is patched and independent; its own record is out of reach.
        with pytest.raises(ValueError, match="already patched"):
            apply_liger_kernel(made, "rope")


@pytest.mark.parametrize("family", zoo.ALL)
def test_save_and_load(family, tmp_path):
    model = zoo.build(family).train()
    reference = run(model, zoo.inputs_of(family))
    apply_liger_kernel(model, "all")
    model.save_pretrained(tmp_path)
    assert set(model._no_split_modules) == set(zoo.build(family)._no_split_modules)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").train()
    repair_model(loaded)
    assert type(loaded) is type(zoo.build(family))
    assert_same(run(loaded, zoo.inputs_of(family)), reference, tolerance=1e-4)
    assert loaded.config.architectures == [type(loaded).__name__]


# Case 16: in bf16 a patched model is as near to the truth as the stock one.
@pytest.mark.parametrize("family", zoo.ALL)
def test_bf16_is_no_worse_than_eager_case_16(family):
    # Not to(torch.bfloat16), which takes the imaginary part of llama4's angles away.
    model = zoo.build(family).bfloat16().train()
    inputs = zoo.inputs_of(family)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = run(copy.deepcopy(model).float(), wide)
    reference = run(model, inputs)
    apply_liger_kernel(model, "all")
    ours = run(model, inputs)
    assert abs(ours.loss - truth.loss) <= 2 * abs(reference.loss - truth.loss) + 1e-2
    assert ours.grads.keys() == reference.grads.keys()

    def error(grads):
        squares = [((grads[n].double() - g.double()).norm() / g.norm()) ** 2 for n, g in pairs]
        return (sum(squares) / len(squares)) ** 0.5

    pairs = [(name, grad) for name, grad in truth.grads.items() if grad.norm() > 0]
    assert error(ours.grads) <= 1.5 * error(reference.grads)


# Cases 16, 41: bf16 activations and an fp32 weight give the dtype that the stock class gives.
@pytest.mark.parametrize("family", zoo.ALL)
def test_norm_with_fp32_weight_case_16_41(family):
    model = zoo.build(family)
    norms = [m for m in model.modules() if type(m).__name__ in FAMILIES[family].norms]
    for norm in norms:
        # llama4 has norms without a weight.
        width = norm.weight.shape[0] if hasattr(norm, "weight") else 8
        x = torch.randn(2, width, dtype=torch.bfloat16)
        wanted = norm(x)
        record = apply_liger_kernel(model, "rms_norm")
        with record.count_calls():
            ours = norm(x)
        assert len(record.unused) == len(norms) - 1
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)
        record.undo()


@pytest.mark.parametrize("family", zoo.ALL)
def test_autocast(family):
    model = zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    with torch.autocast("cpu", torch.bfloat16):
        reference = run(model, inputs)
        record = apply_liger_kernel(model, "all")
        with record.count_calls():
            ours = run(model, inputs)
    assert not record.unused
    assert ours.loss == pytest.approx(reference.loss, rel=0.02)
    for name, grad in reference.grads.items():
        assert ours.grads[name].dtype == grad.dtype == torch.float32
        difference = (ours.grads[name] - grad).norm() / (grad.norm() + 1e-3)
        assert difference < 0.2, name
