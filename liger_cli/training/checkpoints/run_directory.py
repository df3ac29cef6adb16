"""The directory of a run: found, locked for this run alone, and searched for a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from liger_cli.common.outputs import check_writable
from liger_cli.common.readers import expand_path
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.checkpoints.resume import check_same_run, choose_checkpoint, find_resumed
from liger_cli.training.checkpoints.run_lock import LOCK, locked

__all__ = ["run_directory"]


@contextlib.contextmanager
def run_directory(
    config: RunConfig,
    resume: str | None,
    accelerator: Any,
    notify: Callable[[str], None],
    *,
    writes: bool = True,
) -> Iterator[tuple[Path, Path | None]]:
    """Yield the directory of the run and the checkpoint to resume from, if any.

    The main process holds the lock of the directory meanwhile, from before it looks into it.

    Args:
        resume: None, "auto" (the newest checkpoint of output_dir, or a new run where there is none)
            or the path of a checkpoint or of a run.
        notify: Called with a line about each damaged checkpoint and about a lock left behind.
        writes: False takes no lock, for a run that only looks.

    Raises:
        ConfigError: The directory is taken or in use, or there is nothing to resume.
        DataError: Every checkpoint is damaged.
        EnvironmentProblem: The directory cannot be written.
    """
    if config.output_dir is not None:
        expand_path(str(config.output_dir), "output_dir")
    with contextlib.ExitStack() as held:
        # Decided once: the clock and the directory may have moved on for another process.
        choice: list[Any] = [None]
        if accelerator.is_main_process:
            run_dir = _find_run_dir(config, resume)
            if run_dir.exists() and not run_dir.is_dir():
                raise ConfigError(f"output_dir {run_dir} is a file, not a directory")
            check_writable(run_dir, "output_dir", is_directory=True)
            if writes:
                held.enter_context(locked(run_dir / LOCK, f"output_dir {run_dir}", notify))
                for leftover in run_dir.glob(".*.unfinished.*"):
                    leftover.unlink(missing_ok=True)
            choice = [(run_dir, _choose_checkpoint(config, resume, run_dir, notify))]
        run_dir, checkpoint = broadcast_object_list(choice)[0]
        if checkpoint is not None:
            check_same_run(checkpoint, config, accelerator.num_processes)
        yield run_dir, checkpoint


def _find_run_dir(config: RunConfig, resume: str | None) -> Path:
    if config.output_dir is not None:
        return config.output_dir
    if resume is not None:
        return find_resumed(resume, None)[-1].parent
    name = re.sub(r"[^\w.-]+", "-", config.model).strip("-.") or "model"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = Path("runs") / f"{name}-{stamp}"
    # Runs may begin in the same second.
    later = (run_dir.with_name(f"{run_dir.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([run_dir], later) if not path.exists())


def _choose_checkpoint(
    config: RunConfig, resume: str | None, run_dir: Path, notify: Callable[[str], None]
) -> Path | None:
    if resume is None:
        _check_free(run_dir)
        return None
    checkpoint = choose_checkpoint(resume, config.output_dir, notify)
    if checkpoint is not None and checkpoint.parent.resolve() != run_dir.resolve():
        _check_free(run_dir)
    return checkpoint


def _check_free(run_dir: Path) -> None:
    if run_dir.is_dir() and any(path.name != LOCK for path in run_dir.iterdir()):
        raise ConfigError(
            f"output_dir {run_dir} exists and is not empty",
            hint="--resume auto continues the run in it; or take another --output-dir.",
        )
