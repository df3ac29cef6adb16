"""A run as its directory holds it, finished or not.

A finished run is read from its report.json. Of an unfinished one metrics.jsonl and eval.jsonl hold
the steps and evaluations so far, and config.yaml the configuration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from liger_cli.common.readers import read_file_bytes
from liger_cli.config.yaml_file import read_mapping
from liger_cli.errors import ConfigError
from liger_cli.report.values import RunReport, TrainPart
from liger_cli.training.checkpoints.run_log import read_lines

__all__ = ["Run", "read_run"]


@dataclass(frozen=True)
class Run:
    """A run as read from its directory.

    Attributes:
        name: Of the directory; its path where another run is called the same.
        report: As it was written, or of the steps and the last evaluation so far.
        is_finished: Whether it was written.
        steps, evaluations: The lines of metrics.jsonl and eval.jsonl.
        losses, eval_losses: By step; those of evaluations over all sets together.
    """

    name: str
    directory: Path
    report: RunReport
    is_finished: bool
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    losses: dict[int, float]
    eval_losses: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the run as JSON values; its losses are in its directory."""
        kept = ("train", "eval", "eval_sets", "best", "stop", "coverage", "environment")
        values = self.report.to_dict()
        return {
            "name": self.name,
            "directory": str(self.directory),
            "is_finished": self.is_finished,
            **{key: values.get(key) for key in kept},
        }


def read_run(directory: Path, name: str = "") -> Run:
    """Read the directory of a run, finished or not.

    Raises:
        ConfigError: It is no run, or a file of it cannot be read.
    """
    step_log, eval_log = directory / "metrics.jsonl", directory / "eval.jsonl"
    report_file, config_file = directory / "report.json", directory / "config.yaml"
    if not step_log.is_file():
        raise _no_run(directory)
    steps = _read_log(step_log, "loss")
    evals = _read_log(eval_log, "eval_loss")
    losses, eval_losses = _column(steps, "loss"), _column(evals, "eval_loss")
    is_finished = report_file.is_file()
    if is_finished:
        with _reading(report_file):
            report = RunReport.from_json(read_file_bytes(report_file))
    else:
        with _reading(config_file):
            config = read_mapping(config_file)
        with _reading(eval_log):
            report = _report_so_far(config, steps, evals)
    return Run(name, directory, report, is_finished, steps, evals, losses, eval_losses)


def _read_log(path: Path, loss: str) -> list[dict[str, Any]]:
    """Return the rows of a log; a loss that is no finite number is None."""

    def refuse(problem: str) -> NoReturn:
        raise ValueError(problem)

    with _reading(path):
        return list(read_lines(path, (loss,), on_bad=refuse))


def _column(rows: list[dict[str, Any]], key: str) -> dict[int, float]:
    return {row["step"]: float(row[key]) for row in rows if row[key] is not None}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a file raises that a run has not written into a message that names it."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            what = f"{error} is missing"
        raise ConfigError(f"{path} cannot be read as that of a run: {what}") from error


def _no_run(directory: Path) -> ConfigError:
    if not directory.exists():
        return ConfigError(f"{directory} does not exist")
    what = "has no metrics.jsonl" if directory.is_dir() else "is a file"
    hint = "A run is the output_dir of `liger train`, with metrics.jsonl and config.yaml in it."
    parents = [path for path in directory.resolve().parents if (path / "metrics.jsonl").is_file()]
    if parents:
        hint = f"It belongs to the run {parents[0]}."
    return ConfigError(f"{directory} is no run: it {what}", hint=hint)


def _report_so_far(
    config: dict[str, Any], rows: list[dict[str, Any]], evals: list[dict[str, Any]]
) -> RunReport:
    """Build the report of an unfinished run from its steps and its last evaluation."""
    # What knows how to sum them up imports torch, and a finished run needs nothing of it.
    from liger_cli.report.build import add_evaluation
    from liger_cli.training.eval_result import EvalResult
    from liger_cli.training.evaluations import evaluated_values
    from liger_cli.training.result import StepMetrics, summary

    report = RunReport(command="train", config=config)
    if rows:
        report.train = TrainPart(**summary([StepMetrics.from_row(row) for row in rows]))
    if evals:
        add_evaluation(report, EvalResult.from_names(evaluated_values(evals[-1])))
    return report
