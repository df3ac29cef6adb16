"""Ctrl-C anywhere while a model is patched or restored: another call leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import accelerate.hooks
import pytest
import torch
import transformers
import zoo
from checks import assert_same, run, snapshot
from torch import nn

import liger_kernels.transformers
from liger_kernels.transformers import apply_liger_kernel, class_mode, inspect_model, restore
from liger_kernels.transformers.lazy_logits import head
from liger_kernels.transformers.patching import engine
from liger_kernels.transformers.patching.engine import apply
from liger_kernels.transformers.replacements import subclasses

_FILES = {module.__file__ for module in (engine, subclasses, head, class_mode)}


class _Interrupt:
    """Raises KeyboardInterrupt before the k-th line that runs in the files that patch."""

    def __init__(self, k: int) -> None:
        self.left = k

    def __enter__(self) -> _Interrupt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> bool:
        sys.settrace(None)
        return isinstance(error[1], KeyboardInterrupt)

    def _call(self, frame: FrameType, event: str, value: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename in _FILES else None

    def _line(self, frame: FrameType, event: str, value: Any) -> Callable[..., Any] | None:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def _interrupted(call: Callable[[], Any], k: int) -> bool:
    """Return whether a call had a k-th line, before which it was interrupted."""
    with _Interrupt(k) as interrupt:
        call()
    return interrupt.left <= 0


def _small_model() -> nn.Module:
    """Return a model with hooks of accelerate on two modules, whose forwards hold the class's."""
    model = zoo.build("llama", num_hidden_layers=1).train()
    for module in (model.model.norm, model.model.layers[0].mlp):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    return model


def _forwards(model: nn.Module) -> dict[str, Any]:
    """Return the functions that modules hold as forwards: equal ones may be other objects."""
    return {
        f"{name}.{slot}": getattr(vars(module)[slot], "__func__", None)
        for name, module in model.named_modules()
        for slot in ("forward", "_old_forward")
        if slot in vars(module)
    }


@pytest.fixture
def state():
    model = _small_model()
    return model, inspect_model(model, "all"), snapshot(model), _forwards(model)


def test_case_213_an_interrupted_apply_leaves_the_model_as_it_was(state):
    model, plan, before, forwards = state
    for k in range(1, 5000):
        if not _interrupted(lambda: apply(model, plan), k):
            break
        assert snapshot(model) == before, k
        assert _forwards(model) == forwards, k
    else:
        pytest.fail("the call has more lines than were tried")
    assert k > 200
    restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("by", ["record", "restore"])
def test_case_213_an_interrupted_undo_is_finished_by_another(state, by):
    model, plan, before, forwards = state
    for k in range(1, 5000):
        record = apply(model, plan)
        undo = record.undo if by == "record" else lambda: restore(model)
        is_interrupted = _interrupted(undo, k)
        undo()
        assert snapshot(model) == before, k
        assert _forwards(model) == forwards, k
        if not is_interrupted:
            break
    else:
        pytest.fail("the call has more lines than were tried")
    assert k > 100


def test_case_213_restore_finishes_an_undo_of_the_record(state):
    model, plan, before, forwards = state
    for k in range(1, 400):
        record = apply(model, plan)
        _interrupted(record.undo, k)
        restore(model)
        assert snapshot(model) == before, k
        assert _forwards(model) == forwards, k


def test_case_213_a_model_interrupted_and_patched_again_is_stock_in_numbers():
    model, inputs = zoo.build("qwen2", num_hidden_layers=1).train(), zoo.text_inputs()
    reference = run(model, inputs)
    record = apply_liger_kernel(model, "all")
    assert _interrupted(record.undo, 90)
    assert any(map(subclasses.is_patched, model.modules()))
    record.undo()
    assert_same(run(model, inputs), reference)
    with apply_liger_kernel(model, "all").count_calls():
        assert_same(run(model, inputs), reference)


def test_case_213_interrupted_class_mode_ends_with_undo():
    config = zoo.config_of("llama", num_hidden_layers=1)
    cls = transformers.LlamaForCausalLM
    stock = {c: vars(c).get("__init__") for c in (cls, transformers.LlamaForSequenceClassification)}

    def num_patched() -> int:
        torch.manual_seed(0)
        return sum(subclasses.is_patched(module) for module in cls(config).modules())

    def is_stock() -> bool:
        return all(vars(c).get("__init__") is init for c, init in stock.items())

    for k in range(1, 5000, 3):
        if not _interrupted(liger_kernels.transformers.apply_liger_kernel_to_llama, k):
            break
        assert is_stock(), k
    # Nobody has the record of the call that ended.
    (record,) = class_mode._watchers[cls]
    for k in range(1, 5000, 3):
        is_interrupted = _interrupted(record.undo, k)
        record.undo()
        assert is_stock(), k
        if not is_interrupted:
            break
        record = liger_kernels.transformers.apply_liger_kernel_to_llama()
    assert num_patched() == 0
