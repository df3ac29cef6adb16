"""How a run begins: quiet libraries, the device and its processes, the run's directory."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list

from liger_cli.common.outputs import check_writable
from liger_cli.common.readers import expand_path
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, EnvironmentProblem
from liger_cli.training.checkpoints.resume import check_same_run, choose_checkpoint, find_resumed
from liger_cli.training.checkpoints.run_lock import LOCK, locked
from liger_cli.training.model.dtypes import parameter_dtype

__all__ = ["make_accelerator", "quiet_libraries", "run_directory"]


def quiet_libraries() -> None:
    """Turns off the progress bars of libraries: they would run through the one of the run."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def make_accelerator(config: RunConfig, *, adapts: bool = False) -> Accelerator:
    """Returns the Accelerator of a run: device, processes and autocast.

    Args:
        adapts: Whether an adapter is on the model: its float32 matrices are computed in the dtype
            of the frozen ones.

    Raises:
        EnvironmentProblem: The device cannot do what was asked, or the launch is one of a kind that
            the loop does not know.
    """
    # Said in full: accelerate reads what is left out from environment variables.
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    if adapts and precision == "no":
        frozen = parameter_dtype(config, PartialState(cpu=config.use_cpu).device, adapts=True)
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(frozen, "no")
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=config.use_cpu,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except ValueError as error:
        raise EnvironmentProblem(f"{precision} autocast: {error}") from None
    if precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would leave it out without a word.
        raise EnvironmentProblem(
            "fp16 autocast needs a GPU, and this run is on cpu",
            hint="bfloat16 is for both: --bf16.",
        )
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known:
        raise EnvironmentProblem(
            f"the launch asks for {accelerator.distributed_type.value}; "
            "this version trains on one process or with data parallelism (DDP)"
        )
    return accelerator


@contextlib.contextmanager
def run_directory(
    config: RunConfig,
    resume: str | None,
    accelerator: Accelerator,
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
            hint="--resume auto goes on with the run in it; or take another --output-dir.",
        )
