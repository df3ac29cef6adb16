"""Pairs by the chunked losses of liger-kernel, so that the loop can measure them beside ours.

Only their documented interface is called: loss(weight, hidden, target, bias, ref_input, ref_weight,
ref_bias) with hidden (2N, T, H), whose first half are chosen answers. Such a loss is a mean over
its pairs, and that of orpo and cpo also one over its chosen tokens: a step of several micro-batches
takes the mean of theirs, each weighted by its pairs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from liger_cli.config import RunConfig
from liger_cli.config.objectives import OBJECTIVES
from liger_cli.data.encode import IGNORED
from liger_cli.data.feed import pair_figures
from liger_cli.training.forward import balance_weight
from liger_cli.training.inputs import Inputs
from liger_cli.training.objectives.answers import model_inputs
from liger_cli.training.objectives.objective import Batch, Part, Setting, Totals
from liger_cli.training.objectives.pairs import PairObjective
from liger_cli.training.objectives.reference import (
    Reference,
    WeightsReference,
    ready_reference,
)
from liger_cli.training.runtime.peer_patch import PEER_PACKAGE
from liger_kernels.transformers.wrappers import inner_model, output_head

__all__ = ["ChunkedPairs", "find_chunked_loss"]

# By objective: the losses that are ours, and the keys that they take; other keys are at their
# defaults.
_LOSSES = {
    "dpo": {"sigmoid", "apo_zero", "apo_down", "sppo_hard", "nca_pair"},
    "cpo": {"sigmoid", "simpo"},
    "orpo": set[str](),
}
_KEYS = {
    "dpo": {"beta", "loss_type", "reference", "disable_dropout"},
    "cpo": {"beta", "loss_type", "cpo_alpha", "simpo_gamma", "disable_dropout"},
    "orpo": {"beta", "disable_dropout"},
}
# Makes logits so large that a cap shows.
_ENLARGED = 1000.0
# Of bf16, relative to the largest value.
_TOLERANCE = 0.03


def find_chunked_loss(
    config: RunConfig, inputs: Inputs, model: Any, device: torch.device
) -> tuple[ChunkedPairs | None, str | None]:
    """Return the objective of a run by a chunked loss of the peer, if it has one for it.

    Args:
        config: With its keys resolved (table.py).
        inputs: The data of the run.
        model: The model before it is prepared.
        device: Where batches go.

    Returns:
        The objective, and a note: which loss it is, or why there is none. Nothing of a run that
        does not learn from pairs.
    """
    if not OBJECTIVES[config.objective].has_pairs:
        return None, None
    reason = _reason_against(config, inputs, model, device)
    if reason is None:
        name, arguments = _loss_of(config)
        try:
            losses = importlib.import_module(f"{PEER_PACKAGE}.chunked_loss")
            loss = getattr(losses, name)(ignore_index=IGNORED, beta=config.beta, **arguments)
        except (ImportError, AttributeError) as error:
            reason = str(error)
        else:
            return ChunkedPairs(config, model, device, loss), name
    return None, f"without a chunked loss: {reason}"


def _loss_of(config: RunConfig) -> tuple[str, Mapping[str, Any]]:
    """Return the name of a class of the peer, and the arguments that make it."""
    objective = OBJECTIVES[config.objective].objective
    if objective == "orpo":
        return "LigerFusedLinearORPOLoss", {}
    [name] = config.losses
    if objective == "dpo":
        return "LigerFusedLinearDPOLoss", {
            "loss_type": name,
            "use_ref_model": config.reference != "none",
            "compute_nll_loss": False,
        }
    alpha = config.likelihood_weight
    likelihood = {"alpha": alpha, "compute_nll_loss": alpha > 0}
    if name == "simpo":
        return "LigerFusedLinearSimPOLoss", {**likelihood, "gamma": config.simpo_gamma}
    return "LigerFusedLinearCPOLoss", likelihood


def _reason_against(
    config: RunConfig, inputs: Inputs, model: Any, device: torch.device
) -> str | None:
    """Return why none computes what the run asks for; None where one does."""
    keys = OBJECTIVES[config.objective]
    if keys.objective not in _LOSSES:
        return f"none is run for objective {config.objective}"
    for key in sorted(keys.reads - _KEYS[keys.objective]):
        if getattr(config, key) != type(config).model_fields[key].default:
            return f"it takes no {key}"
    losses = config.losses
    if len(losses) > 1 or not _LOSSES[keys.objective].issuperset(losses):
        return f"it has no {', '.join(losses)}"
    if figures := pair_figures(inputs.train):
        return f"it does not read {', '.join(sorted(figures))}"
    if balance_weight(model):
        return "it leaves out the balance of experts"
    if not _is_plain(model, device):
        return "the logits of the model are not the product of a linear head alone"
    return None


@torch.no_grad()
def _is_plain(model: Any, device: torch.device) -> bool:
    """Return whether a model's logits are its head's product, found on a few tokens."""
    head = output_head(inner_model(model))
    if type(head) is not nn.Linear:
        return False
    taken: list[torch.Tensor] = []

    def enlarge(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        taken.append(arguments[0])
        return (arguments[0] * _ENLARGED,)

    inputs = {"input_ids": torch.arange(1, 9, device=device)[None]}
    was_training = model.training
    model.eval()
    handle = head.register_forward_pre_hook(enlarge)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    hidden = _decoded(model, inputs)
    model.train(was_training)
    product = F.linear(hidden * _ENLARGED, head.weight, head.bias)
    return len(taken) == 1 and _is_near(taken[0], hidden) and _is_near(logits, product)


def _is_near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())


def _decoded(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Compute the input of a model's head, (B, T, H)."""
    hidden: torch.Tensor = inner_model(model).get_decoder()(**inputs, use_cache=False)[0]
    return hidden


class _Places(NamedTuple):
    """The places of the tokens of answers in (2N, T), where the chosen ones come first.

    Attributes:
        tokens: (M,) int64, where they are in the flat batch.
        rows, columns: (M,) int64, where they go.
        shape: (2N, T).
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> _Places:
        """Find them in a batch on the host, be it padded, laid end to end or packed."""
        ids, tokens = batch["answer_ids"].flatten().sort(stable=True)
        is_answer = ids >= 0
        ids, tokens = ids[is_answer], tokens[is_answer]
        count = int(batch["num_answers"])
        lengths = ids.bincount(minlength=count)
        columns = torch.arange(len(ids)) - (lengths.cumsum(0) - lengths)[ids]
        rows = ids // 2 + ids % 2 * (count // 2)
        tokens, rows, columns = (place.to(device) for place in (tokens, rows, columns))
        return cls(tokens, rows, columns, (count, int(lengths.max())))

    def put(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """Return values of a batch, (B, L, ...), as (2N, T, ...)."""
        whole = values.new_full((*self.shape, *values.shape[2:]), fill)
        return whole.index_put((self.rows, self.columns), values.flatten(0, 1)[self.tokens])


class ChunkedPairs(PairObjective):
    """The objectives dpo, orpo and cpo by a loss of the peer; without metrics.

    Args:
        config: Has their keys.
        model: The model before it is prepared.
        device: Where batches go.
        loss: The peer's module.
    """

    def __init__(self, config: RunConfig, model: Any, device: torch.device, loss: Any) -> None:
        super().__init__(config, model, device)
        self._loss = loss
        self._reference: Reference | None = None
        self._accelerator: Any = None

    @property
    def metrics(self) -> tuple[str, ...]:
        return ()

    def prepare(self, setting: Setting) -> Inputs:
        config = setting.config
        self._accelerator = setting.accelerator
        if config.reference == "precompute":
            # The loss takes the reference's hidden states, and no values.
            config = config.model_copy(update={"reference": "model"})
        has_reference = "reference" in OBJECTIVES[config.objective].reads
        if has_reference and config.reference != "none":
            self._reference = ready_reference(replace(setting, config=config))
        return setting.inputs

    def part(self, model: Any, batch: Batch, totals: Totals) -> Part:
        places = _Places.of(batch, self._device)
        labels = places.put(batch["labels"].to(self._device), IGNORED)
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        reference = self._reference_arguments(model, batch, places)
        head: Any = output_head(inner_model(model))
        with self._accelerator.autocast():
            hidden = places.put(self._hidden(model, batch), 0.0)
            loss, *_ = self._loss(head.weight, hidden, target, head.bias, **reference)
        share = int(batch["num_pairs"]) / max(totals.pairs, 1)
        return Part(loss * share, torch.zeros(0, dtype=torch.float64, device=self._device))

    def _hidden(self, model: Any, batch: Batch) -> torch.Tensor:
        return _decoded(model, model_inputs(batch, self._device))

    @torch.no_grad()
    def _reference_arguments(self, model: Any, batch: Batch, places: _Places) -> dict[str, Any]:
        """Return the arguments of the loss for the reference; empty without one."""
        reference = self._reference
        if reference is None:
            return {}
        heads: list[Any] = []

        def hidden_of(scoring: Any, batch: Batch) -> torch.Tensor:
            heads.append(output_head(inner_model(scoring)))
            return self._hidden(scoring, batch)

        with self._accelerator.autocast():
            hidden = reference.sums(hidden_of, model, batch)
        [head] = heads
        weight, bias = head.weight, head.bias
        if isinstance(reference, WeightsReference):
            weight, bias = reference.value_of(weight), reference.value_of(bias)
        return {"ref_input": places.put(hidden, 0.0), "ref_weight": weight, "ref_bias": bias}
