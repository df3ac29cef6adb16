"""The model part of a GGUF file: what llama.cpp computes for an architecture, sizes and tensors.

llama.cpp takes some of a model from its own code: the activation, which layers attend to a window,
the scale of attention. A configuration that says otherwise would run there and compute something
else, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "add_sizes",
    "context_length",
    "find_difference",
    "tensors_of",
]

_SILU, _GELU = ("silu",), ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp that computes a model type.

    Attributes:
        name: Member of gguf.MODEL_ARCH.
        activations: Those that its MLP may have.
        rotates_pairs: Whether it rotates numbers side by side, where transformers rotates halves.
        adds_one: Whether its norms multiply by the weight alone, where transformers adds 1 to it.
        window_every: Of so many layers all but the last attend to a window; 0: none does.
        window_theta: Base of the rotation in layers with a window, if it is a constant of its code.
        deep: The depth at which it scales attention by hidden_size / heads, not by head_dim.
        scales_with: How rope.scaling may be: names of rope_type.
    """

    name: str
    activations: tuple[str, ...] = _SILU
    rotates_pairs: bool = False
    adds_one: bool = False
    window_every: int = 0
    window_theta: float | None = None
    deep: int = 0
    scales_with: tuple[str, ...] = ("default", "linear", "yarn")


_LLAMA = Architecture(
    "LLAMA", rotates_pairs=True, scales_with=("default", "linear", "yarn", "llama3")
)
# By model type of transformers.
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "gemma": Architecture("GEMMA", _GELU, adds_one=True, scales_with=("default",)),
    "gemma2": Architecture(
        "GEMMA2", _GELU, adds_one=True, window_every=2, deep=46, scales_with=("default",)
    ),
    "gemma3_text": Architecture(
        "GEMMA3",
        _GELU,
        adds_one=True,
        window_every=6,
        window_theta=10000.0,
        deep=62,
        scales_with=("default", "linear"),
    ),
}


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _rope(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """Return the settings of the rotation, of one kind of layer where kinds differ."""
    settings = getattr(config, "rope_parameters", None)
    if settings is None:
        # Before version 5 of transformers.
        scaling = (getattr(config, "rope_scaling", None) or {}) if kind == "full_attention" else {}
        theta = config.rope_theta
        if kind != "full_attention":
            theta = getattr(config, "rope_local_base_freq", theta)
        settings = {"rope_theta": theta, **scaling}
    settings = settings.get(kind, settings)
    kinds = {"rope_type": settings.get("type", "default"), **settings}
    return {**kinds, "rope_theta": float(kinds["rope_theta"])}


def find_difference(config: Any, architecture: Architecture) -> str | None:
    """Return a setting that llama.cpp does not have, in words, or None."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in architecture.activations:
        return f"its activation is {activation!r}, which llama.cpp does not run there"
    rope = _rope(config)
    if rope["rope_type"] not in architecture.scales_with:
        return f"its rope_type is {rope['rope_type']!r}, for which GGUF has no keys there"
    setting = _rope_difference(rope)
    if setting is not None:
        return setting
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional"
    return _attention_difference(config, architecture)


def _rope_difference(rope: dict[str, Any]) -> str | None:
    """Return a setting of the rotation that is a constant in llama.cpp and differs from it."""
    constants: dict[str, Any] = {"partial_rotary_factor": 1.0}
    if rope["rope_type"] == "yarn":
        constants |= {"beta_fast": 32, "beta_slow": 1, "truncate": True}
        constants |= {"mscale": None, "mscale_all_dim": None}
        constants["attention_factor"] = 0.1 * math.log(rope["factor"]) + 1
    for name, constant in constants.items():
        value = rope.get(name)
        is_same = value is None or (constant is not None and math.isclose(value, constant))
        if not is_same:
            return f"the {name} of its rotation is {value}, for which GGUF has no key there"
    return None


def _attention_difference(config: Any, architecture: Architecture) -> str | None:
    num_layers, every = config.num_hidden_layers, architecture.window_every
    if every:
        is_full = [(i + 1) % every == 0 for i in range(num_layers)]
        expected = ["full_attention" if full else "sliding_attention" for full in is_full]
        if list(config.layer_types) != expected:
            return f"its layers do not attend to all tokens in every {every}th alone"
    theta = architecture.window_theta
    if theta is not None and _rope(config, "sliding_attention")["rope_theta"] != theta:
        return f"its layers with a window do not rotate with base {theta:.0f}"
    scalar = getattr(config, "query_pre_attn_scalar", None)
    size = head_size(config)
    if num_layers == architecture.deep:
        size = config.hidden_size // config.num_attention_heads
    if scalar is not None and scalar != size:
        return f"its query_pre_attn_scalar is {scalar}, where llama.cpp divides by {size}"
    return None


def context_length(config: Any, architecture: Architecture) -> int:
    """Return up to how many tokens llama.cpp computes the model.

    Where its architecture has no window, that of the model is the end: beyond it llama.cpp attends
    to more tokens than the model does.
    """
    longest = int(config.max_position_embeddings)
    window = None if architecture.window_every else getattr(config, "sliding_window", None)
    return longest if window is None else min(longest, int(window))


def add_sizes(writer: Any, config: Any, architecture: Architecture) -> None:
    """Write the sizes and constants of a model."""
    import gguf

    size, rope = head_size(config), _rope(config)
    writer.add_context_length(context_length(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
    if architecture.window_every:
        writer.add_sliding_window(config.sliding_window)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            getattr(writer, f"add_{name}")(getattr(config, name))


def tensors_of(
    model: Any, architecture: Architecture
) -> Iterator[tuple[str, torch.Size, Callable[[], Tensor]]]:
    """Yield the name in GGUF, the shape and a function of the values of each tensor.

    Raises:
        KeyError: A weight has no place in the architecture.
    """
    import gguf

    config = model.config
    kind = gguf.MODEL_ARCH[architecture.name]
    places = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    factors = _rope_factors(config)
    if factors is not None:
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]
        yield f"{name}.weight", factors.shape, lambda: factors
    seen: dict[int, str] = {}
    # A head that is the embedding is not written; llama.cpp takes the embedding then.
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in seen:
            continue
        seen[id(weight)] = name
        place = places.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise KeyError(name)
        yield place, weight.shape, _converted(name, weight, config, architecture)


def _converted(
    name: str, weight: Tensor, config: Any, architecture: Architecture
) -> Callable[[], Tensor]:
    weight = weight.detach()
    if architecture.rotates_pairs and ".q_proj." in name:
        return lambda: in_pairs(weight, config.num_attention_heads)
    if architecture.rotates_pairs and ".k_proj." in name:
        return lambda: in_pairs(weight, config.num_key_value_heads)
    if architecture.adds_one and name.endswith("norm.weight"):
        return lambda: weight.float() + 1
    return lambda: weight


def in_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Return the rows of each head in the order first, middle, second, middle + 1, ...

    Rotating halves turns row i with row i + D / 2; in this order they stand side by side.
    """
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _rope_factors(config: Any) -> Tensor | None:
    """Return by what llama3's scaling divides each frequency, or None where there is none."""
    if _rope(config)["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    return (_rope(config)["rope_theta"] ** -exponents / scaled.double()).float()
