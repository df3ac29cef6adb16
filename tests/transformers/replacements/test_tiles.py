"""Gated MLPs over pieces of tokens: the numbers of the whole MLP, and no wide tensor of all."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.replacements.tiles import tile_mlps

FAMILIES = ("llama", "gemma2", "phi3", "glm4", "qwen3_moe", "mllama")


class Widths(TorchDispatchMode):
    """The most rows that a tensor has which is as wide as the MLP's inside, or more."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] >= self.width:
                self.most = max(self.most, x.numel() // x.shape[-1])
        return result


def adapted(model, dropout: float = 0.0):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    # Both matrices are drawn, so that both have gradients.
    settings = LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False
    )
    return get_peft_model(model, settings)


def built(family: str, tile: int | None, *, lora: bool = False, **options):
    model = zoo.build(family).train()
    model = adapted(model, **options) if lora else model
    apply_liger_kernel(model, "auto")
    assert tile_mlps(model, tile) > 0
    return model


def step(model, checkpoints: bool = False, autocast: bool = False):
    """The loss of 22 tokens and its gradients."""
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**zoo.text_inputs(batch=2, length=11), use_cache=False).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_close(got, wanted, tolerance: float) -> None:
    assert abs(got[0] - wanted[0]) <= tolerance * abs(wanted[0])
    assert got[1].keys() == wanted[1].keys()
    largest = max(grad.norm() for grad in wanted[1].values())
    for name, grad in wanted[1].items():
        scale = max(grad.norm(), 1e-3 * largest)
        assert (got[1][name] - grad).norm() <= tolerance * scale, name


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_compute_what_the_whole_does(family, lora, checkpoints):
    if lora:
        pytest.importorskip("peft")
    wanted = step(built(family, None, lora=lora), checkpoints)
    # Pieces of 5 and a rest of 2.
    assert_close(step(built(family, 5, lora=lora), checkpoints), wanted, 2e-6)


def test_autocast_is_that_of_the_call():
    """Backward, which autocast has ended before, computes in bf16 as forward does."""
    whole, tiled = (step(built("llama", tile), autocast=True) for tile in (None, 5))
    assert_close(tiled, whole, 0.02)
    exact = step(built("llama", None))
    # Both are bf16's distance from fp32.
    assert (tiled[0] - exact[0]).abs() > 1e-7


def test_dropout_is_drawn_again():
    """With one seed the loss and the gradient of a step are a function of the parameters."""
    pytest.importorskip("peft")
    model = built("llama", 5, lora=True, dropout=0.5)
    first = step(model)
    first = first[0], {name: grad.clone() for name, grad in first[1].items()}
    model.zero_grad()
    # Inside a checkpoint the same draws come from another place.
    second = step(model, checkpoints=True)
    assert_close(second, first, 2e-6)
    name, parameter = next(x for x in model.named_parameters() if "down_proj.lora_B" in x[0])
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for sign in (1, -1):
        parameter.data.add_(sign * 1e-2 * direction)
        losses.append(step(model)[0])
        parameter.data.sub_(sign * 1e-2 * direction)
    slope = float(losses[0] - losses[1]) / 2e-2
    assert slope == pytest.approx(float((first[1][name] * direction).sum()), rel=0.02)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
def test_no_wide_tensor_of_all_rows(lora, checkpoints):
    if lora:
        pytest.importorskip("peft")
    most = []
    for tile in (None, 5):
        model = built("llama", tile, lora=lora)
        mlp = next(m for m in model.modules() if hasattr(m, "down_proj"))
        x = torch.randn(100, model.config.hidden_size, requires_grad=True)
        with Widths(model.config.intermediate_size) as widths:
            y = checkpoint(mlp, x, use_reentrant=False) if checkpoints else mlp(x)
            y.sum().backward()
        most.append(widths.most)
    assert most[0] == 100
    # The weight of down is as wide, and has a row for each number of the output.
    assert most[1] == model.config.hidden_size < 100


def test_evaluation_runs_in_pieces_too():
    whole, tiled = built("llama", None).eval(), built("llama", 5).eval()
    inputs = zoo.text_inputs(batch=2, length=11)
    with torch.no_grad():
        wanted, got = (model(**inputs).loss for model in (whole, tiled))
    assert torch.allclose(got, wanted, rtol=1e-6)


def test_a_parameter_that_changes_before_backward_is_refused():
    model = built("llama", 5)
    loss = model(**zoo.text_inputs(batch=2, length=11), use_cache=False).loss
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="parameter of an MLP has been modified"):
        loss.backward()


def test_two_differentiations_are_refused():
    model = built("llama", 5)
    loss = model(**zoo.text_inputs(batch=2, length=11), use_cache=False, skip_logits=False).loss
    weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(loss, weight, create_graph=True)


@pytest.mark.parametrize("num_pieces", [2, 40])
def test_many_pieces_are_summed_in_fp32(num_pieces):
    """Forty sums of bf16 would lose a third of their digits."""
    mlp = built("llama", None).model.layers[0].mlp.to(torch.bfloat16)
    width = mlp.gate_proj.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16 * num_pieces, width, generator=generator).bfloat16()
    dy = torch.randn(x.shape, generator=generator).bfloat16()
    errors = []
    for tile in (None, 16):
        tile_mlps(mlp, tile)
        mlp.zero_grad()
        mlp(x).backward(dy)
        got = mlp.down_proj.weight.grad.double()
        wide = mlp.double()
        wide.zero_grad()
        tile_mlps(wide, None)
        wide(x.double()).backward(dy.double())
        truth = wide.down_proj.weight.grad.clone()
        mlp.to(torch.bfloat16)
        errors.append((got - truth).norm() / truth.norm())
    assert errors[1] <= 1.5 * errors[0]
