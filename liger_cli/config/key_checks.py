"""Checks of the values of keys, beyond their types and limits."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from liger_cli.config.eval_sets import join_sets, metric_names, read_sets
from liger_cli.config.objectives import OBJECTIVES, OBJECTIVES_OF_TRL
from liger_cli.config.pairs import (
    are_pairs,
    join_pairs,
    join_ranks,
    read_numbers,
    read_ranks,
    split_names,
)

__all__ = ["TRACKERS", "KeyChecks"]

_LARGEST_INT = 2**31 - 1
# Tokens of a piece in gated MLPs: fewer would wait for their launches.
_LEAST_TILE = 64

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml")

# Spellings of other programs for what has another name here.
_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
}


class KeyChecks(BaseModel):
    """Validators of the fields of Keys, which is a subclass: hence check_fields=False."""

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

    @field_validator("padding_free", mode="before", check_fields=False)
    @classmethod
    def _words_of_yaml(cls, value: object) -> object:
        # YAML reads a bare true or false as a boolean.
        return str(value).lower() if isinstance(value, bool) else value

    @field_validator("torch_compile", "activation_offloading", mode="before", check_fields=False)
    @classmethod
    def _no_number(cls, value: object) -> object:
        # 1 equals true, and would be taken for it.
        if not (isinstance(value, bool) or value == "auto"):
            raise ValueError("should be auto, true or false")
        return value

    @field_validator("tile_tokens", mode="before", check_fields=False)
    @classmethod
    def _tiles(cls, value: object) -> str:
        text = str(value) if isinstance(value, int | str) else ""
        if text in ("auto", "none"):
            return text
        if not (text.isascii() and text.isdigit() and _LEAST_TILE <= int(text) <= _LARGEST_INT):
            raise ValueError(f"should be auto, none or a number of tokens >= {_LEAST_TILE}")
        return str(int(text))

    @field_validator("optim", mode="before", check_fields=False)
    @classmethod
    def _other_spellings(cls, value: object) -> object:
        return _OPTIMIZERS.get(value, value) if isinstance(value, str) else value

    @field_validator("optim_args", "lr_scheduler_kwargs", mode="before", check_fields=False)
    @classmethod
    def _join_pairs(cls, value: object) -> object:
        return join_pairs(value)

    @field_validator("optim_args", "lr_scheduler_kwargs", check_fields=False)
    @classmethod
    def _named_pairs(cls, value: str | None) -> str | None:
        if value is not None and not are_pairs(value):
            raise ValueError("should be NAME=VALUE,NAME=VALUE")
        return value

    @field_validator("eval_dataset", mode="before", check_fields=False)
    @classmethod
    def _join_sets(cls, value: object) -> object:
        return join_sets(value)

    @field_validator("eval_dataset", check_fields=False)
    @classmethod
    def _named_sets(cls, value: Any) -> Any:
        read_sets(value)
        return value

    @field_validator("eval_strategy", mode="before", check_fields=False)
    @classmethod
    def _no_of_yaml(cls, value: object) -> object:
        # YAML reads a bare no as false.
        return "no" if value is False else value

    @field_validator("metric_for_best_model", check_fields=False)
    @classmethod
    def _known_metric(cls, value: str | None, info: ValidationInfo) -> str | None:
        # Which sets there are is not known where eval_dataset is wrong itself.
        if value is None or not {"eval_dataset", "objective"} <= info.data.keys():
            return value
        sets = [name for name in read_sets(info.data["eval_dataset"]) if name]
        known = metric_names(sets, info.data["objective"])
        # HF's names begin with eval_; a set's name may as well.
        value = value if value in known else value.removeprefix("eval_")
        if value not in known:
            raise ValueError(f"should be one of {', '.join(known)}")
        return value

    @field_validator("objective", mode="before", check_fields=False)
    @classmethod
    def _none_of_trl(cls, value: object) -> object:
        if isinstance(value, str) and (reason := OBJECTIVES_OF_TRL.get(value.lower())):
            why = (
                f"objective {value} {reason}: use TRL's trainer on a patched model and reference, "
                "as in docs/preferences.md (grpo and others); objectives here are "
                f"{', '.join(OBJECTIVES)}"
            )
            raise PydanticCustomError("objective", "{why}", {"why": why})
        return value

    @field_validator("loss_weights", "class_weights", check_fields=False)
    @classmethod
    def _some_weights(cls, value: str | None) -> str | None:
        if value is not None and min(read_numbers(value)) < 0:
            raise ValueError("should be numbers of at least 0")
        return value

    @field_validator("loss_type", check_fields=False)
    @classmethod
    def _known_losses(cls, value: str | None) -> str | None:
        if value is None:
            return None
        names = ["alphapo" if name == "alpha" else name for name in split_names(value)]
        known = list(dict.fromkeys(name for keys in OBJECTIVES.values() for name in keys.losses))
        if not names or not set(names) <= set(known) or len(set(names)) < len(names):
            raise ValueError(f"should be different ones of {', '.join(known)}")
        return ",".join(names)

    @field_validator("lora_rank_pattern", mode="before", check_fields=False)
    @classmethod
    def _join_ranks(cls, value: object) -> object:
        return join_ranks(value)

    @field_validator("lora_rank_pattern", check_fields=False)
    @classmethod
    def _some_ranks(cls, value: str | None) -> str | None:
        if value is not None:
            read_ranks(value)
        return value

    @field_validator(
        "lora_target_modules",
        "lora_modules_to_save",
        "lora_exclude_modules",
        "lora_target_parameters",
        check_fields=False,
    )
    @classmethod
    def _some_names(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not split_names(value):
            kind = "parameter" if info.field_name == "lora_target_parameters" else "module"
            raise ValueError(f"should name a {kind}")
        return value

    @field_validator("add_tokens", "add_special_tokens", check_fields=False)
    @classmethod
    def _some_tokens(cls, value: str | None) -> str | None:
        if value is not None and not all(token.strip() for token in value.split(",")):
            raise ValueError("should name tokens, separated by single commas")
        return value

    @field_validator("report_to", check_fields=False)
    @classmethod
    def _known_trackers(cls, value: str | None) -> str | None:
        names = split_names(value)
        if value is None or names == ["none"]:
            return None
        if not names or not set(names) <= set(TRACKERS):
            raise ValueError(f"should be none, or some of {', '.join(TRACKERS)}")
        return ",".join(names)

    @field_validator("profile_steps", mode="before", check_fields=False)
    @classmethod
    def _one_step(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("profile_steps", check_fields=False)
    @classmethod
    def _some_profile(cls, value: str | None) -> str | None:
        if value is not None:
            match = re.fullmatch(r"([1-9]\d{0,8})(?:-([1-9]\d{0,8}))?", value, re.ASCII)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise ValueError("should be a step such as 3, or steps such as 3-5")
        return value

    @field_validator("ops", check_fields=False)
    @classmethod
    def _known_ops(cls, value: str) -> str:
        if value not in ("auto", "all", "none"):
            # The names are in the library, which imports torch.
            from liger_kernels.transformers.patching.plan import resolve_ops

            try:
                resolve_ops(value)
            except ValueError as error:
                raise PydanticCustomError("ops", "{why}", {"why": str(error)}) from None
        return value

    @field_validator("dp_shard_size", check_fields=False)
    @classmethod
    def _some_shards(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("should be -1 or at least 1")
        return value

    @field_validator("max_steps", check_fields=False)
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("should be -1 or at least 1")
        return value
