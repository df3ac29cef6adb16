"""Step times and peak memory."""

from __future__ import annotations

import time

import pytest
import torch

from liger_cli.common import measure
from liger_cli.common.measure import PeakMemory, StepTimer, median_after_warm_up
from liger_cli.training.runtime.async_scalars import AsyncScalars

CPU = torch.device("cpu")
BLOCK_BYTES = 256 * 2**20


class Clock:
    """A fake of the module `time`, whose clock a test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def allocate() -> None:
    block = torch.ones(BLOCK_BYTES // 4)
    # Longer than the interval of the samples.
    time.sleep(0.05)
    del block


def test_peak_of_a_cpu_sees_what_came_and_went():
    with PeakMemory(CPU) as memory:
        before = memory.num_bytes
        allocate()
        assert memory.num_bytes - before > 0.9 * BLOCK_BYTES
        memory.reset()
        assert memory.num_bytes - before < 0.5 * BLOCK_BYTES
        allocate()
    after = memory.num_bytes
    assert after - before > 0.9 * BLOCK_BYTES
    allocate()
    assert memory.num_bytes == after


@pytest.mark.gpu
def test_peak_of_a_gpu_is_its_allocator():
    device = torch.device("cuda")
    with PeakMemory(device) as memory:
        before = memory.num_bytes
        torch.ones(BLOCK_BYTES // 4, device=device)
        assert memory.num_bytes - before >= BLOCK_BYTES
        memory.reset()
        assert memory.num_bytes - before < BLOCK_BYTES


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_timer(clock):
    timer = StepTimer(CPU)
    timer.start()
    clock.now += 0.02
    step = timer.lap(num_tokens=100)
    assert step.step_ms == pytest.approx(20)
    assert step.tokens_per_s == pytest.approx(5000)


def test_steps_of_a_timer_leave_nothing_out_but_pauses(clock):
    timer = StepTimer(CPU)
    timer.start()
    steps = []
    for seconds in (0.01, 0.02, 0.04):
        clock.now += seconds
        steps.append(timer.lap(num_tokens=1).step_ms)
        # What a loop does between two steps, its log for example, is time of the run.
        clock.now += 0.1
    steps.append(timer.lap(num_tokens=1).step_ms)
    assert steps == pytest.approx([10, 120, 140, 100])
    clock.now += 5
    timer.start()
    clock.now += 0.001
    assert timer.lap(num_tokens=1).step_ms == pytest.approx(1)


def test_values_on_the_way_are_those_of_the_moment(device):
    total = torch.full((), 2.0, device=device)
    values = AsyncScalars(total, torch.full((), 3.0, dtype=torch.bfloat16, device=device))
    total += 1
    assert values.get() == [2.0, 3.0]


@pytest.mark.gpu
def test_values_do_not_wait_for_later_work():
    device = torch.device("cuda")
    values = AsyncScalars(torch.ones((), device=device))
    torch.cuda._sleep(2_000_000_000)
    begin = time.perf_counter()
    assert values.get() == [1.0]
    waited = time.perf_counter() - begin
    torch.cuda.synchronize()
    assert waited < 0.5 * (time.perf_counter() - begin)


def test_median_leaves_out_the_warm_up():
    """case 103: the first step compiles."""
    assert median_after_warm_up([3053.0, 2.0, 4.0, 3.0]) == 3.0
    assert median_after_warm_up([5.0]) == 5.0
