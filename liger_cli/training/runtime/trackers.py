"""Trackers of experiments, through accelerate's classes: what is logged, and when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from liger_cli.common.optional_packages import require_package
from liger_cli.config import RunConfig
from liger_cli.errors import EnvironmentProblem

__all__ = ["Track", "check_trackers", "prefixed", "tracking"]

_PROJECT = "liger"

# The module that each one needs; its package has the same name where none is given.
_MODULES = {"tensorboard": "torch.utils.tensorboard"}


class Track(Protocol):
    """Logs numbers by name under a step."""

    def __call__(self, values: Mapping[str, float | None], step: int) -> None: ...


def check_trackers(config: RunConfig) -> None:
    """Check that the trackers of a run are installed.

    Raises:
        EnvironmentProblem: One is missing, with the command that installs it.
    """
    for name in config.trackers:
        module = _MODULES.get(name, name)
        require_package(module, f"report_to {name}", f"pip install {name}")


@contextmanager
def tracking(config: RunConfig, run_dir: Path, *, is_main: bool) -> Iterator[Track]:
    """Start the trackers of a run, gives them its configuration, and ends them however it ends.

    Raises:
        EnvironmentProblem: One does not start.
    """
    trackers = []
    try:
        if is_main:
            for name in config.trackers:
                trackers.append(_start(name, config, run_dir))

        def track(values: Mapping[str, float | None], step: int) -> None:
            known = {key: value for key, value in values.items() if value is not None}
            for tracker in trackers:
                tracker.log(known, step=step)

        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


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
        text = " ".join(str(error).split()) or repr(error)
        raise EnvironmentProblem(f"report_to {name} does not start: {text}") from error
    return tracker
