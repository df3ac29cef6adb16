"""The report of `liger estimate`: parts, the room on a card, and the sizes that fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from liger_cli.commands.estimate.cards import Card
from liger_cli.commands.estimate.fit import largest_that_fits
from liger_cli.commands.estimate.layout import chosen_layout, fewest_shards
from liger_cli.commands.estimate.machine import Machine
from liger_cli.commands.estimate.times import time_rows
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, OutOfMemory
from liger_cli.report.estimate import CardPart, EstimateReport, FitPart, PartRow, RanksPart
from liger_cli.training.memory.choice import USABLE
from liger_cli.training.memory.limits import RunMemory, cheapest_remedies
from liger_cli.training.memory.long_rows import everything_on, with_long_rows
from liger_cli.training.memory.values import CHECKPOINT_COPY, MemoryEstimate
from liger_cli.training.model.extended import extend_source
from liger_cli.training.model.source import resolve_model
from liger_cli.training.parallel.assumed import assumed_plan
from liger_cli.training.parallel.mesh import ParallelPlan

__all__ = ["Fit", "describe_estimate"]

Fit = Literal["batch", "seq", "shards"]

# Sequences are tried in steps of as many tokens, up to the longest.
_SEQ_STEP, _MAX_SEQ = 64, 1 << 20
_MAX_BATCH = 1 << 14


def describe_estimate(
    config: RunConfig,
    *,
    card: Card | None = None,
    fit: Fit | None = None,
    nproc: int | None = None,
    is_padded: bool = False,
    machine: Machine | None = None,
) -> EstimateReport:
    """Return the memory of a step of a run, from its model's configuration alone.

    Args:
        config: The run: model, ops, batch, rows of max_length, precision, optimizer, adapter.
        card: Where it shall fit.
        fit: What is to be made as large as the card allows; the run's own size is where it starts.
        nproc: Ranks of the run; one by default. With fit "shards" any number by default.
        is_padded: Whether rows have several lengths.
        machine: The speed of cards and links, of which the time of a step follows.

    Raises:
        ConfigError: The model's forward cannot be followed, or there is nothing to fit into.
        OutOfMemory: Not even the smallest size fits.
    """
    if fit is not None and card is None:
        raise ConfigError("fit needs a card to fit into", hint="--gpu H100-80GB, or --gpu 24 (GB)")
    memory, why, card = _laid_out(config, card, fit, nproc, is_padded=is_padded)
    fitted, asked = None, memory.config
    if card is not None and fit is None:
        memory = _with_long_rows(memory, card)
    if fit is not None and card is not None:
        # What is auto is turned on as it is needed: the largest size has all of it.
        memory, fitted = _fitted(everything_on(memory), card, fit)
    # Where there is nothing to be found, the second call says why.
    found = memory.found or memory.estimate()
    room = None
    if card is not None:
        room = CardPart(name=card.name, usable=card.usable, free=card.usable - found.peak)
    return EstimateReport(
        model=memory.source.name,
        batch_size=memory.batch.size,
        sequence_length=memory.batch.length,
        parts=_rows(found),
        peak=found.peak,
        phases=dict(found.phases),
        card=room,
        fit=fitted,
        ranks=_ranks(memory, why),
        checkpoint_copy=found.checkpoint_copy if memory.on_gpu else 0,
        times=[] if machine is None else time_rows(memory, found, machine),
        offloaded=dict(found.offloaded),
        chosen=_chosen(asked, memory.config),
        remedies=list(cheapest_remedies(memory, room.usable)) if room and room.free < 0 else [],
    )


def _laid_out(
    config: RunConfig, card: Card | None, fit: Fit | None, nproc: int | None, *, is_padded: bool
) -> tuple[RunMemory, str, Card | None]:
    """Return the run in its layout, why it is this one, and what of the card it may fill."""
    source = extend_source(config, resolve_model(config.model))
    asked = assumed_plan(config, source, nproc or 1) if fit != "shards" else ParallelPlan()
    plan = asked or ParallelPlan(nproc or 1)
    memory = RunMemory.assumed(config, source, plan, is_padded=is_padded)
    if fit == "shards" and card is not None:
        # What train fills when it chooses between copies and shards.
        card = replace(card, usable=int(USABLE * card.usable))
        return fewest_shards(memory, card, nproc), "the fewest shards that fit", card
    if asked is None:
        return *chosen_layout(memory, card), card
    return memory, "as the keys say", card


def _fitted(memory: RunMemory, card: Card, fit: Fit) -> tuple[RunMemory, FitPart]:
    key = "max_length" if fit == "seq" else "per_device_train_batch_size"
    unit, most = (_SEQ_STEP, _MAX_SEQ) if fit == "seq" else (1, _MAX_BATCH)
    now = getattr(memory.config, key)

    def of(num_units: int) -> RunMemory:
        return memory.resized(memory.config.model_copy(update={key: num_units * unit}))

    largest = largest_that_fits(
        lambda n: of(n).estimate().peak, card.usable, start=max(1, now // unit), most=most // unit
    )
    if largest is None:
        raise OutOfMemory(
            f"{memory.source.name} does not fit into {card.name} with {key} {unit}",
            hint="\n".join(cheapest_remedies(of(1), card.usable)) or None,
        )
    return of(largest), FitPart(key=key, value=largest * unit, is_limit=largest * unit < most)


def _with_long_rows(memory: RunMemory, card: Card) -> RunMemory:
    """Return a step with what is auto as `liger train` decides it on a card."""
    if not memory.config.gradient_checkpointing:
        return memory
    keys, _ = with_long_rows(memory, int(USABLE * card.usable))
    return memory.trying(**keys)


def _chosen(asked: RunConfig, config: RunConfig) -> dict[str, str]:
    """Return the keys that were auto and are on now."""
    found = {}
    if asked.tile_size != config.tile_size:
        found["tile_tokens"] = config.tile_tokens
    if asked.activation_offloading != config.activation_offloading is True:
        found["activation_offloading"] = "true"
    return found


def _ranks(memory: RunMemory, why: str) -> RanksPart | None:
    plan = memory.plan
    if plan.num_processes == 1:
        return None
    return RanksPart(
        layout=plan.name,
        why=why,
        dp_replicate_size=plan.dp_replicate,
        dp_shard_size=plan.dp_shard,
    )


def _rows(found: MemoryEstimate) -> list[PartRow]:
    sizes = {
        "weights": found.weights,
        "reference": found.reference,
        "optimizer": found.optimizer,
        "gradients": found.gradients,
        **found.activations,
        "logits": found.logits,
        "head buffers": found.head_buffers,
        **found.of_ranks,
        CHECKPOINT_COPY: found.at_peak.get(CHECKPOINT_COPY, 0),
    }
    at_peak = dict(found.at_peak)
    rows = []
    for part, size in sizes.items():
        there = at_peak.pop(part, 0)
        name = f"activations of {part}" if part in found.activations else part
        if size or there:
            # Of activations, size is what forward keeps; backward may have more.
            rows.append(PartRow(name=name, size=max(size, there), at_peak=there))
    others = sum(at_peak.values())
    return [*rows, PartRow(name="temporaries", size=others, at_peak=others)]
