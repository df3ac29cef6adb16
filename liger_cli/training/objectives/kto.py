"""KTO: answers labelled good or bad, each compared with a reference by itself.

With r the log-ratio of an answer, log pi(y|x) - log ref(y|x), and s the sigmoid, the loss is

    desirable_weight (1 - s(beta (r - KL)))      of a good answer,
    undesirable_weight (1 - s(beta (KL - r)))    of a bad one

(Ethayarajh et al. 2024, arXiv 2402.01306). A step is the mean over all its answers, good and bad
together. Its KL is one number: the mean log-ratio of the mismatched answers of all of them, at
least 0, without a gradient. It is taken before the first part of the step, over all micro-batches
and processes, so a step means the same however it is divided; which answer is mismatched with which
prompt is fixed by the data (liger_cli/data/unpaired_batches.py). In evaluation the KL is that of
the whole set.

apo_zero_unpaired is the same with a KL of 0 (D'Oosterlinck et al. 2024, arXiv 2408.06266).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import reduce

from liger_cli.config import RunConfig
from liger_cli.config.objectives import BALANCE, KTO_METRICS
from liger_cli.data.batches import count_labels, count_tokens
from liger_cli.data.pair_formats import DESIRABLE
from liger_cli.data.unpaired_maker import GOOD
from liger_cli.training.checkpoints.random_state import kept_random_state
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.forward import balance_of, balance_weight
from liger_cli.training.inputs import Inputs
from liger_cli.training.objectives.answers import Answers, token_values
from liger_cli.training.objectives.objective import Batch, Part, Setting, Totals
from liger_cli.training.objectives.pairs import disable_dropout
from liger_cli.training.objectives.precompute import with_values
from liger_cli.training.objectives.reference import NoReference, Reference, ready_reference
from liger_kernels.preferences.unpaired_losses import kto_losses

__all__ = ["Kto"]

# Of good answers to bad ones, times their weights: the range that the paper recommends.
_BALANCE = (1.0, 4 / 3)


class _Scores(NamedTuple):
    """Log-probabilities of N answers.

    Attributes:
        logps: (N,) float64, with a gradient in training.
        ratios: The same, less those of the reference.
        aux_loss: As `_Sums` has it.
    """

    logps: torch.Tensor
    ratios: torch.Tensor
    aux_loss: torch.Tensor | None


class _Sums(NamedTuple):
    """Sums over the answers of a batch.

    Attributes:
        losses: A scalar with a gradient.
        kinds: (4,) float64: the rewards of good and of bad answers, their log-probabilities.
        aux_loss: The balance of the model's experts in the batch, where it is a part of the loss.
    """

    losses: torch.Tensor
    kinds: torch.Tensor
    aux_loss: torch.Tensor | None


class Kto:
    """The objective kto.

    Args:
        config: Has its keys.
        model: The model before it is prepared.
        device: Where batches go.
    """

    def __init__(self, config: RunConfig, model: Any, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._balance_weight = balance_weight(model)
        if config.disable_dropout:
            disable_dropout(model)
        self._reference: Reference | None = None
        if config.reference == "none":
            self._reference = NoReference(device)
        self._kl = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*KTO_METRICS, *([BALANCE] if self._balance_weight else []))

    @property
    def takes_kl(self) -> bool:
        return self._config.takes_kl

    def prepare(self, setting: Setting) -> Inputs:
        if line := _balance_line(setting):
            setting.notify(line)
        self._reference = ready_reference(setting)
        if setting.config.reference != "precompute":
            return setting.inputs
        names = ("ref_logps", "kl_ref_logps") if self.takes_kl else ("ref_logps",)
        return with_values(self._all_logps, setting, names)

    def count(self, batch: Batch) -> Totals:
        num_good = int(batch[DESIRABLE].sum())
        return Totals(
            tokens=count_tokens(batch),
            labels=count_labels(batch),
            desirable=num_good,
            undesirable=len(batch[DESIRABLE]) - num_good,
            mismatched=int(batch["kl"]["num_answers"]) if self.takes_kl else 0,
        )

    def begin(self, model: Any, batches: Sequence[Batch], totals: Totals) -> None:
        """Take the KL of the step."""
        if not self.takes_kl:
            return
        with torch.no_grad(), kept_random_state(self._device):
            total = torch.stack([self.kl_sum(model, batch) for batch in batches]).sum()
        self._kl = clamped_mean(reduce(total, "sum"), totals.mismatched)

    def kl_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the sum of the log-ratios of the mismatched answers of a batch."""
        return self._scores(model, batch["kl"]).ratios.sum()

    def part(self, model: Any, batch: Batch, totals: Totals) -> Part:
        found = self.sums(model, batch, self._kl)
        num_answers = max(totals.desirable + totals.undesirable, 1)
        share = len(batch[DESIRABLE]) / num_answers
        loss = found.losses / num_answers
        means = kind_means(found.kinds, (totals.desirable, totals.undesirable))
        metrics = [*means, self._kl * share]
        if self._balance_weight:
            balance = balance_of(found.aux_loss, share, loss)
            loss = loss + self._balance_weight * balance
            metrics.append(balance.detach())
        return Part(loss, torch.stack(metrics))

    def sums(self, model: Any, batch: Batch, kl: torch.Tensor) -> _Sums:
        """Return the sums of a batch."""
        config = self._config
        logps, ratios, aux_loss = self._scores(model, batch)
        is_good = batch[DESIRABLE].to(self._device) > 0
        losses = kto_losses(ratios, is_good, kl, config.beta)
        good, bad = config.desirable_weight, config.undesirable_weight
        losses = torch.where(is_good, good * losses, bad * losses)
        values = torch.stack((config.beta * ratios, logps)).detach()
        kinds = torch.stack([(values * kind).sum(1) for kind in (is_good, ~is_good)], 1)
        return _Sums(losses.sum(), kinds.flatten(), aux_loss)

    def _scores(self, model: Any, batch: Batch) -> _Scores:
        assert self._reference is not None, "prepare comes first"
        # First, because it may exchange weights, which no graph of the model would survive.
        with torch.no_grad():
            reference = self._reference.sums(self._logps, model, batch)
        # As in evaluations of sft, the balance of the experts counts in training alone.
        balances = self._balance_weight > 0 and torch.is_grad_enabled()
        tokens, aux_loss = token_values(model, batch, self._device, balances=balances)
        logps = Answers.of(batch, self._device).sums(tokens)
        return _Scores(logps, logps - reference, aux_loss)

    def _logps(self, model: Any, batch: Batch) -> torch.Tensor:
        tokens, _ = token_values(model, batch, self._device)
        return Answers.of(batch, self._device).sums(tokens)

    def _all_logps(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the log-probability of each answer, in turn with its mismatched one's."""
        parts = [batch, batch["kl"]] if self.takes_kl else [batch]
        return torch.stack([self._logps(model, part) for part in parts], 1).flatten()

    def updated(self, step: int) -> None:
        if self._reference is not None:
            self._reference.updated(step)

    def evaluation(self, model: Any) -> KtoEvaluation:
        kind = KlEvaluation if self.takes_kl else KtoEvaluation
        return kind(self, model, self._device)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._reference is None else self._reference.state_dict()

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        if self._reference is not None and values:
            self._reference.load_state_dict(values)


class KtoEvaluation:
    """Means over all answers of the evaluation data, whatever the batches.

    Its sums are those of the losses and of `_Sums.kinds`, counts of good and bad answers and of
    scored tokens, and the KL times the answers.
    """

    num_sums = 9

    def __init__(self, objective: Kto, model: Any, device: torch.device) -> None:
        self._objective = objective
        self._model = model
        self._kl = torch.zeros((), dtype=torch.float64, device=device)

    def sums(self, batch: Batch) -> torch.Tensor:
        # The graphs of a compiled model are for the shapes of training.
        with torch.compiler.set_stance("force_eager"):
            found = self._objective.sums(self._model, batch, self._kl)
        totals = self._objective.count(batch)
        counts = (totals.desirable, totals.undesirable, totals.labels)
        kl = self._kl * len(batch[DESIRABLE])
        sums = torch.cat((found.losses.view(1), found.kinds, kl.view(1)))
        return torch.cat((sums.cpu(), torch.tensor(counts, dtype=torch.float64)))

    def result(self, sums: torch.Tensor) -> EvalResult:
        loss, kl, good, bad, labels = sums[[0, 5, 6, 7, 8]].tolist()
        means = [*map(float, kind_means(sums[1:5], (good, bad))), kl / (good + bad)]
        return EvalResult(
            loss=loss / (good + bad),
            tokens=int(labels),
            answers=int(good + bad),
            means=dict(zip(KTO_METRICS, means, strict=True)),
        )


class KlEvaluation(KtoEvaluation):
    """The same with a KL, which a first pass over a set takes."""

    num_first_sums = 2

    def first_sums(self, batch: Batch) -> torch.Tensor:
        """Return the sum of log-ratios of the mismatched answers of a batch, and their count."""
        with torch.compiler.set_stance("force_eager"):
            total = self._objective.kl_sum(self._model, batch)
        return torch.tensor([total, self._objective.count(batch).mismatched], dtype=torch.float64)

    def begin(self, sums: torch.Tensor) -> None:
        """Take the KL of a set, given its first sums over all batches and processes."""
        self._kl = clamped_mean(sums[0], float(sums[1])).to(self._kl.device)


def clamped_mean(total: torch.Tensor, count: float) -> torch.Tensor:
    """Return the mean of log-ratios as a KL: at least 0, and 0 of none."""
    return (total / max(count, 1)).clamp(min=0)


def kind_means(kinds: torch.Tensor, counts: tuple[float, float]) -> tuple[torch.Tensor, ...]:
    """Return the metrics of KTO_METRICS before kl; NaN where there is no answer of a kind.

    Args:
        kinds: As `_Sums` has them; of a micro-batch, where the counts are of the whole step.
        counts: Good and bad answers.
    """
    chosen, rejected, *logps = kinds / torch.tensor([*counts, *counts], device=kinds.device)
    return chosen, rejected, chosen - rejected, *logps


def _balance_line(setting: Setting) -> str | None:
    """Return a line on data in which one kind has much more weight; None where they are even."""
    config, left_out = setting.config, setting.inputs.data.stats.left_out
    good, bad = (left_out.get(words, 0) for words in GOOD.values())
    weights = config.desirable_weight * good, config.undesirable_weight * bad
    if setting.batches is None or not all(weights):
        return None
    balance = weights[0] / weights[1]
    if _BALANCE[0] <= balance <= _BALANCE[1]:
        return None
    least, most = (config.undesirable_weight * bad / good * times for times in _BALANCE)
    return (
        f"kto: {good} good and {bad} bad answers: with their weights {balance:.3g} to 1, where the "
        f"paper recommends 1 to 1.33; desirable_weight {least:.3g} to {most:.3g} makes it so"
    )
