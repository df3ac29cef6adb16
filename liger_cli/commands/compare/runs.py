"""The comparison of runs: their losses at the steps that both have, and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from liger_cli.errors import ConfigError
from liger_cli.report.run_files import Run, read_run

__all__ = ["Comparison", "LossDifference", "compare_runs"]

# Every run has its own.
_NOT_COMPARED = ("output_dir",)


@dataclass(frozen=True)
class LossDifference:
    """The distance of a run's losses from the first run's, at the steps that both have.

    Attributes:
        run: Name of the other run.
        steps: How many steps both have; without any, all that follows is None.
        max, max_step: The largest difference, and the first step that has it.
        first_step: The first step whose losses are not equal to the bit; None where all are.
    """

    run: str
    steps: int
    max: float | None = None
    max_step: int | None = None
    mean: float | None = None
    first_step: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs, the first of which is the base of the differences.

    Attributes:
        settings: Keys of the configuration that differ, with the value of each run.
    """

    runs: list[Run]
    differences: list[LossDifference]
    settings: dict[str, list[Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "runs": [run.to_dict() for run in self.runs],
            "loss_differences": [asdict(difference) for difference in self.differences],
            "settings": self.settings,
        }


def compare_runs(directories: Sequence[Path]) -> Comparison:
    """Compare runs: their losses, figures and settings.

    Raises:
        ConfigError: A directory is no run, a file of it cannot be read, or there is one run alone.
    """
    if len(directories) < 2:
        raise ConfigError(f"compare takes two runs or more, got {directories[0]} alone")
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = list(map(str, directories))
    runs = [read_run(directory, name) for directory, name in zip(directories, names, strict=True)]
    base, *others = runs
    return Comparison(runs, [_difference(base, run) for run in others], _settings(runs))


def _difference(base: Run, run: Run) -> LossDifference:
    steps = sorted(base.losses.keys() & run.losses.keys())
    if not steps:
        return LossDifference(run.name, 0)
    differences = {step: abs(run.losses[step] - base.losses[step]) for step in steps}
    max_step = max(differences, key=differences.__getitem__)
    return LossDifference(
        run=run.name,
        steps=len(steps),
        max=differences[max_step],
        max_step=max_step,
        mean=sum(differences.values()) / len(steps),
        first_step=next((step for step in steps if differences[step] > 0), None),
    )


def _settings(runs: list[Run]) -> dict[str, list[Any]]:
    configs = [run.report.config or {} for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _NOT_COMPARED)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: found for key, found in values.items() if any(v != found[0] for v in found[1:])}
