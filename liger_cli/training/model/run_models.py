"""The model that a run's directory resolves to: one of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from liger_cli.errors import ConfigError
from liger_cli.training.checkpoints.files import BEST, find_checkpoints, find_damage, newest_whole

__all__ = ["check_in_run", "find_run_model"]


def find_run_model(path: Path, notify: Callable[[str], None]) -> Path:
    """Return the best checkpoint of a run, else the newest whole one; another path as it is.

    Args:
        notify: Called with the checkpoint, and with damaged ones.

    Raises:
        ConfigError: The run wrote no checkpoint.
        DataError: None of its checkpoints is whole.
    """
    if not (path / "config.yaml").is_file() or (path / "config.json").is_file():
        return path
    best = path / BEST
    if best.is_dir():
        if (damage := find_damage(best)) is None:
            chosen = path / best.resolve().name
            notify(f"{path}: taking {chosen.name}, the best of its evaluations")
            return chosen
        notify(f"{best} is damaged: {damage}")
    checkpoint = newest_whole(find_checkpoints(path), notify)
    if checkpoint is None:
        raise ConfigError(f"{path} is the directory of a run that wrote no checkpoint")
    notify(f"{path}: taking {checkpoint.name}, the last")
    return checkpoint


def check_in_run(path: Path) -> None:
    """Raise a ConfigError where a path is in the directory of a run, and is not there."""
    run = path.parent
    if path.exists() or not (run / "config.yaml").is_file() or (run / "config.json").is_file():
        return
    names = ", ".join(found.name for found in find_checkpoints(run))
    reason = f"run {run} has no {path.name}"
    if path.is_symlink():
        reason = f"{path} is a link to {path.readlink()}, which is not there"
    elif path.name == BEST:
        reason += ", as no evaluation chose a best checkpoint"
    raise ConfigError(
        f"{reason}; the checkpoints of this run: {names or 'none'}",
        hint=f"{run} alone means its best checkpoint, else its last.",
    )
