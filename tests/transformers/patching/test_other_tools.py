"""Other people's monkey patches around ours: loaders, forwards, functions, before and after."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from checks import assert_same, run
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from liger_kernels.transformers import AutoLigerKernelForCausalLM, apply_liger_kernel
from liger_kernels.transformers.replacements.subclasses import is_patched

# Loaders ----------------------------------------------------------------------------------------


def _plain(original):
    return lambda *args, **kwargs: original(*args, **kwargs)


def _wrapping(original):
    @functools.wraps(original)
    def tool(*args, **kwargs):
        return original(*args, **kwargs)

    return tool


def _static(original):
    return staticmethod(_plain(original))


def _of_class(original):
    return classmethod(lambda cls, *args, **kwargs: original(*args, **kwargs))


@pytest.mark.parametrize("make", [_plain, _wrapping, _static, _of_class, functools.partial])
@pytest.mark.parametrize("owner", [AutoModelForCausalLM, PreTrainedModel])
def test_case_212_a_tool_replaced_from_pretrained(make, owner, monkeypatch, tmp_path):
    zoo.build("llama").save_pretrained(tmp_path)
    original = owner.from_pretrained
    if owner is PreTrainedModel:
        original = functools.partial(original.__func__, transformers.LlamaForCausalLM)
    monkeypatch.setattr(owner, "from_pretrained", make(original))
    options = {"dtype" if zoo.IS_V5 else "torch_dtype": torch.bfloat16}
    model = AutoLigerKernelForCausalLM.from_pretrained(tmp_path, rope=False, **options)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert is_patched(model.model.norm)
    assert not is_patched(model.model.layers[0].self_attn)


@pytest.mark.parametrize("make", [_plain, _wrapping, _static, _of_class, functools.partial])
def test_case_212_a_tool_replaced_from_config(make, monkeypatch):
    original = AutoModelForCausalLM.from_config
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", make(original))
    model = AutoLigerKernelForCausalLM.from_config(zoo.config_of("llama"), rms_norm=False)
    assert not is_patched(model.model.norm)
    assert is_patched(model.model.layers[0].self_attn)


def test_unknown_options_are_still_named_where_nobody_replaced_a_loader():
    with pytest.raises(ValueError, match="unknown option 'ropes'; did you mean 'rope'"):
        AutoLigerKernelForCausalLM.from_config(zoo.config_of("llama"), ropes=False)


# Forwards and functions -------------------------------------------------------------------------


class Tool:
    """Wraps a function and counts its calls; the result is a little larger, so that it shows."""

    def __init__(self, owner, name, monkeypatch, factor=1.5):
        self.num_calls = 0
        original = getattr(owner, name)

        def tool(*args, **kwargs):
            self.num_calls += 1
            out = original(*args, **kwargs)
            return tuple(x * factor for x in out) if isinstance(out, tuple) else out * factor

        monkeypatch.setattr(owner, name, tool)


_PLACES = {
    "norm": (modeling_llama.LlamaRMSNorm, "forward"),
    "mlp": (modeling_llama.LlamaMLP, "forward"),
    "layer-norm": (nn.LayerNorm, "forward"),
    "linear": (nn.Linear, "forward"),
    "F.linear": (F, "linear"),
    "rotary": (modeling_llama, "apply_rotary_pos_emb"),
    "repeat": (modeling_llama, "repeat_kv"),
    "attention": (modeling_llama, "eager_attention_forward"),
}


# Case 212: stock with the same tool is the reference, whoever came first.
@pytest.mark.parametrize("is_tool_first", [True, False])
@pytest.mark.parametrize("place", _PLACES)
def test_case_212_a_tool_wrapped_a_function(place, is_tool_first, monkeypatch):
    inputs = zoo.text_inputs()
    options = {"attn_implementation": "eager"}
    stock = zoo.build("llama", **options).train()
    ours = zoo.build("llama", **options).train()
    plain = run(stock, inputs)
    if not is_tool_first:
        apply_liger_kernel(ours, "all")
        assert_same(run(ours, inputs), plain)
    tool = Tool(*_PLACES[place], monkeypatch)
    if is_tool_first:
        apply_liger_kernel(ours, "all")
    tool.num_calls = 0
    wanted, num_calls = run(stock, inputs), tool.num_calls
    tool.num_calls = 0
    assert_same(run(ours, inputs), wanted)
    if place != "layer-norm":
        assert num_calls > 0
        assert wanted.loss != plain.loss
    if not is_tool_first and place not in ("linear", "F.linear"):
        assert tool.num_calls == num_calls
    monkeypatch.undo()
    assert_same(run(ours, inputs), plain)


@pytest.mark.parametrize("is_tool_first", [True, False])
def test_case_212_a_tool_wrapped_forwards_of_instances(is_tool_first):
    def install(model):
        for name in ("norm", "layers.0.mlp", "layers.0", "layers.1.self_attn"):
            module = model.model.get_submodule(name)
            inner = module.forward

            def tool(*args, inner=inner, **kwargs):
                calls.append(inner)
                return inner(*args, **kwargs)

            module.forward = tool

    inputs, calls = zoo.text_inputs(), []
    model = zoo.build("llama").train()
    reference = run(model, inputs)
    if is_tool_first:
        install(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = apply_liger_kernel(model, "all")
    if not is_tool_first:
        install(model)
    assert_same(run(model, inputs), reference)
    assert len(calls) == 4
    # What the tool holds by now is a forward of ours, on a module that is stock again.
    record.undo()
    assert_same(run(model, inputs), reference)
    apply_liger_kernel(model, "all")
    assert_same(run(model, inputs), reference)


def test_case_212_a_tool_wrapped_every_call(monkeypatch):
    inputs, model, names = zoo.text_inputs(), zoo.build("llama").train(), []
    reference = run(model, inputs)
    call = nn.Module.__call__

    def tool(self, *args, **kwargs):
        names.append(type(self).__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", tool)
    record = apply_liger_kernel(model, "all")
    assert_same(run(model, inputs), reference)
    assert names.count("LlamaMLP") == 2
    record.undo()
    assert_same(run(model, inputs), reference)


def test_case_212_patching_again_follows_the_tool(monkeypatch):
    inputs, model = zoo.text_inputs(), zoo.build("llama").train()
    apply_liger_kernel(model, "all").undo()
    original = modeling_llama.apply_rotary_pos_emb

    @functools.wraps(original)
    def tool(q, k, cos, sin, unsqueeze_dim=1):
        return original(q, k, cos, sin, unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", tool)
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        run(model, inputs)
    # It computes what the one it replaced did, so the op does for it, and is not given up.
    assert not record.unused
