"""torch.profiler over chosen steps of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from liger_cli.common.outputs import replacing
from liger_cli.errors import EnvironmentProblem

__all__ = ["StepProfiler"]


_log = logging.getLogger(__name__)


class StepProfiler:
    """Records steps inside a `with` block and writes them as a trace for ui.perfetto.dev.

    Args:
        steps: The steps to record, one after the other; empty records nothing.
        path: The file to write.
        device: Where the steps run.
    """

    def __init__(self, steps: range, path: Path, device: torch.device) -> None:
        self._steps = steps
        self._path = path
        kinds = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
        self._activities = [ProfilerActivity.CPU]
        self._activities += [kinds[device.type]] if device.type in kinds else []
        self._profile: Any = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def begin(self, step: int) -> None:
        """Start to record where that is wanted of the step to come."""
        if step in self._steps and self._profile is None:
            self._profile = profile(activities=self._activities, record_shapes=True)
            self._profile.start()

    def end(self, step: int) -> bool:
        """Write the trace after the last step wanted; return whether that took time now."""
        if self._profile is None or step < self._steps[-1]:
            return False
        self._close()
        return True

    def _close(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            try:
                with replacing(self._path) as unfinished:
                    self._profile.export_chrome_trace(str(unfinished))
            except EnvironmentProblem as problem:
                # No reason to end a run, or to hide the error that ends it.
                _log.warning(problem.message)
            self._profile = None
