"""Peak memory of a training step by part, eager and patched, from a model's configuration alone.

What is counted, for N tokens a step, s bytes a value, widths H (hidden), A (all query heads),
K (all key heads), I (one MLP), V (vocabulary):

weights      parameters * bytes of a parameter, and under autocast a copy in the autocast dtype
optimizer    AdamW's two moments: 2 * trainable parameters
gradients    trainable parameters
norms        eager N*(4+s)*width each: an fp32 copy of the input and the normalised value;
             patched N*s*width: the input. The output, which the next projection keeps, is N*s*width
attention    q, k, v and the output: N*s*(2A+2K). sdpa keeps no scores; rope keeps nothing, eager
             or patched
mlp          gated, eager N*s*4I: gate, up, activation, product; patched N*s*3I. Plain: N*s*2I
experts      the same for the experts a token goes to, and N*s*H an expert for its gathered input
logits       eager N*V*(s+12): the logits, which the output keeps, and in backward three fp32
             tensors of their size (N*V*16 in fp32). Patched cross_entropy N*V*2s. Fused: one chunk
head buffers only the fused loss: gradients of the head (V*H, in fp32 over more than eight chunks)
             and of its input (N*H), made in forward

The peak is the largest of four moments: the loss (all activations and the logits; gradients too
under accumulation), the handing over of the head's gradient (in fp32 and in the parameter's dtype),
the first layer's backward, and the optimizer step (all gradients, no activations). With gradient
checkpointing the activations are one input a layer, and one layer at a time is whole.

Not counted: allocator slack, library workspaces, masks, dropout, images, the router of experts,
norms that multiply by the weight in fp32 (Gemma, OLMo 2: one more fp32 copy in eager). Against
steps measured on a GPU it is within 5 % (tests/cli/test_estimate.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from liger_kernels.ops.chunked_linear import accumulator_dtype, chunk_tokens
from liger_kernels.ops.launch import cdiv

__all__ = [
    "MemoryEstimate",
    "ModelShape",
    "StepShape",
    "estimate_memory",
    "estimate_memory_ratio",
    "model_shape",
]

Coverage = Mapping[str, Mapping[str, int]]

_FP32_BYTES = 4
# By bytes of a value; memory is the same for the other half precision.
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
# Multiprocessors of an H100, by which chunks of the fused loss are cut.
_GPU_SMS = 132


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its memory depends on."""

    num_layers: int
    hidden: int
    query_width: int
    key_width: int
    mlp_width: int
    vocab: int
    is_tied: bool
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0

    def num_parameters(self, *, is_gated: bool) -> int:
        """Returns the number of parameters; norms, biases and routers are left out (below 1 %)."""
        matrices = 3 if is_gated else 2
        attention = self.hidden * (2 * self.query_width + 2 * self.key_width)
        width = self.num_experts * self.expert_width if self.num_experts else self.mlp_width
        embeddings = self.vocab * self.hidden * (1 if self.is_tied else 2)
        return embeddings + self.num_layers * (attention + matrices * self.hidden * width)


@dataclass(frozen=True)
class StepShape:
    """A training step: how much goes through the model, in which dtype.

    Attributes:
        parameter_bytes: Bytes of a parameter, of its gradient and of each moment.
        compute_bytes: Bytes of an activation; another number than parameter_bytes is autocast.
        num_parameters: Where the model was built; else it follows from the configuration.
        num_trainable: Parameters with a gradient; all by default.
    """

    batch_size: int
    sequence_length: int
    parameter_bytes: int = 2
    compute_bytes: int = 2
    num_parameters: int | None = None
    num_trainable: int | None = None
    is_head_trainable: bool = True
    gradient_checkpointing: bool = False
    accumulates: bool = False
    on_cpu: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part. The parts are not all there at once: peak is the largest sum at one moment."""

    weights: int
    optimizer: int
    gradients: int
    activations: Mapping[str, int]
    logits: int
    head_buffers: int
    peak: int


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Returns the sizes in a Hugging Face configuration; of its text part where it has several.

    Args:
        config: What config.json holds.

    Raises:
        ValueError: A size is missing.
    """
    text = config.get("text_config") or config
    hidden = _size(text, "hidden_size", "n_embd", "d_model")
    num_heads = _size(text, "num_attention_heads", "n_head")
    head_width = text.get("head_dim") or hidden // num_heads
    num_experts = text.get("num_local_experts") or text.get("num_experts") or 0
    mlp_width = _first(text, "intermediate_size", "n_inner") or 4 * hidden
    return ModelShape(
        num_layers=_size(text, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        query_width=num_heads * head_width,
        key_width=(text.get("num_key_value_heads") or num_heads) * head_width,
        mlp_width=mlp_width,
        vocab=_size(text, "vocab_size"),
        is_tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
        num_experts=num_experts,
        experts_per_token=(text.get("num_experts_per_tok") or 1) if num_experts else 0,
        expert_width=text.get("moe_intermediate_size") or mlp_width if num_experts else 0,
    )


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if config.get(name)), None)


def _size(config: Mapping[str, Any], *names: str) -> int:
    value = _first(config, *names)
    if value is None:
        raise ValueError(f"config: {names[0]} is missing, so its memory cannot be estimated")
    return value


def estimate_memory(
    config: Mapping[str, Any], coverage: Coverage, step: StepShape
) -> MemoryEstimate:
    """Returns the memory of a training step.

    Args:
        config: What config.json holds.
        coverage: {op: {"patched": n, "candidates": m}}; with 0 patched it is the eager model.
        step: Batch, sequence, dtypes and options.

    Raises:
        ValueError: The configuration lacks a size.
    """
    shape = model_shape(config)
    is_gated = any(_candidates(coverage, op) for op in ("swiglu", "geglu"))
    num_parameters = step.num_parameters or shape.num_parameters(is_gated=is_gated)
    trainable = num_parameters if step.num_trainable is None else step.num_trainable
    weights = num_parameters * step.parameter_bytes
    if step.compute_bytes != step.parameter_bytes:
        weights += num_parameters * step.compute_bytes
    optimizer = 2 * trainable * step.parameter_bytes
    gradients = trainable * step.parameter_bytes

    tokens = step.batch_size * step.sequence_length
    whole = _activations(shape, coverage, tokens, step.compute_bytes, is_gated)
    one_layer = sum(whole.values()) // shape.num_layers
    kept = whole
    if step.gradient_checkpointing:
        inputs = tokens * step.compute_bytes * shape.hidden * shape.num_layers
        kept = {"layer inputs": inputs}
    loss = _loss(shape, coverage, tokens, step)

    kept_bytes = sum(kept.values())
    loss_bytes = loss.logits + loss.head_sum + loss.input_gradient
    recomputed = one_layer if step.gradient_checkpointing else 0
    moments = (
        kept_bytes + loss_bytes + (gradients if step.accumulates else 0),
        kept_bytes + loss.head_sum + loss.head_copy + loss.input_gradient,
        kept_bytes + recomputed + (loss.head_copy or loss.head_sum),
        gradients + one_layer,
    )
    return MemoryEstimate(
        weights=weights,
        optimizer=optimizer,
        gradients=gradients,
        activations=kept,
        logits=loss.logits,
        head_buffers=loss.head_sum + loss.head_copy + loss.input_gradient,
        peak=weights + optimizer + max(moments),
    )


def _activations(
    shape: ModelShape, coverage: Coverage, tokens: int, s: int, is_gated: bool
) -> dict[str, int]:
    """What forward keeps for backward, all layers together, by kind of layer."""
    # Norms over heads (q_norm, k_norm) are counted as wide as the others.
    num_norms = _candidates(coverage, "rms_norm")
    fused_norms = _patched(coverage, "rms_norm")
    norms = shape.hidden * ((_FP32_BYTES + s) * (num_norms - fused_norms) + s * fused_norms)
    # torch's own layer norm keeps its input alone, as the fused one does.
    num_norms += _candidates(coverage, "layer_norm")
    norms += s * shape.hidden * _candidates(coverage, "layer_norm")
    outputs = s * shape.hidden * num_norms
    attention = s * (2 * shape.query_width + 2 * shape.key_width) * shape.num_layers

    kept_per_width: float = 2
    if is_gated:
        kept_per_width = 4 - _patched_share(coverage, "swiglu", "geglu")
    width = shape.mlp_width
    gathered = 0
    if shape.num_experts:
        width = shape.expert_width * shape.experts_per_token
        gathered = s * shape.hidden * shape.experts_per_token
    mlp = (round(s * width * kept_per_width) + gathered) * shape.num_layers
    return {
        "norms": tokens * (norms + outputs),
        "attention": tokens * attention,
        "mlp": tokens * mlp,
    }


@dataclass(frozen=True)
class _LossBytes:
    logits: int
    # The head's gradient as it is summed up, and again in the parameter's dtype where that differs.
    head_sum: int = 0
    head_copy: int = 0
    input_gradient: int = 0


def _loss(shape: ModelShape, coverage: Coverage, tokens: int, step: StepShape) -> _LossBytes:
    s = step.compute_bytes
    if _patched(coverage, "fused_linear_cross_entropy"):
        compute, parameter = (_DTYPES[size] for size in (s, step.parameter_bytes))
        device = torch.device("cpu" if step.on_cpu else "cuda")
        chunk = chunk_tokens(
            tokens, shape.hidden, shape.vocab, compute, device, step.is_head_trainable, _GPU_SMS
        )
        logits = min(tokens, chunk) * shape.vocab * s
        input_gradient = tokens * shape.hidden * s
        if not step.is_head_trainable:
            return _LossBytes(logits, input_gradient=input_gradient)
        head = shape.vocab * shape.hidden
        summed = accumulator_dtype(compute, parameter, cdiv(tokens, chunk), device)
        copy = 0 if summed == parameter else head * step.parameter_bytes
        return _LossBytes(logits, head * summed.itemsize, copy, input_gradient)
    if _patched(coverage, "cross_entropy"):
        return _LossBytes(tokens * shape.vocab * 2 * s)
    return _LossBytes(tokens * shape.vocab * (s + 3 * _FP32_BYTES))


def _candidates(coverage: Coverage, op: str) -> int:
    return coverage[op]["candidates"] if op in coverage else 0


def _patched(coverage: Coverage, op: str) -> int:
    return coverage[op]["patched"] if op in coverage else 0


def _patched_share(coverage: Coverage, *ops: str) -> float:
    return sum(_patched(coverage, op) for op in ops) / sum(_candidates(coverage, op) for op in ops)


def estimate_memory_ratio(config: Mapping[str, Any], coverage: Coverage, step: StepShape) -> float:
    """Returns the patched peak as a share of the eager one: the gain without a baseline.

    Raises:
        ValueError: The configuration lacks a size.
    """
    eager = {op: {**counts, "patched": 0} for op, counts in coverage.items()}
    return estimate_memory(config, coverage, step).peak / estimate_memory(config, eager, step).peak
