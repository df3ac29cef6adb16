"""Configurations of axolotl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liger_cli.commands.config.translation import Rule, Translation, lost, needless, rename
from liger_cli.errors import ConfigError

__all__ = ["MARKS", "translate"]

# Keys by which its files are recognised.
MARKS = ("base_model", "datasets", "sequence_len", "micro_batch_size", "sample_packing")


def translate(given: Mapping[str, Any], folder: Path) -> Translation:
    """Return the configuration of a supervised run.

    Args:
        given: The keys of the file.

    Raises:
        ConfigError: It trains something else.
    """
    for key in ("reward_model", "process_reward_model"):
        if given.get(key):
            raise ConfigError(
                f"{key}: reward models of axolotl are not translated",
                hint="liger trains one on prompt, chosen and rejected with --objective reward: "
                "docs/classifiers.md",
            )
    if given.get("rl"):
        raise ConfigError(
            f"rl: {given['rl']}: preferences of axolotl are not translated",
            hint="liger trains on prompt, chosen and rejected with --objective dpo, ipo, orpo, cpo "
            "or simpo, on labelled answers with kto: docs/preferences.md",
        )
    found = Translation()
    found.read(given, _RULES)
    blocks = given.get("datasets") or []
    entries = [entry for block in blocks if (entry := _dataset(found, block, "datasets"))]
    if entries:
        found.set("dataset", entries, "datasets")
    elif blocks:
        raise ConfigError(
            "none of its datasets can be translated:\n"
            + "\n".join(f"{key}: {why}" for key, why in found.lost.items() if "[" in key)
        )
    name = "test_datasets"
    tests = [entry for block in given.get(name) or [] if (entry := _dataset(found, block, name))]
    if tests:
        _set_tests(found, tests)
    if given.get("peft_use_dora"):
        found.set("adapter", "dora", "peft_use_dora")
    if given.get("lora_target_linear"):
        found.set("lora_target_modules", "all-linear", "lora_target_linear")
    if given.get("train_on_inputs"):
        found.set("completion_only_loss", False, "train_on_inputs")
    return found


def _set_tests(found: Translation, tests: list[dict[str, Any]]) -> None:
    is_path = len(tests) == 1 and set(tests[0]) == {"path"}
    found.set("eval_dataset", tests[0]["path"] if is_path else tests, "test_datasets")


def _dataset(found: Translation, block: Any, name: str) -> dict[str, Any] | None:
    """Return an entry of `dataset` for a dataset block, or None where its type has none."""
    if not isinstance(block, Mapping) or not block.get("path"):
        found.lost[f"{name}: {block!r:.60}"] = "a dataset block has a path"
        return None
    path, kind = str(block["path"]), block.get("type")
    label = f"{name}[{path}]"
    if block.get("data_files"):
        files = block["data_files"]
        files = [files] if isinstance(files, str) else files
        if len(files) > 1:
            found.lost[f"{label}.data_files"] = "write an entry of dataset for each file"
            return None
        path = str(Path(path) / files[0]) if Path(path).is_dir() else str(files[0])
    entry: dict[str, Any] = {"path": f"{path}:{block['name']}" if block.get("name") else path}
    if block.get("split") and not Path(path).suffix:
        entry["split"] = block["split"]
    names = _names(found, block, kind, label)
    if names is None:
        return None
    for key in block:
        if key not in _BLOCK_KEYS and block[key] not in (None, False, "", [], {}):
            found.lost[f"{label}.{key}"] = "an entry of dataset has no such key"
    return entry | {key: value for key, value in names.items() if value}


_BLOCK_KEYS = (
    *("path", "type", "ds_type", "data_files", "name", "split", "field_messages", "field"),
    *("message_field_role", "message_field_content", "message_property_mappings", "roles"),
    *("message_field_training", "roles_to_train", "train_on_eos", "field_system", "field_tools"),
    *("trust_remote_code", "conversation"),
)


def _names(
    found: Translation, block: Mapping[str, Any], kind: Any, label: str
) -> dict[str, Any] | None:
    """Return columns, roles and fields of a dataset block by its type."""
    if kind == "chat_template":
        return _chat(found, block, label)
    if kind == "sharegpt":
        return {"columns": _renamed({"conversations": block.get("field_messages")})}
    if kind == "completion":
        field = block.get("field") or "text"
        return {"columns": {"text": field}}
    if kind == "alpaca":
        found.notes.append(f"{label}: the columns system and history are used where they are there")
        return {"instruction_style": "alpaca"}
    if isinstance(kind, Mapping):
        return _custom(found, kind, label)
    found.lost[f"{label}.type"] = (
        f"{kind!r} writes a prompt in words that liger does not write; chat_template, sharegpt, "
        "alpaca, completion and types with format '{instruction}' are translated"
    )
    return None


def _chat(found: Translation, block: Mapping[str, Any], label: str) -> dict[str, Any]:
    mappings = dict(block.get("message_property_mappings") or {})
    for ours, older in (("role", "message_field_role"), ("content", "message_field_content")):
        mappings.setdefault(ours, block.get(older))
    if block.get("message_field_training"):
        mappings["train"] = block["message_field_training"]
    trained = block.get("roles_to_train")
    if trained not in (None, ["assistant"], ["gpt"]):
        found.lost[f"{label}.roles_to_train"] = f"{trained}: liger trains the assistant"
    if block.get("train_on_eos") not in (None, "turn"):
        found.lost[f"{label}.train_on_eos"] = "liger trains the mark that ends each answer"
    known = ("system", "user", "assistant", "tool")
    roles = {role: names for role, names in (block.get("roles") or {}).items() if role in known}
    for role in block.get("roles") or {}:
        if role not in known:
            found.lost[f"{label}.roles.{role}"] = f"roles are {', '.join(known)}"
    columns = {
        "messages": block.get("field_messages"),
        "system": block.get("field_system"),
        "tools": block.get("field_tools"),
    }
    fields = {ours: theirs for ours, theirs in mappings.items() if theirs and theirs != ours}
    return {"columns": _renamed(columns), "roles": roles, "message_fields": fields}


def _custom(found: Translation, kind: Mapping[str, Any], label: str) -> dict[str, Any] | None:
    """Return the columns of a type whose prompt is the instruction as it stands."""
    wording = kind.get("format") or "{instruction}"
    if wording != "{instruction}" or kind.get("system_prompt") or kind.get("system_format"):
        found.lost[f"{label}.type"] = (
            f"format {wording!r}: a prompt is a column as it stands; write it into the rows"
        )
        return None
    return {
        "columns": {
            "prompt": kind.get("field_instruction") or "instruction",
            "completion": kind.get("field_output") or "output",
        }
    }


def _renamed(columns: Mapping[str, str | None]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if theirs and theirs != ours}


def _adapter(found: Translation, key: str, value: Any) -> None:
    if value in ("lora", "qlora"):
        found.set("adapter", "lora", key)
        if value == "qlora":
            found.set("load_in_4bit", True, key)
    else:
        found.lost[key] = f"{value!r}: liger trains LoRA and DoRA"


def _eval_part(found: Translation, key: str, value: Any) -> None:
    if value and value < 1:
        found.set("eval_fraction", float(value), key)
    elif value:
        found.lost[key] = f"{value} rows: eval_fraction is a part of the rows"


def _bf16(found: Translation, key: str, value: Any) -> None:
    # Its parameters are bfloat16 then, as ours are by dtype.
    if value in (True, "full"):
        found.set("dtype", "bfloat16", key)


def _per_epoch(found: Translation, key: str, value: Any) -> None:
    if key == "evals_per_epoch" and value == 1:
        found.set("eval_strategy", "epoch", key)
    else:
        found.lost[key] = f"{value} times an epoch: give {key[:4]}_steps"


def _attention(name: str) -> Rule:
    def rule(found: Translation, key: str, value: Any) -> None:
        if value:
            found.set("attn_implementation", name, key)

    return rule


def _tokens(found: Translation, key: str, value: Any) -> None:
    for name, token in value.items():
        found.set(name, token, f"special_tokens.{name}")


def _template(found: Translation, key: str, value: Any) -> None:
    if value != "tokenizer_default":
        found.set("chat_template", value, key)


def _plugins(found: Translation, key: str, value: Any) -> None:
    others = [name for name in value if "liger" not in str(name).lower()]
    if others:
        found.lost[key] = f"{', '.join(map(str, others))}: liger has no plugins"


def _wandb(found: Translation, key: str, value: Any) -> None:
    found.set("report_to", "wandb", key)
    found.notes.append(f"wandb_project: set WANDB_PROJECT={value} in the environment")


def _steps(found: Translation, key: str, value: Any) -> None:
    if isinstance(value, float) and value < 1:
        found.lost[key] = f"{value}: a part of all steps; give a number of steps"
    else:
        found.set(key, value, key)


def _hub_model(found: Translation, key: str, value: Any) -> None:
    if value:
        found.set("push_to_hub", True, key)
        found.set("hub_model_id", value, key)


_NEEDLESS = (
    *("datasets", "test_datasets", "dataset_prepared_path", "model_type", "tokenizer_type"),
    *("pad_to_sequence_len", "strict", "train_on_inputs", "peft_use_dora", "lora_target_linear"),
    *("is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model", "local_rank"),
    *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "liger_rope", "liger_rms_norm"),
    *("liger_glu_activation", "liger_layer_norm", "liger_fused_linear_cross_entropy", "debug"),
    *(
        "gradient_checkpointing_kwargs",
        "eval_sample_packing",
        "save_safetensors",
        "trust_remote_code",
    ),
    *("wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model", "xformers_attention"),
    *("tokenizer_use_fast", "use_tensorboard", "save_only_model"),
)
_OPTIM = {"adamw_bnb_8bit": "adamw_8bit", "adamw_hf": "adamw_torch"}
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_NEEDLESS, needless),
    "base_model": rename("model"),
    "hub_model_id": _hub_model,
    "adapter": _adapter,
    "peft_use_rslora": rename("use_rslora"),
    "sequence_len": rename("max_length"),
    "sample_packing": rename("packing"),
    "micro_batch_size": rename("per_device_train_batch_size"),
    "eval_batch_size": rename("per_device_eval_batch_size"),
    "num_epochs": rename("num_train_epochs"),
    "optimizer": rename("optim", _OPTIM),
    "lr_scheduler": rename("lr_scheduler_type"),
    "dataset_processes": rename("dataset_num_proc"),
    "gradient_checkpointing": rename("gradient_checkpointing", {"unsloth": True, "offload": True}),
    "val_set_size": _eval_part,
    "bf16": _bf16,
    "bfloat16": _bf16,
    "evals_per_epoch": _per_epoch,
    "saves_per_epoch": _per_epoch,
    "eval_steps": _steps,
    "save_steps": _steps,
    # Ours is as fast where the kernels of flash-attn are not installed.
    "flash_attention": needless,
    "sdp_attention": _attention("sdpa"),
    "eager_attention": _attention("eager"),
    "special_tokens": _tokens,
    "tokens": rename("add_tokens"),
    "chat_template": _template,
    "plugins": _plugins,
    "wandb_project": _wandb,
    "tf32": lost("torch decides about TF32"),
    "lora_model_dir": lost("name the adapter as model, which continues to train it"),
    "resume_from_checkpoint": lost("liger train --resume CHECKPOINT"),
    "deepspeed": lost("dp_shard_size -1 shards the model over all ranks (FSDP2)"),
    "fsdp": lost("dp_shard_size -1 shards the model over all ranks (FSDP2)"),
    "fsdp_config": lost("dp_shard_size -1 shards the model over all ranks (FSDP2)"),
}
