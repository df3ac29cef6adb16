"""The loss that `liger verify` compares: the model's own, or that of an objective, on one batch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from liger_cli.config import RunConfig
from liger_cli.data.batches import count_tokens
from liger_cli.data.class_batches import ClassCollator
from liger_cli.data.class_formats import TARGETS
from liger_cli.data.class_maker import scored_at_end
from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED
from liger_cli.data.pair_batches import PairCollator
from liger_cli.data.pair_formats import ANSWERS, DESIRABLE
from liger_cli.data.unpaired_batches import UnpairedCollator, mismatch
from liger_cli.training.model.classifiers import check_writes_text, is_classifier, random_labels
from liger_cli.training.model.source import load_model, resolve_model
from liger_cli.training.objectives.distill import Distill, check_vocabulary_size
from liger_cli.training.objectives.objective import Objective
from liger_cli.training.objectives.table import make_objective

__all__ = ["Loss", "make_loss", "random_batch"]

# Tokens of the batch: enough for a full block of every kernel, little enough for fp64.
_BATCH_ON_CPU, _BATCH_ON_GPU = (2, 64), (2, 256)
# Tokens that the rejected answer of a pair is shorter by.
_SHORTER = 5


@dataclass(frozen=True)
class Loss:
    """The loss of a model on one batch.

    Attributes:
        input_ids: (B, T) of the batch, on the device.
        num_tokens: Of the batch, without padding.
        of: Computes the loss of a model, a scalar with a gradient.
        teacher: The model that an objective has beside, to be patched as the model is.
    """

    input_ids: torch.Tensor
    num_tokens: int
    of: Callable[[Any], torch.Tensor]
    teacher: Any = None


def make_loss(
    config: RunConfig,
    model: Any,
    device: torch.device,
    dtype: torch.dtype,
    notify: Callable[[str], None],
) -> Loss:
    """Return the loss of the objective that a configuration names, on random tokens.

    Without an objective it is the model's own, of a classifier too.

    Args:
        config: Its objective with the keys of that, and the seed of the tokens.
        dtype: Of a teacher.
        notify: Called with lines about a teacher.

    Raises:
        LigerError: A teacher cannot be loaded, or has another vocabulary.
    """
    batch = random_batch(model, device, config.seed)
    if config.objective == "sft":
        return Loss(
            input_ids=batch["input_ids"],
            num_tokens=batch["input_ids"].numel(),
            of=lambda patched: patched(**batch, use_cache=False).loss,
        )
    # Pairs are scored without a reference: the model itself has one loss at every pair.
    config = config.with_objective_defaults().model_copy(update={"reference": "none"})
    objective = make_objective(config, model, device)
    teacher = None
    if isinstance(objective, Distill):
        teacher = _load_teacher(config, model, device, dtype, notify)
        objective.set_teacher(teacher, contextlib.nullcontext)
    collated = _collated(config, batch)
    return Loss(
        input_ids=collated["input_ids"].to(device),
        num_tokens=count_tokens(collated),
        of=lambda patched: _loss_of(objective, patched, collated),
        teacher=teacher,
    )


def _loss_of(objective: Objective, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    totals = objective.count(batch)
    with warnings.catch_warnings():
        # A model that is not patched makes them, which is what ours is compared with.
        warnings.filterwarnings("ignore", message="token_logprobs makes all logits")
        objective.begin(model, [batch], totals)
        return objective.part(model, batch, totals).loss


def _load_teacher(
    config: RunConfig,
    model: Any,
    device: torch.device,
    dtype: torch.dtype,
    notify: Callable[[str], None],
) -> Any:
    name = config.teacher_model_name_or_path
    assert name is not None, "a conflict of keys otherwise"
    # Another seed than the model's: drawn alike, a teacher of the same preset would be the model.
    source = resolve_model(name, notify)
    check_writes_text(source, f"teacher {name}")
    teacher: Any = load_model(
        source, dtype=dtype, device=device, seed=config.seed + 1, notify=notify
    )
    check_vocabulary_size(name, teacher, model)
    return teacher.requires_grad_(False).eval()


def random_batch(model: Any, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """Draw random tokens; a quarter of the labels and the first of each row are ignored.

    Of a classifier there is a label, or several, for each row.
    """
    shape = _BATCH_ON_CPU if device.type == "cpu" else _BATCH_ON_GPU
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    # Image tokens would want images.
    for name in ("image_token_id", "image_token_index", "video_token_id"):
        special = getattr(model.config, name, None)
        if isinstance(special, int):
            ids[ids == special] = 0
    if is_classifier(model):
        return {"input_ids": ids.to(device), "labels": random_labels(model, shape[0], generator)}
    labels = ids.masked_fill(torch.rand(shape, generator=generator) < 0.25, IGNORED)
    labels[:, 0] = IGNORED
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def _collated(config: RunConfig, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the tokens of a batch as the objective gets them: rows, or answers of half a row.

    Rows of classify have their target.
    """
    if config.trains_pairs:
        return PairCollator(Collator(0))([_pair(row) for row in batch["input_ids"].tolist()])
    if config.trains_unpaired:
        answers = [answer for row in batch["input_ids"].tolist() for answer in _answers(_pair(row))]
        mismatched = mismatch(answers, batch["input_ids"].shape[1]) if config.takes_kl else None
        rows = answers if mismatched is None else [mismatched[i] for i in range(len(answers))]
        return UnpairedCollator(Collator(0), config.takes_kl)(rows)
    ids, labels = (batch[name].tolist() for name in ("input_ids", "labels"))
    if config.classifies:
        targets = [label if isinstance(label, list) else [label] for label in labels]
        return ClassCollator(Collator(0))(
            [
                {"input_ids": x, "labels": scored_at_end(len(x)), TARGETS: y}
                for x, y in zip(ids, targets, strict=True)
            ]
        )
    return Collator(0)([{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)])


def _pair(tokens: Sequence[int]) -> dict[str, list[int]]:
    """Return a pair: a quarter is the prompt, and the rejected answer is shorter."""
    part = len(tokens) // 4
    prompt, chosen, rejected = tokens[:part], tokens[part : 2 * part], tokens[2 * part : 3 * part]
    pair = {}
    for name, answer in (("chosen", chosen), ("rejected", rejected[:-_SHORTER])):
        pair[f"{name}_input_ids"] = [*prompt, *answer]
        pair[f"{name}_labels"] = [IGNORED] * part + list(answer)
    return pair


def _answers(pair: Mapping[str, list[int]]) -> list[dict[str, Any]]:
    """Return the answers of a pair, of which the chosen one is good."""
    return [
        {
            "input_ids": pair[f"{name}_input_ids"],
            "labels": pair[f"{name}_labels"],
            DESIRABLE: int(name == "chosen"),
        }
        for name in ANSWERS
    ]
