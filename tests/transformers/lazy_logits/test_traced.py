"""A patched model traced, exported or differentiated in forward mode: what stock gives."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
import zoo
from torch import nn
from torch.autograd import forward_ad

from liger_kernels.transformers import apply_liger_kernel

FAMILIES = ("llama", "gemma2", "glm4")


class Logits(nn.Module):
    """A model as a function of ids; layers are given to trace without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False, return_dict=True).logits


def _pair(family, **options):
    stock, ours = zoo.build(family, **options).eval(), zoo.build(family, **options).eval()
    apply_liger_kernel(ours, "all")
    return Logits(stock), Logits(ours), zoo.text_inputs()["input_ids"]


def _kinds(traced):
    """Return how many nodes of each kind a trace has."""
    return Counter(node.kind() for node in traced.inlined_graph.nodes())


# Case 214: a trace of the model holds for other ids too.
@pytest.mark.parametrize(
    ("family", "has_grad"), [("llama", True), ("llama", False), ("gemma2", True), ("glm4", False)]
)
def test_case_214_jit_trace(family, has_grad):
    stock, ours, ids = _pair(family, num_hidden_layers=1)
    with torch.set_grad_enabled(has_grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, (ids,), check_trace=False)
        stock_traced = torch.jit.trace(stock, (ids,), check_trace=False)
    for given in (ids, ids.flip(1)):
        torch.testing.assert_close(traced(given), stock_traced(given))
    # The legacy exporter of ONNX is given this graph, and knows no Python function.
    assert _kinds(traced) == _kinds(stock_traced)
    # The model runs its ops again afterwards.
    torch.testing.assert_close(ours(ids), stock(ids))


@pytest.mark.parametrize("is_strict", [True, False])
def test_case_214_export(is_strict):
    stock, ours, ids = _pair("llama", num_hidden_layers=1)
    with torch.no_grad():
        exported = torch.export.export(ours, (ids,), strict=is_strict).module()
        for given in (ids, ids.flip(1)):
            torch.testing.assert_close(exported(given), stock(given))


# Case 215: as under torch.func, the stock code runs.
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_case_215_forward_mode(family, is_training):
    # torch has no forward mode of its fused attention.
    stock, ours, ids = _pair(family, num_hidden_layers=1, attn_implementation="eager")
    found = []
    for model in (stock.model, ours.model):
        model.train(is_training)
        x = model.get_input_embeddings()(ids).detach()
        tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        with forward_ad.dual_level():
            out = model(inputs_embeds=forward_ad.make_dual(x, tangent), labels=ids)
            found.append([*forward_ad.unpack_dual(out.loss), *forward_ad.unpack_dual(out.logits)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_case_215_skip_logits_in_forward_mode():
    stock, ours, ids = _pair("llama")
    with forward_ad.dual_level():
        out = ours.model(input_ids=ids, labels=ids, skip_logits=True)
    assert out.logits is None
    torch.testing.assert_close(out.loss, stock.model(input_ids=ids, labels=ids).loss)
