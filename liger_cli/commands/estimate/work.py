"""The work of a rank in a step, computing and sending, from the model's parameters alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_cli.config import RunConfig
from liger_cli.training.memory import Batch, meta_model_of
from liger_cli.training.memory.limits import RunMemory
from liger_cli.training.memory.step import num_experts
from liger_cli.training.memory.values import MemoryEstimate
from liger_cli.training.model.adapters import is_adapted
from liger_cli.training.parallel.groups import groups_of
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["Work", "work_of"]

# Bytes that norms, attention, activations and their gradients move beside the products, for each
# token, layer and hidden unit; and for each unit that goes through an expert. Fitted to llama-1b,
# llama-8b, and layers of qwen3-30b-a3b and mixtral-8x7b on an H200.
_MOVED, _ROUTED = 450.0, 145.0
_NUM_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class Work:
    """A step of a rank, whatever the layout.

    Attributes:
        micro_batches: In a step.
        tokens: Of a micro-batch.
        forward_flops: Of the products of a micro-batch; backward_flops with those that are
            recomputed.
        forward_bytes: Moved by everything else.
        groups: Bytes of each group that is gathered and resharded, in the order of the forward.
        root: Bytes of the group that is gathered once.
        is_resharded: Whether groups are gathered again in backward.
        reduced: Bytes of the gradients of each group, as shards are summed.
        reduced_root: Those of the root's group.
        copied: Bytes of all gradients, as copies are summed.
        state: Bytes that the optimizer reads and writes for the whole model.
    """

    micro_batches: int
    tokens: int
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float
    groups: tuple[float, ...]
    root: float
    is_resharded: bool
    reduced: tuple[float, ...]
    reduced_root: float
    copied: float
    state: float


def work_of(memory: RunMemory, found: MemoryEstimate) -> Work:
    """Return the work of a step.

    Args:
        memory: The run, on a GPU.
        found: Its memory.
    """
    # It imports torch's FSDP, which takes a second.
    from liger_cli.training.parallel.wrapping import mixed_precision

    config = memory.config
    model = meta_model_of(config.model_copy(update={"ops": "none"}), memory.source)
    policy = mixed_precision(config, torch.device("cuda"), adapts=is_adapted(model))
    modules = groups_of(model)
    groups = [list(module.parameters()) for module in modules]
    inside = {id(p) for group in groups for p in group}
    root = [p for p in model.parameters() if id(p) not in inside]
    trained = [p for p in model.parameters() if p.requires_grad]
    forward, backward = _flops(config, model, memory.batch)
    moved = _moved(model, memory.batch)
    # What the optimizer has of the whole model: a rank has a share of it.
    state = (found.optimizer + found.gradients / 2) * memory.plan.dp_shard
    weights = _size(trained)
    return Work(
        micro_batches=config.gradient_accumulation_steps,
        tokens=memory.batch.size * memory.batch.length,
        forward_flops=forward,
        backward_flops=backward,
        forward_bytes=moved / 3,
        backward_bytes=moved * 2 / 3,
        groups=tuple(_size(group, policy.param_dtype) for group in groups),
        root=_size(root, policy.param_dtype),
        is_resharded=config.reshard_after_forward,
        reduced=tuple(_trained_size(group, policy.reduce_dtype) for group in groups),
        reduced_root=_trained_size(root, policy.reduce_dtype),
        copied=weights,
        state=2 * (state + weights),
    )


def _size(parameters: list[nn.Parameter], dtype: torch.dtype | None = None) -> float:
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters)


def _trained_size(parameters: list[nn.Parameter], dtype: torch.dtype | None) -> float:
    return _size([p for p in parameters if p.requires_grad], dtype)


def _flops(config: RunConfig, model: Any, batch: Batch) -> tuple[float, float]:
    """Return the flops of the products of a micro-batch in forward and in backward."""
    base = inner_model(model)
    tokens = batch.size * batch.length
    head = base.get_output_embeddings()
    table = base.get_input_embeddings().weight
    active = _active_share(base)
    forward = backward = recomputed = 0.0
    for name, p in model.named_parameters():
        # An embedding is looked up; one that is the head too is a product there.
        if p.dim() < 2 or (p is table and (head is None or head.weight is not table)):
            continue
        flops = 2.0 * p.numel() * tokens * (active if ".experts." in name else 1.0)
        forward += flops
        backward += flops * (2 if p.requires_grad else 1)
        recomputed += 0.0 if head is not None and p is head.weight else flops
    attention = _attention_flops(base, batch)
    forward, backward = forward + attention, backward + 2 * attention
    if config.gradient_checkpointing:
        backward += recomputed + attention
    return forward, backward


def _attention_flops(base: Any, batch: Batch) -> float:
    """Return the flops of causal attention in forward, whatever its windows."""
    text = base.config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    # Two products of half of all pairs.
    return 2.0 * text.num_hidden_layers * batch.size * batch.length**2 * width


def _moved(model: Any, batch: Batch) -> float:
    """Return the bytes that everything but the products of a micro-batch moves."""
    text = inner_model(model).config.get_text_config()
    expert = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", 0)
    routed = _num_chosen(text) * (text.hidden_size + expert)
    per_layer = _MOVED * text.hidden_size + _ROUTED * routed
    return float(batch.size * batch.length * text.num_hidden_layers * per_layer)


def _num_chosen(text: Any) -> int:
    """Return the experts that a token goes to; 0 of a model without any."""
    return next((int(n) for key in _NUM_CHOSEN if (n := getattr(text, key, None))), 0)


def _active_share(base: Any) -> float:
    return min(1.0, max(1, _num_chosen(base.config.get_text_config())) / num_experts(base))
