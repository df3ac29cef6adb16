"""Cross entropy beyond the table of test_ops.py: reductions, labels, extremes, uses of autograd."""

from __future__ import annotations

import ast
import builtins
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_kernels.compare import FLOOR, error
from liger_kernels.ops import backend, cross_entropy, launcher
from liger_kernels.ops.cross_entropy import cross_entropy_ref
from liger_kernels.ops.losses import grads_in_forward, row_loss, row_loss_kernel
from liger_kernels.ops.losses.options import LossOptions

REDUCTIONS = ("mean", "sum", "none")


def make(*shape: int, seed: int = 0, spread: float = 1.0, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    return x.to(device=device, dtype=dtype).requires_grad_()


def labels(*shape: int, vocab: int, seed: int = 1, device="cpu", ignored: int = 0):
    target = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
    target.view(-1)[:ignored] = -100
    return target.to(device)


def grad_of(loss: torch.Tensor, x: torch.Tensor, dy: torch.Tensor | None = None) -> torch.Tensor:
    (dx,) = torch.autograd.grad(loss, x, dy)
    return dx


def truth(x: torch.Tensor, target: torch.Tensor, dy: torch.Tensor | None = None, **options):
    """Loss and gradient of the reference in fp64."""
    wide = x.detach().double().requires_grad_()
    loss = cross_entropy_ref(wide, target, **options)
    return loss.detach(), grad_of(loss, wide, None if dy is None else dy.double())


class Allocations(TorchDispatchMode):
    """Records the number of elements of every tensor that is new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.sizes.append(t.numel())
        return out


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_case_3_all_labels_ignored_gives_zero(reduction, device):
    x = make(8, 32, device=device)
    target = torch.full((8,), -100, device=device)
    loss = cross_entropy(x, target, reduction=reduction, label_smoothing=0.1, z_loss=0.1)
    assert loss.abs().sum().item() == 0.0
    assert grad_of(loss.sum(), x).abs().max().item() == 0.0


def test_case_5_none_scales_each_row_by_its_own_gradient(device):
    x = make(8, 32, device=device)
    target = labels(8, vocab=32, ignored=1, device=device)
    dy = torch.arange(8.0, device=device)
    loss = cross_entropy(x, target, reduction="none")
    wanted, wanted_dx = truth(x, target, dy, reduction="none")
    assert error(loss, wanted) < FLOOR[torch.float32]
    assert error(grad_of(loss, x, dy), wanted_dx) < FLOOR[torch.float32]


def test_case_37_expanded_gradient_of_a_sum(device):
    x = make(8, 32, device=device)
    target = labels(8, vocab=32, device=device)
    dx = grad_of(cross_entropy(x, target, reduction="none").sum(), x)
    _, wanted = truth(x, target, reduction="sum")
    assert error(dx, wanted) < FLOOR[torch.float32]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_case_6_shape_and_zeros_of_each_reduction(reduction, device):
    x = make(2, 3, 16, device=device)
    target = labels(2, 3, vocab=16, ignored=2, device=device)
    loss = cross_entropy(x, target, reduction=reduction)
    assert loss.dtype == torch.float32
    assert loss.shape == (target.shape if reduction == "none" else ())
    if reduction == "none":
        assert loss.view(-1)[:2].tolist() == [0.0, 0.0]
        assert (loss.view(-1)[2:] > 0).all()


def test_case_6_unknown_reduction_names_the_choices(device):
    with pytest.raises(ValueError, match=r"reduction must be one of mean, sum, none, got 'avg'"):
        cross_entropy(make(2, 4), labels(2, vocab=4), reduction="avg")


def test_case_35_softcap_saturates_at_the_cap(device):
    x = (make(6, 50, device=device) * 0 + torch.linspace(-124, 124, 50, device=device)).detach()
    x.requires_grad_()
    target = labels(6, vocab=50, device=device)
    loss = cross_entropy(x, target, softcap=30.0)
    wanted, wanted_dx = truth(x, target, softcap=30.0)
    # Capped logits span 60: no loss is above log(50) + 60.
    assert cross_entropy(x, target, softcap=30.0, reduction="none").max() < 64.0
    # A step of tanh near 1 is 1.2e-7 after two divisions, and the cap multiplies it by 30.
    assert error(loss, wanted) < FLOOR[torch.float32]
    assert error(grad_of(loss, x), wanted_dx) < 30 * 2.4e-7


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 999, 1000, 1023, 1024, 2**40])
def test_case_39_ignore_index_is_any_int_and_matches_no_padded_lane(ignore_index, device):
    x = make(4, 1000, device=device)
    target = torch.tensor([999, ignore_index, 0, 998], device=device)
    options = {"ignore_index": ignore_index, "reduction": "none"}
    loss = cross_entropy(x, target, **options)
    wanted, wanted_dx = truth(x, target, torch.ones_like(loss), **options)
    assert loss[1].item() == 0.0
    assert error(loss, wanted) < FLOOR[torch.float32]
    assert error(grad_of(loss.sum(), x), wanted_dx) < FLOOR[torch.float32]


@pytest.mark.parametrize("vocab", [65535, 65536, 65537, 102400, 262208])
def test_case_40_any_vocabulary(vocab, device):
    x = make(3, vocab, device=device, spread=3.0)
    target = torch.tensor([0, vocab - 1, vocab // 2], device=device)
    loss = cross_entropy(x, target)
    wanted, wanted_dx = truth(x, target)
    assert error(loss, wanted) < FLOOR[torch.float32]
    assert error(grad_of(loss, x), wanted_dx) < FLOOR[torch.float32]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 3.0}], ids=str)
def test_an_ignored_row_of_several_blocks_is_zero_and_not_read(options, device):
    x = make(3, 70001, device=device).detach()
    if backend.runs_triton(x):
        x[1] = float("nan")
    x.requires_grad_()
    # The labels lie in the first block and in the last, which stays in registers.
    target = torch.tensor([1, -100, 70000], device=device)
    loss = cross_entropy(x, target, **options)
    dx = grad_of(loss, x)
    valid = torch.tensor([0, 2], device=device)
    wanted, wanted_dx = truth(x[valid], target[valid], **options)
    assert error(loss, wanted) < FLOOR[torch.float32]
    assert error(dx[valid], wanted_dx) < FLOOR[torch.float32]
    assert dx[1].abs().max().item() == 0.0


@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_case_44_no_rows(shape, reduction, device):
    x = make(*shape, device=device)
    target = torch.empty(shape[:-1], dtype=torch.int64, device=device)
    loss = cross_entropy(x, target, reduction=reduction)
    assert loss.shape == (target.shape if reduction == "none" else ())
    assert loss.sum().item() == 0.0
    assert grad_of(loss.sum(), x).shape == shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_case_46_differentiating_twice_raises(reduction, device):
    x = make(4, 16, device=device)
    loss = cross_entropy(x, labels(4, vocab=16, device=device), reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_second_backward_raises_for_a_mean_and_repeats_for_none(device):
    x = make(4, 16, device=device)
    target = labels(4, vocab=16, device=device)
    loss = cross_entropy(x, target)
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="gave them away in the first backward"):
        torch.autograd.grad(loss, x)
    loss = cross_entropy(x, target, reduction="none").sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, grad_of(loss, x))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inputs_and_incoming_gradient_stay_as_they_are(reduction, device):
    x = make(4, 16, device=device)
    target = labels(4, vocab=16, device=device)
    before = x.detach().clone()
    loss = cross_entropy(x, target, reduction=reduction, softcap=2.0, scale=3.0)
    dy = torch.full_like(loss, 0.5)
    grad_of(loss, x, dy)
    assert torch.equal(x, before)
    assert torch.equal(dy, torch.full_like(loss, 0.5))


def test_mean_scaled_by_its_incoming_gradient(device):
    x = make(6, 40, device=device)
    target = labels(6, vocab=40, device=device)
    _, wanted = truth(x, target)
    dx = grad_of(cross_entropy(x, target) * 3.0, x)
    assert error(dx, wanted * 3.0) < FLOOR[torch.float32]


def test_confident_rows_of_large_logits_keep_their_digits(device):
    # Near 1000 an fp32 number has steps of 6e-5: lse - z would be off by about that much.
    x = torch.full((2, 64), 1000.0, device=device)
    x[:, 3] = 1008.0
    x.requires_grad_()
    target = torch.tensor([3, 5], device=device)
    loss = cross_entropy(x, target, reduction="none")
    wanted, wanted_dx = truth(x, target, torch.ones(2, device=device), reduction="none")
    assert (loss - wanted).abs()[0].item() < 5e-7
    assert (grad_of(loss.sum(), x) - wanted_dx).abs()[0].max().item() < 5e-7


def test_logits_of_minus_infinity_have_no_probability(device):
    x = make(3, 20, device=device).detach()
    x[:, 10:] = -float("inf")
    x.requires_grad_()
    target = torch.tensor([0, 4, 9], device=device)
    loss = cross_entropy(x, target)
    wanted, wanted_dx = truth(x, target)
    assert error(loss, wanted) < FLOOR[torch.float32]
    assert error(grad_of(loss, x), wanted_dx) < FLOOR[torch.float32]


@pytest.mark.parametrize("label", [-1, 16, 2**40])
def test_label_out_of_range_raises_on_a_cpu(label):
    with pytest.raises(ValueError, match=rf"target holds {label}; labels go from 0 to 15"):
        cross_entropy(make(1, 16), torch.tensor([label]))


@pytest.mark.parametrize("label", [-1, 16, 2**31, 2**40])
def test_label_out_of_range_is_nan_where_nothing_is_checked(label, device):
    x = make(2, 16, device=device).detach()
    target = torch.tensor([label, 3], device=device)
    loss, dx = torch.zeros(2, device=device), torch.zeros_like(x)
    coef = torch.ones((), device=device).expand(2)
    options = LossOptions(ignore_index=-100)
    row_loss.loss_rows(x, target, options, coef=coef, dx=dx, loss=loss)
    assert loss[0].isnan()
    assert dx[0].isnan().all()
    assert error(loss[1], F.cross_entropy(x[1], target[1])) < FLOOR[torch.float32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"softcap": 0.0}, "softcap must be None or positive, got 0.0"),
        ({"ignore_index": 1.0}, "ignore_index must be an int, got 1.0"),
        ({"weight": torch.ones(3)}, r"weight must be floating \(4,\)"),
        ({"weight": torch.ones(4, requires_grad=True)}, "weight must not require grad"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target must be \(2,\), got \(3,\)"),
        ({"target": torch.zeros(2)}, "target must hold int32 or int64 labels, got torch.float32"),
        ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, "logits must be floating"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    given = {"logits": make(2, 4), "target": labels(2, vocab=4), **arguments}
    with pytest.raises(ValueError, match=message):
        cross_entropy(given.pop("logits"), given.pop("target"), **given)


@pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter copies what kernels are given")
@pytest.mark.parametrize("is_recording", [False, True])
def test_case_9_no_gradient_is_made_where_none_is_asked_for(is_recording, device):
    x = make(64, 50, device=device).requires_grad_(not is_recording)
    target = labels(64, vocab=50, device=device)
    with Allocations() as made, torch.set_grad_enabled(is_recording):
        cross_entropy(x, target)
    # Torch code needs one copy of the logits, or a piece of them, to work on; kernels need none.
    allowed = 0 if backend.runs_triton(x) else 1
    assert sum(size >= x.numel() for size in made.sizes) == allowed


@pytest.mark.skipif(backend.INTERPRETED, reason="an operator's inside is not compiled")
def test_compiles_into_one_graph(device):
    x, target = make(6, 40, device=device), labels(6, vocab=40, ignored=2, device=device)

    def loss(x, target):
        per_row = cross_entropy(x, target, reduction="none", softcap=3.0)
        return cross_entropy(x, target, z_loss=0.1) * 2 + per_row.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert error(compiled(x, target), loss(x, target)) < FLOOR[torch.float32]
    wanted = grad_of(loss(x, target), x)
    assert error(grad_of(compiled(x, target), x), wanted) < FLOOR[torch.float32]


@pytest.mark.parametrize("module", [row_loss_kernel, grads_in_forward])
def test_case_28_kernels_read_no_global_that_is_not_a_kernel(module):
    tree = ast.parse(inspect.getsource(module))
    kernels = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(d) in ("jit", "triton.jit") for d in node.decorator_list)
    ]
    assert kernels
    allowed = {kernel.name for kernel in kernels} | {"tl", "fp32", *dir(builtins)}
    for kernel in kernels:
        names = [node for node in ast.walk(kernel) if isinstance(node, ast.Name)]
        local = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        local |= {argument.arg for argument in kernel.args.args}
        decorators = {"jit", "triton"}
        assert {node.id for node in names} <= local | allowed | decorators


@pytest.mark.whole_card
@pytest.mark.gpu
def test_case_47_rows_past_two_to_the_31_elements():
    x = torch.empty(16400, 131072, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    target = labels(16400, vocab=131072, device="cuda")
    loss = cross_entropy(x, target, reduction="sum")
    dx = grad_of(loss, x)
    last = x.detach()[-4:].requires_grad_()
    few = cross_entropy(last, target[-4:], reduction="sum")
    assert torch.equal(dx[-4:], grad_of(few, last))


@pytest.mark.gpu
def test_forward_and_backward_do_not_wait_for_the_gpu():
    x = make(64, 1000, dtype=torch.bfloat16, device="cuda")
    weight = torch.rand(1000, device="cuda")
    target = labels(64, vocab=1000, ignored=9, device="cuda")
    grad_of(cross_entropy(x, target, weight=weight), x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dx = grad_of(cross_entropy(x, target, weight=weight) * 2.0, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _, wanted = truth(x, target, weight=weight.double())
    assert error(dx, 2.0 * wanted) < 3 * FLOOR[torch.bfloat16]


@pytest.fixture
def launches(monkeypatch) -> list[dict[str, object]]:
    """The arguments of each launch, by the kernel's names for them."""
    calls: list[dict[str, object]] = []
    start = launcher.Launch.__call__

    def recorded(self, *tensors):
        calls.append(dict(zip(self._kernel.arg_names, tensors, strict=False)) | self._others)
        start(self, *tensors)

    monkeypatch.setattr(launcher.Launch, "__call__", recorded)
    return calls


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_case_32_outputs_share_no_storage_and_unused_ones_are_none(reduction, device, launches):
    """The interpreter copies outputs back one by one: an alias would overwrite the loss."""
    x, target = make(4, 3, device=device), labels(4, vocab=3, device=device)
    if not backend.runs_triton(x):
        pytest.skip("torch code has no output pointers")
    cross_entropy(x, target, z_loss=1e-3, reduction=reduction).sum().backward()
    calls = [call for call in launches if "label_ptr" in call]
    assert calls
    for call in calls:
        outputs = ("dx", "loss", "nll", "entropy", "best")
        given = [call[f"{name}_ptr"] for name in outputs if call[f"HAS_{name.upper()}"]]
        unused = [call[f"{name}_ptr"] for name in outputs if not call[f"HAS_{name.upper()}"]]
        storages = [tensor.untyped_storage().data_ptr() for tensor in given]
        assert len(set(storages)) == len(storages)
        assert x.untyped_storage().data_ptr() not in storages
        assert unused == [None] * len(unused)
