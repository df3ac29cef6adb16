"""Poisoned memory for the ops: what a kernel does not write is NaN, not luck."""

from __future__ import annotations

import pytest
import torch
import torch.utils._device

# `with torch.device(...)` collects the allocators once a process: these, not the poisoned ones, or
# it has no effect on torch.empty in any later test.
torch.utils._device._device_constructors()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(function):
        def allocate(*args, **kwargs):
            out = function(*args, **kwargs)
            with torch.no_grad():
                out.fill_(float("nan") if out.is_floating_point() else -(2**30))
            return out

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture
def true_allocators(monkeypatch):
    """Take the poison of conftest.py back: a wrapper of torch.empty cannot be traced."""
    monkeypatch.undo()
    # The tracer's list of torch functions may have been made under the poison.
    torch._dynamo.trace_rules.clear_lru_cache()
