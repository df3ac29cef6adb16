"""When a checkpoint is written, which ones are kept, and which one is the best."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from liger_cli.config import RunConfig
from liger_cli.errors import EnvironmentProblem
from liger_cli.training.checkpoints.files import checkpoint_path, delete_old, mark_best
from liger_cli.training.checkpoints.run_log import JsonLines
from liger_cli.training.checkpoints.state import TrainState, raise_everywhere, save_checkpoint
from liger_cli.training.evaluations import Evaluations

__all__ = ["Saver", "is_due"]

_log = logging.getLogger(__name__)


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
        self.newest = resumed
        self._mark_best()

    @property
    def is_late(self) -> bool:
        """Whether save_minutes have gone by; the main process's clock alone decides."""
        minutes = (time.monotonic() - self._saved_at) / 60
        return self._is_main and 0 < self._config.save_minutes <= minutes

    def save_if_due(self, step: int, *, now: bool, is_final: bool) -> bool:
        """Write the checkpoint of a step if it is due or asked for; return whether it was written.

        Args:
            now: Whether it is asked for.
            is_final: Whether the run ends with it.

        Raises:
            EnvironmentProblem: It cannot be written; those before it are as they were.
        """
        saves = self._is_on and (now or is_due(step, self._config.save_steps))
        if saves:
            self._save(step, is_final=is_final)
        return saves

    def evaluated(self, step: int) -> None:
        """Write the checkpoint that an evaluation asks for: of the best model, or of an early end.

        Raises:
            EnvironmentProblem: As save_if_due.
        """
        is_saved = self.newest == checkpoint_path(self._run_dir, step)
        is_best = self._config.load_best_model_at_end and 0 < step == self._evals.best_step
        ends = self._evals.should_stop
        # When it was saved nobody knew that it is the last.
        is_short = ends and self._state.is_sharded and self._config.save_consolidated == "final"
        if self._is_on and (is_short or not is_saved) and (is_best or ends):
            self._save(step, is_evaluated=True, is_final=ends)
        self._mark_best()

    def _save(self, step: int, *, is_evaluated: bool = False, is_final: bool) -> None:
        # A checkpoint on the disk must not be ahead of the logs there.
        problem = self._sync_logs()
        self.newest = save_checkpoint(
            self._run_dir,
            step,
            self._state,
            self._config,
            is_evaluated=is_evaluated,
            is_final=is_final,
        )
        self._saved_at = time.monotonic()
        if self._is_main and self._config.save_total_limit is not None:
            limit, best = self._config.save_total_limit, self._evals.best_step
            delete_old(self._run_dir, step, limit, _log.warning, best=best)
        raise_everywhere(problem)

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
