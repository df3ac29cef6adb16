"""What single parts of the families do: images, rotary conventions, experts, repairs."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from checks import assert_same, run
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from liger_kernels.transformers import (
    AutoLigerKernelForCausalLM,
    apply_liger_kernel,
    inspect_model,
    restore,
)
from liger_kernels.transformers.patching.upstream_fixes import repair_model
from liger_kernels.transformers.recognise import recognise_rope, rope_functions
from liger_kernels.transformers.replacements.attention import rotary_by_op
from liger_kernels.transformers.replacements.subclasses import is_patched

IS_BROKEN = transformers.__version__ == "5.24.0"

# Image-text models ------------------------------------------------------------------------------


# Case 63: labels that are shifted already, alone, in training and evaluation.
@pytest.mark.parametrize("family", zoo.MULTIMODAL)
def test_shift_labels_alone_case_63(family):
    model = zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    labels = inputs.pop("labels")
    # The last position has a label, which no unshifted row of labels could hold. Some classes of
    # version 4 shift by themselves, where it cannot be told.
    last = 7 if zoo.IS_V5 else -100
    shift_labels = F.pad(labels[:, 1:], (0, 1), value=last)
    # paligemma attends in another way while it has labels.
    logits = model(**inputs, labels=labels).logits.detach()
    wanted = F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten())
    apply_liger_kernel(model, "all")
    for is_training in (True, False):
        out = model.train(is_training)(**inputs, shift_labels=shift_labels)
        torch.testing.assert_close(out.loss, wanted)
    assert type(out.logits) is torch.Tensor
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)


# Case 77: generate checks the names of its arguments against forward's signature.
@pytest.mark.parametrize("family", zoo.MULTIMODAL)
def test_generate_with_all_a_processor_gives_case_77(family):
    model = zoo.build(family).eval()
    inputs = zoo.inputs_of(family)
    del inputs["labels"]
    known = inspect.signature(model.forward).parameters
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(**inputs, **options)
    apply_liger_kernel(model, "all")
    ours = inspect.signature(model.forward).parameters
    assert [name for name in ours if name in known] == list(known)
    assert torch.equal(model.generate(**inputs, **options), wanted)
    with pytest.raises(ValueError, match="no_such_input"):
        model.generate(**inputs, **options, no_such_input=torch.ones(2, 3))


# Case 78: an image has its own positions in two dimensions, also when none are given.
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_with_images_case_78(family):
    model = zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    stock = run(model, inputs)
    names = inspect.signature(model.model.get_rope_index).parameters
    known = {k: v for k, v in inputs.items() if k in names}
    positions, _ = model.model.get_rope_index(**known)
    assert not torch.equal(positions[0], positions[1])
    apply_liger_kernel(model, "all")
    assert_same(run(model, inputs), stock)
    assert_same(run(model, {**inputs, "position_ids": positions}), stock)
    # Positions of one dimension give other gradients: the test would see them.
    flat = positions[:1].expand(3, -1, -1)
    with pytest.raises(AssertionError):
        assert_same(run(model, {**inputs, "position_ids": flat}), stock, tolerance=1e-3)


# Case 79: the text part of paligemma may be Gemma or Gemma2; its layer norms print their shape.
@pytest.mark.parametrize("text_type", ["gemma", "gemma2"])
def test_paligemma_text_models_case_79(text_type):
    model = zoo.build("paligemma", text_type=text_type).train()
    inputs, printed = zoo.inputs_of("paligemma"), repr(model)
    stock = run(model, inputs)
    record = apply_liger_kernel(model, "all")
    assert all(n["patched"] == n["candidates"] for n in record.coverage.values())
    assert repr(model) == printed
    assert "LayerNorm((32,)" in printed
    with record.count_calls():
        assert_same(run(model, inputs), stock)
    assert not record.unused


def _registered() -> list[tuple[str, type]]:
    """Every class registered for an image-text type of the zoo, or for its text part."""
    found = {}
    for family in zoo.MULTIMODAL:
        config = zoo.build(family).config
        for part in (config, config.get_text_config()):
            for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
                classes = mapping.get(type(part), ())
                for cls in classes if isinstance(classes, tuple) else (classes,):
                    found[f"{family}-{cls.__name__}"] = (cls, part)
    return sorted((name, *entry) for name, entry in found.items())


# Case 71: each class that is registered for a type or for its text part has every module patched.
@pytest.mark.parametrize(
    ("cls", "config"), [pytest.param(*rest, id=name) for name, *rest in _registered()]
)
def test_registered_classes_case_71(cls, config):
    with torch.device("meta"):
        model = cls(config)
    coverage = inspect_model(model, "all").coverage
    assert {"rope", "rms_norm", "fused_linear_cross_entropy"} <= coverage.keys()
    assert all(n["patched"] == n["candidates"] for n in coverage.values())
    assert ("vision" in config.to_dict() or "vision_config" in config.to_dict()) == hasattr(
        config, "vision_config"
    )


# Ungated MLPs of vision towers have nothing to fuse, and stand in the plan with that reason.
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama4", "Llama4VisionMLP"),
        ("mllama", "MllamaVisionMLP"),
        ("gemma3", "SiglipMLP"),
        ("paligemma", "SiglipMLP"),
        ("qwen2_vl", "VisionMlp"),
    ],
)
def test_plain_vision_mlps_have_a_reason(family, name):
    skips = [s for s in inspect_model(zoo.build(family), "all").skips if s.module_class == name]
    assert len(skips) >= 2
    assert {(s.op, s.reason) for s in skips} == {(None, "plain MLP (no gate): nothing to fuse")}


# Case 70: the Auto class builds an image-text class whole, from a configuration and from files.
@pytest.mark.parametrize("family", zoo.MULTIMODAL)
def test_auto_class_case_70(family, tmp_path):
    stock = zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    reference = run(stock, inputs)
    stock.save_pretrained(tmp_path)
    model = AutoLigerKernelForCausalLM.from_pretrained(tmp_path, rope=False).train()
    assert type(model) is type(stock)
    patched = {type(module).__name__ for module in model.modules() if is_patched(module)}
    assert any("Norm" in name for name in patched)
    assert not any(name.endswith("Attention") for name in patched)
    assert_same(run(model, inputs), reference, tolerance=1e-4)
    built = AutoLigerKernelForCausalLM.from_config(stock.config)
    assert type(built) is type(stock)
    assert any("Attention" in type(m).__name__ for m in built.modules() if is_patched(m))


# Repairs ----------------------------------------------------------------------------------------


def _stock_llama4() -> nn.Module:
    config = zoo.build("llama4").config
    torch.manual_seed(0)
    return zoo.spread(transformers.Llama4ForConditionalGeneration(config)).train()


def test_llama4_is_repaired_where_it_must_be():
    inputs = zoo.inputs_of("llama4")
    model, other = _stock_llama4(), _stock_llama4()
    inner = type(model.language_model)
    message = repair_model(model)
    assert (message is None) == (not IS_BROKEN)
    stock = run(model, inputs)
    if not IS_BROKEN:
        assert type(model.language_model) is inner
        return
    assert "reads image_outputs off the output of its Llama4ForCausalLM" in message
    # A second call finds nothing to do.
    assert repair_model(model) is None
    assert isinstance(model.language_model, inner)
    assert repr(type(model.language_model)) == repr(inner)
    # One instance is repaired; the class and the other instance fail as before.
    with pytest.raises(AttributeError, match="image_outputs"):
        other(**inputs)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(run(made, inputs), stock)
    out = model(**inputs, return_dict=False)
    assert out[0].item() == pytest.approx(stock.loss)


def test_launcher_tells_of_the_repair():
    """Whatever ops are asked for: loading does it."""
    from liger_cli.training.model.source import load_model, resolve_model

    told: list[str] = []
    for name in ("llama4", "llama4-text"):
        model = load_model(resolve_model(name), notify=told.append)
        run(model.train(), zoo.text_inputs())
    assert len(told) == (1 if IS_BROKEN else 0)
    assert all(line.startswith("llama4: ") and "image_outputs=None" in line for line in told)


def test_auto_class_tells_of_the_repair(caplog):
    AutoLigerKernelForCausalLM.from_config(zoo.build("llama4").config)
    assert ("image_outputs=None" in caplog.text) == IS_BROKEN


def test_repair_survives_patching_and_restoring():
    model, inputs = zoo.build("llama4").train(), zoo.inputs_of("llama4")
    stock = run(model, inputs)
    inner = type(model.language_model)
    record = apply_liger_kernel(model, "all")
    assert_same(run(model, inputs), stock)
    made = copy.deepcopy(model)
    record.undo()
    restore(made)
    for each in (model, made):
        assert type(each.language_model) is inner
        assert run(each, inputs).loss == stock.loss


@pytest.mark.parametrize("family", [name for name in zoo.ALL if name != "llama4"])
def test_other_families_need_no_repair(family):
    assert repair_model(zoo.build(family)) is None


# Rotary positions -------------------------------------------------------------------------------


def _attention(family: str, word: str, **options: object) -> nn.Module:
    modules = zoo.build(family, **options).modules()
    return next(m for m in modules if word in type(m).__name__ and rope_functions(type(m)))


def _cos_sin(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def _complex(*shape: int) -> tuple[torch.Tensor]:
    angles = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return (torch.polar(torch.ones(shape), angles),)


def _heads(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


HEADS = (_heads(2, 6, 5, 16), _heads(2, 2, 5, 16))
SEQUENCE = (_heads(2, 5, 6, 16), _heads(2, 5, 2, 16))
# family, attention, (style, angles), q and k, angles
ROTATIONS = {
    "half-shared": ("llama", "Attention", ("half", "twice"), HEADS, _cos_sin(1, 5, 8)),
    # Case 23: positions of each sample.
    "half-per-sample": ("llama", "Attention", ("half", "twice"), HEADS, _cos_sin(2, 5, 8)),
    # Case 25: narrower than the head.
    "half-partial": ("phi3", "Attention", ("half", "twice"), HEADS, _cos_sin(2, 5, 6)),
    "olmo2": ("olmo2", "Attention", ("half", "twice"), HEADS, _cos_sin(2, 5, 8)),
    "pairs": ("glm4", "Attention", ("pairs", "twice"), HEADS, _cos_sin(2, 5, 8)),
    "pairs-partial": ("glm4", "Attention", ("pairs", "twice"), HEADS, _cos_sin(1, 5, 4)),
    # Case 24: tokens first, no batch.
    "vision": (
        "qwen2_vl",
        "VisionAttention",
        ("half", "twice"),
        (_heads(12, 3, 40), _heads(12, 3, 40)),
        _cos_sin(12, 20),
    ),
    "vision-2.5": (
        "qwen2_5_vl",
        "VisionAttention",
        ("half", "twice"),
        (_heads(12, 3, 40), _heads(12, 3, 40)),
        _cos_sin(12, 20),
    ),
    "complex-shared": (
        "llama4_text",
        "TextAttention",
        ("pairs", "complex"),
        SEQUENCE,
        _complex(1, 5, 8),
    ),
    "complex-per-sample": (
        "llama4_text",
        "TextAttention",
        ("pairs", "complex"),
        SEQUENCE,
        _complex(2, 5, 8),
    ),
    "complex-vision": (
        "llama4",
        "VisionAttention",
        ("pairs", "complex_shared"),
        SEQUENCE,
        _complex(5, 1, 8),
    ),
}


# Cases 23, 24, 25: each convention, forward and backward, through the op and as transformers does.
@pytest.mark.parametrize("case", ROTATIONS)
def test_rotation_case_23_24_25(case, monkeypatch):
    family, word, kind, heads, angles = ROTATIONS[case]
    attention = _attention(family, word)
    spec = recognise_rope(attention)
    assert (spec.style, spec.angles) == kind
    original = rope_functions(type(attention))[spec.function]
    calls = []
    monkeypatch.setattr(
        "liger_kernels.transformers.replacements.attention.record_call",
        lambda module=None: calls.append(module),
    )
    results = []
    for function in (original, rotary_by_op(original, spec)):
        q, k = (x.clone().requires_grad_() for x in heads)
        turned = function(q, k, *angles)
        torch.autograd.backward(turned, [_heads(*x.shape).cos() for x in turned])
        results.append((*turned, q.grad, k.grad))
    assert len(calls) == 1
    for ours, wanted in zip(results[1], results[0], strict=True):
        assert ours.dtype == wanted.dtype
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(zoo.IS_V5, reason="transformers 5 merges the sections before the attention")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_rotation_by_sections(family):
    attention = _attention(family, "VLAttention")
    spec = recognise_rope(attention)
    assert (spec.style, spec.angles) == ("half", "sections")
    original = rope_functions(type(attention))[spec.function]
    cos, sin = _cos_sin(3, 2, 5, 8)
    wanted = original(*HEADS, cos, sin, [2, 3, 3])
    ours = rotary_by_op(original, spec)(*HEADS, cos, sin, [2, 3, 3])
    torch.testing.assert_close(ours, wanted)


def test_angles_that_lost_their_imaginary_part_are_left_to_the_class():
    """model.to(dtype) makes llama4's vision angles real: the stock result, not an error."""
    attention = _attention("llama4", "VisionAttention")
    spec = recognise_rope(attention)
    original = rope_functions(type(attention))[spec.function]
    real = torch.randn(5, 1, 8)
    for ours, wanted in zip(
        rotary_by_op(original, spec)(*SEQUENCE, real), original(*SEQUENCE, real), strict=True
    ):
        assert torch.equal(ours, wanted)


# Case 23: in a whole model; one row starts later than the other.
@pytest.mark.parametrize("family", zoo.TEXT)
def test_positions_of_each_sample_case_23(family):
    options = {"phi3": {"partial_rotary_factor": 0.5}}.get(family, {})
    model = zoo.build(family, **options).train()
    inputs = zoo.text_inputs()
    positions = torch.arange(inputs["input_ids"].shape[1]).repeat(2, 1)
    positions[1] += 7
    inputs["position_ids"] = positions
    stock = run(model, inputs)
    record = apply_liger_kernel(model, "rope,rms_norm")
    with record.count_calls():
        assert_same(run(model, inputs), stock)
    assert not record.unused


# Experts ----------------------------------------------------------------------------------------

# family, options: layers dense and sparse, more experts than tokens find.
EXPERTS = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-idle": ("mixtral", {"num_local_experts": 16}),
    "mixtral-one": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "qwen3_moe-first-dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen3_moe-sparse": ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
    "qwen3_moe-step": ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
    "qwen3_moe-idle": ("qwen3_moe", {"num_experts": 16}),
    # Every other layer dense; each sparse one has a shared expert beside the routed ones.
    "llama4_text-mixed": ("llama4_text", {"interleave_moe_layer_step": 2}),
    "llama4_text-sparse": ("llama4_text", {"interleave_moe_layer_step": 1}),
    "llama4_text-two": ("llama4_text", {"num_experts_per_tok": 2}),
}


# Cases 72, 73: dense and sparse layers, shared experts, experts that no token goes to.
@pytest.mark.parametrize("case", EXPERTS)
def test_experts_case_72_73(case):
    family, options = EXPERTS[case]
    model = zoo.build(family, **options).train()
    inputs = zoo.text_inputs(batch=1, length=6)
    stock = run(model, inputs)
    outputs = model(**inputs)
    routers = [name for name in stock.grads if name.endswith((".gate.weight", "router.weight"))]
    assert routers
    assert all(stock.grads[name].abs().max() > 0 for name in routers)
    record = apply_liger_kernel(model, "all")
    found = [record.coverage[op] for op in ("swiglu", "moe_experts") if op in record.coverage]
    assert all(part["patched"] == part["candidates"] for part in found)
    assert sum(part["patched"] for part in found) >= 2
    with record.count_calls():
        assert_same(run(model, inputs), stock)
    ours = model(**inputs)
    if getattr(outputs, "aux_loss", None) is not None:
        torch.testing.assert_close(ours.aux_loss, outputs.aux_loss)
    if "idle" in case:
        idle = [n for n, g in stock.grads.items() if "experts" in n and (g == 0).any()]
        assert idle
        # Version 4 has one module an expert: one without tokens is never called.
        assert (not record.unused) == zoo.IS_V5


@pytest.mark.skipif(not zoo.IS_V5, reason="version 4 has one MLP an expert")
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_implementations_case_72(family, implementation):
    model = zoo.build(family).train()
    model.config._experts_implementation = implementation
    inputs = zoo.text_inputs()
    stock = run(model, inputs)
    record = apply_liger_kernel(model, "moe_experts")
    with record.count_calls():
        assert_same(run(model, inputs), stock)
    assert not record.unused
    # Another that is chosen later runs, and the op does again once it is chosen back.
    for chosen in ("batched_mm", "eager", implementation):
        model.config._experts_implementation = chosen
        with record.count_calls():
            assert_same(run(model, inputs), stock)
        assert bool(record.unused) == (chosen != implementation)


# Scaled logits ----------------------------------------------------------------------------------


# Case 83: granite divides its logits; cohere, which has no row, multiplies them.
def test_scaled_logits_case_83():
    granite = zoo.build("granite", logits_scaling=8.0)
    torch.manual_seed(0)
    config = transformers.CohereConfig(**zoo.TEXT["llama"][2], logit_scale=0.25)
    cohere = zoo.spread(transformers.CohereForCausalLM(config))
    for model in (granite, cohere):
        stock = run(model.train(), zoo.text_inputs())
        record = apply_liger_kernel(model, "fused_linear_cross_entropy")
        with record.count_calls():
            assert_same(run(model, zoo.text_inputs()), stock)
        assert not record.unused
