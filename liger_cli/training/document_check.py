"""The check of a model in memory before it trains on rows of documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from liger_cli.config import RunConfig
from liger_cli.data.packing import check_packed, token_logits
from liger_cli.errors import ConfigError
from liger_cli.training.attention import AttentionPlan
from liger_cli.training.inputs import Inputs
from liger_cli.training.model.classifiers import take_places, token_scores
from liger_kernels.transformers.attention.interface import recorded_choices

__all__ = ["check_documents"]


def check_documents(
    config: RunConfig, inputs: Inputs, model: Any, accelerator: Any, notify: Callable[[str], None]
) -> Inputs:
    """Check that documents of a row do not see each other, and record what computes each layer.

    Returns:
        The inputs with the backends that were seen; of a model that fails the check, and that was
        not asked to lay rows end to end, with batches that are padded.

    Raises:
        ConfigError: The model fails the check, and packing or padding_free was asked for.
    """
    plan = inputs.attention
    if not plan.has_documents:
        return inputs
    flatten = inputs.collator.flatten or plan.padding_free
    if config.has_scores:
        take_places(model)
    outputs = token_scores if config.has_scores else token_logits
    try:
        with accelerator.autocast(), recorded_choices() as found:
            check_packed(model, flatten=flatten, has_lengths=plan.has_lengths, outputs=outputs)
    except ConfigError as error:
        if config.packing or config.padding_free == "true":
            raise
        notify(f"padding_free is off: {error.message}")
        collator = inputs.collator.with_layout(**AttentionPlan().layout)
        return replace(inputs, attention=AttentionPlan(plan.implementation), collator=collator)
    # The check runs in evaluation, where nothing is dropped.
    if found and not any("dropout" in (layer.reason or "") for layer in plan.layers):
        plan = replace(plan, layers=tuple(found))
    for line in plan.lines():
        notify(line)
    return replace(inputs, attention=plan)
