"""One training step of each family, patched and stock; the interpreter runs these too."""

from __future__ import annotations

import pytest
import zoo
from checks import assert_same, run

from liger_kernels.transformers import apply_liger_kernel


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_training_step_equals_stock(family):
    model = zoo.build(family).train()
    # Tokens enough for every expert to get one.
    inputs = zoo.text_inputs(batch=2, length=9)
    stock = run(model, inputs)
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        ours = run(model, inputs)
    # The interpreter and torch add in another order.
    assert_same(ours, stock, tolerance=5e-5)
    assert all(n["patched"] == n["candidates"] for n in record.coverage.values())
