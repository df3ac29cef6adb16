"""When a checkpoint is written, which ones are kept, and which one is the best.

With async_save training goes on while one is written, and waits for it before the next one, and
before the run ends.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from liger_cli.common.numbers import format_bytes
from liger_cli.config import RunConfig
from liger_cli.errors import EnvironmentProblem
from liger_cli.training.checkpoints.background import (
    BackgroundWrite,
    HostCopies,
    fits_hosts,
    make_writers,
)
from liger_cli.training.checkpoints.files import checkpoint_path, delete_old, mark_best
from liger_cli.training.checkpoints.run_log import JsonLines
from liger_cli.training.checkpoints.state import (
    TrainState,
    kept_line,
    stage_checkpoint,
    write_checkpoint,
)
from liger_cli.training.checkpoints.writers import Writers
from liger_cli.training.evaluations import Evaluations

__all__ = ["Saver", "is_due"]

_log = logging.getLogger(__name__)

# How long a process that fails waits for its checkpoint: others wait for the process.
_PATIENCE_S = 10.0


class _Pending(NamedTuple):
    """The checkpoint of a step that is being written."""

    step: int
    write: BackgroundWrite


class Saver:
    """Writes the checkpoints of a run. Every process calls it.

    Args:
        config: How often, and how many are kept.
        run_dir: Where checkpoints go.
        state: The state to save, the model included.
        log: The steps so far.
        evals: The evaluations so far.
        resumed: The checkpoint that the run was resumed from, in this directory or another.
        is_on: False writes nothing, for a run that only measures.

    Attributes:
        newest: The newest checkpoint that is whole.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        state: TrainState,
        *,
        log: JsonLines,
        evals: Evaluations,
        resumed: Path | None = None,
        is_on: bool = True,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._state = state
        self._log = log
        self._evals = evals
        self._is_on = is_on
        self._is_main = is_on and state.accelerator.is_main_process
        self._saved_at = time.monotonic()
        self._stage, self._writers = self._make_stage()
        self._everyone = Writers()
        self._has_room = False
        self._pending: _Pending | None = None
        # Whole, or being written.
        self._last = self.newest = resumed
        self._mark_best()

    def _make_stage(self) -> tuple[HostCopies | None, Writers]:
        """Return the copier of the state, if training does not wait for files, and the writers."""
        accelerator = self._state.accelerator
        count = accelerator.num_processes
        if not (self._is_on and self._config.saves_async(count)):
            return None, Writers()
        return HostCopies(accelerator.device), make_writers(count, self._config.ddp_timeout)

    @property
    def is_late(self) -> bool:
        """Whether save_minutes have gone by; the main process's clock alone decides."""
        minutes = (time.monotonic() - self._saved_at) / 60
        return self._is_main and 0 < self._config.save_minutes <= minutes

    @property
    def has_failed(self) -> bool:
        """Whether a write has failed that training did not wait for: `finish` raises its error."""
        return self._pending is not None and self._pending.write.has_failed

    def save_if_due(self, step: int, *, now: bool, is_final: bool) -> bool:
        """Write the checkpoint of a step if it is due or asked for; return whether it was begun.

        Args:
            now: Whether it is asked for.
            is_final: Whether the run ends with it.

        Raises:
            EnvironmentProblem: It, or the one before, cannot be written; those before that are as
                they were.
        """
        if self._pending is not None and self._pending.write.is_done and not self.has_failed:
            self.finish()
        saves = self._is_on and (now or is_due(step, self._config.save_steps))
        if saves:
            self._save(step, is_final=is_final)
        return saves

    def evaluated(self, step: int) -> None:
        """Write the checkpoint that an evaluation asks for: of the best model, or of an early end.

        Raises:
            EnvironmentProblem: As save_if_due.
        """
        is_saved = self._last == checkpoint_path(self._run_dir, step)
        is_best = self._config.load_best_model_at_end and 0 < step == self._evals.best_step
        ends = self._evals.should_stop
        # When it was saved nobody knew that it is the last.
        is_short = ends and self._state.is_sharded and self._config.save_consolidated == "final"
        if self._is_on and (is_short or not is_saved) and (is_best or ends):
            self._save(step, is_evaluated=True, is_final=ends)
        self._mark_best()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole.

        Raises:
            EnvironmentProblem: It cannot be written; the same on all processes.
        """
        if self._pending is not None:
            (step, write), self._pending = self._pending, None
            write.result()
            self._written(step)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Give the checkpoint that is being written some time if the block raises an error.

        Not after a KeyboardInterrupt, which is to end the run at once.
        """
        try:
            yield
        except Exception:
            if self._pending is not None:
                self._pending.write.wait(_PATIENCE_S)
            raise

    def _save(self, step: int, *, is_evaluated: bool = False, is_final: bool) -> None:
        self.finish()
        # A checkpoint on the disk must not be ahead of the logs there.
        problem = self._everyone.first_problem(self._sync_logs())
        copies = self._copies()
        target = checkpoint_path(self._run_dir, step)
        with self._everyone.together(target, kept_line(self._run_dir)):
            staged = stage_checkpoint(
                step,
                self._state,
                self._config,
                copies or (lambda tree: tree),
                is_evaluated=is_evaluated,
                is_final=is_final,
            )
        self._saved_at, self._last = time.monotonic(), target
        write = functools.partial(write_checkpoint, self._run_dir, staged, self._writers)
        if copies is None:
            write()
            self._written(step)
        else:
            self._pending = _Pending(step, BackgroundWrite(write))
        if problem is not None:
            self.finish()
            raise problem

    def _copies(self) -> HostCopies | None:
        """Return the copier of the state; None from the first save on where a host has no room."""
        if self._stage is not None and not self._has_room:
            fits, needed, free = fits_hosts(self._state.num_bytes)
            self._has_room = fits
            if not fits:
                self._stage = None
                if self._is_main:
                    _log.warning(
                        "training waits for checkpoints: the copies of async_save take %s, and the "
                        "host has %s free",
                        format_bytes(needed),
                        format_bytes(free),
                    )
        return self._stage

    def _written(self, step: int) -> None:
        self.newest = checkpoint_path(self._run_dir, step)
        if self._is_main and self._config.save_total_limit is not None:
            limit, best = self._config.save_total_limit, self._evals.best_step
            delete_old(self._run_dir, step, limit, _log.warning, best=best)
        self._mark_best()

    def _sync_logs(self) -> EnvironmentProblem | None:
        """Bring the logs to the disk; return the error of one that cannot be written.

        The run ends with it, after the checkpoint that would be lost otherwise.
        """
        if self._is_main:
            try:
                self._log.sync()
                self._evals.sync()
            except EnvironmentProblem as problem:
                name = checkpoint_path(self._run_dir, self._log.rows[-1]["step"]).name
                problem.hint = (
                    f"{name} was written, and --resume auto continues from it; the steps whose "
                    "lines could not be written are missing in the log."
                )
                return problem
        return None

    def _mark_best(self) -> None:
        if self._is_main:
            mark_best(self._run_dir, self._evals.best_step, _log.warning)


def is_due(step: int, interval: int) -> bool:
    """Return whether something with an interval in steps is due after this one; 0 is never."""
    return interval > 0 and step % interval == 0
