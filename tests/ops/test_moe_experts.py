"""moe_experts alone: routing, products of groups, what is kept, and no wait for the device."""

from __future__ import annotations

import pytest
import torch

from liger_kernels.compare import error
from liger_kernels.ops import moe_activation, moe_experts
from liger_kernels.ops.backend import runs_triton
from liger_kernels.ops.grouped_products import grouped_outer, grouped_product
from liger_kernels.ops.moe_experts import moe_experts_ref
from liger_kernels.ops.moe_routing import route
from liger_kernels.ops.registry import OPS

# Tokens, choices, experts, the ids that occur.
ROUTINGS = {
    "some": (13, 2, 5, (0, 5)),
    "one": (1, 1, 1, (0, 1)),
    "blocks": (45, 4, 7, (0, 7)),
    "idle": (30, 2, 40, (7, 19)),
    "empty-slots": (30, 3, 4, (-3, 9)),
    "all-empty": (9, 2, 4, (4, 5)),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_slots_are_sorted_by_expert_in_their_order(name, device):
    num_tokens, top_k, num_experts, (first, last) = ROUTINGS[name]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(first, last, (num_tokens, top_k), generator=generator).to(device)
    routing = route(ids, num_experts, triton_runs=runs_triton(torch.empty(0, device=device)))
    flat = ids.flatten().tolist()
    slots = [slot for e in range(num_experts) for slot, found in enumerate(flat) if found == e]
    counts = torch.tensor([flat.count(e) for e in range(num_experts)])
    assert routing.offsets.tolist() == counts.cumsum(0).tolist()
    assert routing.slots[: len(slots)].tolist() == slots
    places = {slot: row for row, slot in enumerate(slots)}
    assert routing.rows.flatten().tolist() == [places.get(i, -1) for i in range(len(flat))]


# Widths, and where each group ends; the last rows belong to none.
GROUPS = {
    "groups": (24, 40, (5, 5, 22, 22, 30)),
    "odd": (33, 7, (3, 4, 20)),
    "one": (16, 16, (25,)),
    # torch's product of such bf16 rows would be padded.
    "padded": (16, 12, (4, 9, 30)),
    "no-rows": (16, 8, (0, 0, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("name", GROUPS)
def test_products_of_groups(name, is_transposed, dtype, device):
    inner, width, ends = GROUPS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, inner, generator=generator).to(device, dtype)
    y = torch.randn(30, width, generator=generator).to(device, dtype)
    weight = torch.randn(len(ends), inner, width, generator=generator).to(device, dtype)
    if is_transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    products = grouped_product(x, weight, offsets)
    outers = grouped_outer(x, y, offsets)
    assert products.is_contiguous()
    assert outers.is_contiguous()
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    for group, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        wanted = x[start:end].double() @ weight[group].double()
        assert error(products[start:end], wanted) < tolerance, group
        wanted = x[start:end].double().t() @ y[start:end].double()
        assert error(outers[group], wanted) < tolerance, group


def sample(device, dtype=torch.float32, **options):
    case = next(case for case in OPS["moe_experts"].cases if case.id == "tiny")
    generator = torch.Generator().manual_seed(0)
    found = OPS["moe_experts"].sample(case, dtype, device, generator)
    return (*found.args,), {**found.kwargs, **options}


def test_what_is_kept_for_backward(device):
    args, _ = sample(device)
    num_tokens, width, inner, _, top_k = (6, 16, 8, 4, 2)
    own = {x.untyped_storage().data_ptr() for x in args}
    kept = {}
    for keeps in (False, True):
        sizes = []

        def pack(x, sizes=sizes):
            if x.is_floating_point() and x.untyped_storage().data_ptr() not in own:
                sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            moe_experts(*args, keeps_products=keeps)
        kept[keeps] = sum(sizes)
    assert kept[False] == num_tokens * top_k * 2 * inner
    assert kept[True] == num_tokens * top_k * (2 * inner + width + inner)


def test_gradients_are_laid_out_as_their_weights(device):
    (hidden, weights, ids, gate_up, down), _ = sample(device)
    for transposes in (False, True):
        stored = [w.detach().transpose(1, 2).contiguous() if transposes else w.detach().clone()
                  for w in (gate_up, down)]  # fmt: skip
        leaves = [w.requires_grad_() for w in stored]
        views = [w.transpose(1, 2) if transposes else w for w in leaves]
        moe_experts(hidden, weights, ids, *views).sum().backward()
        assert all(w.grad.stride() == w.stride() for w in leaves)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("trained", range(5))
def test_gradients_where_they_are_asked_for_alone(trained, weight_on, device):
    args, options = sample(device, weight_on=weight_on)
    if trained == 2:
        # Ids have no gradient: all else has.
        names = [0, 1, 3, 4]
    else:
        names = [trained]
    found = {}
    for function in (moe_experts, moe_experts_ref):
        given = [x.detach().clone() for x in args]
        for i in names:
            given[i].requires_grad_()
        function(*given, **options).square().sum().backward()
        found[function] = [x.grad for x in given]
    for i, (ours, wanted) in enumerate(zip(*found.values(), strict=True)):
        assert (ours is None) == (wanted is None) == (i not in names)
        assert ours is None or error(ours, wanted) < 1e-5


# Tiles of GPUs, by inner width, of which the interpreter has others.
@pytest.mark.parametrize("tile", [(4, 256, 4), (1, 1024, 4), (1, 1024, 8), (4, 4, 4)])
def test_tiles_of_the_activation(tile, monkeypatch, device):
    if not runs_triton(torch.empty(0, device=device)):
        pytest.skip("torch code has no tiles")
    for name in ("_FWD_TILES", "_BWD_TILES"):
        monkeypatch.setattr(moe_activation, name, ((0, tile),))
    args, _ = sample(device)
    found = []
    for function in (moe_experts, moe_experts_ref):
        given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in args]
        y = function(*given)
        y.square().sum().backward()
        found.append([y, *(x.grad for x in given if x.requires_grad)])
    for ours, wanted in zip(*found, strict=True):
        assert error(ours, wanted) < 1e-5


def test_repeated_experts_of_a_token(device):
    args, _ = sample(device)
    ids = torch.full_like(args[2], 3)
    found = []
    for function in (moe_experts, moe_experts_ref):
        given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in args]
        given[2] = ids
        y = function(*given)
        y.square().sum().backward()
        found.append([y, *(x.grad for x in given if x.requires_grad)])
    for ours, wanted in zip(*found, strict=True):
        assert error(ours, wanted) < 1e-5


def test_a_tracer_gets_the_same(true_allocators, device):
    if device.type != "cpu" or runs_triton(torch.zeros(1)):
        pytest.skip("torch code, which Triton's kernels replace here")
    for options in ({}, {"weight_on": "input"}):
        args, _ = sample(device)
        found = []
        torch._dynamo.reset()
        compiled = torch.compile(moe_experts, backend="eager", fullgraph=True)
        for function in (moe_experts, compiled):
            given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in args]
            y = function(*given, **options)
            y.square().sum().backward()
            found.append([y, *(x.grad for x in given if x.requires_grad)])
        for ours, wanted in zip(*found, strict=True):
            assert error(ours, wanted) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_without_a_break(dtype, device, true_allocators):
    case = next(case for case in OPS["moe_experts"].cases if case.id == "gpt-oss")
    found = OPS["moe_experts"].sample(case, dtype, device, torch.Generator().manual_seed(0))
    values = (*found.args, *found.kwargs.values())
    leaves = [x for x in values if isinstance(x, torch.Tensor) and x.requires_grad]
    torch._dynamo.reset()
    steps = []
    for function in (moe_experts, torch.compile(moe_experts, fullgraph=True)):
        y = function(*found.args, **found.kwargs)
        grads = torch.autograd.grad(y.square().sum(), leaves)
        steps.append([y.detach(), *grads])
    for wanted, ours in zip(*steps, strict=True):
        assert error(ours, wanted) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nothing_waits_for_the_device(dtype, device, true_allocators):
    args, options = sample(device, dtype)
    moe_experts(*args, **options).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_experts(*args, **options).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_captured_graph_follows_the_ids(dtype, device, true_allocators):
    args, options = sample(device, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            moe_experts(*args, **options).sum().backward()
            for x in args:
                x.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe_experts(*args, **options)
        y.sum().backward()
    for expert in (0, 3):
        args[2].fill_(expert)
        graph.replay()
        given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in args]
        wanted = moe_experts(*given, **options)
        wanted.sum().backward()
        assert torch.equal(y, wanted)
        for ours, other in zip(args, given, strict=True):
            assert other.grad is None or torch.equal(ours.grad, other.grad)
