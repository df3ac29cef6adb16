"""Trackers of experiments, through accelerate's classes: what is logged, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from liger_cli.common.optional_packages import require_package
from liger_cli.config import RunConfig
from liger_cli.errors import EnvironmentProblem

__all__ = ["Tracking", "check_trackers", "prefixed", "tracking"]

_PROJECT = "liger"

# The module that each one needs; its package has the same name where none is given.
_MODULES = {"tensorboard": "torch.utils.tensorboard"}


class Tracking(NamedTuple):
    """The trackers of a run.

    Args:
        start: Starts those that a configuration names, which get all that the run has decided.
        log: Logs numbers by name under a step.
    """

    start: Callable[[RunConfig], None]
    log: Callable[[Mapping[str, float | None], int], None]


def check_trackers(config: RunConfig) -> None:
    """Check that the trackers of a run are installed.

    Raises:
        EnvironmentProblem: One is missing, with the command that installs it.
    """
    for name in config.trackers:
        module = _MODULES.get(name, name)
        require_package(module, f"report_to {name}", f"pip install {name}")


@contextmanager
def tracking(run_dir: Path, *, is_main: bool, notify: Callable[[str], None]) -> Iterator[Tracking]:
    """Yield the trackers of a run, none of them started yet, and end them however it ends.

    A tracker that fails later is reported once and left out from then on: its server may be away
    for a while, and metrics.jsonl has all of it.

    Args:
        run_dir: Directory of the run.
        is_main: Whether this process logs; others start none.
        notify: Shows the user a line about a tracker that fails.

    Raises:
        EnvironmentProblem: By `start`, where one does not start.
    """
    trackers: dict[str, Any] = {}

    def call(name: str, method: str, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(trackers[name], method)(*args, **kwargs)
        # Trackers have their own errors, as in _start.
        except Exception as error:
            trackers.pop(name)
            notify(
                f"warning: report_to {name} fails: {_line_of(error)}; the run continues without "
                f"it, and metrics.jsonl and eval.jsonl in {run_dir} have every value"
            )

    def start(config: RunConfig) -> None:
        for name in config.trackers if is_main else ():
            trackers[name] = _start(name, config, run_dir)

    def log(values: Mapping[str, float | None], step: int) -> None:
        known = {key: value for key, value in values.items() if value is not None}
        for name in list(trackers):
            call(name, "log", known, step=step)

    try:
        yield Tracking(start, log)
    finally:
        for name in list(trackers):
            call(name, "finish")


def prefixed(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers under the names that trackers show in groups: train/loss."""
    return {f"{group}/{key}": value for key, value in values.items() if key != "step"}


def _start(name: str, config: RunConfig, run_dir: Path) -> Any:
    options = {
        "tensorboard": {"run_name": name, "logging_dir": str(run_dir)},
        "wandb": {"run_name": _PROJECT, "name": run_dir.name, "dir": str(run_dir)},
        "mlflow": {"experiment_name": _PROJECT, "run_name": run_dir.name},
        "trackio": {"run_name": _PROJECT, "name": run_dir.name},
        "comet_ml": {"run_name": _PROJECT},
    }
    values = config.model_dump(mode="json")
    # Not every tracker takes a null for a value.
    shown = {key: "null" if value is None else value for key, value in values.items()}
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](**options[name])
        tracker.start()
        tracker.store_init_configuration(shown)
    # Trackers have their own errors: no account, no server, no network.
    except Exception as error:
        problem = f"report_to {name} does not start: {_line_of(error)}"
        raise EnvironmentProblem(problem) from error
    return tracker


def _line_of(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)
