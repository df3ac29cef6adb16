"""Tiny random models of any model type: the fields of its configuration made small by their names.

A configuration class does not say which of its numbers must fit each other, so a type is built from
the first of a few variations that makes a model which trains.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from liger_kernels.transformers.repair import repair_model

# Model type to class. A type with a vision part is its image-text class; the text configuration
# inside has a type, and a line, of its own.
MODEL_CLASSES: dict[str, str] = {
    **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
VOCAB_SIZE = 128
MAX_PARAMETERS = 60_000_000

# What a field is set to, by its name alone.
_SIZES: dict[str, Any] = {
    # Vocabulary and positions.
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Width.
    **dict.fromkeys(
        (
            *("hidden_size", "n_embd", "d_model", "embed_dim", "hidden_dim", "out_hidden_size"),
            *("word_embed_proj_dim", "projection_dim", "vision_hidden_size", "lru_width"),
            "mamba_d_ssm",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"),
            *("ffn_hidden_size", "mlp_hidden_size", "dense_intermediate_size"),
            "intermediate_size_mlp",
        ),
        48,
    ),
    **dict.fromkeys(
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size"),
            *("expert_ffn_hidden_size", "q_lora_rank", "kv_lora_rank", "qk_head_dim"),
        ),
        16,
    ),
    # Depth.
    **dict.fromkeys(
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
            *("encoder_layers", "depth"),
        ),
        2,
    ),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers", "num_kv_shared_layers"), 0),
    # Heads.
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "global_attention_heads"),
            *("decoder_attention_heads", "encoder_attention_heads", "linear_num_value_heads"),
        ),
        4,
    ),
    **dict.fromkeys(
        (
            *("num_key_value_heads", "num_global_key_value_heads", "num_key_value_groups"),
            *("linear_num_key_heads", "index_n_heads"),
        ),
        2,
    ),
    **dict.fromkeys(
        (
            *("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "global_head_dim"),
            *("rotary_dim", "rotary_ndims", "linear_key_head_dim", "linear_value_head_dim"),
            *("index_head_dim", "query_pre_attn_scalar", "hidden_size_per_layer_input"),
            "laurel_rank",
        ),
        8,
    ),
    "index_topk": 4,
    "sliding_window": 16,
    "attention_window_size": 16,
    "attention_chunk_size": 64,
    # Experts.
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(
        (
            *("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"),
            *("zero_expert_num", "num_dense_layers", "moe_num_shared_experts"),
        ),
        1,
    ),
    "expert_capacity": 64,
    "moe_latent_size": None,
    # State spaces.
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "conv_kernel"), 4),
    **dict.fromkeys(
        (
            *("mamba_d_head", "mamba_d_state", "mamba_chunk_size", "mamba_head_dim"),
            *("state_size", "ssm_state_size", "d_state", "chunk_size"),
        ),
        8,
    ),
    **dict.fromkeys(("mamba_n_groups", "mamba_expand", "n_groups"), 1),
    "expand": 2,
    "altup_num_inputs": 2,
    # Vision.
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_FULL_ROPE = {
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    "layer_types": ["full_attention", "full_attention"],
}
_TEXT_IDS = {"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102}


def _mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    """Return positions of three kinds, each with its part of a head's frequencies."""
    parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}
    return {"rope_parameters": parameters}


# What names alone cannot tell, for types worth it.
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_HYBRID, "linear_num_heads": 4, "linear_head_dim": 8},
    "bamba": {"attn_layer_indices": [1], "mamba_expand": 1},
    "cohere_compass": {"text_config": _FULL_ROPE},
    "cohere_compass_text": _FULL_ROPE,
    "glm46v": {"text_config": _mrope([1, 1, 2])},
    "glm4v": {"text_config": _mrope([1, 1, 2])},
    "glm4v_moe": {"text_config": _mrope([1, 1, 2], partial_rotary_factor=1.0)},
    "glm_ocr": {"text_config": _mrope([1, 1, 2])},
    "glmga": {"text_config": _mrope([1, 1, 2])},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_HYBRID, "mamba_expand": 1},
    "kimi_linear": {**_HYBRID, "linear_num_heads": 4, "linear_head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen2_5_omni_thinker": {"text_config": _mrope([1, 1, 2]), **_TEXT_IDS},
    "qwen2_5_vl": {"text_config": _mrope([1, 1, 2])},
    "qwen2_vl": {"text_config": _mrope([1, 1, 2])},
    "qwen3_omni_moe_thinker": {"text_config": _mrope([1, 1, 2]), **_TEXT_IDS},
    # Its dropout and its hashes draw from seeds of their own, another each time.
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "xlm": {"emb_dim": 32},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1},
}
# Tried in this order: fields left at their default, and another depth (patterns of layer types have
# a period).
_VARIATIONS: tuple[tuple[tuple[str, ...], int], ...] = (
    ((), 2),
    ((), 4),
    ((), 8),
    (("head_dim",), 2),
    (("num_key_value_heads",), 2),
    (("head_dim", "num_key_value_heads"), 2),
    (("sliding_window",), 2),
)


def training_inputs() -> dict[str, torch.Tensor]:
    """Return a batch of text: ids and labels, some of them ignored."""
    ids = torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def build(model_type: str) -> PreTrainedModel:
    """Return a tiny model of a type, in training mode, whose loss is finite.

    Raises:
        Exception: The first variation's, when no variation gives such a model.
    """
    model_class = getattr(transformers, MODEL_CLASSES[model_type])
    sizes = _merge(_fields(CONFIG_MAPPING[model_type]), _OWN.get(model_type, {}))
    problem = None
    for without, depth in _VARIATIONS:
        try:
            return _build(model_class, CONFIG_MAPPING[model_type], _vary(sizes, without, depth))
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _build(model_class: Any, config_class: Any, fields: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_class(**fields)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in model_class(config).parameters())
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"{num_parameters / 1e6:.0f} million parameters are not tiny")
    model = model_class(config_class(**fields))
    repair_model(model)
    model.train()
    # Weights wide enough for every part to matter; some types overflow with them.
    _spread(model, 5.0)
    loss = model(**training_inputs()).loss
    if loss is not None and not loss.isfinite():
        _spread(model, 0.2)
        loss = model(**training_inputs()).loss
    if loss is None or not loss.isfinite():
        raise ValueError(f"its loss is {loss}")
    return model


def _spread(model: torch.nn.Module, scale: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            elif parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))


def _fields(config_class: Any, depth: int = 0) -> dict[str, Any]:
    """Return the small values of the fields that a configuration class and its parts have."""
    names = set(getattr(config_class, "__dataclass_fields__", ()))
    names |= set(inspect.signature(config_class.__init__).parameters)
    # A mapped name is another spelling of a field.
    names -= set(getattr(config_class, "attribute_map", ()))
    default = _default(config_class)
    # A list where most types have a number stays as it is.
    fields = {
        name: value
        for name, value in _SIZES.items()
        if name in names and isinstance(_value(default, name), list) <= isinstance(value, list)
    }
    for name, part in _parts(config_class) if depth < 3 else ():
        fields[name] = {**_fields(part, depth + 1), "model_type": part.model_type}
    return fields


def _parts(config_class: Any) -> Iterator[tuple[str, Any]]:
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = config_class.sub_configs[name]
        if not getattr(part, "model_type", ""):
            # Any configuration may stand here; the default one does.
            default = _default(config_class)
            part = type(_value(default, name))
        if getattr(part, "model_type", ""):
            yield name, part


@functools.cache
def _default(config_class: Any) -> Any:
    try:
        return config_class()
    except Exception:
        return None


def _value(config: Any, name: str) -> Any:
    # A field that differs from layer to layer refuses to be read.
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _merge(fields: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in own.items():
        is_part = isinstance(value, dict) and isinstance(fields.get(name), dict)
        merged[name] = _merge(fields[name], value) if is_part else value
    return merged


def _vary(fields: dict[str, Any], without: tuple[str, ...], depth: int) -> dict[str, Any]:
    varied = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            varied[name] = _vary(value, without, depth)
        elif name not in without:
            varied[name] = depth if name in _DEPTHS else value
    return varied
