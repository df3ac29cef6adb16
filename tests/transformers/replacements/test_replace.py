"""What patched classes compute, against the classes they stand for: outputs, gradients, calls."""

from __future__ import annotations

import copy
import importlib
import types

import pytest
import torch
from norm_modules import (
    FixedLayerNorm,
    GatedEndNorm,
    GatedLastNorm,
    GatedNorm,
    IdleBufferNorm,
    L2Norm,
    NormEnd,
    ShiftedLayerNorm,
    T5Norm,
)
from rotary_functions import (
    apply_rotary_backwards,
    apply_rotary_last,
    apply_rotary_of_two,
    apply_rotary_sin_first,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from liger_kernels.compare import FLOOR, error
from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.recognise import Refusal, recognise_norm, recognise_rope
from liger_kernels.transformers.replacements.calls import tally_calls
from liger_kernels.transformers.replacements.table import patched_class

DTYPES = (torch.float32, torch.bfloat16)


def patched(module: nn.Module, recognise=recognise_norm) -> nn.Module:
    """Return a copy of a module with its class swapped."""
    spec = recognise(module)
    assert spec is not None
    assert not isinstance(spec, Refusal), spec
    twin = copy.deepcopy(module)
    twin.__class__ = patched_class(type(module), spec)
    return twin


def run(module, *inputs):
    """Return the output and the gradients of inputs and weights for a fixed direction."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    module.zero_grad()
    y = module(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    y.backward(dy)
    return [y.detach(), *(x.grad for x in leaves), *(p.grad for p in module.parameters())]


def assert_same(ours, stock, dtype):
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.dtype == theirs.dtype
        # Eager code rounds the gradients between its steps.
        assert error(mine, theirs) <= 4 * FLOOR[dtype]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


NORMS = {
    "end": (NormEnd, 1),
    "t5": (T5Norm, 1),
    "l2": (L2Norm, 1),
    "idle-buffer": (IdleBufferNorm, 1),
    "fixed-layer-norm": (FixedLayerNorm, 1),
    "shifted-layer-norm": (lambda: ShiftedLayerNorm(12), 1),
    "gated": (GatedNorm, 2),
    "gated-groups": (lambda: GatedNorm(4), 2),
    "gated-last": (GatedLastNorm, 2),
    "gated-end": (GatedEndNorm, 2),
}


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORMS)
def test_norm(case, x_dtype, weight_dtype):
    build, num_inputs = NORMS[case]
    torch.manual_seed(0)
    module = build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if case == "shifted-layer-norm" and x_dtype != weight_dtype:
        pytest.skip("torch's layer norm takes one dtype")
    module, twin = module.to(weight_dtype), patched(module).to(weight_dtype)
    inputs = [randn(3, 5, 12, dtype=x_dtype, seed=seed) for seed in range(num_inputs)]
    coarsest = max(x_dtype, weight_dtype, key=lambda dtype: torch.finfo(dtype).eps)
    with tally_calls([twin]) as tally:
        ours = run(twin, *inputs)
    assert_same(ours, run(module, *inputs), coarsest)
    # T5's, whose rounding depends on both dtypes, runs itself where they differ.
    assert bool(tally.called) == (case != "t5" or x_dtype == weight_dtype)


# Real classes: whatever transformers has of them rounds as recognised, bit by bit in bf16.
GATED = {
    "qwen3_next.Qwen3NextRMSNormGated": (48,),
    "qwen3_5.Qwen3_5RMSNormGated": (48,),
    "olmo_hybrid.OlmoHybridRMSNormGated": (48,),
    "kimi_linear.KimiLinearRMSNormGated": (48,),
    "bailing_hybrid.BailingHybridRMSNormGated": (48,),
    "glm5_next.Glm5NextTextRMSNormGated": (48,),
    "lara_mini.LaraMiniRMSNormGated": (48,),
    "mamba2.MambaRMSNormGated": (48,),
    "bamba.BambaRMSNormGated": (48,),
    "granitemoehybrid.GraniteMoeHybridRMSNormGated": (48,),
    "nemotron_h.NemotronHRMSNormGated": (48, 16),
    "zamba2.Zamba2RMSNormGated": (48, 16),
    "falcon_h1.FalconH1RMSNormGated": (48, 1e-5, 3, False),
    "falcon_h1.FalconH1RMSNormGated-after": (48, 1e-5, 3, True),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_norms_of_transformers(name):
    model, class_name = name.removesuffix("-after").split(".")
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        cls = getattr(module, class_name)
    except (ImportError, AttributeError):
        pytest.skip("not in this version of transformers")
    try:
        norm = cls(*GATED[name])
    except TypeError:
        norm = cls(48, 48)
    with torch.no_grad():
        norm.weight.add_(0.3 * randn(48, seed=1))
    for x_dtype in DTYPES:
        for weight_dtype in DTYPES:
            stock, twin = norm.to(weight_dtype), patched(norm).to(weight_dtype)
            inputs = [randn(4, 7, 48, dtype=x_dtype, seed=seed) for seed in (2, 3)]
            wanted, y = stock(*inputs), twin(*inputs)
            assert y.dtype == wanted.dtype
            assert (y != wanted).float().mean() < 0.02 or error(y, wanted) < 1e-6


def test_gated_norm_calls():
    norm = GatedNorm()
    twin = patched(norm)
    x, gate = randn(3, 12), randn(3, 12, seed=1)

    def check(is_ours, *args, **kwargs):
        with tally_calls([twin]) as tally:
            torch.testing.assert_close(twin(*args, **kwargs), norm(*args, **kwargs))
        assert bool(tally.called) == is_ours

    check(True, x, gate)
    check(True, x, gate=gate)
    check(True, gate=gate, x=x)
    # No gate, one that is broadcast, fp64: the class's own.
    check(False, x)
    check(False, x, None)
    check(False, x, gate[:1])
    norm.double(), twin.double()
    check(False, x.double(), gate.double())
    for wrong in ({"no": gate}, {"gate": gate, "no": 1}):
        with pytest.raises(TypeError, match="unexpected keyword argument 'no'"):
            twin(x, **wrong)
    with pytest.raises(TypeError, match="gate"):
        twin(x, gate, gate=gate)


# Nemotron's layer norm casts its arguments under autocast, in a way of its own.
def test_shifted_layer_norm_under_autocast():
    norm = ShiftedLayerNorm(12)
    twin = patched(norm)
    with torch.autocast("cpu", torch.bfloat16), tally_calls([twin]) as tally:
        assert torch.equal(twin(randn(4, 12)), norm(randn(4, 12)))
    assert not tally.called


def attention(function):
    """Return an attention whose forward is a call of a rotary function."""

    class Attention(nn.Module):
        def forward(self, *args):
            return apply_rotary(*args)  # noqa: F821

    Attention.__module__ = function.__module__
    names = {"apply_rotary": function, "__name__": function.__module__}
    Attention.forward = types.FunctionType(Attention.forward.__code__, names)
    return Attention()


def half_tables(*shape):
    angles = randn(*shape, seed=5)
    return angles.cos(), angles.sin()


def full_tables(*shape):
    return tuple(torch.cat((t, t), -1) for t in half_tables(*shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("function", "shapes", "tables"),
    [
        (apply_rotary_backwards, [(2, 4, 5, 16), (2, 3, 5, 16)], full_tables(2, 5, 8)),
        (apply_rotary_last, [(2, 4, 5, 16)], half_tables(2, 5, 4)),
        (apply_rotary_last, [(2, 4, 5, 16)], half_tables(2, 5, 8)),
        (apply_rotary_sin_first, [(2, 5, 4, 16)], half_tables(2, 5, 8)[::-1]),
        (
            apply_rotary_of_two,
            [(2, 5, 4, 16)],
            tuple(torch.cat((t, 0.5 * t), -1) for t in full_tables(2, 5, 4)),
        ),
    ],
    ids=["backwards", "last", "last-of-whole-head", "sin-first", "inside"],
)
def test_rope(function, shapes, tables, dtype):
    module = attention(function)
    twin = patched(module, recognise_rope)
    inputs = [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]

    def turn(layer):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = layer(*leaves, *tables)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [randn(*y.shape, dtype=y.dtype, seed=7) for y in outputs]
        torch.autograd.backward(outputs, gradients)
        return [*(y.detach() for y in outputs), *(x.grad for x in leaves)]

    with tally_calls([twin]) as tally:
        ours = turn(twin)
    assert tally.called
    assert_same(ours, turn(module), dtype)


def test_a_hook_on_an_activation_is_called():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(config).train()
    apply_liger_kernel(model)
    seen = []
    act = model.model.layers[0].mlp.act_fn
    hook = act.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    ids = torch.arange(8)[None]
    loss = model(input_ids=ids, labels=ids).loss
    assert seen == [(1, 8, 24)]
    hook.remove()
    assert torch.equal(model(input_ids=ids, labels=ids).loss, loss)
    assert len(seen) == 1
