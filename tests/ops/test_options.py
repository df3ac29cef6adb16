"""Every option of every op: what is out of range is refused by name, the rest is computed right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rows import arguments_of, call

from liger_kernels.compare import FLOOR, compare
from liger_kernels.ops import (
    count_labels,
    cross_entropy,
    fused_add_rms_norm,
    fused_linear_cross_entropy,
    fused_linear_logprobs,
    gated_rms_norm,
    rms_norm,
)
from liger_kernels.ops.arguments import Cap, Choice, Choices, Flag, Instance, Integer, Number
from liger_kernels.ops.gated_rms_norm import gated_rms_norm_ref
from liger_kernels.ops.losses.options import Normalizer
from liger_kernels.ops.op import Case, Op
from liger_kernels.ops.registry import OPS
from liger_kernels.ops.rms_norm import rms_norm_ref

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = ("1", [1.0], {}, 1j, torch.ones(2), torch.tensor(1.0, requires_grad=True))
# By the kind of option: values that no option of that kind may have.
WRONG: dict[type, tuple[Any, ...]] = {
    Number: (NAN, INF, -INF, 1e39, 10**400, np.float64("nan"), torch.tensor(NAN), None, True)
    + NO_NUMBERS,
    Cap: (NAN, -INF, 0.0, -1.0, 1e-40, True, *NO_NUMBERS),
    Integer: (1.5, NAN, "1", True, [1], 2**63, -(2**63) - 1, torch.ones(2)),
    Choice: ("other", "", None, 1, ["mean"]),
    Choices: ("logprob", None, 1, [], ["other"], ["logprob", "logprob"], [1], {"logprob"}),
    Flag: (None, 1, 0, "yes", torch.tensor(True)),
    Instance: (5, "5", torch.tensor(5)),
    Normalizer: (NAN, INF, -1, -0.5, "3", True, torch.ones(2), torch.tensor(1j), 10**400),
}
# Values that options of a kind may have, as far as their range goes.
RIGHT = (0.0, -1.0, 1.0, 0.5, 3, 0.05, 4.0)


def each_option(*kinds: type) -> Iterator[Any]:
    for op in OPS.values():
        for option in op.options:
            if not kinds or isinstance(option, kinds):
                yield pytest.param(op, option, id=f"{op.name}-{option.name}")


def wrong_values(option: Any) -> Iterator[Any]:
    yield from WRONG[type(option)]
    if isinstance(option, Number):
        if option.least > -math.inf:
            yield np.nextafter(option.least, -math.inf)
        yield np.nextafter(option.most, math.inf)
    if isinstance(option, Integer) and not option.is_optional:
        yield None


def valid_arguments(op: Op, device: torch.device) -> dict[str, Any]:
    return arguments_of(op, next(case for case in op.cases if not case.options), device)


@pytest.mark.parametrize(("op", "option"), list(each_option()))
def test_case_204_wrong_values_are_refused_by_name(op, option, device):
    arguments = valid_arguments(op, device)
    for value in wrong_values(option):
        with pytest.raises(ValueError, match=" must ") as caught:
            op.function(**{**arguments, option.name: value})
        message = str(caught.value)
        assert f"{option.name} must " in message, f"{value!r}: {message}"
        shown = message.split("got ", 1)[1]
        if not isinstance(value, torch.Tensor):
            assert repr(value)[:40] in shown, f"{value!r}: {message}"


@pytest.mark.parametrize(("op", "option"), list(each_option(Number)))
def test_case_204_values_in_range_give_the_reference(op, option, device):
    plain = next(case for case in op.cases if not case.options)
    tried = 0
    for value in RIGHT:
        if option.least <= value <= option.most:
            case = Case("value", plain.shape, {option.name: value})
            result = compare(op, case, torch.float32, device)
            assert result.ok, f"{option.name}={value}: {result}"
            tried += 1
    assert tried > 1


@pytest.mark.parametrize(("op", "option"), list(each_option(Number)))
def test_a_number_of_any_type_is_the_number_it_holds(op, option, device):
    arguments = valid_arguments(op, device)
    wanted, grads = call(op, {**arguments, option.name: 1.0})
    for value in (1, np.float32(1.0), np.int64(1), torch.tensor(1.0), torch.tensor([1])):
        ours, our_grads = call(op, {**arguments, option.name: value})
        assert all(map(torch.equal, ours, wanted)), repr(value)
        assert all(torch.equal(our_grads[name], grads[name]) for name in grads), repr(value)


@pytest.mark.parametrize(("op", "option"), list(each_option(Cap)))
def test_case_204_an_infinite_cap_is_no_cap(op, option, device):
    arguments = valid_arguments(op, device)
    wanted, grads = call(op, {**arguments, option.name: None})
    for value in (INF, np.float32("inf"), torch.tensor(INF)):
        ours, our_grads = call(op, {**arguments, option.name: value})
        assert all(map(torch.equal, ours, wanted))
        assert all(torch.equal(our_grads[name], grads[name]) for name in grads)


@pytest.mark.parametrize("cap", [1.0, 1e3, 1e30])
def test_caps_of_any_size_give_the_reference(cap, device):
    case = Case("cap", (6, 50), {"softcap": cap, "spread": 4.0})
    result = compare(OPS["cross_entropy"], case, torch.float32, device)
    assert result.ok, str(result)


def test_case_204_the_examples():
    x = torch.randn(2, 8)
    target = torch.tensor([1, 2])
    assert torch.equal(cross_entropy(x, target, softcap=INF), cross_entropy(x, target))
    for eps in (NAN, -10, "1e-6"):
        with pytest.raises(ValueError, match="eps must be a finite number, not negative"):
            rms_norm(x, eps=eps)
    for name in ("z_loss", "scale"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number, got nan"):
            cross_entropy(x, target, **{name: NAN})
    with pytest.raises(ValueError, match="temperature must be positive, got inf: .* finite"):
        fused_linear_logprobs(x, x, torch.tensor([0, 1]), temperature=INF)


def test_case_205_a_number_is_no_label_count():
    x, target = torch.randn(2, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="label_count must be None or a LabelCount.*got 5"):
        fused_linear_cross_entropy(x, x, target, label_count=5)
    loss = fused_linear_cross_entropy(x, x, target, label_count=count_labels(target))
    assert torch.equal(loss, fused_linear_cross_entropy(x, x, target))


# Finite logits of any size. Their names say what they look like; V is 40.
LOWEST = torch.finfo(torch.float32).min


def logits_of(kind: str) -> torch.Tensor:
    noise = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    masked = torch.rand(4, 40, generator=torch.Generator().manual_seed(1)) < 0.8
    return {
        "all-2e19": torch.full((4, 40), 2e19),
        "all-the-lowest": torch.full((4, 40), LOWEST),
        "all-the-largest": torch.full((4, 40), -LOWEST),
        "about-minus-1e35": noise - 1e35,
        "minus-1e30-and-less": -1e30 - 1e30 * noise.abs(),
        "far-apart": 1e36 * noise,
        "masked-by-the-lowest": noise.masked_fill(masked, LOWEST),
        "masked-by-minus-1e30": noise.masked_fill(masked, -1e30),
        "one-above-the-lowest": torch.full((4, 40), LOWEST).index_fill(1, torch.tensor(7), 0.0),
    }[kind]


KINDS = (
    "all-2e19",
    "all-the-lowest",
    "all-the-largest",
    "about-minus-1e35",
    "minus-1e30-and-less",
    "far-apart",
    "masked-by-the-lowest",
    "masked-by-minus-1e30",
    "one-above-the-lowest",
)


def truth(x, target, class_weight=None, label_smoothing=0.0, z_loss=0.0, softcap=None, scale=1.0):
    """The loss of each row in fp64, from distances to the peak: cross_entropy_ref's logsumexp
    loses log V beside logits of 2e19 even in fp64, and its gradient is then no softmax."""
    z = x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)
    peak = z.amax(-1, keepdim=True).detach()
    log_total = (z - peak).exp().sum(-1, keepdim=True).log()
    log_p = z - peak - log_total
    w = torch.ones_like(z[0]) if class_weight is None else class_weight
    nll = -w[target] * log_p.gather(-1, target[:, None])[:, 0]
    smooth = -(w * log_p).mean(-1)
    lse = (peak + log_total)[:, 0]
    return (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * lse.square()


def assert_close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within some roundings of the largest number, or of 1."""
    size = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    assert ours.isfinite().all()
    assert ((ours.double() - wanted).abs() <= 4 * FLOOR[torch.float32] * size).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-38}, {"softcap": 30.0}, {"scale": 0.5}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("kind", KINDS)
def test_case_203_finite_logits_of_any_size(kind, options, reduction, device):
    """The loss and its gradient are those of fp64, rounded; what fp32 has no number for is inf."""
    x = logits_of(kind).to(device).requires_grad_()
    target = x.detach().argmax(1)
    for class_weight in (None, torch.linspace(0.5, 1.5, 40, device=device)):
        loss = cross_entropy(x, target, weight=class_weight, reduction=reduction, **options)
        (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        wide = x.detach().double().requires_grad_()
        wide_weight = None if class_weight is None else class_weight.double()
        true = truth(wide, target, wide_weight, **options)
        if reduction == "mean":
            true = true.sum() / (4 if wide_weight is None else wide_weight[target].sum())
        (wanted,) = torch.autograd.grad(true, wide, torch.ones_like(true))
        # fp32 has no number for the sum over a row, of which smoothing takes the mean.
        overflows = loss.isinf()
        assert (true[overflows].abs() * 40 * 40 > -LOWEST).all(), "infinite, and need not be"
        assert_close(loss[~overflows], true[~overflows])
        assert_close(dx, wanted)


@pytest.mark.parametrize("kind", ["all-the-lowest", "masked-by-the-lowest", "far-apart"])
def test_case_203_logprobs_and_entropy_of_finite_logits_of_any_size(kind, device):
    weight = logits_of(kind).to(device).t().contiguous().requires_grad_()
    hidden, ids = torch.eye(4, device=device), weight.detach().argmax(0)
    logprob, entropy = fused_linear_logprobs(hidden, weight, ids)
    (dweight,) = torch.autograd.grad((logprob * 2e9 + entropy * 1e9).sum(), weight)
    wide = weight.detach().double().t().requires_grad_()
    log_p = wide.log_softmax(-1)
    true_logprob = log_p.gather(1, ids[:, None])[:, 0]
    true_entropy = -(log_p.exp() * log_p).sum(-1)
    (wanted,) = torch.autograd.grad((true_logprob * 2e9 + true_entropy * 1e9).sum(), wide)
    assert_close(logprob, true_logprob)
    assert_close(entropy, true_entropy)
    assert_close(dweight, wanted.t())


@pytest.mark.parametrize(("old", "new"), [("mid", "before_weight"), ("end", "after_weight")])
def test_older_spellings_of_cast_compute_the_same(old, new):
    x, weight = torch.randn(2, 3, 16).bfloat16(), torch.randn(16)
    functions = {
        rms_norm: (x, weight),
        rms_norm_ref: (x, weight),
        gated_rms_norm: (x, x, weight),
        gated_rms_norm_ref: (x, x, weight),
        lambda *args, cast: fused_add_rms_norm(*args, cast=cast)[0]: (x, x, weight),
    }
    for function, arguments in functions.items():
        y, wanted = (function(*arguments, cast=cast) for cast in (old, new))
        assert y.dtype == wanted.dtype
        assert torch.equal(y, wanted)
