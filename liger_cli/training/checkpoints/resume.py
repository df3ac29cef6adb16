"""The checkpoint that a run resumes from, and the keys that a resumed run may change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from liger_cli.common.readers import expand_path
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.checkpoints.files import (
    find_checkpoints,
    newest_whole,
    read_manifest,
    step_of,
)

__all__ = [
    "check_same_run",
    "choose_checkpoint",
    "describe_resume",
    "find_resumed",
    "saved_choice",
    "with_older_values",
]

# What a resumed run may change: its length, its messages and files, and how it computes the same.
# Everything else would make step N another one than that of the run it resumes, or is in the
# checkpoint, as the optimizer's options are.
_FREE_KEYS = frozenset(
    {
        "activation_offloading",
        "async_save",
        "attn_implementation",
        "auto_fit",
        "cpu_offload",
        "dataloader_num_workers",
        "dataset_num_proc",
        "dp_replicate_size",
        "dp_shard_size",
        "ddp_timeout",
        "early_stopping_patience",
        "early_stopping_threshold",
        "eval_on_start",
        "eval_steps",
        "eval_strategy",
        "gradient_checkpointing",
        "greater_is_better",
        "load_best_model_at_end",
        "logging_steps",
        "max_steps",
        "metric_for_best_model",
        "num_train_epochs",
        "ops",
        "output_dir",
        "padding_free",
        "per_device_eval_batch_size",
        "profile_steps",
        "reduce_dtype",
        "report_to",
        "reshard_after_forward",
        "save_consolidated",
        "save_memory",
        "save_minutes",
        "save_steps",
        "save_total_limit",
        "tile_tokens",
        "torch_compile",
        "use_cpu",
        "use_regional_compilation",
    }
)

# Of these the rows of a step are a product, with the number of processes.
_ROW_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")

# What a key had the effect of before it existed, where that is not its default.
_BEFORE_IT_EXISTED = {"padding_free": "false"}


def with_older_values(checkpoint: Path, config: RunConfig) -> RunConfig:
    """Return the configuration of a resumed run: keys left alone as the checkpoint had them.

    Keys that are younger than the checkpoint had no effect in the steps that it has behind it.
    """
    known = read_manifest(checkpoint)["config"]
    fields = RunConfig.model_fields
    older = {
        key: value
        for key, value in _BEFORE_IT_EXISTED.items()
        if key not in known and getattr(config, key) == fields[key].default
    }
    if config.reference == "auto":
        older["reference"] = known.get("reference", "auto")
    return config.model_copy(update=older)


def choose_checkpoint(
    resume: str, output_dir: Path | None, notify: Callable[[str], None]
) -> Path | None:
    """Return the newest whole checkpoint that --resume means; None where there is none yet.

    Args:
        resume: "auto", of output_dir; or the path of a run or of a checkpoint. In place of one that
            is damaged comes the one before it.
        notify: Gets a line about each damaged one.

    Raises:
        ConfigError: The path is neither.
        DataError: Every checkpoint is damaged.
    """
    return newest_whole(find_resumed(resume, output_dir), notify)


def find_resumed(resume: str, output_dir: Path | None) -> list[Path]:
    """Return the checkpoints that --resume allows, the oldest first; empty where "auto" has none.

    Raises:
        ConfigError: The path is neither a run nor a checkpoint, or "auto" has no output_dir.
    """
    if resume == "auto":
        if output_dir is None:
            raise ConfigError("--resume auto needs --output-dir, the directory of the run")
        return find_checkpoints(output_dir)
    path = expand_path(resume, "--resume")
    found = find_checkpoints(path)
    if not found and step_of(resolved := path.resolve()) and resolved.is_dir():
        # A link such as `best` is as good as the checkpoint it leads to.
        parent = path.parent if step_of(path) else resolved.parent
        found = [c for c in find_checkpoints(parent) if step_of(c) <= step_of(resolved)]
    if not found:
        raise ConfigError(f"--resume {resume}: there is no checkpoint of a run")
    return found


def check_same_run(checkpoint: Path, config: RunConfig, num_processes: int) -> None:
    """Check that a run can resume from a checkpoint as if it had not stopped.

    Another number of processes may, as long as a step has as many rows: they are the same then.

    Raises:
        ConfigError: A key has a value that would make the steps to come others, or a step would
            have another number of rows.
    """
    manifest = read_manifest(checkpoint)
    changes = _changes(manifest, config)
    old = _step(manifest["config"], manifest["num_processes"])
    new = _step(config.model_dump(), num_processes)
    has_same_rows = math.prod(old) == math.prod(new)
    free = _FREE_KEYS.union(_ROW_KEYS) if has_same_rows else _FREE_KEYS
    lines = [
        f"{key} is {changes[key][1]!r}, but {checkpoint} was trained with {changes[key][0]!r}"
        for key in changes
        if key not in free
    ]
    hint = "A resumed run keeps its model, data, batches and optimizer. "
    if not has_same_rows:
        was, would_be = _rows_line(old), _rows_line(new)
        lines.append(f"a step of {checkpoint} has {was}, and here it would have {would_be}")
        hint = f"{_rows_hint(math.prod(old), new[0], num_processes)} "
    if lines:
        hint += f"--model {checkpoint} without --resume starts a new run from its weights."
        raise ConfigError("\n".join(lines), hint=hint)


def _step(config: Mapping[str, Any], num_processes: int) -> tuple[int, int, int]:
    """Return rows of a micro-batch, micro-batches of a step, and processes."""
    fields = RunConfig.model_fields
    size, count = (config.get(key, fields[key].default) for key in _ROW_KEYS)
    return size, count, num_processes


def _rows_line(step: tuple[int, int, int]) -> str:
    size, count, num_processes = step
    ranks = "1 process" if num_processes == 1 else f"{num_processes} processes"
    return f"{math.prod(step)} rows ({size} a micro-batch, {count} micro-batches, {ranks})"


def _rows_hint(rows: int, size: int, num_processes: int) -> str:
    """Return the keys with which a launch has so many rows a step, near those that it has."""
    share, rest = divmod(rows, num_processes)
    if rest:
        fits = [str(count) for count in range(1, rows + 1) if rows % count == 0]
        return f"{rows} rows can be shared by {', '.join(fits)} processes."
    fitting = max(number for number in range(1, size + 1) if share % number == 0)
    words = f"--gradient-accumulation-steps {share // fitting}"
    if fitting != size:
        words = f"--per-device-train-batch-size {fitting} {words}"
    return f"{words} keeps the rows of a step."


def saved_choice(checkpoint: Path | None) -> bool | None:
    """Return the torch_compile that a checkpoint was trained with; None where it is unknown."""
    if checkpoint is None:
        return None
    value = read_manifest(checkpoint)["config"].get("torch_compile", False)
    return value if isinstance(value, bool) else None


def describe_resume(
    checkpoint: Path, config: RunConfig, device: torch.device, num_processes: int
) -> str:
    """Return the line that names the checkpoint of a resumed run and what has changed."""
    manifest = read_manifest(checkpoint)
    changes = _changes(manifest, config)
    changes.pop("output_dir", None)
    notes = [f"{key} is {new!r} (was {old!r})" for key, (old, new) in changes.items()]
    if manifest["device"] != device.type:
        notes.append(
            f"the device is {device.type} (was {manifest['device']}), so that its random numbers "
            "and roundings are others"
        )
    if manifest["num_processes"] != num_processes:
        notes.append(
            f"the number of processes is {num_processes} (was {manifest['num_processes']}): steps "
            "have the same rows, random numbers (as of dropout) and roundings are others"
        )
    return "; ".join([f"resume: {checkpoint}, after step {manifest['step']}", *notes])


# Keys that were true before null came to mean it.
_YES = ("completion_only_loss", "assistant_only_loss")


def _changes(manifest: dict[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys that have changed, with their value in a manifest and now."""
    # A key that is younger than the checkpoint had the effect of its default.
    defaults = {key: field.default for key, field in RunConfig.model_fields.items()}
    # But for these.
    defaults |= {**_BEFORE_IT_EXISTED, "torch_compile": False}
    found = {}
    for key, new in config.with_objective_defaults().model_dump(mode="json").items():
        old = manifest["config"].get(key, defaults[key])
        is_same = old == new or (key in _YES and {old, new} == {None, True})
        # With auto a resumed run keeps the reference that it has.
        is_same = is_same or (key == "reference" and new == "auto")
        if not is_same:
            found[key] = (old, new)
    return found
