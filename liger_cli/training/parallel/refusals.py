"""Refusals of a sharded run, each with the nearest that works."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.inputs import Inputs
from liger_cli.training.model.adapters import is_quantised
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.optim.optimizers import EIGHT_BIT
from liger_cli.training.parallel.groups import has_separate_experts
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["check_inputs", "check_model", "check_sharded"]

_COPIES = "--dp-replicate-size with the number of ranks (DDP)"


class _Refusal(NamedTuple):
    """Whether something applies, why it is refused, and what works."""

    applies: bool
    reason: str
    hint: str


def check_sharded(config: RunConfig, source: ModelSource, device: torch.device) -> None:
    """Refuse keys of a sharded run, before its data are read.

    Args:
        device: Where the run computes.

    Raises:
        ConfigError: With the nearest that works.
    """
    gathers = config.cpu_offload and config.optim in ("muon", "adafactor")
    _raise_first(
        _Refusal(
            config.fp16,
            "fp16 scales the loss, and shards have no scaler that all ranks agree on",
            "--bf16 needs none.",
        ),
        _Refusal(
            config.optim in EIGHT_BIT,
            f"optim {config.optim} does not take shards of parameters",
            "--optim adamw_torch_fused: its moments are shared by the ranks.",
        ),
        _Refusal(
            gathers and device.type != "cpu",
            f"optim {config.optim} sums over whole matrices, and GPUs do not sum shards on the "
            "host, where cpu_offload keeps them",
            "--optim adamw_torch goes element by element.",
        ),
        _Refusal(
            is_quantised(config, source) and not _has_four_bits(config, source),
            "quantised weights other than those of load_in_4bit cannot be gathered",
            f"--load-in-4bit, or {_COPIES}.",
        ),
        _Refusal(
            config.cpu_offload and is_quantised(config, source),
            "cpu_offload takes no weights of 4 bits",
            "They and the shards of an adapter are small: leave cpu_offload out.",
        ),
        _Refusal(
            config.lora_target_parameters is not None,
            "lora_target_parameters replaces parameters that are sharded",
            f"--lora-target-modules, or {_COPIES}.",
        ),
        _Refusal(
            config.sync_ref_model,
            "sync_ref_model moves a reference that is whole on every rank",
            f"Leave it out, or {_COPIES}.",
        ),
        _Refusal(
            config.auto_fit,
            "auto_fit is for one process: the others would wait for the one that ran out",
            "A smaller --per-device-train-batch-size.",
        ),
    )


def _has_four_bits(config: RunConfig, source: ModelSource) -> bool:
    stored = (source.config or {}).get("quantization_config")
    return config.load_in_4bit or (isinstance(stored, dict) and bool(stored.get("load_in_4bit")))


def check_inputs(inputs: Inputs) -> None:
    """Refuse a model or data whose ranks would not call the same modules.

    Raises:
        ConfigError: With the nearest that works.
    """
    check_model(inputs.meta_model)
    _raise_first(
        _Refusal(
            inputs.data.has_images,
            "ranks whose rows have no images would not take part in the vision model",
            f"{_COPIES}.",
        ),
    )


def check_model(model: Any) -> None:
    """Refuse a model whose ranks would not call the same modules, whatever its data.

    Args:
        model: It may be on the meta device.

    Raises:
        ConfigError: With the nearest that works.
    """
    _raise_first(
        _Refusal(
            has_separate_experts(model),
            "its experts are separate modules, and a rank whose tokens choose none of them would "
            "not take part",
            f"transformers 5 holds them in one, or {_COPIES}.",
        ),
        _Refusal(
            _saves_both_ends(model),
            "lora_modules_to_save has the embedding and the head of a tied model, which are one "
            "matrix in two places, and it cannot be written from shards",
            f"One of the two, or {_COPIES}.",
        ),
    )


def _saves_both_ends(model: Any) -> bool:
    """Return whether an adapter trains copies of the embedding and of the head tied to it."""
    base = inner_model(model)
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return False
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    # Of peft's wrapper around a module that is trained whole.
    return all(hasattr(end, "modules_to_save") for end in ends)


def _raise_first(*refusals: _Refusal) -> None:
    for refusal in refusals:
        if refusal.applies:
            raise ConfigError(f"a sharded run: {refusal.reason}", hint=refusal.hint)
