"""The training loop, to be read from top to bottom; session.py has its parts.

The loss of an optimizer step is the mean over all its trained tokens, those of every micro-batch on
every process: the model gets their number (num_items_in_batch) and returns a sum divided by it. So
a step means the same whatever the accumulation, and a short window at the end of an epoch is
weighted by the tokens it has.
"""

from __future__ import annotations

from typing import Any

from liger_cli.common.measure import PeakMemory, StepTimer
from liger_cli.training.prepared import PreparedRun
from liger_cli.training.result import TrainResult
from liger_cli.training.runtime.profiling import StepProfiler
from liger_cli.training.runtime.stop_signals import StopRequest
from liger_cli.training.session import Callbacks, TrainSession

__all__ = ["train"]


def train(
    run: PreparedRun, model: Any, record: Any, callbacks: Callbacks | None = None
) -> TrainResult:
    """Train a model and return the metrics of every step.

    Args:
        run: The prepared run.
        model: The patched model on the device of the run.
        record: The PatchRecord of the model.
        callbacks: Functions to call after steps and evaluations.

    Raises:
        NonFiniteLoss: The loss or a gradient is NaN or infinite; checkpoints before it are kept.
        EnvironmentProblem: A checkpoint or a log cannot be written; checkpoints before it are kept.
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
    """
    session = TrainSession(run, model, record, callbacks)
    session.settle()
    session.resume()
    timer = StepTimer(run.device)
    trace = run.run_dir / f"profile-{run.config.profile_steps}.json"
    traced = run.config.profiled_steps if run.is_main else range(0)
    with (
        session.saving(),
        PeakMemory(run.device) as memory,
        StepProfiler(traced, trace, run.device) as profiler,
        StopRequest() as stop,
    ):
        timer.start()
        while not session.is_done:
            memory.reset()
            profiler.begin(session.num_done + 1)
            done = session.step()
            session.log(done, timer.lap(done.num_tokens), memory.num_bytes)
            is_saved = session.save(stop_requested=stop.requested)
            is_evaluated = session.evaluate_if_due()
            if profiler.end(session.num_done) or is_saved or is_evaluated:
                # A pause is no part of the next step.
                timer.start()
    return session.finish()
