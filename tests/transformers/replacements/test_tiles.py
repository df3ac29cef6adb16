"""Gated MLPs over pieces of tokens: the numbers of the whole MLP, and no wide tensor of all."""

from __future__ import annotations

import pytest
import test_expert_lists
import torch
import zoo
from checks import assert_same, run
from test_experts import build as build_experts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.replacements.tiles import tile_modules

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
    assert tile_modules(model, tile) > 0
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
        tile_modules(mlp, tile)
        mlp.zero_grad()
        mlp(x).backward(dy)
        got = mlp.down_proj.weight.grad.double()
        wide = mlp.double()
        wide.zero_grad()
        tile_modules(wide, None)
        wide(x.double()).backward(dy.double())
        truth = wide.down_proj.weight.grad.clone()
        mlp.to(torch.bfloat16)
        errors.append((got - truth).norm() / truth.norm())
    assert errors[1] <= 1.5 * errors[0]


# Products ---------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the multiplications of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "baddbmm", "bmm"):
            a, b = args[-2:]
            self.count += a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


def products(module, x, *, checkpoints: bool) -> int:
    """The multiplications of a step of a module."""
    with Products() as counted:
        y = checkpoint(module, x, use_reentrant=False) if checkpoints else module(x)
        y.sum().backward()
    return counted.count


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_last_product_is_not_recomputed(family, checkpoints, autocast):
    """Three products in forward, two of them once more, and six in backward."""
    mlp = next(m for m in built(family, 5).modules() if hasattr(m, "down_proj"))
    width, inner = mlp.down_proj.weight.shape
    x = torch.randn(23, width, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert products(mlp, x, checkpoints=checkpoints) == 11 * 23 * width * inner


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["gate_proj"]], ids=str)
def test_the_last_product_is_not_recomputed_beside_adapters(targets, checkpoints):
    """As many as a checkpoint takes, which stops before it."""
    peft = pytest.importorskip("peft")
    found = []
    for tile in (None, 5):
        model = zoo.build("llama").train()
        settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, settings)
        apply_liger_kernel(model, "auto")
        tile_modules(model, tile)
        mlp = model.base_model.model.model.layers[0].mlp
        x = torch.randn(23, model.config.hidden_size, requires_grad=True)
        found.append(products(mlp, x, checkpoints=checkpoints or tile is None))
    assert found[0] == found[1]
    assert found[0] >= 8 * 23 * model.config.hidden_size * model.config.intermediate_size


# Experts ----------------------------------------------------------------------------------------


@pytest.fixture(params=["gpt_oss", "qwen2_moe", "olmoe"])
def experts_family(request):
    if not zoo.IS_V5:
        pytest.skip("version 4 has one MLP an expert")
    return request.param


def experts_step(family: str, tile: int | None, checkpoints: bool, **options):
    model = build_experts(family)
    record = apply_liger_kernel(model, "auto", **options)
    assert record.coverage["moe_experts"]["patched"] == 2
    tile_modules(model, tile)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (2, 11), generator=generator)
    with record.count_calls():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert not record.unused
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
def test_experts_in_tiles_compute_what_the_whole_do(experts_family, checkpoints):
    """Their weights, biases and router too; the pieces are of 5 tokens and a rest of 2."""
    wanted = experts_step(experts_family, None, checkpoints)
    assert_close(experts_step(experts_family, 5, checkpoints), wanted, 2e-6)


def test_experts_that_keep_their_products_do_too():
    if not zoo.IS_V5:
        pytest.skip("version 4 has one MLP an expert")
    wanted = experts_step("olmoe", None, False, save_memory=False)
    assert_close(experts_step("olmoe", 5, False, save_memory=False), wanted, 2e-6)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
def test_no_wide_tensor_of_all_choices(experts_family, checkpoints):
    """Nor is the last product of experts computed once more."""
    model = build_experts(experts_family)
    apply_liger_kernel(model, "auto")
    experts = model.model.layers[0].mlp.experts
    num_experts, width, inner = sorted_sizes(experts)
    x = torch.randn(100, width, requires_grad=True)
    ids = torch.rand(100, num_experts).argsort(1)[:, :2]
    weights = torch.rand(100, 2, requires_grad=True)
    found = []
    for tile in (None, 5):
        tile_modules(model, tile)
        with Widths(2 * inner) as widths, Products() as counted:
            args = (x, ids, weights)
            is_inside = checkpoints and tile is not None
            y = checkpoint(experts, *args, use_reentrant=False) if is_inside else experts(*args)
            y.sum().backward()
        found.append((widths.most, counted.count))
    assert found[0][0] == 200
    # Weights are as wide, with a row for each number of the output of each expert.
    assert found[1][0] <= num_experts * width < 200
    assert found[1][1] == found[0][1] + 2 * 200 * width * inner


def sorted_sizes(experts) -> tuple[int, int, int]:
    """Experts, width and inner width."""
    num_experts, *sizes = experts.gate_up_proj.shape
    width = experts.down_proj.numel() // (num_experts * max(sizes) // 2)
    return num_experts, width, experts.gate_up_proj.numel() // (2 * num_experts * width)


def test_experts_of_llama4_run_in_tiles():
    """Whose blocks give each expert the token times its score, and have a shared MLP."""
    if not zoo.IS_V5:
        pytest.skip("version 4 has other blocks")
    found = []
    for tile in (None, 5):
        model = zoo.build("llama4").train()
        record = apply_liger_kernel(model, "auto")
        assert record.coverage["moe_experts"]["patched"] > 0
        tile_modules(model, tile)
        loss = model(**zoo.text_inputs(batch=2, length=11), use_cache=False).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    assert_close(found[1], found[0], 2e-6)


def test_adapters_of_experts_have_their_gradients():
    """peft adds their product to the weights while the forward runs, and backward is later."""
    peft = pytest.importorskip("peft")
    if not zoo.IS_V5 or "target_parameters" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("no adapters of parameters")
    found = []
    for tile in (None, 5):
        settings = peft.LoraConfig(
            r=4,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        )
        torch.manual_seed(3)
        model = peft.get_peft_model(build_experts("olmoe"), settings)
        apply_liger_kernel(model, "auto")
        tile_modules(model, tile)
        ids = torch.arange(3, 25).view(2, 11)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert sum("experts" in name for name in grads) >= 4
        found.append((loss.detach(), grads))
    assert_close(found[1], found[0], 2e-6)


@pytest.mark.parametrize("form", ["shared-gated", "calls-all", "method"])
def test_lists_of_experts_run_in_tiles(form):
    block, options = test_expert_lists.FORMS[form]
    found = []
    for tile in (None, 7):
        model = test_expert_lists.build(block, **options)
        record = apply_liger_kernel(model, "all")
        assert tile_modules(model, tile) >= 2
        with record.count_calls(), Widths(2 * test_expert_lists.INNER) as widths:
            result = run(model, test_expert_lists.inputs(50))
        assert not record.unused
        found.append((result, widths.most))
    assert_same(found[1][0], found[0][0])
    # Weights are as wide: 16 rows for each of four experts.
    assert found[1][1] == 64 < 200 <= found[0][1]
