"""Patched models compute what stock ones do: loss, logits and every gradient, in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from checks import Run, assert_same, run, snapshot

from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.families import FAMILIES

# The image-text families train on an image in these tests.
OTHERS = (*(name for name in zoo.TEXT if name not in zoo.FAMILIES), *zoo.MULTIMODAL)


def _requests(family: str) -> list[str]:
    ops = [op for op in FAMILIES[family].options if op != "cross_entropy"]
    return [*ops, "cross_entropy", "all", "all,-fused_linear_cross_entropy,cross_entropy"]


@pytest.fixture(scope="module")
def stock() -> dict[str, Run]:
    """A stock training step of every family, run once."""
    return {
        family: run(zoo.build(family).train(), zoo.inputs_of(family)) for family in zoo.FAMILIES
    }


# Case 42: every option alone; case 17: gemma2 reads a gradient again after a norm's backward;
# case 57: cross_entropy reaches a loss in every family.
@pytest.mark.parametrize(
    ("family", "ops"), [(family, ops) for family in zoo.FAMILIES for ops in _requests(family)]
)
def test_step_case_17_42_57(family, ops, stock):
    model = zoo.build(family).train()
    record = apply_liger_kernel(model, ops)
    with record.count_calls():
        ours = run(model, zoo.inputs_of(family))
    assert_same(ours, stock[family])
    assert record.patches
    assert not record.unused


# Cases 71, 73: vision and text parts, dense and sparse layers, each patched by what it is.
@pytest.mark.parametrize("family", OTHERS)
def test_step_of_other_families_case_71_73(family):
    if family == "llama4" and not hasattr(zoo, "_llama4"):
        pytest.skip("transformers 5.24 cannot run the image-text class at all")
    model = zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    reference = run(model, inputs)
    record = apply_liger_kernel(model, "all")
    assert record.plan.source == "row"
    with record.count_calls():
        ours = run(model, inputs)
    assert_same(ours, reference, tolerance=1e-4)
    assert not record.unused
    for op in FAMILIES[family].options:
        assert op == "cross_entropy" or record.coverage[op]["patched"] > 0, op


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
    "train-keep": (True, lambda i: {"labels": i["labels"], "logits_to_keep": 12}),
    "eval-labels": (False, lambda i: {"labels": i["labels"]}),
    "eval-shift": (False, lambda i: {"labels": i["labels"], "shift_labels": _shifted(i)}),
    "eval-none": (False, lambda i: {}),
    "eval-keep": (False, lambda i: {"logits_to_keep": 3}),
    "eval-keep-tensor": (False, lambda i: {"logits_to_keep": torch.tensor([1, 4])}),
}


# Cases 59, 62, 63: accumulation counts, kept positions, labels that are shifted already.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_mode_case_59_62_63(family, mode):
    is_training, given = MODES[mode]
    model = zoo.build(family).train(is_training)
    inputs = zoo.text_inputs()
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")} | given(inputs)
    reference = run(model, inputs)
    apply_liger_kernel(model, "all")
    assert_same(run(model, inputs), reference)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_generate_case_62(family):
    # Version 4 cannot generate with router logits.
    options = {"output_router_logits": False} if family == "mixtral" else {}
    model = zoo.build(family, **options).eval()
    ids = zoo.text_inputs()["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    apply_liger_kernel(model, "all")
    assert torch.equal(model.generate(ids, **options), wanted)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_gradient_checkpointing_case_91(family, use_reentrant):
    model = zoo.build(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    # The embedding's output needs a gradient for a reentrant checkpoint to have one.
    model.enable_input_require_grads()
    reference = run(model, zoo.text_inputs())
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        ours = run(model, zoo.text_inputs())
    assert_same(ours, reference)
    assert not record.unused


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_nothing_but_behaviour_changes_case_48_50_51(family):
    model, other = zoo.build(family).train(), zoo.build(family).train()
    inputs = zoo.text_inputs()
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
        assert after[key].data_ptr() == pointer
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


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_copies_case_50(family, tmp_path):
    inputs = zoo.text_inputs()
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


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_save_and_load(family, tmp_path):
    model = zoo.build(family).train()
    reference = run(model, zoo.text_inputs())
    apply_liger_kernel(model, "all")
    model.save_pretrained(tmp_path)
    assert set(model._no_split_modules) == set(zoo.build(family)._no_split_modules)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").train()
    assert type(loaded) is type(zoo.build(family))
    assert_same(run(loaded, zoo.text_inputs()), reference, tolerance=1e-4)
    assert loaded.config.architectures == [type(loaded).__name__]


# Case 16: in bf16 a patched model is as near to the truth as the stock one.
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_bf16_is_no_worse_than_eager_case_16(family):
    model = zoo.build(family).to(torch.bfloat16).train()
    inputs = zoo.text_inputs()
    truth = run(copy.deepcopy(model).float(), inputs)
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
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_norm_with_fp32_weight_case_16_41(family):
    model = zoo.build(family)
    norms = [m for m in model.modules() if type(m).__name__ in FAMILIES[family].norms]
    for norm in norms:
        x = torch.randn(2, norm.weight.shape[0], dtype=torch.bfloat16)
        wanted = norm(x)
        record = apply_liger_kernel(model, "rms_norm")
        with record.count_calls():
            ours = norm(x)
        assert len(record.unused) == len(norms) - 1
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)
        record.undo()


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_autocast(family):
    model = zoo.build(family).train()
    inputs = zoo.text_inputs()
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
