"""Groups of LoRA layers and whole gated MLPs: as the layers one after another, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from liger_kernels.compare import allowed_error, error
from liger_kernels.ops import backend, lora_linear, magnitude
from liger_kernels.ops.adapted_linear import AdaptedLinear
from liger_kernels.ops.lora_linear import lora_linears
from liger_kernels.ops.lora_mlp import lora_mlp
from liger_kernels.ops.packed_weight import PackedFormat

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CASES = [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)]
each_dtype = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), CASES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def layer(
    width, out, rank, dtype, device, *, adapter=FP32, bias=False, dora=False, seed=0, **settings
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, to=dtype):
        return torch.randn(shape, generator=generator).mul(shape[-1] ** -0.5).to(device, to)

    weight = normal(out, width)
    offset = normal(out).requires_grad_() if bias else None
    if not rank:
        return AdaptedLinear(weight, offset)
    a, b = normal(rank, width, to=adapter), normal(out, rank, to=adapter)
    magnitude = normal(out, to=adapter).requires_grad_() if dora else None
    return AdaptedLinear(
        weight, offset, a.requires_grad_(), b.requires_grad_(), magnitude, **settings
    )


def to_dtype(one: AdaptedLinear, dtype, adapter=None) -> AdaptedLinear:
    """A copy as leaves, in another dtype."""
    if one.dropout_dtype is not None and dtype == FP64:
        one = one._replace(dropout_dtype=FP64)
    to = dict.fromkeys(("a", "b", "magnitude"), adapter or dtype)
    to |= {"weight": dtype, "bias": dtype}
    copies = {
        name: None
        if (x := getattr(one, name)) is None
        else x.detach().to(kind).requires_grad_(x.requires_grad)
        for name, kind in to.items()
    }
    return one._replace(**copies)


def plain(x, one: AdaptedLinear):
    """A layer as peft computes it under autocast: every activation in x's dtype."""
    y = F.linear(x, one.weight, one.bias)
    if one.a is None:
        return y
    dropped = x
    if one.dropout:
        dropped = F.dropout(x.to(one.dropout_dtype or x.dtype), one.dropout).to(x.dtype)
    xa = F.linear(dropped, one.a.to(x.dtype))
    added = F.linear(xa, one.b.to(x.dtype)) * one.scale
    if one.magnitude is None:
        return y + added
    # As peft: the norm is a constant, and with dropout the adapter has a product of the base layer.
    directions = one.weight + one.scale * (one.b @ one.a).detach()
    factors = one.magnitude / torch.linalg.norm(directions, dim=1)
    base = F.linear(dropped, one.weight)
    return (y + (factors - 1) * base + factors * added).to(x.dtype)


def plain_mlp(x, layers, activation):
    *heads, down = layers
    ys = [plain(x, one) for one in heads]
    gate, up = ys if len(ys) == 2 else ys[0].chunk(2, -1)
    act = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    }[activation]
    return plain(act(gate) * up, down)


def results(function, x, layers, dys) -> dict[str, torch.Tensor]:
    """Outputs, and the gradient of everything that has one."""
    leaves = {"x": x, **named(layers)}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    torch.manual_seed(5)
    ys = function(x, layers)
    ys = ys if isinstance(ys, tuple | list) else [ys]
    after = torch.rand(3)
    outputs = [y for y, dy in zip(ys, dys, strict=True) if dy is not None]
    grads = [dy.to(y.dtype) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    # Backward draws the masks again, and leaves the generator as it was.
    torch.manual_seed(5)
    function(x, layers)
    assert torch.equal(torch.rand(3), after)
    return {
        **{f"output {i}": y.detach() for i, y in enumerate(ys)},
        **{f"gradient of {k}": g for k, g in zip(leaves, found, strict=True)},
    }


def named(layers):
    return {
        f"{name} {i}": x
        for i, one in enumerate(layers)
        for name in ("bias", "a", "b", "magnitude")
        if (x := getattr(one, name)) is not None
    }


def assert_no_worse(ours, eager, x, layers, dys, *, times: float = 2.0) -> None:
    """Within twice the error of eager code of the same dtypes, in every output and gradient."""
    dtype = x.dtype
    wide = [to_dtype(one, FP64) for one in layers]
    truth = results(eager, x.detach().double().requires_grad_(x.requires_grad), wide, dys)
    usual = results(eager, x, layers, dys)
    mine = results(ours, x, layers, dys)
    assert mine.keys() == usual.keys()
    for name, value in mine.items():
        if usual[name] is None:
            assert value is None or not value.any(), name
            continue
        assert (value.dtype, value.shape) == (usual[name].dtype, usual[name].shape), name
        limit = allowed_error(error(usual[name], truth[name]), dtype, x.device, times)
        assert error(value, truth[name]) <= limit, name


def draw(rows, width, dtype, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((*rows, width), generator=generator).to(device, dtype)


# Forms of q, k and v: one rank, several, a layer without an adapter, a bias, several scales.
GROUPS = {
    "alike": [(32, 8, {}), (16, 8, {}), (16, 8, {})],
    "ranks": [(32, 3, {"scale": 2.0}), (16, 12, {"scale": 0.5}), (16, 1, {"scale": 16.0})],
    "part": [(32, 4, {}), (16, 0, {}), (16, 4, {})],
    "bias": [(32, 4, {"bias": True}), (16, 0, {"bias": True}), (16, 4, {})],
    "dropout": [(32, 4, {"dropout": 0.3}), (16, 4, {"dropout": 0.3}), (16, 4, {"scale": 2.0})],
    "alone": [(32, 4, {"dropout": 0.5, "bias": True})],
    "dora": [(32, 4, {"dora": True, "bias": True}), (16, 2, {"scale": 2.0}), (16, 0, {})],
    "dora-dropout": [
        (32, 4, {"dora": True, "dropout": 0.3, "bias": True}),
        (16, 4, {"dora": True, "scale": 2.0}),
        (16, 4, {"dora": True, "dropout": 0.5}),
    ],
}


@each_dtype
@pytest.mark.parametrize("form", GROUPS)
def test_group_is_its_layers_one_after_another(form, dtype, adapter_dtype, device):
    layers = [
        layer(24, out, rank, dtype, device, adapter=adapter_dtype, seed=i, **settings)
        for i, (out, rank, settings) in enumerate(GROUPS[form])
    ]
    x = draw((2, 5), 24, dtype, device).requires_grad_()
    dys = [draw((2, 5), one.weight.shape[0], FP32, device, 7) for one in layers]

    def ours(x, layers):
        return lora_linears(x, layers, x.dtype)

    def eager(x, layers):
        return [plain(x, one) for one in layers]

    assert_no_worse(ours, eager, x, layers, dys)
    # v is not read: its gradient is none, and the others' are what they were.
    assert_no_worse(ours, eager, x, layers, [*dys[:-1], None] if len(dys) > 1 else dys)


# A gated MLP: widths, activation, and the ranks and settings of gate, up and down.
MLPS = {
    "silu": ("silu", [(4, {}), (4, {}), (4, {})]),
    "gelu": ("gelu", [(4, {"scale": 2.0}), (2, {}), (3, {"scale": 0.5})]),
    "gelu_tanh": ("gelu_tanh", [(4, {"bias": True}), (4, {}), (4, {"bias": True})]),
    "fused": ("silu", [(4, {"scale": 2.0}), (4, {})]),
    "gate": ("silu", [(4, {}), (0, {}), (0, {})]),
    "down": ("silu", [(0, {}), (0, {}), (4, {})]),
    "dropout": ("silu", [(4, {"dropout": 0.2}), (4, {"dropout": 0.4}), (4, {"dropout": 0.2})]),
    "fused-dropout": ("gelu_tanh", [(4, {"dropout": 0.2}), (4, {"dropout": 0.2})]),
}


def mlp_layers(form, dtype, device, **options):
    activation, forms = MLPS[form]
    width, inner = 16, 24
    outs = [inner, inner, width] if len(forms) == 3 else [2 * inner, width]
    layers = [
        layer(
            inner if i == len(forms) - 1 else width,
            outs[i],
            rank,
            dtype,
            device,
            seed=i,
            **settings,
            **options,
        )
        for i, (rank, settings) in enumerate(forms)
    ]
    return activation, layers


@each_dtype
@pytest.mark.parametrize("needs_dx", [True, False], ids=["dx", "no-dx"])
@pytest.mark.parametrize("form", MLPS)
def test_mlp_is_its_layers_one_after_another(form, needs_dx, dtype, adapter_dtype, device):
    activation, layers = mlp_layers(form, dtype, device, adapter=adapter_dtype)
    x = draw((2, 5), 16, dtype, device).requires_grad_(needs_dx)
    dys = [draw((2, 5), 16, FP32, device, 7)]
    assert_no_worse(
        lambda x, layers: lora_mlp(x, layers, activation, x.dtype),
        lambda x, layers: plain_mlp(x, layers, activation),
        x,
        layers,
        dys,
    )


@pytest.mark.parametrize("rank", [1, 2, 16, 64, 512])
@pytest.mark.parametrize("form", ["silu", "fused"])
def test_mlp_of_any_rank(form, rank, device):
    activation, forms = MLPS[form]
    outs = [24, 24, 16] if len(forms) == 3 else [48, 16]
    layers = [
        layer(24 if i == len(forms) - 1 else 16, out, rank, FP32, device, seed=i)
        for i, out in enumerate(outs)
    ]
    assert_no_worse(
        lambda x, layers: lora_mlp(x, layers, activation, x.dtype),
        lambda x, layers: plain_mlp(x, layers, activation),
        draw((3,), 16, FP32, device).requires_grad_(),
        layers,
        [draw((3,), 16, FP32, device, 7)],
    )


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_matrix_that_is_not_trained_gets_no_gradient(frozen, device):
    layers = [layer(24, 16, 4, FP32, device, seed=i) for i in range(2)]
    getattr(layers[0], frozen).requires_grad_(False)
    x = draw((5,), 24, FP32, device)
    y, z = lora_linears(x, layers, FP32)
    (y.sum() + z.sum()).backward()
    assert getattr(layers[0], frozen).grad is None
    wanted = [to_dtype(one, FP32) for one in layers]
    sum(plain(x, one).sum() for one in wanted).backward()
    for mine, other in zip(named(layers).values(), named(wanted).values(), strict=True):
        if mine.requires_grad:
            assert error(mine.grad, other.grad) < 2e-6


def saved_bytes(function) -> int:
    """Bytes of the storages that autograd keeps of one call, each once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(kept.values())


def test_group_keeps_x_once_and_the_small_products(device):
    layers = [layer(32, 16, 4, BF16, device, seed=i) for i in range(3)]
    x = draw((64,), 32, BF16, device).requires_grad_()
    kept = saved_bytes(lambda: lora_linears(x, layers, BF16))
    assert kept == x.nbytes + 64 * 3 * 4 * 2


def test_a_magnitude_keeps_one_output_and_its_norms(device):
    one = layer(32, 16, 4, BF16, device, dora=True)
    x = draw((64,), 32, BF16, device).requires_grad_()
    kept = saved_bytes(lambda: lora_linears(x, [one], BF16))
    assert kept == x.nbytes + 64 * 4 * 2 + 64 * 16 * 2 + 16 * 4


@pytest.mark.parametrize(
    ("as_mlp", "name"),
    [(False, "weight"), (False, "a"), (False, "magnitude"), (True, "weight"), (True, "b")],
)
def test_a_tensor_that_is_changed_before_backward_is_an_error(as_mlp, name, device):
    """As with torch's own layers, whose saved tensors autograd looks after."""
    activation, layers = mlp_layers("silu", FP32, device)
    if name == "magnitude":
        layers = [layer(16, 16, 4, FP32, device, dora=True)] * 3
    x = draw((3,), 16, FP32, device).requires_grad_()
    y = lora_mlp(x, layers, activation, FP32) if as_mlp else lora_linears(x, layers[:1], FP32)[0]
    y.sum().backward(retain_graph=True)
    with torch.no_grad():
        getattr(layers[0], name).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_norms_by_chunks_of_rows_are_those_of_the_whole(dtype, device, monkeypatch):
    one = layer(24, 33, 4, dtype, device)
    wanted = torch.linalg.norm(one.weight.double() + 2.0 * (one.b @ one.a).double(), dim=1)
    # Five rows at a time, and the last chunk has fewer.
    monkeypatch.setattr(magnitude, "_CHUNK", 24 * 5)
    norms = magnitude.direction_norms(one.weight, one.a, one.b, 2.0)
    assert error(norms, wanted) < 1e-6
    dy, z = draw((7,), 33, dtype, device), draw((7,), 33, dtype, device, 2)
    sums = magnitude.factor_gradients(dy, z)
    assert error(sums, (dy.double() * z.double()).sum(0)) < 1e-6


def test_mlp_keeps_x_gate_and_up(device):
    activation, layers = mlp_layers("silu", BF16, device)
    x = draw((64,), 16, BF16, device).requires_grad_()
    kept = saved_bytes(lambda: lora_mlp(x, layers, activation, BF16))
    assert kept == x.nbytes + 2 * (64 * 24 * 2) + 64 * 3 * 4 * 2


@pytest.mark.skipif(backend.INTERPRETED, reason="no kernel takes part")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast_around_backward_changes_no_gradient(dtype, device):
    """Forward decides the dtype of all products; backward may run in another context."""
    layers = [layer(24, 16, 4, FP32, device, seed=i, dropout=0.2) for i in range(2)]
    x = draw((5,), 24, FP32, device)

    def gradients(enabled):
        torch.manual_seed(0)
        loss = sum(y.square().sum() for y in lora_linears(x, layers, FP32))
        with torch.autocast(x.device.type, dtype, enabled=enabled):
            return torch.autograd.grad(loss, list(named(layers).values()))

    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_a_weight_that_asks_for_a_gradient_is_refused(device):
    x, weight = draw((2,), 8, FP32, device), draw((4,), 8, FP32, device).requires_grad_()
    a, b = draw((2,), 8, FP32, device), draw((4,), 2, FP32, device)
    with pytest.raises(ValueError, match="weight must not require grad.*requires_grad_"):
        lora_linear(x, weight, a, b)
    with pytest.raises(ValueError, match=r"magnitude must be \(4,\)"):
        lora_linear(x, weight.detach(), a, b, None, torch.ones(3, device=device))
    with pytest.raises(ValueError, match=r"b must be \(4, 2\)"):
        lora_linear(x, weight.detach(), a, b.t())


@pytest.mark.skipif(backend.INTERPRETED, reason="no kernel takes part")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_it_is_traced_whole(dora, device):
    one = layer(24, 16, 4, FP32, device, dora=dora, bias=dora, scale=2.0)
    x = draw((5,), 24, FP32, device).requires_grad_()
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)

    def outcome(function):
        y = function(x, one.weight, one.a, one.b, one.bias, one.magnitude, scale=2.0)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *named([one]).values()])]

    for mine, wanted in zip(outcome(compiled), outcome(lora_linear), strict=True):
        assert error(mine, wanted) < 2e-6


class Negated(PackedFormat):
    """A weight that is kept in one dimension with the other sign."""

    def __init__(self, shape):
        self.shape = shape

    def unpack(self, weight, dtype):
        return -weight.view(self.shape).to(dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_weight_that_brings_its_format_is_unpacked_by_it(dora, dtype, device):
    dense = layer(16, 24, 4, dtype, device, bias=True, dora=dora, scale=0.5)
    packed = (-dense.weight).flatten().clone()
    packed.quant_state = Negated(dense.weight.shape)
    x = torch.randn(3, 5, 16, dtype=dtype, device=device, requires_grad=True)
    found = []
    for weight in (dense.weight, packed):
        trained = [one for one in dense[1:5] if one is not None]
        y = lora_linear(x, weight, dense.a, dense.b, dense.bias, dense.magnitude, scale=dense.scale)
        found.append((y, *torch.autograd.grad(y.sum(), (x, *trained))))
    for right, other in zip(*found, strict=True):
        assert torch.equal(right, other)
