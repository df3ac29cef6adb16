"""Class mode: whatever class of a family is built is patched and counted, once."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
import transformers
import zoo
from checks import assert_same, run
from transformers import PreTrainedModel

import liger_kernels.transformers
from liger_kernels.transformers import apply_liger_kernel_to_llama
from liger_kernels.transformers.patching.families import FAMILIES
from liger_kernels.transformers.replacements.subclasses import is_patched


def _num_patched(model):
    return sum(map(is_patched, model.modules()))


def _apply_to(family):
    return getattr(liger_kernels.transformers, f"apply_liger_kernel_to_{family}")


def _configs(config):
    """Return a configuration and those of its parts."""
    parts = [getattr(config, name) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for part in parts if part is not None)]


def _classes(family):
    """Return the classes of a family's file that can be built, with their configurations."""
    module = importlib.import_module(FAMILIES[family].module)
    config = zoo.build(family).config
    found = []
    for cls in vars(module).values():
        if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
            continue
        if cls.__module__ != module.__name__ or cls.forward is torch.nn.Module.forward:
            continue
        found += [(cls, c) for c in _configs(config) if type(c) is cls.config_class]
    return found


# Case 211: text models of multimodal families too, and heads of other kinds.
@pytest.mark.parametrize("family", zoo.ALL)
def test_case_211_every_class_of_a_family_is_patched_and_counted_once(family):
    classes = _classes(family)
    assert any("For" in cls.__name__ for cls, _ in classes)
    record = _apply_to(family)()
    try:
        for count, (cls, config) in enumerate(classes, 1):
            model = cls(config)
            assert _num_patched(model) > 0, cls
            assert type(model) is cls
            assert len(record.built) == count, cls
            assert _num_patched(model) == len(record.built[-1].patches), cls
            assert record.summary().startswith(f"{count} {family} models patched")
    finally:
        record.undo()
    assert all(_num_patched(cls(config)) == 0 for cls, config in classes[:1])


@pytest.mark.parametrize("family", ["mllama", "gemma3", "llama4"])
def test_case_211_a_text_model_of_a_multimodal_family_computes_what_stock_does(family):
    whole = zoo.build(family).config
    cls = next(
        cls
        for cls, config in _classes(family)
        if cls.__name__.endswith("ForCausalLM") and type(config) is type(whole.text_config)
    )
    models = []
    for is_on in (False, True):
        record = _apply_to(family)() if is_on else None
        try:
            torch.manual_seed(0)
            models.append(zoo.spread(cls(whole.text_config)).train())
        finally:
            if record is not None:
                record.undo()
    stock, ours = models
    assert _num_patched(ours) > 0
    inputs = zoo.text_inputs()
    assert_same(run(ours, inputs), run(stock, inputs))


def test_case_211_an_instance_of_a_part_without_a_row_is_of_the_family():
    config = zoo.build("mllama").config.text_config
    model = transformers.MllamaForCausalLM(config)
    record = _apply_to("mllama")(model=model)
    assert record.coverage["rms_norm"]["patched"] > 0
    with pytest.raises(ValueError, match="got a model of type 'mllama_text_model'"):
        _apply_to("llama")(model=transformers.MllamaForCausalLM(config))


@pytest.mark.parametrize("is_whole_first", [True, False])
def test_case_211_two_records_of_one_class_patch_it_once(is_whole_first):
    names = ["gemma3", "gemma3_text"][:: 1 if is_whole_first else -1]
    records = {name: _apply_to(name)() for name in names}
    config = zoo.config_of("gemma3_text")
    try:
        assert _num_patched(transformers.Gemma3ForCausalLM(config)) > 0
        assert [len(records[name].built) for name in ("gemma3", "gemma3_text")] == [0, 1]
        # In either order, as they came.
        records[names[0]].undo()
        assert _num_patched(transformers.Gemma3ForCausalLM(config)) > 0
        assert sum(len(record.built) for record in records.values()) == 2
    finally:
        for record in records.values():
            record.undo()
    assert _num_patched(transformers.Gemma3ForCausalLM(config)) == 0


def test_case_211_a_base_class_is_no_model():
    class Mine(transformers.models.llama.modeling_llama.LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = transformers.LlamaModel(config)
            self.score = torch.nn.Linear(32, 1)

    record = apply_liger_kernel_to_llama()
    try:
        model = Mine(zoo.config_of("llama"))
        assert len(record.built) == 1
        assert _num_patched(model) == _num_patched(model.model) > 0
    finally:
        record.undo()


# Case 212: a tool wraps a constructor, before class mode or in it.
@pytest.mark.parametrize("wraps", [functools.wraps, lambda function: lambda wrapper: wrapper])
@pytest.mark.parametrize("is_tool_first", [True, False])
def test_case_212_a_wrapped_constructor(wraps, is_tool_first):
    cls, config, calls = transformers.LlamaForCausalLM, zoo.config_of("llama"), []
    stock = cls.__init__

    def install():
        inner = cls.__init__

        @wraps(inner)
        def tool(self, *args, **kwargs):
            calls.append(type(self))
            inner(self, *args, **kwargs)

        cls.__init__ = tool

    try:
        if is_tool_first:
            install()
        for count in (1, 2):
            record = apply_liger_kernel_to_llama()
            try:
                if not is_tool_first and count == 1:
                    install()
                calls.clear()
                assert _num_patched(cls(config)) > 0
                assert len(record.built) == 1
                assert calls == [cls]
            finally:
                record.undo()
            calls.clear()
            assert _num_patched(cls(config)) == 0
            assert calls == [cls]
    finally:
        cls.__init__ = stock
