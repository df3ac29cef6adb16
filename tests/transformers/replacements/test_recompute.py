"""Recipes in place of saved tensors: the same numbers, less memory, and never the wrong tensor."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from checks import assert_same, run
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from zoo import FAMILIES, build, text_inputs

from liger_kernels.ops import rms_norm
from liger_kernels.transformers import (
    apply_liger_kernel,
    apply_liger_kernel_to_llama,
    inspect_model,
)
from liger_kernels.transformers.replacements.recompute import recomputing, remember


def norm(x, weight, calls=None):
    """A norm whose output can be made again; `calls` counts how often it is."""

    def make():
        if calls is not None:
            calls.append(1)
        return rms_norm(x.detach(), weight.detach())

    y = rms_norm(x, weight)
    remember(y, make)
    return y


def make(width=8, rows=(2, 5)):
    torch.manual_seed(0)
    x = torch.randn(*rows, width, requires_grad=True)
    weight = torch.randn(width, requires_grad=True)
    layers = nn.ModuleList(nn.Linear(width, size) for size in (8, 4, 4))
    return x, weight, layers


def step(x, weight, layers, *, saves: bool, calls=None):
    y = norm(x, weight, calls)
    with recomputing(*([y] if saves else [])):
        out = torch.cat([layer(y) for layer in layers], dim=-1)
    return out


def gradients(out, tensors):
    return torch.autograd.grad(out.square().sum(), tensors)


def test_same_gradients_and_made_once_for_all_projections():
    x, weight, layers = make()
    tensors = [x, weight, *layers.parameters()]
    calls: list[int] = []
    kept = gradients(step(x, weight, layers, saves=False), tensors)
    remade = gradients(step(x, weight, layers, saves=True, calls=calls), tensors)
    assert all(torch.equal(a, b) for a, b in zip(kept, remade, strict=True))
    assert len(calls) == 1


def test_the_output_is_freed_and_made_again():
    x, weight, layers = make()
    y = norm(x, weight)
    with recomputing(y):
        out = layers[0](y)
    freed = weakref.ref(y.untyped_storage())
    del y
    gc.collect()
    assert freed() is None
    out.sum().backward()
    assert layers[0].weight.grad.abs().sum() > 0


def test_a_second_backward_makes_it_again():
    x, weight, layers = make()
    calls: list[int] = []
    out = step(x, weight, layers, saves=True, calls=calls).square().sum()
    first = torch.autograd.grad(out, list(layers.parameters()), retain_graph=True)
    second = torch.autograd.grad(out, list(layers.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(calls) == 2


def test_an_output_changed_in_place_is_kept_as_it_is():
    x, weight, layers = make()
    calls: list[int] = []

    def run(saves):
        y = norm(x, weight, calls)
        y.mul_(3.0)
        with recomputing(*([y] if saves else [])):
            return layers[0](y)

    parameters = [layers[0].weight, x]
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            gradients(run(False), parameters), gradients(run(True), parameters), strict=True
        )
    )
    assert not calls


def test_an_output_changed_inside_is_kept_as_it_is():
    x, weight, layers = make()
    calls: list[int] = []
    y = norm(x, weight, calls)
    with recomputing(y):
        z = y.mul_(2.0)
        out = layers[0](z)
    (grad,) = torch.autograd.grad(out.sum(), [layers[0].weight])
    expected = z.detach().reshape(-1, 8).sum(0).expand(8, 8)
    torch.testing.assert_close(grad, expected)
    assert not calls


def test_part_of_an_output_is_no_output():
    x, weight, layers = make()
    calls: list[int] = []
    y = norm(x, weight, calls)
    with recomputing(y):
        # Starts where y starts, and is another tensor.
        out = layers[0](y[:1])
    out.sum().backward()
    torch.testing.assert_close(layers[0].weight.grad[0], y[:1].detach().sum((0, 1)))
    assert not calls


def test_what_was_saved_may_not_change_before_backward():
    x, weight, layers = make()
    y = norm(x, weight)
    with recomputing(y):
        h = layers[0](y)
        out = (h * h).sum()
    h.data.zero_()
    with torch.no_grad():
        h.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_case_91_inside_a_checkpoint_nothing_interferes(use_reentrant):
    x, weight, layers = make()
    tensors = [x, weight, *layers.parameters()]
    kept = gradients(step(x, weight, layers, saves=False), tensors)
    out = checkpoint(lambda x: step(x, weight, layers, saves=True), x, use_reentrant=use_reentrant)
    out.square().sum().backward()
    for tensor, wanted in zip(tensors, kept, strict=True):
        assert torch.equal(tensor.grad, wanted)


def test_hooks_of_others_keep_their_tensors():
    x, weight, layers = make()
    seen = []
    y = norm(x, weight)
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.append(t.shape) or t.detach(), lambda t: t
        ),
        recomputing(y),
    ):
        layers[0](y)
    assert torch.Size([10, 8]) in seen or torch.Size([2, 5, 8]) in seen


def test_hooks_that_are_forbidden_are_not_set():
    x, weight, layers = make()
    y = norm(x, weight)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"), recomputing(y):
        assert layers[0](y).requires_grad


def test_nothing_is_noted_where_nothing_is_differentiated():
    x, weight, layers = make()
    calls: list[int] = []
    with torch.no_grad():
        step(x, weight, layers, saves=True, calls=calls)
    with torch.inference_mode():
        step(x.detach(), weight.detach(), layers, saves=True, calls=calls)
    assert not calls


def test_values_of_any_type_are_let_through():
    with recomputing(None, 3, "mask", torch.zeros(2), (torch.zeros(1),)):
        pass


def test_outputs_are_saved_to_files_as_ever():
    x, weight, _ = make()
    y = norm(x, weight)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), y)


def test_autocast_copies_are_kept():
    x, weight, layers = make()
    tensors = [x, weight, *layers.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        kept = gradients(step(x, weight, layers, saves=False).float(), tensors)
        remade = gradients(step(x, weight, layers, saves=True).float(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(kept, remade, strict=True))


class Alive(TorchDispatchMode):
    """Counts the bytes of what was made inside, beyond a model's parameters, and still lives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, out)
        return out

    def _note(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self._given:
            self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    @property
    def num_bytes(self) -> int:
        return sum(size for ref, size in self._made.values() if not ref.expired())


def bytes_after_forward(model: nn.Module, inputs) -> int:
    with Alive(model) as alive:
        out = model(**inputs, use_cache=False)
        loss = out.loss
        del out
        gc.collect()
        num_bytes = alive.num_bytes
    loss.backward()
    return num_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_less_and_computes_the_same_bits(family):
    model, inputs = build(family).train(), text_inputs()
    kept, runs = [], []
    for save_memory in (False, True):
        record = apply_liger_kernel(model, "all", save_memory=save_memory)
        runs.append(run(model, inputs))
        kept.append(bytes_after_forward(model, inputs))
        record.undo()
    assert_same(runs[1], runs[0], tolerance=0.0)
    # Hidden 32 and intermediate 48, fp32: a token and layer keep the outputs of two norms less, and
    # a product; mixtral's experts keep theirs.
    num_tokens, num_layers = inputs["input_ids"].numel(), 2
    saved = 4 * num_tokens * num_layers * (32 if family == "mixtral" else 2 * 32 + 48)
    assert kept[0] - kept[1] >= saved


# Without lora_linear the product of gate and up is recomputed; with it, it is never kept.
@pytest.mark.parametrize(("ops", "product"), [("all", 0), ("all,-lora_linear", 48)])
def test_lora_keeps_less_too(ops, product):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, inputs = build("llama"), text_inputs()
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    kept, runs = [], []
    for save_memory in (False, True):
        record = apply_liger_kernel(model, ops, save_memory=save_memory)
        runs.append(run(model, inputs))
        kept.append(bytes_after_forward(model, inputs))
        record.undo()
    assert_same(runs[1], runs[0], tolerance=0.0)
    # The first norm is frozen and so is what it reads: its output is kept.
    num_tokens = inputs["input_ids"].numel()
    assert kept[0] - kept[1] >= 4 * num_tokens * (2 * (2 * 32 + product) - 32)


@pytest.mark.parametrize("change", ["bias", "hook", "forward", "adapter", "dtype"])
def test_an_mlp_that_is_not_plain_runs_through_its_layers(change):
    torch.manual_seed(0)
    model, inputs = build("llama").train(), text_inputs()
    called = []
    for layer in model.model.layers:
        down = layer.mlp.down_proj
        if change == "bias":
            down.bias = nn.Parameter(torch.randn(32))
        elif change == "hook":
            down.register_forward_hook(lambda *args: called.append(1))
        elif change == "forward":
            original = down.forward
            down.forward = lambda x, original=original: 2.0 * original(x)
        elif change == "adapter":
            layer.mlp.down_proj = nn.Sequential(down, nn.Linear(32, 32))
        else:
            layer.mlp.register_forward_pre_hook(lambda module, args: (args[0].double(),))
            layer.mlp.double().register_forward_hook(lambda module, args, out: out.float())
    stock = run(model, inputs)
    num_called = len(called)
    apply_liger_kernel(model, "all")
    assert_same(run(model, inputs), stock)
    assert len(called) == 2 * num_called


def test_copies_and_files_keep_the_choice():
    model = build("llama")
    apply_liger_kernel(model, "all", save_memory=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.model.layers[0].mlp._saves_memory
    assert not inspect_model(model, "none").patches


def test_plans_and_records_say_what_was_chosen():
    model = build("llama")
    assert apply_liger_kernel(model, "all").to_dict()["save_memory"] is True
    family = apply_liger_kernel_to_llama(model=build("llama"), save_memory=False)
    assert family.plan.save_memory is False
    with pytest.raises(ValueError, match="save_memory='no'"):
        apply_liger_kernel_to_llama(model=build("llama"), save_memory="no")
