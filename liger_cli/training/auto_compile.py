"""torch_compile auto: compile layers where the GPU waits for the host, as measured before step 1.

A compiled layer starts fewer kernels, which saves at most the time that the GPU waits: the share of
a step in which no kernel runs. Where that is small, or the run too short to earn what compiling
costs, compiling would lose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from liger_cli.common.failures import is_out_of_memory
from liger_cli.common.measure import free_cached_memory
from liger_cli.config import RunConfig
from liger_cli.data.feed import make_feed
from liger_cli.training.checkpoints.random_state import kept_random_state
from liger_cli.training.model.loading import layers_of
from liger_cli.training.objectives.objective import Objective
from liger_cli.training.prepared import PreparedRun
from liger_cli.training.runtime import device_timer

__all__ = ["AUTO", "Decision", "decide_early", "decide_measured"]

AUTO = "auto"

# Share of a step that the GPU must wait for the host: below, what is saved is within the noise.
_LEAST_SHARE = 0.10
# Compiling one kind of layer for one shape of batch. The first steps of patched+compile in
# docs/results/bench-*-h200.json take 7.4 s (llama-1b), 7.7 s (qwen3-0.6b) and 18.4 s (gemma3-1b).
_COMPILE_S = 20.0


@dataclass(frozen=True)
class Decision:
    """Whether layers are compiled, and why.

    Attributes:
        reason: In words, for the line of the run.
    """

    compiles: bool
    reason: str

    @property
    def line(self) -> str:
        return f"torch_compile: auto: {self.reason}"


def decide_early(
    config: RunConfig, device: torch.device, *, is_quantised: bool, saved: bool | None
) -> Decision | None:
    """Decide without a measurement, or return None where one is needed.

    Args:
        is_quantised: Whether the weights of the model are held in few bits.
        saved: What the checkpoint that the run resumes from was trained with.
    """
    if device_timer.device_timer(device) is None:
        return Decision(False, f"not compiled: the run is on {device.type}")
    if config.gradient_checkpointing:
        why = "with gradient_checkpointing torch compiles nothing inside of the layers"
        return Decision(False, f"not compiled: {why}")
    if config.tile_size is not None:
        return Decision(
            False, "not compiled: tile_tokens runs MLPs piece by piece, as no one graph"
        )
    if is_quantised:
        return Decision(False, "not compiled: the model is quantised")
    if config.use_regional_compilation is False:
        why = "use_regional_compilation is false, and auto compiles layers one by one"
        return Decision(False, f"not compiled: {why}")
    if saved is not None:
        return Decision(saved, f"{'' if saved else 'not '}compiled, as before the resume")
    return None


def decide_measured(run: PreparedRun, model: Any, objective: Objective) -> Decision:
    """Measure passes of the first batch, and compile the layers of the model where that pays.

    Random generators, gradients, buffers and the data are as before, and no optimizer step is
    done. Every process calls it and has the same result: that of the main one, or not to compile
    where a process would not.

    Args:
        run: The prepared run, whose torch_compile is auto.
        model: The prepared model.
        objective: Of the run.
    """
    with _untouched(model, run.device):
        step = _Pass(run, model, objective)
        found = _measure(step)
        decision = _agreed(found if isinstance(found, Decision) else _judge(found, run, model))
        if decision.compiles:
            assert not isinstance(found, Decision)
            decision = _agreed(_compile(decision, found, step))
            if not decision.compiles:
                _undo(model)
    # What a pass that failed has left is held by cycles of its graph.
    free_cached_memory()
    return decision


@dataclass(frozen=True)
class _Idle:
    """Measurements of a pass.

    Attributes:
        share: Part of the time in which the GPU runs no kernel.
        pass_s: Seconds of forward and backward of a micro-batch.
        step_s: Of all micro-batches of a step.
    """

    share: float
    pass_s: float
    step_s: float

    @property
    def words(self) -> str:
        return (
            f"the GPU waits for the host {self.share:.0%} of a step of {1e3 * self.step_s:.0f} ms"
        )


class _Pass:
    """Forward and backward of the first micro-batch of a run, without an optimizer step."""

    def __init__(self, run: PreparedRun, model: Any, objective: Objective) -> None:
        timer = device_timer.device_timer(run.device)
        assert timer is not None, "decide_early has decided"
        self.timer = timer
        # A feed for this alone: that of the run stays where it is.
        [window] = make_feed(run.inputs.train, run.batches, run.inputs.collator).windows(1, 1)
        self._batch, self.num_batches = window[0], len(window)
        self._engine, self.model, self._objective = run.engine, model, objective

    def __call__(self) -> None:
        self.model.zero_grad()
        with self._engine.micro_step(self.model, is_last=True):
            totals = self._objective.count(self._batch)
            self._objective.begin(self.model, [self._batch], totals)
            self._engine.backward(self._objective.part(self.model, self._batch, totals).loss)


@contextlib.contextmanager
def _untouched(model: Any, device: torch.device) -> Iterator[None]:
    """Train inside, and leave gradients, buffers and random generators as they were."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    try:
        with kept_random_state(device):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for buffer, before in buffers:
            buffer.copy_(before)


def _measure(step: _Pass) -> _Idle | Decision:
    """Return the measurements, or the decision against compiling where there are none."""
    try:
        step()
        elapsed = step.timer.elapsed(step)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Decision(False, "not compiled: memory ran out in the passes that measure")
    try:
        busy = step.timer.busy(step)
    # Two passes have run: it is the profiler that fails, with errors of its libraries.
    except Exception as error:
        why = "memory ran out" if is_out_of_memory(error) else _first_line(error)
        return Decision(False, f"not compiled: torch.profiler cannot measure here: {why}")
    if busy <= 0:
        return Decision(False, "not compiled: torch.profiler sees no kernels here (CUPTI)")
    share = max(0.0, 1 - busy / elapsed)
    return _Idle(share, elapsed, elapsed * step.num_batches)


def _judge(idle: _Idle, run: PreparedRun, model: Any) -> Decision:
    """Decide by what compiling may save and what it costs."""
    if idle.share <= _LEAST_SHARE:
        return Decision(False, f"{idle.words}; not compiled: at most {_LEAST_SHARE:.0%}")
    layers = layers_of(model)
    if not layers:
        return Decision(False, f"{idle.words}; not compiled: no list of layers found")
    # Batches of other lengths are compiled once more, for lengths that vary.
    num_shapes = 1 if run.config.packing else 2
    cost = _COMPILE_S * num_shapes * len({type(layer) for layer in layers})
    steps = run.num_steps - run.first_step
    saving = idle.share * idle.step_s * steps
    words = f"{idle.words}; {steps} steps save up to {saving:.0f} s, compiling costs {cost:.0f} s"
    if saving <= cost:
        return Decision(False, f"{words}; not compiled")
    return Decision(True, f"{words}; {len(layers)} layers are compiled, one by one")


def _compile(decision: Decision, idle: _Idle, step: _Pass) -> Decision:
    """Compile the layers and time a pass; decide against where that fails or is no faster."""
    for layer in layers_of(step.model):
        layer.compile()
    try:
        step()
        elapsed = step.timer.elapsed(step)
    # Compilers fail with errors of any kind; the same pass ran before.
    except Exception as error:
        why = "memory ran out" if is_out_of_memory(error) else _first_line(error)
        return Decision(False, f"{idle.words}; not compiled: compiling fails: {why}")
    if elapsed >= idle.pass_s:
        times = f"{1e3 * elapsed:.0f} ms, {1e3 * idle.pass_s:.0f} ms without"
        return Decision(False, f"{idle.words}; not compiled: compiled, a pass takes {times}")
    return decision


def _undo(model: Any) -> None:
    for layer in layers_of(model):
        # What nn.Module.compile sets; there is no public way back.
        layer._compiled_call_impl = None
    torch.compiler.reset()


def _agreed(decision: Decision) -> Decision:
    """Return the decision of the main process, or not to compile where another one would not."""
    decisions: list[Decision] = gather_object([decision])
    first = decisions[0]
    for number, other in enumerate(decisions):
        if first.compiles and not other.compiles:
            return Decision(False, f"not compiled, because of process {number}: {other.reason}")
    return first


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
