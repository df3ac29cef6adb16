"""From a configuration to what the loop needs: device, directory, data, model, patches.

What can fail cheaply comes first, so that a typo does not cost the loading of a model.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list

from liger_cli.config import RunConfig
from liger_cli.environment import host_memory
from liger_cli.errors import ConfigError, DataError, EnvironmentProblem, OutOfMemory
from liger_cli.training.checkpoint import check_same_run, find_checkpoints
from liger_cli.training.collate import Collator
from liger_cli.training.data import Examples, RowOptions, load_examples
from liger_cli.training.model import (
    ModelSource,
    build_meta_model,
    choose_dtype,
    load_model,
    load_tokenizer,
    resolve_model,
)
from liger_cli.training.packing import PackedRows, refuse_packing
from liger_cli.training.samples import SAMPLE_NAME
from liger_cli.training.sources import SYNTHETIC_NAME, Split
from liger_cli.training.stream import open_stream
from liger_cli.training.tokenizers import load_processor
from liger_kernels.ops.registry import find_op
from liger_kernels.transformers.api import apply_liger_kernel
from liger_kernels.transformers.engine import PatchRecord
from liger_kernels.transformers.plan import resolve_ops

__all__ = [
    "Inputs",
    "check_memory",
    "choose_run_dir",
    "load_inputs",
    "load_patched",
    "make_accelerator",
    "parameter_dtype",
    "parse_ops",
    "quiet_libraries",
]

# Rows of the sample's own split that end a run unasked: some seconds on a CPU.
_UNASKED_EVAL_ROWS = 32


def parse_ops(ops: str, required: str = "") -> list[str]:
    """Checks the names in `ops` and returns the full names of those in `required`.

    Raises:
        ConfigError: A name is no op, with the nearest one.
    """
    try:
        resolve_ops(ops)
        return [find_op(name).name for name in required.split(",") if name.strip()]
    except ValueError as error:
        raise ConfigError(str(error)) from None


def quiet_libraries() -> None:
    """Turns off the progress bars of libraries: they would run through the one of the run."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def make_accelerator(config: RunConfig) -> Accelerator:
    """Returns the Accelerator of a run: device, processes and autocast.

    Raises:
        EnvironmentProblem: The device cannot do what was asked, or the launch is one of a kind that
            the loop does not know.
    """
    # Said in full: what is left out, accelerate takes from environment variables.
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    try:
        accelerator = Accelerator(mixed_precision=precision, cpu=config.use_cpu)
    except ValueError as error:
        raise EnvironmentProblem(f"{precision} autocast: {error}") from None
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known:
        raise EnvironmentProblem(
            f"the launch asks for {accelerator.distributed_type.value}; "
            "this version trains on one process or with data parallelism (DDP)"
        )
    return accelerator


def parameter_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of the parameters; auto is bfloat16 where a GPU has it, else float32.

    Autocast keeps float32 parameters: it would gain nothing over bfloat16 ones.
    """
    if config.dtype != "auto":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[config.dtype]
    return torch.float32 if config.bf16 or config.fp16 else choose_dtype("auto", device)


def choose_run_dir(
    config: RunConfig, resume: str | None, accelerator: Accelerator
) -> tuple[Path, Path | None]:
    """Returns the directory of the run and the checkpoint it goes on from, if any.

    Args:
        resume: None, "auto" (the newest checkpoint of output_dir, or a new run where there is none)
            or the path of a checkpoint or of a run.

    Raises:
        ConfigError: The directory is taken, or there is nothing to resume.
    """
    # Decided once: the clock and the directory may have moved on for another process.
    choice: list[Any] = [None]
    if accelerator.is_main_process:
        choice = [_choose_run_dir(config, resume)]
    run_dir, checkpoint = broadcast_object_list(choice)[0]
    if checkpoint is not None:
        check_same_run(checkpoint, config)
    return run_dir, checkpoint


def _choose_run_dir(config: RunConfig, resume: str | None) -> tuple[Path, Path | None]:
    if resume is None:
        name = re.sub(r"[^\w.-]+", "-", config.model).strip("-.") or "model"
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return _check_free(config.output_dir or Path("runs") / f"{name}-{stamp}"), None
    if resume == "auto":
        if config.output_dir is None:
            raise ConfigError("--resume auto needs --output-dir, the directory of the run")
        checkpoints = find_checkpoints(config.output_dir)
        return config.output_dir, checkpoints[-1] if checkpoints else None
    path = Path(resume)
    found = find_checkpoints(path) or [c for c in find_checkpoints(path.parent) if c == path]
    if not found:
        raise ConfigError(f"--resume {resume}: there is no checkpoint of a run")
    run_dir = found[-1].parent
    if config.output_dir is not None and config.output_dir.resolve() != run_dir.resolve():
        run_dir = _check_free(config.output_dir)
    return run_dir, found[-1]


def _check_free(run_dir: Path) -> Path:
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"output_dir {run_dir} is a file, not a directory")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise ConfigError(
            f"output_dir {run_dir} exists and is not empty",
            hint="--resume auto goes on with the run in it; or take another --output-dir.",
        )
    return run_dir


@dataclass(frozen=True)
class Inputs:
    """A model that was found but not loaded, and its data.

    Attributes:
        meta_model: The model without weights.
        data: As they were read, before a part was kept for evaluation.
        train: Rows to train on, or a Stream; None where only evaluation was asked for.
        eval: Rows to evaluate on, if any.
    """

    source: ModelSource
    meta_model: Any
    tokenizer: Any
    collator: Collator
    data: Examples
    train: Any
    eval: Any


def load_inputs(
    config: RunConfig, *, trains: bool = True, notify: Callable[[str], None] | None = None
) -> Inputs:
    """Finds the model and reads the data; loads no weights.

    Args:
        trains: False reads the evaluation data alone: eval_dataset, or a part or split of dataset.
        notify: Told what a user should know of the data's cache.

    Raises:
        LigerError: The model or the data cannot be had.
    """
    source = resolve_model(config.model)
    meta_model = build_meta_model(source)
    tokenizer = load_tokenizer(source)

    options = RowOptions(
        max_length=config.max_length,
        vocab_size=meta_model.config.get_text_config().vocab_size,
        completion_only=config.completion_only_loss,
        assistant_only=config.assistant_only_loss,
    )
    packs = trains and config.packing
    if packs:
        refuse_packing(meta_model, config.max_length)

    def load(name: str, split: Split) -> Examples:
        return load_examples(
            name,
            tokenizer,
            options,
            split=split,
            seed=config.order_seed,
            processor=load_processor(source),
            num_proc=config.dataset_num_proc,
            notify=notify,
        )

    train_rows = eval_rows = None
    max_eval_rows = config.max_eval_samples
    if config.eval_fraction:
        examples = load(config.dataset, "train")
        train_rows, eval_rows = _split(examples, config)
    elif not trains:
        examples = load(config.eval_dataset or config.dataset, "eval")
        eval_rows = examples.examples
    else:
        if config.streaming:
            examples = open_stream(
                config.dataset,
                tokenizer,
                options,
                buffer_size=config.shuffle_buffer_size,
                seed=config.order_seed,
                packing=config.packing_strategy if packs else None,
            )
        else:
            examples = load(config.dataset, "train")
        train_rows = examples.examples
        if config.eval_dataset:
            eval_rows = load(config.eval_dataset, "eval").examples
        elif config.dataset == SAMPLE_NAME or (
            config.eval_steps and config.dataset == SYNTHETIC_NAME
        ):
            eval_rows = load(config.dataset, "eval").examples
            max_eval_rows = max_eval_rows or _UNASKED_EVAL_ROWS
        elif config.eval_steps:
            raise ConfigError("eval_steps needs eval_dataset or eval_fraction")
    if eval_rows is not None and max_eval_rows is not None:
        eval_rows = eval_rows.select(range(min(max_eval_rows, len(eval_rows))))
    if packs and not config.streaming:
        refuse_packing(meta_model, config.max_length, has_images=examples.has_images)
        train_rows = PackedRows.of(train_rows, config.max_length, config.packing_strategy)
    # Where it looks for documents, flash attention wants a batch of one row.
    flatten = packs and "flash" in (config.attn_implementation or "")
    return Inputs(
        source=source,
        meta_model=meta_model,
        tokenizer=tokenizer,
        collator=Collator.for_tokenizer(tokenizer, flatten=flatten),
        data=examples,
        train=train_rows,
        eval=eval_rows,
    )


def _split(data: Examples, config: RunConfig) -> tuple[Any, Any]:
    """The rows to train on and those kept for evaluation, drawn by the data's seed."""
    examples = data.examples
    if len(examples) > data.stats.rows:
        raise ConfigError(
            "eval_fraction: the weights of dataset repeat rows, so that the same rows would be "
            "trained and evaluated on; set eval_dataset"
        )
    num_eval = math.ceil(config.eval_fraction * len(examples))
    if num_eval == len(examples):
        raise DataError(
            f"eval_fraction {config.eval_fraction} of {len(examples)} rows leaves none to train on"
        )
    generator = torch.Generator().manual_seed(config.order_seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    kept, held_out = sorted(order[num_eval:]), sorted(order[:num_eval])
    return examples.select(kept), examples.select(held_out)


def check_memory(
    config: RunConfig, meta_model: Any, device: torch.device, *, trains: bool = True
) -> None:
    """Refuses a model that cannot fit on a CPU, where Linux would end the process without a word.

    Raises:
        OutOfMemory: The parameters, and in training gradients and moments, are more than there is.
    """
    if device.type != "cpu":
        return
    num_parameters = sum(parameter.numel() for parameter in meta_model.parameters())
    copies, what = (4, "weights, gradients and moments") if trains else (1, "weights")
    needed = num_parameters * parameter_dtype(config, device).itemsize * copies
    if needed > host_memory():
        raise OutOfMemory(
            f"{config.model} needs {needed / 1e9:.0f} GB for its {what} alone; "
            f"this machine has {host_memory() / 1e9:.0f} GB",
            hint="Take a smaller model, or --dtype bfloat16 for half of it.",
        )


def load_patched(
    config: RunConfig, source: ModelSource, device: torch.device, notify: Callable[[str], None]
) -> tuple[Any, PatchRecord]:
    """Loads the model on a device and patches it.

    Args:
        source: The model, or a checkpoint of it.
        notify: Told what a user should know, such as weights that are missing.
    """
    model = load_model(
        source,
        dtype=parameter_dtype(config, device),
        device=device,
        seed=config.seed,
        attn_implementation=config.attn_implementation,
        notify=notify,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        record = apply_liger_kernel(model, config.ops)
    for warning in caught:
        notify(str(warning.message))
    return model, record
