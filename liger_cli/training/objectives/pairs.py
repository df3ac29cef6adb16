"""Objectives of pairs: sums over pairs and over chosen tokens, whose means are the loss.

A step is a mean over all its pairs; the likelihood of chosen answers, where a loss has it, is a
mean over all their scored tokens in the step, as the loss of sft is. Both are the same for any
micro-batches, accumulation, number of processes and packing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from liger_cli.config import RunConfig
from liger_cli.config.objectives import BALANCE, METRICS
from liger_cli.data.batches import count_labels, count_tokens
from liger_cli.data.encode import IGNORED
from liger_cli.data.feed import pair_figures
from liger_cli.errors import DataError
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.forward import balance_of, balance_weight
from liger_cli.training.inputs import Inputs
from liger_cli.training.objectives.answers import Answers, token_values
from liger_cli.training.objectives.objective import Batch, Part, Setting, Totals

__all__ = [
    "PairObjective",
    "PairSums",
    "Scores",
    "disable_dropout",
    "margin_of",
    "mean_metrics",
]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the 2N answers of a batch.

    Attributes:
        answers: Where their tokens are.
        tokens: (B, T - 1) float32, with a gradient in training.
        sums: (2N,) float64, in which tokens may be weighted.
        aux_loss: The balance of the model's experts in the batch, where it is a part of the loss.
        reference: The sums that a reference gives, where there is one.
    """

    answers: Answers
    tokens: torch.Tensor
    sums: torch.Tensor
    aux_loss: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """Scored tokens of each answer, (2N,) float64."""
        return self.answers.lengths


class PairSums(NamedTuple):
    """Sums of a batch.

    Attributes:
        losses: Over pairs, a scalar with a gradient.
        likelihood: The negative log-likelihood over chosen tokens, the same.
        metrics: (len(PairObjective.pair_metrics),) float64, over pairs.
        aux_loss: The balance of the model's experts, where it is asked for.
    """

    losses: torch.Tensor
    likelihood: torch.Tensor
    metrics: torch.Tensor
    aux_loss: torch.Tensor | None = None


class PairObjective:
    """An objective of pairs.

    Args:
        config: Has its keys.
        model: The model before it is prepared.
        device: Where batches go.

    Attributes:
        pair_metrics: Names of means over pairs.
        likelihood_weight: Of the negative log-likelihood of chosen answers in the loss.
        shows_likelihood: Whether that is a metric, nll_loss.
        ld_alpha: Weight of tokens beyond the shorter answer of a pair; None weighs none.
        reads_margin: Whether the margin of a pair counts.
    """

    pair_metrics: tuple[str, ...] = METRICS
    likelihood_weight: float = 0.0
    shows_likelihood: bool = True
    ld_alpha: float | None = None
    reads_margin: bool = False

    def __init__(self, config: RunConfig, model: Any, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._balance_weight = balance_weight(model)
        if config.disable_dropout:
            disable_dropout(model)

    @property
    def metrics(self) -> tuple[str, ...]:
        likelihood = ["nll_loss"] if self.shows_likelihood else []
        return (*self.pair_metrics, *likelihood, *([BALANCE] if self._balance_weight else []))

    def sums(self, model: Any, batch: Batch, scores: Scores) -> PairSums:
        """Return the sums of a batch whose answers the model has scored."""
        raise NotImplementedError

    def prepare(self, setting: Setting) -> Inputs:
        sets = (setting.inputs.train, *setting.inputs.eval.values())
        figures = frozenset().union(*map(pair_figures, sets))
        if "margin" in figures and not self.reads_margin:
            raise DataError(
                f"the data have a margin, which objective {self._config.objective} with loss "
                f"{', '.join(self._config.losses) or 'its own'} does not read",
                hint="losses sigmoid, sigmoid_norm, hinge and robust of dpo and all but ipo of "
                "cpo do; rename the column to leave it out",
            )
        if "ref_chosen_logps" in figures and (reason := self.leaves_values(setting)):
            setting.notify(f"the data's ref_chosen_logps are not read: {reason}")
        return setting.inputs

    def leaves_values(self, setting: Setting) -> str | None:
        """Return why the data's values of a reference are not read; None where they are."""
        return f"objective {self._config.objective} has no reference"

    def count(self, batch: Batch) -> Totals:
        is_label = batch["labels"][:, 1:] != IGNORED
        # Even numbers are chosen answers; padding has none, and no label.
        is_chosen = batch["answer_ids"][:, 1:] % 2 == 0
        return Totals(
            tokens=count_tokens(batch),
            labels=count_labels(batch),
            pairs=int(batch["num_pairs"]),
            chosen_labels=int((is_label & is_chosen).sum()),
        )

    def begin(self, model: Any, batches: Sequence[Batch], totals: Totals) -> None:
        """Do nothing: most losses are sums over pairs."""

    def score(self, model: Any, batch: Batch) -> Scores:
        """Return the log-probabilities that the model gives the answers of a batch."""
        answers = Answers.of(batch, self._device, self.ld_alpha)
        # As in evaluations of sft, the balance of the experts counts in training alone.
        balances = self._balance_weight > 0 and torch.is_grad_enabled()
        tokens, aux_loss = token_values(model, batch, self._device, balances=balances)
        return Scores(answers, tokens, answers.sums(tokens, weighted=True), aux_loss)

    def batch_sums(self, model: Any, batch: Batch) -> PairSums:
        """Return the sums of a batch, whose answers are scored for that."""
        scores = self.score(model, batch)
        return self.sums(model, batch, scores)._replace(aux_loss=scores.aux_loss)

    def part(self, model: Any, batch: Batch, totals: Totals) -> Part:
        sums = self.batch_sums(model, batch)
        likelihood = sums.likelihood / max(totals.chosen_labels, 1)
        num_pairs = max(totals.pairs, 1)
        loss = sums.losses / num_pairs
        if self.likelihood_weight:
            loss = loss + self.likelihood_weight * likelihood
        metrics = sums.metrics.detach() / num_pairs
        if self.shows_likelihood:
            metrics = torch.cat((metrics, likelihood.detach().view(1)))
        if self._balance_weight:
            share = int(batch["num_pairs"]) / num_pairs
            balance = balance_of(sums.aux_loss, share, loss)
            loss = loss + self._balance_weight * balance
            metrics = torch.cat((metrics, balance.detach().view(1)))
        return Part(loss, metrics)

    def updated(self, step: int) -> None:
        """Do nothing: the loss reads nothing but the model."""

    def evaluation(self, model: Any) -> PairEvaluation:
        return PairEvaluation(self, model)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""

    def likelihood(self, scores: Scores) -> torch.Tensor:
        """Return the negative log-likelihood of chosen answers, summed over their tokens."""
        return -scores.answers.sums(scores.tokens)[::2].sum()


class PairEvaluation:
    """Means over all pairs of the evaluation data, whatever the batches.

    Its sums are those of the losses, the likelihoods and the metrics, and counts of pairs, chosen
    tokens and scored tokens.
    """

    def __init__(self, objective: PairObjective, model: Any) -> None:
        self._objective = objective
        self._model = model
        self.num_sums = len(objective.pair_metrics) + 5

    def sums(self, batch: Batch) -> torch.Tensor:
        objective = self._objective
        # The graphs of a compiled model are for the shapes of training.
        with torch.compiler.set_stance("force_eager"):
            found = objective.batch_sums(self._model, batch)
        totals = objective.count(batch)
        counts = (totals.pairs, totals.chosen_labels, totals.labels)
        sums = torch.cat((found.losses.view(1), found.likelihood.view(1), found.metrics))
        return torch.cat((sums.cpu(), torch.tensor(counts, dtype=torch.float64)))

    def result(self, sums: torch.Tensor) -> EvalResult:
        losses, likelihood, *metrics, pairs, chosen_labels, labels = sums.tolist()
        objective = self._objective
        nll = likelihood / chosen_labels
        means = dict(zip(objective.pair_metrics, (value / pairs for value in metrics), strict=True))
        if objective.shows_likelihood:
            means["nll_loss"] = nll
        loss = losses / pairs + objective.likelihood_weight * nll
        return EvalResult(loss=loss, tokens=int(labels), pairs=int(pairs), means=means)


def mean_metrics(rewards: torch.Tensor, logps: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    """Return the sums over pairs of METRICS, and of more values of each pair.

    Args:
        rewards: (2N,), chosen and rejected in turn.
        logps: The same.
        more: (N,) each.
    """
    rewards, logps = rewards.detach(), logps.detach()
    chosen, rejected = rewards[::2], rewards[1::2]
    values = (
        *(chosen, rejected, (chosen > rejected).double(), chosen - rejected),
        *(logps[::2], logps[1::2], *(value.detach() for value in more)),
    )
    return torch.stack([value.sum() for value in values])


def margin_of(batch: Batch, like: torch.Tensor) -> torch.Tensor:
    """Return how much better the data say that chosen answers are, (N,); 0 where they do not."""
    if "margin" in batch:
        return batch["margin"].to(like.device)
    return torch.zeros_like(like)


def disable_dropout(model: Any) -> None:
    """Turn dropout off, in layers and in attention, which has it as a number."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
