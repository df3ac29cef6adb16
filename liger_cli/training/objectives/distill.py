"""Distillation: every trained token's distribution is drawn to that of a teacher.

A step is a mean over its trained tokens of the divergence from the teacher, plus ce_weight times
the mean of their cross-entropy: the same tokens, and the same mean, as those of sft. So it is the
same for any micro-batches, accumulation, number of processes and packing.

The teacher is patched, frozen and in evaluation mode. Neither model makes all logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from liger_cli.config import RunConfig
from liger_cli.config.objectives import BALANCE
from liger_cli.data.batches import count_labels
from liger_cli.data.encode import WEIGHTS
from liger_cli.errors import ConfigError, DataError
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.forward import balance_of, balance_weight
from liger_cli.training.inputs import Inputs
from liger_cli.training.model.classifiers import check_writes_text
from liger_cli.training.model.loading import load_patched
from liger_cli.training.model.source import ModelSource, resolve_model
from liger_cli.training.model.tokenizers import has_tokenizer, load_tokenizer
from liger_cli.training.objectives.answers import model_inputs
from liger_cli.training.objectives.objective import Batch, Part, Setting, Totals
from liger_cli.training.objectives.sft import NextToken, TokenEvaluation
from liger_kernels.transformers import token_divergence
from liger_kernels.transformers.divergence import DivergenceSums

__all__ = ["Distill", "check_vocabulary_size"]

_SAME_TOKENS = "a teacher has the same tokens, as a larger model of the same family"


class Distill:
    """The objective distill.

    Args:
        config: Has its keys.
        model: The model before it is prepared.
        device: Where batches go.
    """

    def __init__(self, config: RunConfig, model: Any, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._tokens = NextToken(model, device)
        self._balance_weight = balance_weight(model)
        self._teacher: Any = None
        self._autocast: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("divergence", "nll_loss", *([BALANCE] if self._balance_weight else []))

    def prepare(self, setting: Setting) -> Inputs:
        _refuse_weights(setting.inputs)
        self.set_teacher(load_teacher(setting), setting.accelerator.autocast)
        return setting.inputs

    def set_teacher(
        self, teacher: Any, autocast: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Take a teacher, frozen and in evaluation mode, and the context of both models."""
        self._teacher, self._autocast = teacher, autocast

    def count(self, batch: Batch) -> Totals:
        return self._tokens.count(batch)

    def begin(self, model: Any, batches: Sequence[Batch], totals: Totals) -> None:
        """Do nothing: the parts of a step do not depend on one another."""

    def sums(self, model: Any, batch: Batch) -> DivergenceSums:
        """Return the divergence and the cross-entropy, summed over the labels of a batch."""
        labels = batch["labels"].to(self._device, non_blocking=True)
        with self._autocast():
            found = token_divergence(
                model,
                self._teacher,
                model_inputs(batch, self._device),
                labels,
                beta=self._config.beta,
                temperature=self._config.temperature,
            )
        return found._replace(divergence=found.divergence.double())

    def part(self, model: Any, batch: Batch, totals: Totals) -> Part:
        num_labels = max(totals.labels, 1)
        found = self.sums(model, batch)
        means = [found.divergence / num_labels, found.nll / num_labels]
        loss = means[0] + self._config.ce_weight * means[1]
        if self._balance_weight:
            means.append(balance_of(found.aux_loss, count_labels(batch) / num_labels, loss))
            loss = loss + self._balance_weight * means[2]
        return Part(loss.float(), torch.stack(means).detach())

    def updated(self, step: int) -> None:
        """Do nothing: the teacher stays as it is."""

    def evaluation(self, model: Any) -> DistillEvaluation:
        return DistillEvaluation(self, model, self._device, self._config.ce_weight)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""


class DistillEvaluation:
    """The figures of sft, and the divergence: means over all tokens with a label.

    Its sums are those of TokenEvaluation and the divergences.
    """

    def __init__(
        self, objective: Distill, model: Any, device: torch.device, ce_weight: float
    ) -> None:
        self._objective = objective
        self._model = model
        self._ce_weight = ce_weight
        self._tokens = TokenEvaluation(model, device)
        self.num_sums = self._tokens.num_sums + 1

    def sums(self, batch: Batch) -> torch.Tensor:
        own = self._tokens.sums(batch)
        # The graphs of a compiled model are for the shapes of training.
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            found = self._objective.sums(self._model, batch)
        return torch.cat((own, found.divergence.detach().cpu().view(1)))

    def result(self, sums: torch.Tensor) -> EvalResult:
        found = self._tokens.result(sums[:-1])
        divergence = float(sums[-1]) / found.tokens if found.tokens else math.nan
        loss = divergence + self._ce_weight * found.loss
        means = {"divergence": divergence, "nll_loss": found.loss}
        return replace(found, loss=loss, means=means)


def _refuse_weights(inputs: Inputs) -> None:
    sets = [rows for rows in (inputs.train, *inputs.eval.values()) if rows is not None]
    if any(WEIGHTS in getattr(rows, "column_names", ()) for rows in sets):
        raise DataError(
            "the data have weights of rows or messages, which objective distill does not read",
            hint="leave them out, or train: false for what is not trained on; sft reads weights",
        )


def load_teacher(setting: Setting) -> Any:
    """Return the teacher of a run, patched as its model, frozen and in evaluation mode.

    Raises:
        ConfigError: It has another vocabulary, or gives words other ids.
    """
    config = setting.config
    name = config.teacher_model_name_or_path
    assert name is not None, "a conflict of keys otherwise"
    source = resolve_model(name, setting.notify)
    check_writes_text(source, f"teacher {name}", hint=_SAME_TOKENS)
    _check_vocabulary(setting, source)
    # Few bits are those of the student; a teacher may have its own, by its files.
    whole = {"adapter": "none", "load_in_4bit": False, "load_in_8bit": False}
    loaded_as = setting.inputs.attention.applied(config).model_copy(update=whole)
    device = setting.accelerator.device
    teacher, _ = load_patched(loaded_as, source, device, setting.notify, trains=False)
    check_vocabulary_size(name, teacher, setting.inputs.meta_model)
    return teacher.requires_grad_(False).eval()


def check_vocabulary_size(name: str, teacher: Any, model: Any) -> None:
    """Raise a ConfigError where a teacher, which has this name, has more or fewer tokens."""
    size, wanted = (m.config.get_text_config().vocab_size for m in (teacher, model))
    if size != wanted:
        raise ConfigError(
            f"teacher {name} has a vocabulary of {size}, the model one of {wanted}",
            hint=_SAME_TOKENS,
        )


def _check_vocabulary(setting: Setting, source: ModelSource) -> None:
    """Check that the teacher's tokenizer, where it has one, gives every word the model's id."""
    ours = setting.inputs.preprocessing.tokenizer
    if ours is None:
        return
    if source.kind == "directory" and source.path and not has_tokenizer(source.path):
        return
    known, theirs = ours.get_vocab(), load_tokenizer(source).get_vocab()
    odd = [word for word, number in theirs.items() if known.get(word) != number]
    if odd:
        raise ConfigError(
            f"teacher {setting.config.teacher_model_name_or_path} has another tokenizer: "
            f"{len(odd)} of its words have other ids, or none, in the model's, such as {odd[0]!r}",
            hint=_SAME_TOKENS,
        )
