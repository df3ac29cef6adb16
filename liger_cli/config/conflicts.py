"""Keys that do not go together."""

from __future__ import annotations

import functools
from collections.abc import Callable

from liger_cli.config.keys import Keys
from liger_cli.config.objective_conflicts import OBJECTIVE_CONFLICTS
from liger_cli.config.objectives import OBJECTIVES

__all__ = ["CONFLICTS", "METRIC_SCHEDULES"]

_ADAPTER_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_modules_to_save",
    "lora_exclude_modules",
    "lora_target_parameters",
    "lora_rank_pattern",
    "use_rslora",
)


_ADAM_KEYS = ("adam_beta1", "adam_beta2", "adam_epsilon")

# Schedules that follow a metric instead of the number of the step.
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


def _is_set(key: str, config: Keys) -> bool:
    return bool(getattr(config, key) != type(config).model_fields[key].default)


def _lacks_adapter(key: str, config: Keys) -> bool:
    return config.adapter == "none" and _is_set(key, config)


def _lacks_four_bits(key: str, config: Keys) -> bool:
    return not config.load_in_4bit and _is_set(key, config)


def _lacks_moments(key: str, config: Keys) -> bool:
    return config.optim in ("sgd", "adafactor") and _is_set(key, config)


def _lacks_evaluations(key: str, config: Keys) -> bool:
    return not config.evaluates_during_training and _is_set(key, config)


def _lacks_shards(key: str, config: Keys) -> bool:
    return config.dp_shard_size in (None, 1) and _is_set(key, config)


def _lacks_push(key: str, config: Keys) -> bool:
    return not config.push_to_hub and _is_set(key, config)


def _doubles_train_on(key: str, config: Keys) -> bool:
    return config.train_on is not None and getattr(config, key) is not None


# Keys, why they do not go together, and when. A conflict is never one of default values alone.
CONFLICTS: tuple[tuple[tuple[str, ...], str, Callable[[Keys], bool]], ...] = (
    (("bf16", "fp16"), "bf16 and fp16 exclude each other", lambda c: c.bf16 and c.fp16),
    (
        ("fp16", "dtype"),
        "fp16 needs float32 or bfloat16 parameters, dtype is float16",
        lambda c: c.fp16 and c.dtype == "float16" and c.adapter == "none",
    ),
    *(
        ((key, "push_to_hub"), f"{key} is for push_to_hub", functools.partial(_lacks_push, key))
        for key in ("hub_model_id", "hub_private_repo")
    ),
    (
        ("push_to_hub", "save_consolidated"),
        "push_to_hub needs the safetensors of the last checkpoint, which save_consolidated none "
        "leaves out",
        lambda c: c.push_to_hub and c.save_consolidated == "none",
    ),
    (
        ("master_weights", "dtype", "bf16", "fp16"),
        "master_weights is for bfloat16 parameters; bf16 and fp16 have float32 ones",
        lambda c: c.master_weights and (c.bf16 or c.fp16 or c.dtype in ("float32", "float16")),
    ),
    (
        ("master_weights", "adapter"),
        "master_weights is for the model's own parameters; those of an adapter are float32",
        lambda c: c.master_weights and c.adapter != "none",
    ),
    (
        ("use_regional_compilation", "gradient_checkpointing"),
        "torch compiles nothing inside of a checkpoint, and with gradient_checkpointing each layer "
        "is in one: use_regional_compilation would compile nothing",
        lambda c: bool(c.use_regional_compilation and c.gradient_checkpointing),
    ),
    (
        ("activation_offloading", "gradient_checkpointing"),
        "activation_offloading takes the one tensor that a checkpointed layer keeps; set "
        "gradient_checkpointing",
        lambda c: c.activation_offloading is True and not c.gradient_checkpointing,
    ),
    (
        ("activation_offloading", "torch_compile"),
        "with gradient_checkpointing the model is compiled as one graph, which "
        "activation_offloading would break at each layer; leave torch_compile out",
        lambda c: c.activation_offloading is True and c.torch_compile is True,
    ),
    (
        ("tile_tokens", "torch_compile"),
        "a compiled MLP is one graph, which does not run over pieces of tokens; leave "
        "torch_compile out",
        lambda c: c.tile_tokens.isdigit() and c.torch_compile is True,
    ),
    (
        ("tile_tokens", "ops"),
        "tile_tokens is for patched MLPs and experts; ops is none",
        lambda c: c.tile_tokens.isdigit() and c.ops == "none",
    ),
    *(
        (
            (key, "adapter"),
            f"{key} is for an adapter; set adapter to lora or dora",
            functools.partial(_lacks_adapter, key),
        )
        for key in _ADAPTER_KEYS
    ),
    (
        ("lora_target_parameters", "lora_dropout"),
        "an adapter of a parameter has no input to drop out: lora_target_parameters needs "
        "lora_dropout 0",
        lambda c: c.lora_target_parameters is not None and c.lora_dropout > 0,
    ),
    (
        ("lora_target_parameters", "adapter"),
        "lora_target_parameters is for adapter lora; peft has no dora of a parameter",
        lambda c: c.lora_target_parameters is not None and c.adapter == "dora",
    ),
    (
        ("load_in_4bit", "load_in_8bit"),
        "load_in_4bit and load_in_8bit exclude each other",
        lambda c: c.load_in_4bit and c.load_in_8bit,
    ),
    *(
        (
            (key, "load_in_4bit"),
            f"{key} is for load_in_4bit",
            functools.partial(_lacks_four_bits, key),
        )
        for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant")
    ),
    *(
        (
            (key, "optim"),
            f"{key} is for AdamW and muon; sgd and adafactor do not take it",
            functools.partial(_lacks_moments, key),
        )
        for key in _ADAM_KEYS
    ),
    (
        ("lr_scheduler_type", "eval_steps"),
        "this lr_scheduler_type follows the loss of the evaluations and needs eval_steps",
        lambda c: c.lr_scheduler_type in METRIC_SCHEDULES and not c.evaluates_during_training,
    ),
    (
        ("lr_scheduler_type", "warmup_steps", "warmup_ratio"),
        "this lr_scheduler_type has no warm-up; set warmup_steps and warmup_ratio to 0",
        lambda c: c.lr_scheduler_type in METRIC_SCHEDULES and c.warmup_steps + c.warmup_ratio > 0,
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
    *(
        (
            (key, "train_on"),
            f"train_on says what {key} says; keep one of them",
            functools.partial(_doubles_train_on, key),
        )
        for key in ("completion_only_loss", "assistant_only_loss")
    ),
    *(
        (
            (key, "eval_steps"),
            f"{key} looks at the evaluations and needs eval_steps, or eval_strategy epoch",
            functools.partial(_lacks_evaluations, key),
        )
        for key in ("load_best_model_at_end", "early_stopping_patience")
    ),
    (
        ("early_stopping_threshold", "early_stopping_patience"),
        "early_stopping_threshold is for early_stopping_patience",
        lambda c: c.early_stopping_threshold > 0 and c.early_stopping_patience is None,
    ),
    (
        ("eval_strategy", "eval_steps"),
        "eval_strategy steps needs eval_steps",
        lambda c: c.eval_strategy == "steps" and c.eval_steps == 0,
    ),
    (
        ("eval_strategy", "eval_steps"),
        "eval_steps is for eval_strategy steps; set it to 0",
        lambda c: c.eval_strategy in ("no", "epoch") and c.eval_steps > 0,
    ),
    (
        ("eval_strategy", "eval_on_start"),
        "eval_strategy no and eval_on_start exclude each other",
        lambda c: c.eval_strategy == "no" and c.eval_on_start,
    ),
    *(
        (
            (key, "dp_shard_size"),
            f"{key} is for a sharded run; set dp_shard_size, -1 for all ranks",
            functools.partial(_lacks_shards, key),
        )
        for key in ("reshard_after_forward", "cpu_offload", "reduce_dtype")
    ),
    (
        ("packing", "text_mode"),
        "text_mode stream fills rows by itself; packing keeps documents apart",
        lambda c: c.packing and c.text_mode == "stream",
    ),
    (
        ("objective", "text_mode"),
        "text_mode stream is for objectives that learn every token of a text",
        lambda c: (
            (OBJECTIVES[c.objective].compares_answers or OBJECTIVES[c.objective].has_scores)
            and c.text_mode == "stream"
        ),
    ),
    (
        ("streaming", "eval_strategy"),
        "streaming has no epochs to evaluate after; set eval_steps",
        lambda c: c.streaming and c.eval_strategy == "epoch",
    ),
    (
        ("streaming", "max_steps"),
        "streaming needs max_steps: the number of rows in an epoch is unknown",
        lambda c: c.streaming and c.max_steps < 0,
    ),
    (
        ("streaming", "eval_fraction"),
        "streaming and eval_fraction exclude each other; eval_dataset has separate rows",
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
    *OBJECTIVE_CONFLICTS,
)
