"""The reference of dpo and kto: the model that answers are compared with.

A kind of `reference`, one class each:

- adapter_off: the model without its adapter. It costs a forward pass, and no memory.
- model: the model as it was before the first step. Copies of the trained parameters are exchanged
  with the parameters while it scores, so that the same code runs on the same tensors.
- precompute: the values that model would give, before the first step (precompute.py).
- none: no reference; all its log-probabilities are 0.
- a path or a name: another model, loaded beside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from liger_cli.config import RunConfig
from liger_cli.config.objectives import REFERENCE_KINDS
from liger_cli.errors import ConfigError, LigerError
from liger_cli.training.checkpoints.sharded_state import is_sharded
from liger_cli.training.model.adapters import is_adapted
from liger_cli.training.model.classifiers import check_writes_text
from liger_cli.training.model.loading import load_patched
from liger_cli.training.model.source import ModelSource, build_meta_model, resolve_model
from liger_cli.training.objectives.objective import Batch, Setting

__all__ = [
    "Reference",
    "Scorer",
    "WeightsReference",
    "check_other",
    "ready_reference",
    "resolve_reference",
]

# Those of both answers of a pair, or the one of an answer in no pair.
REFERENCE_VALUES = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps")

_SAME_FAMILY = "a reference scores the same tokens: another checkpoint of the same family"

# (model, batch) -> the log-probabilities of its answers, (M,) float64.
Scorer = Callable[[Any, Batch], torch.Tensor]


def resolve_reference(
    config: RunConfig, source: ModelSource, *, has_values: bool = False, trains: bool = True
) -> str:
    """Return the kind of reference that auto means here; another one is checked.

    Args:
        source: The model before training.
        has_values: Whether the data have log-probabilities of a reference.
        trains: False is a run that only evaluates.

    Raises:
        ConfigError: The reference cannot be had.
    """
    wanted = config.reference
    is_new = trains and config.adapter != "none"
    if wanted == "adapter_off" and not (is_new or source.adapter is not None):
        raise ConfigError(
            "reference adapter_off is the model without its adapter, and there is none",
            hint="--adapter lora adds one; --reference precompute trains the model itself",
        )
    if wanted in ("model", "precompute") and not (trains or has_values):
        raise ConfigError(
            f"reference {wanted} is the model as it was before training, which an evaluation does "
            "not know",
            hint="--reference PATH names it; adapter_off and none need nothing",
        )
    if wanted != "auto":
        return wanted
    if config.sync_ref_model:
        return "model"
    if has_values:
        return "precompute"
    if is_new or (not trains and source.adapter is not None):
        return "adapter_off"
    if not trains:
        raise ConfigError(
            f"objective {config.objective} compares with a reference, and nothing says which",
            hint="--reference PATH is the model before training, --reference none goes without",
        )
    is_copied = source.adapter is not None or config.streaming
    return "model" if is_copied else "precompute"


class Reference(Protocol):
    """A model that scores answers beside the one in training."""

    def sums(self, score: Scorer, model: Any, batch: Batch) -> torch.Tensor:
        """Return the log-probabilities of the answers of a batch, (M,) float64.

        Args:
            score: Scores with a model.
            model: The model in training, as the caller runs it.
            batch: Collated answers, on the host.
        """

    def updated(self, step: int) -> None:
        """Follow an optimizer step of the model."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint must hold."""

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Restore what state_dict returned."""


class _Fixed:
    """A reference that no step changes."""

    def updated(self, step: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""


class NoReference(_Fixed):
    """Log-probabilities of 0."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sums(self, score: Scorer, model: Any, batch: Batch) -> torch.Tensor:
        count = int(batch["num_answers"])
        return torch.zeros(count, dtype=torch.float64, device=self._device)


class StoredReference(_Fixed):
    """Log-probabilities that came with the rows."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sums(self, score: Scorer, model: Any, batch: Batch) -> torch.Tensor:
        names = [name for name in REFERENCE_VALUES if name in batch]
        return torch.stack([batch[name] for name in names], 1).flatten().to(self._device)


class AdapterOff(_Fixed):
    """The model without its adapter."""

    def __init__(self, adapted: Any) -> None:
        self._adapted = adapted

    def sums(self, score: Scorer, model: Any, batch: Batch) -> torch.Tensor:
        with _evaluating(self._adapted), _without_adapter(self._adapted):
            return score(self._adapted, batch)


class OtherModel(_Fixed):
    """A model that was loaded beside, frozen and in evaluation mode."""

    def __init__(self, other: Any, accelerator: Any) -> None:
        self._other = other
        self._accelerator = accelerator

    def sums(self, score: Scorer, model: Any, batch: Batch) -> torch.Tensor:
        with self._accelerator.autocast():
            return score(self._other, batch)


class WeightsReference:
    """The model with other values of its trained parameters, such as those before the first step.

    Args:
        model: The model; its parameters are the same objects as those of the prepared one.
        values: Of the trained parameters, by name.
        alpha: ref_model_mixup_alpha of TR-DPO (arXiv 2404.09656).
        interval: Steps between two moves of the reference; 0 moves it never.
    """

    def __init__(
        self,
        model: nn.Module,
        values: Mapping[str, torch.Tensor],
        *,
        alpha: float = 1.0,
        interval: int = 0,
    ) -> None:
        self._model = model
        self._pairs = [(p, values[name], name) for name, p in trained_parameters(model).items()]
        self._alpha, self._interval = alpha, interval
        self._is_sharded = is_sharded(model)

    def sums(self, score: Scorer, model: Any, batch: Batch) -> torch.Tensor:
        with self.exchanged(), _evaluating(self._model):
            return score(self._model, batch)

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Put the reference's values in place of the model's, tensor by tensor."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, value, _ in self._pairs:
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)
        if self._is_sharded:
            # Whole weights that a forward has gathered are those from before.
            from liger_cli.training.parallel.wrapping import reshard

            reshard(self._model)

    @torch.no_grad()
    def updated(self, step: int) -> None:
        if self._interval and step % self._interval == 0:
            for parameter, value, _ in self._pairs:
                value.lerp_(parameter.detach(), self._alpha)

    def value_of(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Return the reference's value of a parameter, which is the model's of a frozen one."""
        return next((value for p, value, _ in self._pairs if p is tensor), tensor)

    def state_dict(self) -> dict[str, Any]:
        return {name: value for _, value, name in self._pairs} if self._interval else {}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        for _, value, name in self._pairs:
            value.copy_(values[name])


@contextlib.contextmanager
def _without_adapter(adapted: nn.Module) -> Iterator[None]:
    """Compute without the adapter, for a forward that needs no gradient.

    peft's disable_adapter also turns requires_grad off and on again. Where a sharded parameter is
    gathered in between, it would do the first to the shard and the second to the whole one.
    """
    layers: list[Any] = [
        m for m in adapted.modules() if getattr(m, "_disable_adapters", None) is False
    ]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the trained parameters, by name."""
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}


def original_weights(setting: Setting) -> dict[str, torch.Tensor]:
    """Return the trained parameters as they were before the first step, by name.

    A resumed run loads them once more from the model that it started from.

    Raises:
        ConfigError: That model has other parameters now.
    """
    model = setting.accelerator.unwrap_model(setting.model)
    if setting.checkpoint is None:
        return copied(model)
    # Unpatched: it is loaded for its weights, and scores nothing.
    config = setting.config.model_copy(update={"ops": "none", "torch_compile": False})
    first, _ = setting.engine.load(config, setting.inputs.source, lambda line: None)
    found = {name: p.detach() for name, p in trained_parameters(first).items()}
    if found.keys() != trained_parameters(model).keys():
        raise ConfigError(
            f"{setting.config.model} has other parameters than the checkpoint that is resumed, so "
            "that it is not the model from before the first step",
        )
    return found


def check_other(config: RunConfig, model: Any) -> None:
    """Check the model that `reference` names, before any weights are loaded.

    Args:
        model: The one of the run, with weights or without.

    Raises:
        LigerError: It cannot be found, or has another architecture or vocabulary.
    """
    try:
        source = resolve_model(config.reference)
    except LigerError as error:
        kinds = f"reference is one of {', '.join(sorted(REFERENCE_KINDS))}, or another model"
        raise type(error)(
            f"reference {config.reference}: {error.message}",
            hint="\n".join(filter(None, (error.hint, kinds))),
        ) from error
    check_writes_text(source, f"reference {config.reference}", hint=_SAME_FAMILY)
    ours, theirs = (m.config.get_text_config() for m in (model, build_meta_model(source)))
    for name in ("model_type", "vocab_size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(
                f"reference {config.reference} is of another architecture: its {name} is "
                f"{getattr(theirs, name)}, the model's {getattr(ours, name)}",
                hint=_SAME_FAMILY,
            )


def load_other(setting: Setting) -> Any:
    """Return the model that `reference` names, patched as the run's."""
    config = setting.config
    source = resolve_model(config.reference, setting.notify)
    loaded_as = setting.inputs.attention.applied(config)
    device = setting.accelerator.device
    other, _ = load_patched(loaded_as, source, device, setting.notify, trains=False)
    return other.requires_grad_(False)


def ready_reference(setting: Setting) -> Reference:
    """Return the reference of a run but for precompute, whose values are in the rows.

    Raises:
        ConfigError: It cannot be had.
    """
    config = setting.config
    kind = config.reference
    if kind == "none":
        return NoReference(setting.accelerator.device)
    if kind == "precompute":
        return StoredReference(setting.accelerator.device)
    model = setting.accelerator.unwrap_model(setting.model)
    if kind == "adapter_off":
        return AdapterOff(model)
    if kind == "model":
        if config.sync_ref_model and config.ref_model_mixup_alpha < 1 and is_adapted(model):
            raise ConfigError(
                "the product of two mixed matrices is no mixture: with an adapter, and one that is "
                f"trained on too, sync_ref_model needs ref_model_mixup_alpha 1, got "
                f"{config.ref_model_mixup_alpha:g}",
            )
        return WeightsReference(
            model,
            original_weights(setting),
            alpha=config.ref_model_mixup_alpha,
            interval=config.ref_model_sync_steps if config.sync_ref_model else 0,
        )
    return OtherModel(load_other(setting), setting.accelerator)
