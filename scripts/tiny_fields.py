"""Values of the fields of a tiny model's configuration, by name and by type."""

from __future__ import annotations

from typing import Any

# Placeholder tokens of images, above the ids of the text.
IMAGE_TOKEN, VISION_START = 100, 102
VOCAB_SIZE = 128

# Values by the name of the field alone.
SIZES: dict[str, Any] = {
    # Vocabulary and positions.
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE_TOKEN),
    **dict.fromkeys(("video_token_id", "video_token_index"), 101),
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": 103,
    **dict.fromkeys(("audio_token_id", "audio_token_index"), 104),
    **dict.fromkeys(("boi_token_id", "boi_token_index"), 105),
    **dict.fromkeys(("eoi_token_id", "eoi_token_index"), 106),
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
    "mm_tokens_per_image": 4,
    "patch_embed_hidden_size": 48,
    "latent_query_num": 16,
    "image_grid_pinpoints": [[16, 16]],
    "num_image_tokens": 16,
    "num_position_embeddings": 16,
}
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_INDEXED = {
    **_HYBRID,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_FULL_ROPE = {
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    "layer_types": ["full_attention", "full_attention"],
}


_START = {"vision_start_token_id": VISION_START, "audio_token_id": 104}


def _mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    """Return positions of three kinds, each with its part of a head's frequencies."""
    parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}
    return {"rope_parameters": parameters}


# What names alone cannot tell, for types worth it.
OWN: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "use_cache": False,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "chameleon": {"vocabulary_map": {"<image>": IMAGE_TOKEN}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "florence2": {
        "vision_config": {
            "depths": [1, 1],
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 4,
        }
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {
            "sam_config": {"downsample_channels": [16, 32], "global_attn_indexes": [1]}
        },
    },
    "ernie4_5_vl_moe": {"text_config": _mrope([1, 1, 2])},
    "gemma4_unified": {"vision_config": {"pooling_kernel_size": 1}},
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 4,
            "index_kpool": 2,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "qk_rope_head_dim": 0,
        }
    },
    "hunyuan_vl": {"text_config": _mrope([1, 1, 1, 1])},
    "hy_v4_vl": {"text_config": _mrope([1, 1, 2])},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": 32}},
    "janus": {
        "vision_config": {"num_image_tokens": 16},
        "vq_config": {"base_channels": 32, "latent_channels": 32, "num_embeddings": 64},
    },
    "kimi_k25": {"projection_hidden_size": 32},
    "llama4": {
        "vision_config": {
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        }
    },
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
            "max_num_tiles": 1,
        },
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2], "text_hidden_size": 32}},
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {
        "out_hidden_size": 128,
        "audio_config": {"patch_sizes": [16, 6], "hidden_sizes": [16, 32], "depths": [1, 1]},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [16, 32]}}},
    "pp_formulanet": {"vision_config": {"decoder_hidden_size": 32, "post_conv_out_channels": 32}},
    "udop": {"decoder_start_token_id": 0},
    "vision-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "vipllava": {"vision_feature_layers": [-1, -1, -1, -1, -1]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
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
    "qwen2_5_omni_thinker": {"text_config": _mrope([1, 1, 2]), **_START},
    "qwen2_5_vl": {"text_config": _mrope([1, 1, 2])},
    "qwen2_vl": {"text_config": _mrope([1, 1, 2])},
    "qwen3_omni_moe_thinker": {"text_config": _mrope([1, 1, 2]), **_START},
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
VARIATIONS: tuple[tuple[tuple[str, ...], int], ...] = (
    ((), 2),
    ((), 4),
    ((), 8),
    (("head_dim",), 2),
    (("num_key_value_heads",), 2),
    (("head_dim", "num_key_value_heads"), 2),
    (("sliding_window",), 2),
)
