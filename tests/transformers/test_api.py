"""The surface: options and their errors, class mode, the Auto class."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings

import pytest
import torch
import transformers
import zoo
from checks import assert_same, run
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.models.llama import modeling_llama

import liger_kernels
from liger_kernels.transformers import (
    AutoLigerKernelForCausalLM,
    apply_liger_kernel,
    apply_liger_kernel_to_llama,
    class_mode,
)
from liger_kernels.transformers.patching.families import FAMILIES
from liger_kernels.transformers.patching.plan import build_plan
from liger_kernels.transformers.patching.upstream_fixes import repair_model
from liger_kernels.transformers.replacements.subclasses import is_patched


def _num_patched(model) -> int:
    return sum(is_patched(module) for module in model.modules())


def test_names_resolve():
    assert liger_kernels.apply_liger_kernel is apply_liger_kernel
    assert liger_kernels.apply_liger_kernel_to_llama is apply_liger_kernel_to_llama
    for family in FAMILIES:
        name = f"apply_liger_kernel_to_{family}"
        assert getattr(liger_kernels.transformers, name).__name__ == name
        assert name in dir(liger_kernels.transformers)
    for name in liger_kernels.__all__:
        assert callable(getattr(liger_kernels, name))
    with pytest.raises(AttributeError, match="apply_liger_kernel_to_nothing"):
        _ = liger_kernels.transformers.apply_liger_kernel_to_nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_family_function_has_the_options_of_its_row(family):
    function = getattr(liger_kernels.transformers, f"apply_liger_kernel_to_{family}")
    parameters = inspect.signature(function).parameters
    assert [*parameters] == [
        *FAMILIES[family].options,
        "model",
        "save_memory",
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert {n: p.default for n, p in parameters.items()} == {
        **FAMILIES[family].options,
        "model": None,
        "save_memory": True,
    }


def test_family_signature_is_the_published_one():
    assert str(inspect.signature(apply_liger_kernel_to_llama)).startswith(
        "(*, rope: 'bool' = True, rms_norm: 'bool' = True, swiglu: 'bool' = True, "
        "cross_entropy: 'bool' = False, fused_linear_cross_entropy: 'bool' = True, model: "
    )


# Case 42: every option off, alone, and on, alone, runs a step.
@pytest.mark.parametrize("family", zoo.ALL)
def test_each_option_case_42(family):
    apply_to_family = getattr(liger_kernels.transformers, f"apply_liger_kernel_to_{family}")
    known = FAMILIES[family].options
    model, inputs = zoo.build(family).train(), zoo.inputs_of(family)
    reference = run(model, inputs)
    for option in known:
        only = {name: name == option for name in known}
        record = apply_to_family(model=model, **only)
        assert {patch.op for patch in record.patches} == {option}
        with record.count_calls():
            assert_same(run(model, inputs), reference)
        assert not record.unused
        record.undo()
        if known[option]:
            record = apply_to_family(model=model, **{option: False})
            assert record.coverage[option]["patched"] == 0
            record.undo()


# Case 58: two ways to compute the loss are an error before anything is touched.
def test_both_losses_case_58():
    model = zoo.build("llama")
    with pytest.raises(ValueError, match="compute the same loss"):
        apply_liger_kernel_to_llama(cross_entropy=True, model=model)
    with pytest.raises(ValueError, match="compute the same loss"):
        apply_liger_kernel_to_llama(cross_entropy=True)
    with pytest.raises(ValueError, match="compute the same loss"):
        AutoLigerKernelForCausalLM.from_config(zoo.config_of("llama"), cross_entropy=True)
    with pytest.raises(ValueError, match="compute the same loss"):
        apply_liger_kernel(model, "all,ce")
    assert _num_patched(model) == 0
    assert _num_patched(zoo.build("llama")) == 0
    record = apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)
    assert "forward" not in vars(model)
    assert record.coverage["fused_linear_cross_entropy"]["patched"] == 0


def test_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="'rms_nrom'; did you mean 'rms_norm'"):
        apply_liger_kernel_to_llama(rms_nrom=False)
    with pytest.raises(ValueError, match="'swigl'; did you mean 'swiglu'"):
        apply_liger_kernel_to_llama(swigl=False, model=zoo.build("llama"))
    with pytest.raises(ValueError, match="unknown option 'geglu'"):
        apply_liger_kernel_to_llama(geglu=True)
    with pytest.raises(ValueError, match=r"'atn'\. Ours: rope, rms_norm, layer"):
        AutoLigerKernelForCausalLM.from_config(zoo.config_of("llama"), atn=True)
    assert _num_patched(zoo.build("llama")) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_option_names_the_right_ones(family):
    apply_to_family = getattr(liger_kernels.transformers, f"apply_liger_kernel_to_{family}")
    known = FAMILIES[family].options
    wrong = {op for row in FAMILIES.values() for op in row.options} - set(known)
    assert wrong
    right = ", ".join(("model", "save_memory", *known))
    for option in wrong:
        name = apply_to_family.__name__
        message = f"{name} got an unknown option '{option}'.* Allowed: {right}$"
        with pytest.raises(ValueError, match=message):
            apply_to_family(**{option: True})


def test_family_function_wants_its_family():
    with pytest.raises(ValueError, match="model of type 'qwen2'"):
        apply_liger_kernel_to_llama(model=zoo.build("qwen2"))


# Case 70: an unsupported model is a warning that lists known types, and an unpatched model.
def test_unsupported_model_case_70(tmp_path):
    # GPT-2 has layer norms and a head, but neither rotary positions nor a gated MLP.
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128)
    model = GPT2LMHeadModel(config)
    message = (
        r"model type 'gpt2' stays unpatched: no place for rope, swiglu; it has places for "
        r"layer_norm \(5, not requested: add layer_norm to ops\), fused_linear_cross_entropy "
        r"\(1, not requested: add fused_linear_cross_entropy to ops\)\. "
        r"Known model types: llama"
    )
    with pytest.warns(UserWarning, match=message):
        record = apply_liger_kernel(model, "rope,swiglu")
    assert _num_patched(model) == 0
    assert not record.patches
    assert record.plan.missing == ("rope", "swiglu")
    model.save_pretrained(tmp_path)
    options = {"layer_norm": False, "fused_linear_cross_entropy": False}
    with pytest.warns(UserWarning, match="Known model types"):
        loaded = AutoLigerKernelForCausalLM.from_pretrained(tmp_path, **options)
    assert isinstance(loaded, GPT2LMHeadModel)
    assert _num_patched(loaded) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_liger_kernel(model, "none")


# Case 70: places that are all refused are no success either, and the warning says why.
def test_refused_model_case_70(monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: self.weight * x)
    with pytest.warns(UserWarning, match=r"rms_norm \(5, LlamaRMSNorm does not compute"):
        record = apply_liger_kernel(zoo.build("llama"), "rms_norm")
    assert not record.patches


# Case 70: the text type of a multimodal one is another type.
def test_types_of_a_family_are_told_apart_case_70():
    with pytest.raises(ValueError, match="use .* apply_liger_kernel_to_gemma3_text"):
        liger_kernels.apply_liger_kernel_to_gemma3(model=zoo.build("gemma3_text"))
    with pytest.raises(ValueError, match="use .* apply_liger_kernel_to_llama4"):
        liger_kernels.apply_liger_kernel_to_llama4_text(model=zoo.build("llama4"))


def test_unlisted_type_is_logged_and_may_be_left_alone(caplog):
    model = zoo.build_unlisted().train()
    inputs = zoo.text_inputs()
    reference = run(model, inputs)
    with pytest.warns(UserWarning, match="'smollm3' stays unpatched: no place for rope"):
        record = apply_liger_kernel(model, recognise=False)
    assert _num_patched(model) == 0
    record.undo()
    with caplog.at_level("INFO", logger="liger_kernels"):
        record = apply_liger_kernel(model)
    assert "'smollm3' is not listed" in caplog.text
    assert record.plan.source == "recognised"
    assert_same(run(model, inputs), reference)


# Class mode -------------------------------------------------------------------------------------


def _auto_class(family):
    return AutoModelForCausalLM if family in zoo.TEXT else AutoModelForImageTextToText


# Case 49: only models built from now on are patched, and the record says so.
@pytest.mark.parametrize("family", zoo.ALL)
def test_class_mode_case_49(family, tmp_path):
    apply_to_family = getattr(liger_kernels.transformers, f"apply_liger_kernel_to_{family}")
    existing, inputs = zoo.build(family).train(), zoo.inputs_of(family)
    reference = run(existing, inputs)
    existing.save_pretrained(tmp_path)
    stock_init = type(existing).__init__
    record = apply_to_family()
    try:
        assert record.model is None
        assert record.coverage == {}
        assert _num_patched(existing) == 0
        built = zoo.build(family).train()
        loaded = _auto_class(family).from_pretrained(
            tmp_path, attn_implementation=existing.config._attn_implementation
        )
        repair_model(loaded.train())
        for model in (built, loaded):
            assert_same(run(model, inputs), reference, tolerance=1e-4)
            assert _num_patched(model) >= 10
            assert type(model) is type(existing)
        plan = build_plan(existing, "all")
        assert record.coverage == {
            op: {"patched": 2 * n["patched"], "candidates": 2 * n["candidates"]}
            for op, n in plan.coverage.items()
        }
        assert len(record.built) == 2
        other = "qwen2" if family != "qwen2" else "llama"
        assert _num_patched(zoo.build(other)) == 0
        with pytest.raises(ValueError, match="patched already"):
            apply_to_family()
    finally:
        record.undo()
    assert type(existing).__init__ is stock_init
    assert _num_patched(zoo.build(family)) == 0
    assert _num_patched(built) >= 10
    record.undo()


def test_class_mode_of_subclasses_and_headless_models():
    class Mine(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Linear(2, 2)

    config = zoo.config_of("llama")
    record = apply_liger_kernel_to_llama(rope=False)
    try:
        assert _num_patched(Mine(config)) == 8
        assert _num_patched(transformers.LlamaModel(config)) == 7
        assert _num_patched(transformers.LlamaForSequenceClassification(config)) == 7
        with pytest.raises(TypeError):
            transformers.LlamaForCausalLM()
        # A constructor that failed does not leave the next model unpatched.
        assert _num_patched(Mine(config)) == 8
    finally:
        record.undo()
    assert "__init__" not in vars(transformers.LlamaForSequenceClassification)


def test_class_mode_of_families_inside_each_other():
    records = [
        liger_kernels.apply_liger_kernel_to_gemma3(),
        liger_kernels.apply_liger_kernel_to_gemma3_text(),
    ]
    try:
        model = zoo.build("gemma3")
        assert "gemma3 models patched" in records[0].summary()
        assert [len(record.built) for record in records] == [1, 0]
        assert _num_patched(model) == 25
    finally:
        for record in records:
            record.undo()


# Case 76: one family that fails to import is that family's problem alone.
def test_broken_family_case_76(monkeypatch):
    def import_module(name):
        if "gemma2" in name:
            raise RuntimeError("cannot import name 'vanished'")
        return importlib.import_module(name)

    class Importer:
        pass

    Importer.import_module = staticmethod(import_module)
    monkeypatch.setattr(class_mode, "importlib", Importer)
    message = r"'gemma2' cannot be imported.*vanished.*4\.57 to 5\.24"
    with pytest.raises(ImportError, match=message):
        liger_kernels.apply_liger_kernel_to_gemma2()
    apply_liger_kernel_to_llama().undo()
    assert apply_liger_kernel(zoo.build("llama")).coverage["rope"]["patched"] == 2


def test_importing_families_imports_no_family():
    assert "liger_kernels.transformers.patching.families" in sys.modules
    source = inspect.getsource(sys.modules["liger_kernels.transformers.patching.families"])
    assert "import transformers" not in source
    assert "from transformers" not in source


# The Auto class ---------------------------------------------------------------------------------


# Case 68: our options go to the patcher, the rest to transformers, an unknown one is an error.
def test_from_pretrained_case_68(tmp_path):
    stock = zoo.build("llama").train()
    reference = run(stock, zoo.text_inputs())
    stock.save_pretrained(tmp_path)
    model = AutoLigerKernelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager", rope=False, revision=None
    )
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not any(is_patched(layer.self_attn) for layer in model.model.layers)
    assert is_patched(model.model.norm)
    model = AutoLigerKernelForCausalLM.from_pretrained(str(tmp_path)).train()
    assert_same(run(model, zoo.text_inputs()), reference)
    model, info = AutoLigerKernelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, config=stock.config
    )
    assert _num_patched(model) >= 10
    assert not info["missing_keys"]
    # A name of the configuration overrides it, as in transformers.
    model = AutoLigerKernelForCausalLM.from_pretrained(tmp_path, attention_dropout=0.25)
    assert model.config.attention_dropout == 0.25
    for wrong, nearest in (("rms_nrom", "rms_norm"), ("atn_implementation", "attn_implementation")):
        with pytest.raises(ValueError, match=f"'{wrong}'; did you mean '{nearest}'"):
            AutoLigerKernelForCausalLM.from_pretrained(tmp_path, **{wrong: True})


# Case 69
@pytest.mark.parametrize("family", zoo.TEXT)
def test_from_config_case_69(family):
    config = zoo.config_of(family)
    model = AutoLigerKernelForCausalLM.from_config(config, rms_norm=False, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not is_patched(model.model.norm)
    assert is_patched(model.model.layers[0].self_attn)
    with pytest.raises(ValueError, match="'swiglo'; did you mean 'swiglu'"):
        AutoLigerKernelForCausalLM.from_config(config, swiglo=False)


def test_auto_class_in_class_mode():
    record = apply_liger_kernel_to_llama()
    try:
        model = AutoLigerKernelForCausalLM.from_config(zoo.config_of("llama"), rope=False)
    finally:
        record.undo()
    assert not is_patched(model.model.layers[0].self_attn)
    assert is_patched(model.model.norm)


def test_auto_class_options_are_those_of_the_rows():
    options = {name: d for row in FAMILIES.values() for name, d in row.options.items()}
    for method in (
        AutoLigerKernelForCausalLM.from_pretrained,
        AutoLigerKernelForCausalLM.from_config,
    ):
        parameters = inspect.signature(method).parameters.values()
        keyword = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert keyword == {**options, "save_memory": True}


# Case 70, second part: a configuration with a vision part is its image-text class.
def test_vision_configuration_is_built_whole():
    stock = zoo.build("gemma3")
    model = AutoLigerKernelForCausalLM.from_config(stock.config)
    assert type(model) is type(stock)
    model = AutoLigerKernelForCausalLM.from_config(stock.config.text_config)
    assert type(model) is transformers.Gemma3ForCausalLM


# Case 65: the tuple form has the loss first.
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_tuple_output_case_65(family):
    model = zoo.build(family).train()
    wanted = model(**zoo.text_inputs())
    apply_liger_kernel(model, "all")
    got = model(**zoo.text_inputs(), return_dict=False)
    assert got[0].item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    with_logits = model(**zoo.text_inputs(), skip_logits=False)
    assert type(with_logits.logits) is torch.Tensor
    torch.testing.assert_close(with_logits.logits, wanted.logits, rtol=1e-4, atol=1e-4)
