"""Each family on a CUDA device, in three dtypes: a patched step is no worse than a stock one."""

from __future__ import annotations

import pytest
import torch
import zoo
from checks import Run, run

from liger_kernels.compare import FLOOR
from liger_kernels.transformers import apply_liger_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


DEVICE = "cuda"


def build(family: str, dtype: torch.dtype) -> torch.nn.Module:
    model = zoo.build(family).train()
    for module in model.modules():
        # Every expert takes part: a rounding must not decide which one a token goes to.
        if hasattr(module, "top_k"):
            module.top_k = 4
    # Not to(dtype), which takes the imaginary part of llama4's angles away.
    return model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t).to(DEVICE)


def inputs_of(family: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a training batch on the device, with an image where the family takes one."""
    is_text = family in zoo.TEXT
    inputs = zoo.text_inputs(batch=4, length=24) if is_text else zoo.inputs_of(family)
    return {k: v.to(DEVICE, dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def distances(got: Run, truth: Run) -> dict[str, float]:
    """Each gradient's distance from the truth, over its norm or a share of the largest one."""
    largest = max(grad.norm().item() for grad in truth.grads.values())
    found = {"loss": abs(got.loss - truth.loss) / abs(truth.loss)}
    for name, grad in truth.grads.items():
        scale = max(grad.norm().item(), 0.05 * largest)
        found[name] = (got.grads[name].double() - grad.double()).norm().item() / scale
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("family", zoo.ALL)
def test_step_is_no_worse_than_stock(family, dtype):
    inputs = inputs_of(family, dtype)
    # The parameters rounded to dtype, computed in fp64: what both runs approximate.
    exact = build(family, dtype).double()
    # The grouped product of experts has no fp64.
    exact.config._experts_implementation = "eager"
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = run(exact, wide)
    model = build(family, dtype)
    stock = distances(run(model, inputs), truth)
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        ours = distances(run(model, inputs), truth)
    # Errors of a whole step are draws of the same size, not bounds: hence 3 where an op has 2.
    floor = 4 * FLOOR[dtype]
    worse = {
        name: (error, stock[name])
        for name, error in ours.items()
        if not error <= 3 * stock[name] + floor
    }
    assert not worse
    assert all(n["patched"] == n["candidates"] for n in record.coverage.values())
    patched = [row for row in record.modules if row["status"] == "patched"]
    assert {row["backend"] for row in patched} == {"triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("family", zoo.ALL)
def test_generate_and_undo(family):
    inputs = {k: v for k, v in inputs_of(family, torch.float32).items() if k != "labels"}
    model = build(family, torch.float32).eval()
    # Some versions cannot balance the load of a prompt that generate has cached.
    model.config.output_router_logits = False
    wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    record = apply_liger_kernel(model, "all")
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), wanted)
    record.undo()
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), wanted)
