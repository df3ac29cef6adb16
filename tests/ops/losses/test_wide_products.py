"""Sums of products wider than their factors, on devices with and without torch's out_dtype."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from liger_kernels.compare import error
from liger_kernels.ops.losses import linear_loss
from liger_kernels.ops.losses.linear_loss import add_product
from liger_kernels.ops.products import has_wide_products


@pytest.mark.parametrize(
    ("capability", "dtype", "takes_out_dtype"),
    [
        ((7, 0), torch.float16, False),
        ((7, 5), torch.float16, False),
        ((7, 5), torch.bfloat16, False),
        ((8, 0), torch.float16, True),
        ((9, 0), torch.bfloat16, True),
    ],
)
def test_case_219_out_dtype_is_asked_of_cards_that_have_it(
    capability, dtype, takes_out_dtype, monkeypatch
):
    """What stands in for a card's tensors notes the products that are asked of it."""
    asked = []

    def product(*factors, **options):
        asked.append((factors[-1].dtype, "out_dtype" in options))

    def on_the_card(dtype):
        return SimpleNamespace(dtype=dtype, device=torch.device("cuda"), to=on_the_card)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch, "addmm", product)
    # It remembers what the cards of this machine have.
    monkeypatch.setattr(linear_loss, "has_wide_products", has_wide_products.__wrapped__)
    out = on_the_card(torch.float32)
    out.addmm_, out.add_, out.copy_ = product, lambda x: None, lambda x: None
    for is_first in (True, False):
        add_product(out, on_the_card(dtype), on_the_card(dtype), is_first)
    # An fp16 product would overflow: its factors are widened where the product cannot be.
    widened = torch.float32 if dtype == torch.float16 and not takes_out_dtype else dtype
    assert asked == [(widened, takes_out_dtype)] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wide_sum_of_products_does_not_overflow(dtype, device):
    """64 x 64 x 64 is beyond fp16, and the sum is divided by the number of labels only later."""
    a, b = (torch.full((4, 64), 64.0, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty(4, 4, dtype=torch.float32, device=device)
    for is_first in (True, False):
        add_product(out, a, b.t(), is_first)
    assert error(out, torch.full((4, 4), 2.0 * 64**3, device=device)) < 4e-3
