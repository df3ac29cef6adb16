"""Which part of a step's memory a module makes, by its name in the model and what it holds."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["ACTIVATIONS", "HEAD_GRADIENT", "LOGITS", "ON_HOST", "module_parts", "table_of"]

LOGITS = "logits"
HEAD_GRADIENT = "head buffers"
# In the memory of the host: nothing of it is on the device.
ON_HOST = "on the host"
ACTIVATIONS = (
    "embeddings",
    "attention",
    "mlp",
    "experts",
    "norms",
    "residuals",
    "vision",
    "other",
)

_VISION = ("vision", "visual", "image", "multi_modal", "projector", "audio")
_NORMS = ("norm", "ln_")
# In this order: a mixture of experts is often named mlp.
_WORDS = {
    "attention": ("attn", "attention", "mixer", "mamba"),
    "experts": ("expert", "moe", "router"),
    "mlp": ("mlp", "feed_forward", "ffn"),
}


def module_parts(model: Any) -> dict[int, str]:
    """Return the part of each module by its id: that of what is made while it runs.

    What the model itself makes, after its inner model has run, is the logits and their loss.
    """
    parts: dict[int, str] = {}
    _walk(model, LOGITS, parts)
    for get, part in (("get_input_embeddings", "embeddings"), ("get_output_embeddings", LOGITS)):
        if (table := table_of(model, get)) is not None:
            parts[id(table)] = part
    return parts


def table_of(model: Any, get: str) -> nn.Module | None:
    """Return the embedding or the head of a model, by the name of the method that returns it."""
    try:
        table: nn.Module | None = getattr(model, get)()
    except (AttributeError, NotImplementedError):
        return None
    return table


def _walk(module: nn.Module, part: str, parts: dict[int, str]) -> None:
    parts[id(module)] = part
    for name, child in module.named_children():
        _walk(child, _part_of(name.lower(), child, part), parts)


def _part_of(name: str, module: nn.Module, above: str) -> str:
    if above == "vision" or _has(name, _VISION):
        return "vision"
    if _has(name, _NORMS) and not list(module.children()):
        return "norms"
    if above in ("attention", "experts"):
        return above
    for part, words in _WORDS.items():
        if _has(name, words):
            is_mixture = part == "mlp" and any("expert" in n for n, _ in module.named_modules())
            return "experts" if is_mixture else part
    if isinstance(module, nn.ModuleList):
        # What a layer makes itself, outside its parts.
        return "residuals"
    return "other" if above == LOGITS else above


def _has(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name for word in words)
