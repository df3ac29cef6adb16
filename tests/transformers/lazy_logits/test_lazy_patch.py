"""The patched head in a model that is copied, wrapped, sharded or undone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lazy_models import FUSED, assert_same, make, make_inputs, step, was_made
from torch import Tensor, nn

from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers.lazy_logits.head import head_problem, install_head, num_fused
from liger_kernels.transformers.lazy_logits.tensor import LazyLogits

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")


# The patch.


def test_deepcopy_and_pickle_are_independent() -> None:
    model = make()
    patch = install_head(model, FUSED)
    stock = step(model, **make_inputs())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone.forward.__self__ is clone
        assert type(clone.lm_head) is not nn.Linear
        assert_same(step(clone, **make_inputs()), stock)
        before = num_fused(model.lm_head)
        assert isinstance(step(clone, **make_inputs())[2].logits, LazyLogits)
        assert num_fused(model.lm_head) == before
        # Undoing a copy leaves the original, and the other way round.
        clone._head_patch.undo()
        assert type(clone.lm_head) is nn.Linear
        assert type(step(clone, **make_inputs())[2].logits) is Tensor
        assert isinstance(step(model, **make_inputs())[2].logits, LazyLogits)
    clone = copy.deepcopy(model)
    patch.undo()
    assert isinstance(step(clone, **make_inputs())[2].logits, LazyLogits)


def test_model_looks_stock() -> None:
    model = make()
    before = (
        repr(model),
        list(model.state_dict()),
        dict(model.__dict__),
        dict(model.lm_head.__dict__),
    )
    weight = model.lm_head.weight
    patch = install_head(model, FUSED)
    step(model, **make_inputs())
    assert repr(model) == before[0]
    assert list(model.state_dict()) == before[1]
    assert isinstance(model.lm_head, nn.Linear)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is weight
    patch.undo()
    assert model.__dict__ == before[2]
    assert model.lm_head.__dict__ == before[3]
    assert type(model.lm_head) is nn.Linear
    patch.undo()
    install_head(model, FUSED).undo()
    assert model.__dict__ == before[2]


def _wrap(model: Any) -> None:
    """Wrap a model's forward as accelerate's prepare does for mixed precision."""
    from types import MethodType

    inner = model.forward.__func__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, *args, **kwargs)

    forward.__wrapped__ = inner  # type: ignore[attr-defined]
    model._original_forward = model.forward
    model.forward = MethodType(forward, model)


def test_undo_beneath_a_wrapper() -> None:
    model = make()
    patch = install_head(model, FUSED)
    _wrap(model)
    assert isinstance(model(**make_inputs()).logits, LazyLogits)
    patch.undo()
    out = model(**make_inputs())
    assert type(out.logits) is Tensor
    assert type(model.lm_head) is nn.Linear
    # The wrapper still calls through it, so it comes back to life rather than lie there twice.
    patch = install_head(model, FUSED)
    assert isinstance(model(**make_inputs()).logits, LazyLogits)
    patch.undo()
    model.forward = model._original_forward
    assert type(model(**make_inputs()).logits) is Tensor


def test_patch_and_undo_over_a_wrapper() -> None:
    model = make()
    _wrap(model)
    before = dict(model.__dict__)
    patch = install_head(model, FUSED)
    assert isinstance(model(**make_inputs()).logits, LazyLogits)
    patch.undo()
    assert model.__dict__ == before
    assert type(model(**make_inputs()).logits) is Tensor


def test_accelerate_prepare_and_unwrap(accelerate: Any) -> None:
    model = make()
    install_head(model, FUSED)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    out = prepared(**make_inputs())
    assert isinstance(out.logits, LazyLogits)
    assert out.logits.dtype == torch.float32
    assert not was_made(out.logits)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert isinstance(unwrapped(**make_inputs()).logits, LazyLogits)


def test_accelerate_hook_on_the_head() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    stock = step(make(), **make_inputs())
    model = make()
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    assert "wrapped" in (head_problem(model) or "")
    with pytest.raises(ValueError, match="patch before wrapping"):
        install_head(model, FUSED)
    model = make()
    install_head(model, FUSED)
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    assert_same(step(model, **make_inputs()), stock)
    assert num_fused(model.lm_head) == 1


def test_refusals() -> None:
    model = make()
    with pytest.raises(ValueError, match="op must be one of fused_linear_cross_entropy, cross"):
        install_head(model, "flce")  # type: ignore[arg-type]
    install_head(model, FUSED)
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched; undo that first"):
        install_head(model, "cross_entropy")
    with pytest.raises(ValueError, match="no output head"):
        install_head(model.model, FUSED)


def test_other_models_stay_stock() -> None:
    patched, other = make(), make()
    install_head(patched, FUSED)
    assert type(other.lm_head) is nn.Linear
    assert type(other(**make_inputs()).logits) is Tensor
    assert "forward" not in other.__dict__


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = make("mixtral")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    assert_same(step(model, **make_inputs()), stock)


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp(find_unused: bool, process_group: Any) -> None:
    stock = step(make(), **make_inputs())
    model = make()
    install_head(model, FUSED)
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
    out = ddp(**make_inputs())
    # DDP clones outputs to find unused parameters, and that makes logits.
    assert type(out.logits) is (Tensor if find_unused else LazyLogits)
    (out.loss * 1.7).backward()
    assert_same((out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}), stock)
    if find_unused:
        reference = make()
        torch.testing.assert_close(out.logits, reference(**make_inputs()).logits)
        # The clone's gradient finds its way back.
        results = []
        for each, call in ((model, ddp), (reference, reference)):
            each.zero_grad()
            call(**make_inputs()).logits.square().mean().backward()
            results.append((torch.zeros(()), {n: p.grad for n, p in each.named_parameters()}))
        assert_same(*results)


@pytest.mark.parametrize("head_alone", [False, True])
def test_fsdp2(head_alone: bool, process_group: Any) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    stock = step(make(), **make_inputs())
    model = make()
    install_head(model, FUSED)
    if head_alone:
        fsdp.fully_shard(model.lm_head)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fsdp.fully_shard(model, mesh=mesh)
    model.zero_grad()
    out = model(**make_inputs())
    assert num_fused(model.lm_head) == 1
    assert not was_made(out.logits)
    (out.loss * 1.7).backward()
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    assert_same((out.loss.detach(), grads), stock)
    # Gathered again after a step, the head's weights are new tensors.
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="the head's weights have changed"):
        out.logits.argmax(-1)


def test_a_model_inside_a_module_is_told_and_not_passed_over():
    from liger_kernels.transformers import apply_liger_kernel

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

    plan = apply_liger_kernel(Policy()).plan
    (skip,) = [skip for skip in plan.skips if skip.op == FUSED]
    assert skip.name == "inner.lm_head"
    assert skip.reason == "its model is inside a Policy: pass model.inner instead"
