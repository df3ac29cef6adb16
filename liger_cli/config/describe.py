"""The values that each key takes, in words and as a JSON schema, for help, errors and docs."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator

from liger_cli.config.keys import ALIASES
from liger_cli.config.run_config import RunConfig
from liger_kernels.nearest import nearest_name

__all__ = [
    "allowed",
    "choices",
    "default_text",
    "group",
    "json_schema",
    "limits",
    "nearest_key",
    "parallel_advice",
    "value_type",
]

# Keys of other programs, where the spelling does not lead to ours.
_ELSEWHERE = {
    "base_model": "model",
    "pretrained_model_name_or_path": "model",
    "torch_dtype": "dtype",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "train_file": "dataset",
    "datasets": "dataset",
    "val_size": "eval_fraction",
    "test_size": "eval_fraction",
    "val_set_size": "eval_fraction",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "gradient_clipping": "max_grad_norm",
    "out_dir": "output_dir",
    "no_cuda": "use_cpu",
    "use_peft": "adapter",
    "use_dora": "adapter",
    "finetuning_type": "adapter",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "exclude_modules": "lora_exclude_modules",
    "target_parameters": "lora_target_parameters",
    "lora_target_parameter": "lora_target_parameters",
    "rank_pattern": "lora_rank_pattern",
    "qlora": "load_in_4bit",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "double_quantization": "use_bnb_nested_quant",
    "compile": "torch_compile",
    "template": "chat_template",
    "chat_template_jinja": "chat_template",
    "tokens": "add_tokens",
    "new_special_tokens": "add_special_tokens",
    "additional_special_tokens": "add_special_tokens",
    "resize_vocab": "resize_to_multiple_of",
    "resize_token_embeddings_to_32x": "resize_to_multiple_of",
    "neftune_alpha": "neftune_noise_alpha",
    "auto_find_batch_size": "auto_fit",
    "stage": "objective",
    "rl": "objective",
    "pref_beta": "beta",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "pref_loss": "loss_type",
    "dpo_loss_type": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "ref_model": "reference",
    "reference_free": "reference",
    "precompute_ref_log_probs": "reference",
    "dpo_use_weighting": "use_weighting",
    "pref_ftx": "loss_weights",
    "rpo_alpha": "loss_weights",
}


# Kinds of parallelism that have no key here, by how other programs begin the names of theirs.
_PARALLELISMS = {
    "tp": "tensor parallelism",
    "tensor": "tensor parallelism",
    "cp": "context parallelism",
    "context": "context parallelism",
    "sp": "sequence parallelism",
    "sequence": "sequence parallelism",
    "ep": "expert parallelism",
    "expert": "expert parallelism",
    "pp": "pipeline parallelism",
    "pipeline": "pipeline parallelism",
}

# Flags of a launch by what is written as a key for them.
_LAUNCH_FLAGS = {
    **dict.fromkeys(("nproc", "nproc_per_node", "num_processes", "num_gpus"), "--nproc"),
    **dict.fromkeys(("nnodes", "num_machines"), "--nnodes"),
    **dict.fromkeys(("node_rank", "machine_rank"), "--node-rank"),
    **dict.fromkeys(("rdzv_endpoint", "main_process_ip"), "--rdzv-endpoint"),
    "log_rank": "--log-rank",
}


def parallel_advice(name: str) -> str | None:
    """Return the advice on a key that sets up processes, such as tp_size or nproc, or None."""
    words = re.split("[_.-]", name.lower())
    is_size = bool({"size", "degree", "parallel", "parallelism", "plan"} & set(words))
    if is_size and (kind := _PARALLELISMS.get(words[0])):
        return f": {kind} is not there yet; dp_shard_size and dp_replicate_size are"
    if words[0] in ("fsdp", "fsdp2", "deepspeed"):
        return ": dp_shard_size -1 shards the model over all ranks (FSDP2)"
    if flag := _LAUNCH_FLAGS.get(name.lower().replace("-", "_")):
        return f": processes belong to the command, not to the run: give {flag}"
    return None


def value_type(name: str) -> Any:
    """Return the type of a key's values other than null."""
    return _type_and_notes(name)[0]


def choices(name: str) -> tuple[str, ...]:
    """Return the only values of a key, empty where there are more than a list could hold."""
    kind = value_type(name)
    return tuple(map(_yaml_word, get_args(kind))) if get_origin(kind) is Literal else ()


def group(name: str) -> str:
    """Return the heading under which a key stands."""
    extra = RunConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])


def limits(name: str) -> list[str]:
    """Return the bounds of a number, such as ">= 0"."""
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    return [
        f"{sign} {getattr(limit, attribute)}"
        for limit in _type_and_notes(name)[1]
        for attribute, sign in signs
        if hasattr(limit, attribute)
    ]


def default_text(name: str) -> str:
    """Return the default as YAML has it; empty where the key must be given."""
    field = RunConfig.model_fields[name]
    return "" if field.is_required() else _yaml_word(field.default)


def allowed(name: str) -> str:
    """Return in words what a key takes: "integer >= 1 or null"."""
    words = {bool: "true or false", int: "integer", float: "number", Path: "path"}
    text = f"one of {', '.join(choices(name))}" if choices(name) else ""
    text = text or words.get(value_type(name), "text")
    if bounds := limits(name):
        text += f" {', '.join(bounds)}"
    if any(isinstance(note, BeforeValidator) for note in _type_and_notes(name)[1]):
        is_mapping = name in ("columns", "roles", "message_fields")
        text += " or a mapping of names" if is_mapping else " or a list of names"
    takes_null = type(None) in get_args(RunConfig.model_fields[name].annotation)
    return f"{text} or null" if takes_null else text


def nearest_key(name: str) -> str | None:
    """Return the key that was probably meant, or None."""
    wanted = name[:100].lower().replace("-", "_").strip()
    # `training.seed` and `lora.r` are how other programs write sections.
    tail = wanted.rpartition(".")[2]
    for spelling in (wanted, wanted.replace(".", "_"), tail):
        if spelling in RunConfig.model_fields or spelling in ALIASES:
            return spelling
        if spelling in _ELSEWHERE:
            return _ELSEWHERE[spelling]
    keys = [*RunConfig.model_fields, *ALIASES]
    return nearest_name(wanted, keys) or nearest_name(tail, keys)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a file: what an editor needs to complete and check its keys.

    No key is required: what a file leaves out may come from --set or a flag.
    """
    schema = RunConfig.model_json_schema()
    properties: dict[str, Any] = {}
    for name, entry in schema["properties"].items():
        kept = {key: value for key, value in entry.items() if key not in ("title", "group")}
        properties[name] = kept
    for alias, name in ALIASES.items():
        properties[alias] = {**properties[name], "description": f"The same as {name}."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of liger",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _type_and_notes(name: str) -> tuple[Any, list[Any]]:
    """Return a key's type without null, and its annotations apart: limits and validators."""
    field = RunConfig.model_fields[name]
    kind, notes = field.annotation, list(field.metadata)
    while get_origin(kind) in (Union, types.UnionType, Annotated):
        if get_origin(kind) is Annotated:
            kind, *inner = get_args(kind)
            notes += inner
        else:
            # The first is the one that a flag can spell.
            kind = next(part for part in get_args(kind) if part is not type(None))
    return kind, notes


def _yaml_word(value: object) -> str:
    special = {None: "null", True: "true", False: "false"}
    return special[value] if value is None or isinstance(value, bool) else str(value)
