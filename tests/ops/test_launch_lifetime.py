"""How long a Launch keeps its kernel: as long as it may start it, and no longer.

Kernel and driver are stand-ins, so that it is shown with any Triton, and without: a kernel here is
unloaded with its last reference, which not every Triton does.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from liger_kernels.ops import launcher


class Compiled:
    """A compiled kernel that is unloaded when nobody holds it."""

    def __init__(self, name: str, gpu: Gpu) -> None:
        self.function = f"address of {name}"
        self.packed_metadata = None
        # No method of this object, which would hold it.
        self.run = gpu.start
        gpu.loaded.add(self.function)
        weakref.finalize(self, gpu.loaded.discard, self.function)


class Gpu:
    """The driver, and all of Triton that a Launch reads."""

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self.started: list[str] = []
        self.is_broken = False
        self.device = 0
        self.arg_names = ["x", "y", "N"]
        self.starts_nothing = False

    def start(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        assert function in self.loaded, "a kernel that is not on the GPU was started"
        if self.is_broken:
            raise RuntimeError("launch failed")
        self.started.append(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(x: torch.Tensor, y: torch.Tensor | None, **others: Any) -> Compiled | None:
            if self.starts_nothing:
                return None
            compiled = Compiled(f"{x.dtype} on {self.device}", self)
            compiled.run(1, 1, 1, 0, compiled.function)
            return compiled

        return first

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    stand_in = SimpleNamespace(
        runtime=SimpleNamespace(driver=SimpleNamespace(active=gpu)),
        knobs=SimpleNamespace(runtime=hooks),
        compiler=SimpleNamespace(CompiledKernel=Compiled),
    )
    monkeypatch.setattr(launcher, "triton", stand_in)
    monkeypatch.setattr(launcher, "_STARTS_KERNELS", True)
    # What is freed is freed at once: a Launch is in no cycle that waits for a collection.
    gc.disable()
    yield gpu
    gc.enable()


def make(gpu: Gpu) -> launcher.Launch:
    return launcher.Launch(gpu, (1,), N=4)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, None]:
    return torch.zeros(16, dtype=dtype), None


def test_case_250_a_kernel_is_loaded_while_its_launch_is_there_and_no_longer(gpu):
    start = make(gpu)
    for _ in range(3):
        start(*tensors())
    assert gpu.started == ["address of torch.float32 on 0"] * 3
    assert gpu.loaded == {"address of torch.float32 on 0"}
    del start
    assert gpu.loaded == set()


def test_every_form_of_a_launch_is_kept_and_freed_with_it(gpu):
    start = make(gpu)
    for _ in range(2):
        for gpu.device in (0, 1):
            for dtype in (torch.float32, torch.bfloat16):
                start(*tensors(dtype))
    assert len(gpu.loaded) == 4
    assert len(gpu.started) == 8
    del start
    assert gpu.loaded == set()


def test_a_function_of_sizes_keeps_kernels_until_it_forgets_them(gpu, monkeypatch):
    monkeypatch.setattr(launcher, "_MAX_CACHED_SHAPES", 2)
    launch_of = launcher.cache_by_shape(lambda size: make(gpu))
    launch_of(0)(*tensors(torch.float32))
    launch_of(1)(*tensors(torch.bfloat16))
    assert len(gpu.loaded) == 2
    launch_of(2)(*tensors(torch.float16))
    assert gpu.loaded == {f"address of torch.{name} on 0" for name in ("bfloat16", "float16")}
    launch_of.cache_clear()
    assert gpu.loaded == set()


def test_a_launch_that_fails_keeps_its_kernel_and_its_error_does_not(gpu):
    start = make(gpu)
    start(*tensors())
    gpu.is_broken = True
    with pytest.raises(RuntimeError, match="launch failed") as caught:
        start(*tensors())
    gpu.is_broken = False
    start(*tensors())
    assert len(gpu.loaded) == 1
    # Its traceback has the frame of the launch, and with it the kernel.
    del caught
    del start
    assert gpu.loaded == set()


def test_what_never_started_is_not_kept(gpu):
    start = make(gpu)
    gpu.is_broken = True
    with pytest.raises(RuntimeError, match="launch failed") as caught:
        start(*tensors())
    del caught
    assert gpu.loaded == set()
    gpu.is_broken, gpu.starts_nothing = False, True
    start(*tensors())
    gpu.starts_nothing = False
    start(*tensors())
    assert gpu.started == ["address of torch.float32 on 0"]


def test_a_launch_keeps_no_tensor(gpu):
    start = make(gpu)
    x, y = torch.zeros(16), torch.zeros(16)
    kept = [weakref.ref(x), weakref.ref(y)]
    start(x, y)
    start(x, y)
    del x, y
    assert [tensor() for tensor in kept] == [None, None]
