"""Sums over answers: exact in fp64, for any order of the tokens, with their gradient."""

from __future__ import annotations

import sys

import pytest
import torch

from liger_kernels.ops import sequence_sums
from liger_kernels.ops.backend import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel runs")


def case(num: int, shape: tuple[int, ...], layout: str, device) -> tuple[torch.Tensor, ...]:
    """Values, and the numbers of answers: one after the other in rows, or mixed."""
    generator = torch.Generator().manual_seed(0)
    values = -5.0 * torch.rand(shape, generator=generator)
    if layout == "mixed":
        ids = torch.randint(-1, num, shape, generator=generator)
    else:
        ids = torch.arange(values.numel()).view(shape) * (num + 1) // values.numel() - 1
    return values.to(device).requires_grad_(), ids.to(device)


@pytest.mark.parametrize("layout", ["packed", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("num", "shape"), [(1, (7,)), (6, (3, 11)), (40, (2, 300)), (5, (0,))])
def test_every_answer_has_the_sum_of_its_values(num, shape, dtype, layout, device, monkeypatch):
    # Several groups of answers.
    monkeypatch.setattr(sys.modules["liger_kernels.ops.sequence_sums"], "_MAX_ELEMENTS", 1500)
    values, ids = case(num, shape, layout, device)
    values = values.detach().to(dtype).requires_grad_()
    wanted = torch.stack([values.detach().double()[ids == i].sum() for i in range(num)])
    sums = sequence_sums(values, ids, num)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, wanted, rtol=1e-14, atol=1e-14)
    coef = torch.randn(num, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(sums, values, coef.to(device))
    at = torch.cat([coef, torch.zeros(1)])[ids.cpu()].to(device, dtype)
    assert torch.equal(grad, at)


def test_a_log_ratio_of_2048_tokens_is_exact_where_fp32_is_not(device):
    """The difference of two sums of thousands of nats that differ by hundredths."""
    generator = torch.Generator().manual_seed(0)
    policy = -6.0 * torch.rand(2, 2048, generator=generator)
    reference = policy + 1e-4 * torch.randn(2, 2048, generator=generator)
    ids = torch.tensor([[0], [1]]).expand(2, 2048).to(device)
    exact = (policy.double().sum(1) - reference.double().sum(1)).to(device)
    sums = [sequence_sums(x.to(device), ids, 2) for x in (policy, reference)]
    assert (sums[0] - sums[1] - exact).abs().max() < 1e-9
    one_by_one = [x.cumsum(1)[:, -1] for x in (policy, reference)]
    assert (one_by_one[0] - one_by_one[1] - exact.cpu()).abs().max() > 1e-4


def test_compiled_in_one_graph(device):
    values, ids = case(6, (3, 11), "mixed", device)

    def loss(values):
        return sequence_sums(values * 2, ids, 6).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(values), loss(values))
    wanted = torch.autograd.grad(loss(values), values)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(values), values)[0], wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2), torch.tensor([0, 2]), 2), "answer_ids holds 2; answers go from 0 to 1"),
        ((torch.ones(2), torch.tensor([0, -2]), 2), "answer_ids holds -2"),
        ((torch.ones(2), torch.tensor([0]), 2), r"answer_ids must have values' shape \(2,\)"),
        ((torch.ones(2).long(), torch.tensor([0, 1]), 2), "values must be floating"),
        ((torch.ones(2), torch.ones(2), 2), "answer_ids must hold int32 or int64"),
        ((torch.ones(2), torch.tensor([0, 1]), -1), "num must be an int of at least 0"),
        ((torch.ones(2), torch.tensor([0, 1]), 2.0), "num must be an int"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sequence_sums(*arguments)


def test_without_answers_there_are_no_sums(device):
    ids = torch.full((3,), -1, device=device)
    assert sequence_sums(torch.ones(3, device=device), ids, 0).shape == (0,)
    assert sequence_sums(torch.ones(3, device=device), ids, 2).tolist() == [0.0, 0.0]
