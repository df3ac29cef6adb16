"""Tiny random models: 2 layers, hidden 32, vocabulary 128; build(name) makes one in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokenizers
import torch
import transformers
from transformers import PreTrainedModel

from liger_kernels.transformers.patching.upstream_fixes import repair_model

transformers.logging.set_verbosity_error()

IS_V5 = int(transformers.__version__.split(".")[0]) >= 5
VOCAB_SIZE = 128
IMAGE_TOKEN = 100
VISION_START = 101
# The families a user asks for first; every test runs on these.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral")
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


def _text(**options: Any) -> dict[str, Any]:
    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **options,
    }
    if not IS_V5 and "rope_parameters" in config:
        rope = dict(config.pop("rope_parameters"))
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    return config


def _rope(**options: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, **options}


def text_inputs(batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Return ids and labels; the ignored labels differ from row to row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 90, (batch, length), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    labels[-1, -2:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def image_inputs(num_tokens: int, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return text_inputs with image tokens after the second one, unlabelled."""
    inputs = text_inputs()
    ids = inputs["input_ids"]
    image = torch.full((ids.shape[0], num_tokens), IMAGE_TOKEN)
    ids = torch.cat([ids[:, :2], image, ids[:, 2:]], 1)
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        **tensors,
    }


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _moe(**options: Any) -> dict[str, Any]:
    return _text(num_experts_per_tok=2, output_router_logits=True, **options)


TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _text()),
    "mistral": ("MistralForCausalLM", "MistralConfig", _text(sliding_window=8)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _text()),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _text(head_dim=8)),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _text(
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            final_logit_softcapping=3.0,
            attn_logit_softcapping=5.0,
            attn_implementation="eager",
        ),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _moe(num_local_experts=4, router_aux_loss_coef=0.01),
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _text(head_dim=8)),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _text(head_dim=8, query_pre_attn_scalar=8, sliding_window=8, final_logit_softcapping=3.0),
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _moe(head_dim=8, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[1]),
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _text()),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        _text(
            logits_scaling=4.0,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.3,
        ),
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _text()),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", _text(head_dim=8, partial_rotary_factor=0.5)),
    "llama4_text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _text(
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 0],
            attention_chunk_size=64,
        ),
    ),
}


def _mllama() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    }
    text = _text(num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=_rope())
    config = transformers.MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN
    )
    return transformers.MllamaForConditionalGeneration(config)


def _gemma3() -> PreTrainedModel:
    config = transformers.Gemma3Config(
        vision_config=VISION,
        text_config=_text(head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
        mm_tokens_per_image=1,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=101,
        eoi_token_index=102,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _paligemma(text_type: str = "gemma") -> PreTrainedModel:
    text = TEXT[text_type][2]
    config = transformers.PaliGemmaConfig(
        vision_config={**VISION, "projection_dim": 32},
        text_config={**text, "model_type": text_type},
        projection_dim=32,
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
        vocab_size=VOCAB_SIZE,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _qwen_vl(name: str, **vision: Any) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(
        vision_config={
            "depth": 2,
            "num_heads": 4,
            "hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        text_config=_text(rope_parameters=_rope(mrope_section=[1, 1, 2])),
        image_token_id=IMAGE_TOKEN,
        video_token_id=103,
        vision_start_token_id=VISION_START,
        vision_end_token_id=102,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _qwen2_vl() -> PreTrainedModel:
    return _qwen_vl("Qwen2VL", embed_dim=32, mlp_ratio=2)


def _qwen2_5_vl() -> PreTrainedModel:
    return _qwen_vl(
        "Qwen2_5_VL",
        intermediate_size=48,
        out_hidden_size=32,
        window_size=16,
        fullatt_block_indexes=[1],
    )


def _llama4() -> PreTrainedModel:
    theta = {"rope_parameters": _rope()} if IS_V5 else {"rope_theta": 1e4}
    vision = {
        "hidden_size": 32,
        # What the pixel shuffle makes of the hidden size.
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 2,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
        **theta,
    }
    config = transformers.Llama4Config(
        vision_config=vision,
        text_config=TEXT["llama4_text"][2],
        image_token_index=IMAGE_TOKEN,
        boi_token_index=101,
        eoi_token_index=102,
    )
    model = transformers.Llama4ForConditionalGeneration(config)
    # The stock class of some versions raises in every call.
    repair_model(model)
    return model


MULTIMODAL: dict[str, Callable[..., PreTrainedModel]] = {
    "mllama": _mllama,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "llama4": _llama4,
}

# Every family that has a row.
ALL = (*TEXT, *MULTIMODAL)


def _qwen_vl_inputs() -> dict[str, torch.Tensor]:
    inputs = image_inputs(
        4, pixel_values=_pixels(32, 96), image_grid_thw=torch.tensor([[1, 4, 4]] * 2)
    )
    # Version 4 looks for an image after this token, 5 in the types.
    inputs["input_ids"][:, 1] = VISION_START
    if IS_V5:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    return inputs


def inputs_of(name: str, kind: str = "image") -> dict[str, torch.Tensor]:
    """Return a training batch for a family: with an image where it takes one and kind says so.

    Kinds: "text"; "image" with labels on the text; "labelled-image" with labels on both.
    """
    if name in TEXT or kind == "text":
        return text_inputs()
    inputs = _image_inputs(name)
    if kind == "labelled-image":
        inputs["labels"] = inputs["input_ids"].clone()
    return inputs


def kinds_of(name: str) -> tuple[str, ...]:
    """Return the kinds of batches that a family takes."""
    return ("text",) if name in TEXT else ("text", "image", "labelled-image")


def _image_inputs(name: str) -> dict[str, torch.Tensor]:
    if name in ("qwen2_vl", "qwen2_5_vl"):
        return _qwen_vl_inputs()
    if name == "mllama":
        ones = torch.ones(2, 1, dtype=torch.long)
        inputs = image_inputs(
            1,
            pixel_values=_pixels(2, 1, 1, 3, 8, 8),
            aspect_ratio_ids=ones,
            aspect_ratio_mask=ones[:, :, None],
        )
        length = inputs["input_ids"].shape[1]
        inputs["cross_attention_mask"] = torch.ones(2, length, 1, 1, dtype=torch.long)
        return inputs
    inputs = image_inputs(1 if name == "gemma3" else 4, pixel_values=_pixels(2, 3, 8, 8))
    if name == "llama4":
        return inputs
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    inputs["token_type_ids"] = (is_image if name == "gemma3" else ~is_image).long()
    return inputs


def config_of(name: str, **options: Any) -> Any:
    """Return the configuration of a text family, with some options changed."""
    _, config_class, config = TEXT[name]
    return getattr(transformers, config_class)(**{**config, **options})


def build(name: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Return a stock model with weights of `seed`, spread enough for every part to matter."""
    torch.manual_seed(seed)
    if name in MULTIMODAL:
        return spread(MULTIMODAL[name](**options))
    return spread(getattr(transformers, TEXT[name][0])(config_of(name, **options)))


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Spread the weights of a new model, so that every part of it shows in the loss."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)
    return model


def build_unlisted(seed: int = 0) -> PreTrainedModel:
    """Return a model of a type that has no row in FAMILIES."""
    torch.manual_seed(seed)
    config = transformers.SmolLM3Config(**_text(no_rope_layers=[1, 0]))
    return transformers.SmolLM3ForCausalLM(config)


def tokenizer() -> Any:
    """Return a tokenizer with a word for each id: t0 to t125, then those of padding and the end."""
    words = {f"t{i}": i for i in range(VOCAB_SIZE - 2)}
    words |= {"<pad>": VOCAB_SIZE - 2, "<eos>": VOCAB_SIZE - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>"
    )
