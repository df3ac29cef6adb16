"""The rows of new tokens that are trained beside an adapter, in the embedding and the head."""

from __future__ import annotations

from typing import Any

import torch

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.model.presets import NewTokens

__all__ = ["check_trained_rows", "rows_to_train"]


def rows_to_train(
    config: RunConfig, model: Any, tokens: NewTokens, saved: list[str]
) -> tuple[dict[str, list[int]], list[str]]:
    """Return how the rows of new tokens are trained beside an adapter.

    Returns:
        By the name of an embedding or head its rows to train, and the names of those to train
        whole: peft trains rows of a head without its bias.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    parts = [table] if head is None else [table, head]
    is_tied = head is not None and head.weight is table.weight
    spelled = [{names[id(part)], names[id(part)].rpartition(".")[2]} for part in parts]
    rows: dict[str, list[int]] = {}
    whole: list[str] = []
    for part, spellings in zip(parts, spelled, strict=True):
        name = names[id(part)]
        last = name.rpartition(".")[2]
        targets = config.adapter_targets
        if isinstance(targets, list) and spellings & set(targets):
            raise ConfigError(
                f"lora_target_modules names {last}, and the rows of the new tokens in it are "
                "trained by themselves",
                hint=f"leave {last} out, or train it whole: --lora-modules-to-save {last}",
            )
        # Of two that are one matrix, what is done to one is done to both.
        if (set().union(*spelled) if is_tied else spellings) & set(saved):
            continue
        if is_tied and part is head:
            continue
        if getattr(part, "bias", None) is not None:
            whole.append(last)
        else:
            rows[name] = tokens.ids
    return rows, whole


def check_trained_rows(adapted: Any, settings: Any) -> None:
    """Raise a ConfigError where rows of new tokens would not be trained, or change the model."""
    if not settings.trainable_token_indices:
        return
    for part in (adapted.get_input_embeddings(), adapted.get_base_model().get_output_embeddings()):
        if part is not None and not any(p.requires_grad for p in part.parameters()):
            raise ConfigError(
                f"adapter: rows of the new tokens would not be trained: {type(part).__name__}",
                hint="--lora-modules-to-save with the names of the embedding and the head",
            )
        if part is not None and not _computes_the_same(part):
            raise ConfigError(
                "adapter: this release of peft computes something else than the "
                f"{type(part.token_adapter.base_layer).__name__} some of whose rows it trains",
                hint="pip install --upgrade peft, or --lora-modules-to-save with the names of the "
                "embedding and the head",
            )


@torch.no_grad()
def _computes_the_same(part: Any) -> bool:
    """Return whether an embedding or head whose rows of some tokens are trained is as it was.

    Early releases of peft know no embedding that scales its output.
    """
    tokens = part._modules.get("token_adapter")
    if tokens is None or tokens.base_layer.weight.device.type == "meta":
        return True
    weight = tokens.base_layer.weight
    x = torch.arange(2, device=weight.device)
    if isinstance(tokens.base_layer, torch.nn.Linear):
        # Sums of one term: others depend on where the weight lies in memory.
        x = torch.eye(2, weight.shape[1], device=weight.device, dtype=weight.dtype)
    return bool(torch.equal(part(x), tokens.base_layer(x)))
