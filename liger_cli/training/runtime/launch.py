"""How a run begins: quiet libraries, then the device and its processes."""

from __future__ import annotations

from datetime import timedelta

import datasets
import torch
import transformers
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from liger_cli.common.ranks import find_rank
from liger_cli.config import RunConfig
from liger_cli.errors import EnvironmentProblem
from liger_cli.training.model.dtypes import parameter_dtype

__all__ = ["make_accelerator", "quiet_libraries"]


def quiet_libraries() -> None:
    """Turn off the progress bars of libraries: they would run through the one of the run."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def make_accelerator(config: RunConfig, *, adapts: bool = False) -> Accelerator:
    """Return the Accelerator of a run: device, processes and autocast.

    Args:
        adapts: Whether an adapter is on the model: its float32 matrices are computed in the dtype
            of the frozen ones.

    Raises:
        EnvironmentProblem: The device cannot do what was asked, or the launch is one of a kind that
            the loop does not know.
    """
    # The process group is made by the first of the two: PartialState or Accelerator.
    has_gpu = torch.cuda.is_available() or torch.xpu.is_available()
    cpu = config.use_cpu or (find_rank() is not None and not has_gpu)
    timeout = timedelta(seconds=config.ddp_timeout)
    # Explicit: accelerate reads missing arguments from environment variables.
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    if adapts and precision == "no":
        frozen = parameter_dtype(config, PartialState(cpu=cpu, timeout=timeout).device, adapts=True)
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(frozen, "no")
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=cpu,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
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
