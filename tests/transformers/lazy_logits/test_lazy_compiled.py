"""Deferred logits under torch.compile."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from lazy_models import (
    FUSED,
    VOCAB,
    assert_loss_is_stock,
    assert_same,
    make,
    make_inputs,
    step,
    was_made,
)
from torch import Tensor

from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers.lazy_logits.head import install_head, num_fused
from liger_kernels.transformers.lazy_logits.tensor import LazyLogits

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")


# torch.compile.

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


_EXPERTS_TRACE = pytest.mark.skipif(
    _VERSION < (5, 24), reason="the loop over experts of this transformers cannot be traced"
)


@pytest.fixture
def compiled() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        pytest.param("mixtral", marks=_EXPERTS_TRACE),
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "granite", "qwen3")),
    ],
)
def test_compile(family: str, compiled: Any) -> None:
    # transformers' own router-logits hooks take a lock when first called, which cannot be traced.
    settings = {"output_router_logits": False} if family == "mixtral" else {}
    model = make(family, **settings)
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    run = compiled(model)
    for count in range(3):
        ours = step(run, **make_inputs())
        named = {n.removeprefix("_orig_mod."): g for n, g in ours[1].items()}
        assert_same((ours[0], named), stock)
        assert ours[2].logits is None
        assert num_fused(model.lm_head) == count + 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["nll", "gather", "parts"])
def test_compiled_losses_of_other_people_make_no_logits(pattern: str, compiled: Any) -> None:
    model = make("gemma2")

    def loss_function(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        at = labels.clamp(min=0)[..., None]
        if pattern == "nll":
            return F.nll_loss(logits.float().log_softmax(-1).view(-1, VOCAB), labels.view(-1))
        if pattern == "gather":
            return -logits.log_softmax(-1).gather(-1, at).mean() + logits.detach()[0].mean()
        return (torch.gather(logits, -1, at).squeeze(-1) - logits.logsumexp(-1)).square().mean()

    model.loss_function = loss_function
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    run = compiled(model)
    ours = step(run, **make_inputs())
    assert_same((ours[0], {n.removeprefix("_orig_mod."): g for n, g in ours[1].items()}), stock)
    assert num_fused(model.lm_head) == 1


def test_compile_makes_logits_for_other_losses(compiled: Any) -> None:
    model = make()

    def loss_function(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        # An unrecorded use, and a change in place that later uses of the same name must see.
        logits[..., :3] = -50.0
        return logits.logsumexp(-1).mean() + F.cross_entropy(
            logits.view(-1, VOCAB), labels.reshape(-1)
        )

    model.loss_function = loss_function
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    ours = step(compiled(model), **make_inputs())
    named = {n.removeprefix("_orig_mod."): g for n, g in ours[1].items()}
    assert_same((ours[0], named), stock)
    assert num_fused(model.lm_head) == 0


def test_compile_in_pieces(compiled: Any) -> None:
    model = make()
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    # What cannot be traced as a whole runs as in eager code, around compiled pieces.
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    ours = step(compiled(model, fullgraph=False), **make_inputs())
    named = {n.removeprefix("_orig_mod."): g for n, g in ours[1].items()}
    assert_same((ours[0], named), stock)
    assert isinstance(ours[2].logits, LazyLogits)
    assert not was_made(ours[2].logits)


def test_compiled_loss_on_lazy_logits(compiled: Any) -> None:
    assert_loss_is_stock(
        compiled(lambda x, y: F.cross_entropy(x.view(-1, VOCAB) * 2.0, y.view(-1)), fullgraph=False)
    )
