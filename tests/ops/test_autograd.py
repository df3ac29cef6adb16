"""What the backward of every op has in common: the thread it runs on."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from liger_kernels.ops import autograd, swiglu


def backward(device: str = "cpu") -> None:
    x = torch.randn(2, 8, device=device, requires_grad=True)
    swiglu(x, x).sum().backward()


def test_each_thread_keeps_its_state_once(monkeypatch):
    kept: list[int] = []
    entry = SimpleNamespace(PyGILState_Ensure=lambda: kept.append(threading.get_ident()))
    monkeypatch.setattr(autograd.ctypes, "pythonapi", entry)

    def work() -> None:
        backward()
        backward()

    # One after the other: Triton's interpreter serves one thread at a time.
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(kept) == 2, "once a thread, however many nodes run on it"


def test_a_thread_of_python_ends_as_ever():
    thread = threading.Thread(target=backward)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.gpu
def test_the_thread_of_a_device_keeps_its_state():
    """What Python knows of a thread is lost with its state: a thread-local value shows it."""
    local = threading.local()
    seen: list[int] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            local.calls = getattr(local, "calls", 0) + 1
            seen.append(local.calls)
            return dy

    backward("cuda")
    for _ in range(3):
        Probe.apply(torch.ones(2, device="cuda", requires_grad=True)).sum().backward()
    assert seen == [1, 2, 3]
