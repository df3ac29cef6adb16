"""Small models with a patched head, one training step of them, and what it made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from liger_kernels.transformers.lazy_logits.head import install_head, num_fused
from liger_kernels.transformers.lazy_logits.tensor import LazyLogits

FUSED = "fused_linear_cross_entropy"


VOCAB, BATCH, LENGTH = 64, 2, 10


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "gemma2": (
        "Gemma2",
        # Eager attention: sdpa knows no cap of attention scores, and says so in a warning.
        {"head_dim": 4, "final_logit_softcapping": 3.0, "attn_implementation": "eager"},
    ),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 4}),
}


def make(family: str = "llama", **settings: Any) -> Any:
    """Return a tiny model in training mode whose logits are far from zero."""
    prefix, own = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **own, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return model


def make_inputs(length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (BATCH, length), generator=generator)
    labels = ids.clone()
    # Ragged: each row has another number of labels.
    labels[0, :3] = -100
    labels[1, -1:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor | None], Any]:
    """Run one forward and backward; return loss, gradients and output."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out = model(**inputs)
    # Not 1, so that a gradient that forgets what comes in is seen.
    (out.loss * 1.7).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return out.loss.detach(), grads, out


def assert_same(ours: Any, stock: Any, tolerance: float = 1e-5) -> None:
    """Compare two results of `step`."""
    torch.testing.assert_close(ours[0], stock[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == stock[1].keys()
    for name, grad in stock[1].items():
        assert (ours[1][name] is None) == (grad is None), name
        if grad is not None:
            floor = tolerance * grad.abs().max().item()
            torch.testing.assert_close(ours[1][name], grad, rtol=tolerance, atol=floor, msg=name)


def was_made(logits: LazyLogits) -> bool:
    return logits._deferred.made is not None


class LargestTensor(TorchDispatchMode):
    """Records the most numbers that any tensor with a vocabulary dimension had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and VOCAB in value.shape[-1:]:
                self.numel = max(self.numel, value.numel())
        return out


# Any cross-entropy on the logits.


def assert_loss_is_stock(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    is_lazy: bool = True,
    num_losses: int = 1,
    family: str = "gemma2",
) -> None:
    """Compare a loss of our own on out.logits, with a random gradient coming in.

    Args:
        loss_of: The loss, from logits and labels.
        is_lazy: Whether it is computed without making the logits.
        num_losses: As how many fused losses it is computed.
        family: Whose model it is.
    """
    model = make(family)
    inputs = make_inputs()
    labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    results = []
    for is_patched in (False, True):
        if is_patched:
            install_head(model, FUSED)
        model.zero_grad()
        out = model(**inputs)
        loss = loss_of(out.logits, labels)
        dy = torch.randn(loss.shape, generator=torch.Generator().manual_seed(5))
        loss.backward(dy)
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
        if is_patched:
            assert was_made(out.logits) != is_lazy
            assert num_fused(model.lm_head) == 1 + is_lazy * num_losses
    assert_same(results[1], results[0], tolerance=2e-5)


class OwnLoss(torch.autograd.Function):
    """A loss of another package: it takes logits and makes the gradient itself."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits.softmax(-1) - F.one_hot(target, VOCAB))
        return F.cross_entropy(logits, target, reduction="sum")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return ctx.saved_tensors[0] * dy, None
