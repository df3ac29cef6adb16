"""How rows reach attention, and what computes it: `--packing`, padding_free, attn_implementation.

Rows of several documents are computed by liger_varlen (liger_kernels/transformers/attention) where
it can serve. The choice follows from the configuration, the model without weights and the device;
first lines and reports show it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from liger_cli.config import RunConfig
from liger_cli.data.packing import packing_problem
from liger_cli.errors import ConfigError, EnvironmentProblem
from liger_kernels.nearest import nearest_name
from liger_kernels.transformers.attention.choice import (
    LayerChoice,
    LayerForm,
    layer_forms,
    model_problem,
    plan_layers,
)
from liger_kernels.transformers.attention.interface import LIGER_VARLEN
from liger_kernels.transformers.attention.kernel import MAX_HEAD_SIZE
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["AttentionPlan", "Rows", "check_implementation", "plan_attention"]

# Below this share of padding, rows of equal length are computed faster as they are.
_WORTH_IT = 0.05


@dataclass(frozen=True)
class Rows:
    """The properties of a run's rows that decide how they are laid out.

    Attributes:
        is_packed: Whether rows hold several documents.
        has_images: Whether they have more than ids.
        padding: The share of padding in their batches, if they were padded; None if unknown.
    """

    is_packed: bool
    has_images: bool = False
    padding: float | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """The layout of batches, and the attention that computes them.

    Attributes:
        implementation: The attn_implementation to load the model with; None is the model's choice.
        layers: The backend of each type of layer; empty where that is up to transformers.
        padding_free: Whether rows that are not packed are laid end to end.
        has_lengths: Whether batches are one row and say where documents begin.
        has_documents: Whether any rows hold several documents.
        reason: Why liger_varlen was not taken for rows of documents, if it was not.
    """

    implementation: str | None = None
    layers: tuple[LayerChoice, ...] = ()
    padding_free: bool = False
    has_lengths: bool = False
    has_documents: bool = False
    reason: str | None = None

    def applied(self, config: RunConfig) -> RunConfig:
        """Return the configuration that the model is loaded with."""
        return config.model_copy(update={"attn_implementation": self.implementation})

    @property
    def layout(self) -> dict[str, bool]:
        """The arguments of Collator that make the batches."""
        # Where it looks for documents, flash attention wants a batch of one row.
        flatten = self.has_lengths or "flash" in (self.implementation or "")
        return {
            "flatten": flatten,
            "padding_free": self.padding_free,
            "has_lengths": self.has_lengths,
        }

    def lines(self) -> list[str]:
        """Return a line for each type of layer: its backend, and why a faster one was not taken."""
        if not self.has_documents:
            return []
        if not self.layers:
            name = self.implementation or "that of the model, with a mask of documents"
            return [f"attention: {name}" + (f"; {self.reason}" if self.reason else "")]
        return [
            f"attention: {layer.layer_type} ({layer.num_layers} layers) by {layer.backend}"
            + (f"; {layer.reason}" if layer.reason else "")
            for layer in self.layers
        ]


def plan_attention(
    config: RunConfig, model: Any, rows: Rows, device: torch.device, dtype: torch.dtype
) -> AttentionPlan:
    """Return the layout and the attention of a run.

    Args:
        config: Of the run.
        model: Its model, which may be on the meta device.
        rows: Those it trains on, or evaluates.
        device: Where it runs.
        dtype: That attention is computed in.

    Raises:
        ConfigError: padding_free is true, and the model or the rows do not allow it.
    """
    named, wish = config.attn_implementation, config.padding_free
    num_rows = max(config.per_device_train_batch_size, config.per_device_eval_batch_size)
    length = config.max_length * num_rows * config.answers_per_row
    problem = packing_problem(model, length, has_images=rows.has_images)
    if wish == "true" and problem is not None:
        raise ConfigError(
            f"padding_free: {inner_model(model).config.model_type} cannot train on rows that are "
            f"laid end to end: {problem}",
            hint="--no-padding-free pads them.",
        )
    may_be_free = wish == "true" or (wish == "auto" and problem is None and _is_worth_it(rows))
    if not (rows.is_packed or may_be_free):
        return AttentionPlan(named)
    obstacle = model_problem(model)
    layers: tuple[LayerChoice, ...] = ()
    if named in (None, LIGER_VARLEN) and obstacle is None:
        layers = plan_layers(model, device, dtype)
    backends = {layer.backend for layer in layers}
    # A mask of rows end to end would be larger than those of the rows.
    has_lengths = bool(backends - {"mask"}) or (obstacle is None and "flash" in (named or ""))
    serves = named == LIGER_VARLEN or bool(backends - {"mask"})
    is_free = wish == "true" or (may_be_free and backends == {"varlen"})
    if not (rows.is_packed or is_free):
        return AttentionPlan(named)
    return AttentionPlan(
        LIGER_VARLEN if serves else named,
        layers if serves else (),
        padding_free=is_free,
        has_lengths=has_lengths,
        has_documents=True,
        reason=None if serves or named else _reason(layers, obstacle),
    )


def _is_worth_it(rows: Rows) -> bool:
    return rows.is_packed or rows.padding is None or rows.padding > _WORTH_IT


def _reason(layers: Sequence[LayerChoice], obstacle: str | None) -> str:
    reasons = [layer.reason for layer in layers if layer.reason is not None]
    return f"{LIGER_VARLEN}: {obstacle}" if obstacle else "; ".join(dict.fromkeys(reasons))


def check_implementation(
    config: RunConfig, model: Any, device: torch.device, dtype: torch.dtype, *, trains: bool
) -> None:
    """Refuse an attn_implementation asked for by name that cannot compute a layer of the model.

    Raises:
        ConfigError: No attention has the name, or the model, its dtype or its dropout do not
            allow it.
        EnvironmentProblem: The device or a package does not.
    """
    name = config.attn_implementation
    # Others, such as those of the hub, are no plain words.
    known = ("eager", *AttentionInterface())
    if name is not None and re.fullmatch(r"\w+", name) and name not in known:
        near = nearest_name(name.lower(), known)
        raise ConfigError(
            f"attn_implementation {name!r} is unknown"
            + (f"; did you mean {near}?" if near else ""),
            hint=f"Names: {', '.join(known)}.",
        )
    if name == LIGER_VARLEN:
        if (problem := model_problem(model)) is not None:
            model_type = inner_model(model).config.model_type
            raise ConfigError(
                f"attn_implementation {name} cannot serve {model_type}: {problem}",
                hint="Without the key it is the attention that the model has.",
            )
        return
    kind = "flash" if name is not None and name.startswith("flash_attention_") else name
    if kind not in _PROBLEMS:
        return
    for form in layer_forms(model, device, dtype):
        found = _PROBLEMS[kind](form, trains)
        if found is None:
            continue
        error, why = found
        able = [LIGER_VARLEN] if model_problem(model) is None else []
        able += [
            n for n in ("sdpa", "eager") if n not in _PROBLEMS or not _PROBLEMS[n](form, trains)
        ]
        raise error(
            f"attn_implementation {name} cannot compute the {form.layer_type} layers of "
            f"{inner_model(model).config.model_type}: {why}",
            hint=f"These can: {', '.join(able)}.",
        )


_Problem = tuple[type[ConfigError] | type[EnvironmentProblem], str] | None


def _sdpa_problem(form: LayerForm, trains: bool) -> _Problem:
    if form.is_capped:
        return ConfigError, "it does not cap scores"
    return (ConfigError, "it has no attention sinks") if form.has_sinks else None


def _flash_problem(form: LayerForm, trains: bool) -> _Problem:
    if form.device.type != "cuda":
        return EnvironmentProblem, f"it needs a CUDA GPU, and this is {form.device.type}"
    if form.dtype == torch.float32:
        return ConfigError, "it computes in bfloat16 or float16, and this is float32"
    if form.head_size > MAX_HEAD_SIZE:
        return ConfigError, f"it takes heads of at most {MAX_HEAD_SIZE}, not {form.head_size}"
    return None


def _flex_problem(form: LayerForm, trains: bool) -> _Problem:
    if trains and form.device.type == "cpu":
        return EnvironmentProblem, "it has no backward on a CPU"
    if trains and form.dropout:
        return ConfigError, f"it has no dropout, and attention_dropout is {form.dropout}"
    return None


_PROBLEMS = {"sdpa": _sdpa_problem, "flash": _flash_problem, "flex_attention": _flex_problem}
