"""liger_kernel.ops and the loss of hidden states: what they compute is what torch computes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from liger_kernels.compat import functions
from liger_kernels.ops.backend import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.skipif(
        "liger_kernel" in sys.modules or importlib.util.find_spec("liger_kernel") is not None,
        reason="the original liger_kernel is installed; the drop-in refuses then",
    ),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_equal(ours: Any, stock: Any, *inputs: Tensor) -> None:
    """Compare the outputs, and the gradients of their squares' sum."""
    ours, stock = (x if isinstance(x, tuple) else (x,) for x in (ours, stock))
    sides = []
    for outputs in (ours, stock):
        total = sum(x.square().sum() for x in outputs)
        sides.append((*outputs, *torch.autograd.grad(total, inputs)))
    torch.testing.assert_close(sides[0], sides[1], rtol=2e-5, atol=2e-5)


A, B, W = randn(3, 8), randn(3, 8, seed=1), randn(8, seed=2)
# name: (positional arguments of apply, the same by torch, what has a gradient)
CASES: dict[str, tuple[tuple[Any, ...], Any, tuple[Tensor, ...]]] = {
    "LigerRMSNormFunction": (
        (A, W, 1e-5, 1.0, "gemma", False),
        lambda: F.rms_norm(A, (8,), W + 1.0, 1e-5),
        (A, W),
    ),
    "LigerFusedAddRMSNormFunction": (
        (A, B, W, 1e-5, 0.0, "llama", False),
        lambda: (F.rms_norm(A + B, (8,), W, 1e-5), A + B),
        (A, B, W),
    ),
    "LigerLayerNormFunction": (
        (A, W, W, 1e-5),
        lambda: F.layer_norm(A, (8,), W, W, 1e-5),
        (A, W),
    ),
    "LigerSiLUMulFunction": ((A, B), lambda: F.silu(A) * B, (A, B)),
    "LigerGELUMulFunction": ((A, B), lambda: F.gelu(A, approximate="tanh") * B, (A, B)),
}


@pytest.mark.parametrize("name", CASES)
def test_function_of_ops(name, alias):
    ops = importlib.import_module("liger_kernel.ops")
    arguments, stock, inputs = CASES[name]
    assert_equal(getattr(ops, name).apply(*arguments), stock(), *inputs)


def test_rope_of_ops(alias):
    rope = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction
    q, k, angles = randn(2, 4, 6, 8), randn(2, 2, 6, 8, seed=1), randn(2, 6, 8, seed=3).detach()
    # Both halves have the same angles, as transformers' tables do.
    angles = angles[..., :4].repeat(1, 1, 2)
    tables = angles.cos(), angles.sin()
    assert_equal(rope.apply(q, k, *tables, None, 1), apply_rotary_pos_emb(q, k, *tables), q, k)


def test_ops_has_these_functions_and_no_others(alias):
    ops = importlib.import_module("liger_kernel.ops")
    of_losses = {"LigerCrossEntropyFunction", "LigerFusedLinearCrossEntropyFunction"}
    assert set(ops.__all__) == {*CASES, *of_losses, "LigerRopeFunction"} == set(functions.__all__)
    # A permission that is not used: the same values, and no tensor is written to.
    before = A.detach().clone()
    ours = ops.LigerFusedAddRMSNormFunction.apply(A, B, W, 1e-5, 0.0, "llama", True)
    assert_equal(ours, CASES["LigerFusedAddRMSNormFunction"][1](), A, B, W)
    assert torch.equal(A, before)
    with pytest.raises(ImportError, match="LigerKLDivLossFunction"):
        exec("from liger_kernel.ops import LigerKLDivLossFunction")


LABELS = torch.tensor([[3, 4, -100, 0, 10], [7, -100, 9, 1, 2]])
LOSSES: dict[str, dict[str, Any]] = {
    "labels": {},
    "items": {"num_items_in_batch": torch.tensor(5)},
    "shifted": {"shift_labels": LABELS.roll(-1, 1)},
    "softcap": {"final_logit_softcapping": 2.0},
    "ignored": {"ignore_index": 4},
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_a_causal_model(name, alias):
    loss_utils = importlib.import_module("liger_kernel.transformers.model.loss_utils")
    options = LOSSES[name]
    labels = LABELS.abs() % 11 if name == "ignored" else LABELS
    hidden, head = randn(2, 5, 6), randn(11, 6, seed=1)
    ours = loss_utils.LigerForCausalLMLoss(
        hidden_states=hidden, lm_head_weight=head, labels=labels, hidden_size=6, **options
    )
    logits = hidden @ head.T
    cap = options.get("final_logit_softcapping")
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    rest = {k: v for k, v in options.items() if k != "final_logit_softcapping"}
    assert_equal(ours, ForCausalLMLoss(logits, labels, vocab_size=11, **rest), hidden, head)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_size": 4}, "chunk_size=4"),
        ({"accum_dtype": torch.float32}, "accum_dtype=torch.float32"),
        ({"hidden_size": 7}, "hidden_size must be the width of hidden_states, 6, got 7"),
        ({"labels": None}, "needs labels or shift_labels"),
    ],
)
def test_what_the_loss_does_not_take_is_named(change, words):
    options: dict[str, Any] = {"labels": LABELS, "hidden_size": 6, **change}
    with pytest.raises(ValueError, match=words):
        functions.LigerForCausalLMLoss(randn(2, 5, 6), randn(11, 6), **options)
