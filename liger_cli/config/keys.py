"""RunConfig: every key, with its type, default, limits and meaning.

A key added here is a flag, a line of docs/configuration.md (scripts/config_page.py writes it) and a
part of the JSON schema; nothing else needs to know of it.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from liger_cli.config.yaml_file import to_yaml

__all__ = ["ALIASES", "RunConfig"]

ALIASES = {"model_name_or_path": "model", "dataset_name": "dataset"}

_LARGEST_INT = 2**31 - 1


def _join_names(value: object) -> object:
    """A YAML list of op names means the same as the comma-separated string."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value)
    return value


_Names = Annotated[
    str,
    BeforeValidator(_join_names),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


def _join_datasets(value: object) -> object:
    """A YAML list of datasets means the same as NAME:WEIGHT,NAME,..., which is one flag."""
    if not isinstance(value, list):
        return value
    return ",".join(_dataset_words(entry) for entry in value)


def _dataset_words(entry: object) -> str:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict) or not {"path"} <= set(entry) <= {"path", "weight"}:
        raise ValueError("a dataset of a list is a name, or an object of path and perhaps weight")
    path, weight = entry["path"], entry.get("weight")
    if not isinstance(path, str) or not path or "," in path or re.search(r":[\d.e+-]+$", path):
        raise ValueError("the path of a dataset of a list has no comma and no :NUMBER at its end")
    if weight is None:
        return path
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
        raise ValueError("the weight of a dataset is a number above 0")
    return f"{path}:{weight}"


_DATASET_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "weight": {"type": "number", "exclusiveMinimum": 0},
    },
    "required": ["path"],
    "additionalProperties": False,
}
_Datasets = Annotated[
    str,
    BeforeValidator(_join_datasets),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"anyOf": [{"type": "string"}, _DATASET_SCHEMA]}},
            ]
        }
    ),
]


def _key(group: str, default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


_model = functools.partial(_key, "Model and kernels")
_data = functools.partial(_key, "Data")
_batch = functools.partial(_key, "Batches")
_optimizer = functools.partial(_key, "Optimizer and schedule")
_run = functools.partial(_key, "Run directory")
_machine = functools.partial(_key, "Precision and device")


class RunConfig(BaseModel):
    """Every key that train, eval and bench know, with its type, default and limits."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str = _model(..., "Preset, directory, config.json or hub id.", min_length=1)
    ops: _Names = _model(
        "auto", "auto, all, none, a list such as rope,rmsnorm,flce, or auto,-rope."
    )
    attn_implementation: str | None = _model(None, "Attention of transformers: eager, sdpa, ...")

    dataset: _Datasets = _data(
        "chitchat",
        "A file, folder, glob or hub name, chitchat or synthetic; several as NAME:WEIGHT,NAME.",
        min_length=1,
    )
    eval_dataset: str | None = _data(None, "Evaluation data, named as the dataset is.")
    eval_fraction: float = _data(0.0, "Part of the dataset kept for evaluation.", ge=0, lt=1)
    max_eval_samples: int | None = _data(
        None, "Rows evaluated at most (32 of the sample's own split, else all).", ge=1
    )
    max_length: int = _data(1024, "Longest row in tokens; longer ones are cut.", ge=2)
    completion_only_loss: bool = _data(True, "Of prompt and completion train the completion only.")
    assistant_only_loss: bool = _data(True, "Of a conversation train what the assistant says only.")
    packing: bool = _data(False, "Fill rows of max_length with whole documents, kept apart.")
    packing_strategy: Literal["bfd", "sequential"] = _data(
        "bfd", "Best fit, the longest first; or in the order of the data."
    )
    streaming: bool = _data(False, "Read the data as the run goes; for more than memory holds.")
    shuffle_buffer_size: int = _data(10_000, "Rows shuffled at a time in streaming.", ge=1)
    dataset_num_proc: int = _data(1, "Processes that tokenise.", ge=1)
    dataloader_num_workers: int = _data(0, "Processes that collate batches.", ge=0)

    per_device_train_batch_size: int = _batch(8, "Rows of a forward pass on each device.", ge=1)
    per_device_eval_batch_size: int = _batch(8, "The same in evaluation.", ge=1)
    gradient_accumulation_steps: int = _batch(1, "Forward passes of an optimizer step.", ge=1)
    num_train_epochs: float = _batch(3.0, "Passes over the dataset.", gt=0)
    max_steps: int = _batch(-1, "Optimizer steps; -1 leaves it to num_train_epochs.", ge=-1)

    optim: Literal["adamw"] = _optimizer("adamw", "Optimizer.")
    learning_rate: float = _optimizer(5e-5, "Highest learning rate.", ge=0)
    weight_decay: float = _optimizer(0.0, "Decay of matrices; vectors have none.", ge=0)
    adam_beta1: float = _optimizer(0.9, "Decay of the first moment.", ge=0, lt=1)
    adam_beta2: float = _optimizer(0.999, "Decay of the second moment.", ge=0, lt=1)
    adam_epsilon: float = _optimizer(1e-8, "Added to the root of the second moment.", gt=0)
    max_grad_norm: float = _optimizer(1.0, "Norm the gradient is clipped to; 0 is off.", ge=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = _optimizer(
        "linear", "Learning rate after the warm-up."
    )
    warmup_steps: int = _optimizer(0, "Steps of warm-up.", ge=0)
    warmup_ratio: float = _optimizer(0.0, "Warm-up as a part of all steps.", ge=0, lt=1)

    output_dir: Path | None = _run(
        None, "Directory of the run (runs/MODEL-TIME when not given).", strict=False
    )
    logging_steps: int = _run(10, "Steps between printed lines; metrics.jsonl has all.", ge=1)
    eval_steps: int = _run(0, "Steps between evaluations; 0 evaluates at the end.", ge=0)
    save_steps: int = _run(500, "Steps between checkpoints; 0 saves at the end.", ge=0)
    save_total_limit: int | None = _run(None, "Checkpoints kept; older ones are deleted.", ge=1)
    seed: int = _run(42, "Seed of weights and dropout.", ge=0, lt=2**31)
    data_seed: int | None = _run(
        None, "Seed of the data's order (the seed when not given).", ge=0, lt=2**31
    )

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _machine(
        "auto", "Parameters; auto is bfloat16 on a GPU that has it, else float32."
    )
    bf16: bool = _machine(False, "Autocast to bfloat16 over float32 parameters.")
    fp16: bool = _machine(False, "Autocast to float16, with loss scaling.")
    gradient_checkpointing: bool = _machine(False, "Recompute activations to save memory.")
    use_cpu: bool = _machine(False, "Stay on the CPU although there is a GPU.")

    @field_validator("*")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > _LARGEST_INT:
            raise ValueError(f"should be at most {_LARGEST_INT} in size")
        if isinstance(value, str | Path):
            # None of these can be saved as a line of UTF-8, and a file name takes no NUL.
            if re.search("[\x00-\x1f\x7f\ud800-\udfff]", str(value)):
                raise ValueError("should have no control characters and be valid Unicode")
            # A shell expands the ~ of a flag; in a file nobody does, and a directory ~ is a trap.
            if str(value).startswith("~"):
                return type(value)(os.path.expanduser(value))
        return value

    @field_validator("ops")
    @classmethod
    def _known_ops(cls, value: str) -> str:
        if value not in ("auto", "all", "none"):
            # The names are in the library, which imports torch.
            from liger_kernels.transformers.plan import resolve_ops

            try:
                resolve_ops(value)
            except ValueError as error:
                raise PydanticCustomError("ops", "{why}", {"why": str(error)}) from None
        return value

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("should be -1 or at least 1")
        return value

    @model_validator(mode="after")
    def _no_conflicts(self) -> RunConfig:
        found = [
            {"keys": keys, "message": message}
            for keys, message, is_conflict in _CONFLICTS
            if is_conflict(self)
        ]
        if found:
            text = "; ".join(str(conflict["message"]) for conflict in found)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "found": found})
        return self

    @property
    def order_seed(self) -> int:
        """The seed of the data's order."""
        return self.seed if self.data_seed is None else self.data_seed

    def to_yaml(self) -> str:
        """Returns the YAML that load_config reads back to an equal configuration."""
        return to_yaml(self.model_dump(mode="json"))


# Keys that do not go together, why, and when. A conflict is never one of default values alone.
_CONFLICTS: tuple[tuple[tuple[str, ...], str, Callable[[RunConfig], bool]], ...] = (
    (("bf16", "fp16"), "bf16 and fp16 exclude each other", lambda c: c.bf16 and c.fp16),
    (
        ("fp16", "dtype"),
        "fp16 needs float32 or bfloat16 parameters, dtype is float16",
        lambda c: c.fp16 and c.dtype == "float16",
    ),
    (
        ("warmup_steps", "warmup_ratio"),
        "warmup_steps and warmup_ratio exclude each other; set one to 0",
        lambda c: c.warmup_steps > 0 and c.warmup_ratio > 0,
    ),
    (
        ("eval_dataset", "eval_fraction"),
        "eval_dataset and eval_fraction exclude each other",
        lambda c: c.eval_dataset is not None and c.eval_fraction > 0,
    ),
    (
        ("streaming", "max_steps"),
        "streaming needs max_steps: nobody knows how many rows an epoch has",
        lambda c: c.streaming and c.max_steps < 0,
    ),
    (
        ("streaming", "eval_fraction"),
        "streaming and eval_fraction exclude each other; eval_dataset has rows of its own",
        lambda c: c.streaming and c.eval_fraction > 0,
    ),
    (
        ("streaming", "dataset_num_proc"),
        "streaming tokenises in the run's own process; set dataset_num_proc to 1",
        lambda c: c.streaming and c.dataset_num_proc > 1,
    ),
    (
        ("streaming", "dataloader_num_workers"),
        "streaming collates in the run's own process; set dataloader_num_workers to 0",
        lambda c: c.streaming and c.dataloader_num_workers > 0,
    ),
)
