"""Calls that mean nothing: a ValueError that names the argument and its value, and no patch."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from liger_kernels.transformers import (
    AutoLigerKernelForCausalLM,
    apply_liger_kernel,
    apply_liger_kernel_to_llama,
    inspect_model,
)

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=50,
)


@pytest.mark.parametrize("ops", [3, None, [3], {"rope": False}], ids=str)
@pytest.mark.parametrize("function", [apply_liger_kernel, inspect_model])
def test_ops_of_another_type(function, ops):
    with pytest.raises(ValueError, match="ops must be a string or a sequence of names, got"):
        function(LlamaForCausalLM(CONFIG), ops)


@pytest.mark.parametrize("model", ["llama", None, LlamaForCausalLM], ids=str)
def test_model_that_is_none(model):
    for function in (apply_liger_kernel, inspect_model):
        with pytest.raises(ValueError, match="model must be a model that is built already, got"):
            function(model)
    if model is not None:
        with pytest.raises(ValueError, match="model must be a transformers model, got"):
            apply_liger_kernel_to_llama(model=model)


@pytest.mark.parametrize("value", ["no", 0, None])
def test_option_that_is_no_boolean(value):
    with pytest.raises(ValueError, match=f"got rope={value!r}; it is True or False"):
        apply_liger_kernel_to_llama(rope=value, model=LlamaForCausalLM(CONFIG))
    with pytest.raises(ValueError, match=f"got rope={value!r}; it is True or False"):
        AutoLigerKernelForCausalLM.from_config(CONFIG, rope=value)
