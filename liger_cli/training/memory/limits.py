"""Memory of a training step of a run by part, and remedies that reduce it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from liger_cli.common.environment import host_memory
from liger_cli.common.numbers import format_bytes
from liger_cli.config import RunConfig
from liger_cli.data.packing import answer_lengths
from liger_cli.errors import LigerError, OutOfMemory
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory import (
    Batch,
    MemoryEstimate,
    assumed_attention,
    estimate_memory,
)
from liger_cli.training.memory.values import CHECKPOINT_COPY
from liger_cli.training.model.adapters import is_adapted
from liger_cli.training.model.dtypes import parameter_dtype
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.optim.optimizers import state_bytes
from liger_cli.training.parallel.mesh import ParallelPlan, explicit_plan
from liger_cli.training.runtime.auto_fit import smaller_batches

__all__ = [
    "AUTO_TILE",
    "RunMemory",
    "cheapest_remedies",
    "check_memory",
    "device_memory",
    "evaluation_out_of_memory",
    "out_of_memory",
    "parts_line",
]

# Rows whose longest is the length of all in the estimate.
_ROWS_LOOKED_AT = 1000
# A remedy that saves less than this is none.
_WORTH_IT = 0.98
_NUM_REMEDIES = 3
# Rows that are not worth cutting.
_SHORT = 64
# Tokens of a piece of tile_tokens where nobody says: enough to fill a GPU, and an MLP of them takes
# about a gigabyte (llama-8b).
AUTO_TILE = 8192


@dataclass(frozen=True)
class RunMemory:
    """A step of a run: what its memory follows from.

    Attributes:
        config: The run.
        source: Its model.
        batch: A micro-batch.
        on_gpu: Whether it runs on a GPU.
        plan: How ranks share the model; its memory is that of a rank.
        host_bytes: That activation_offloading may take of the host for a rank; None: what it needs.
    """

    config: RunConfig
    source: ModelSource
    batch: Batch
    on_gpu: bool
    plan: ParallelPlan = ParallelPlan()
    host_bytes: int | None = None

    @classmethod
    def of(cls, config: RunConfig, inputs: Inputs, device: torch.device) -> RunMemory:
        """Return the memory of a step of this run."""
        lengths, size = _row_lengths(config, inputs), _num_sequences(config)
        plan, length = inputs.attention, max(lengths)
        is_free = plan.padding_free and not config.packing
        if is_free:
            # Of the longest rows that can come together, the mean.
            longest = sorted(lengths)[-size:]
            length = -(-sum(longest) // len(longest))
        batch = Batch(
            size=size,
            length=length,
            is_padded=len(set(lengths)) > 1 and size > 1 and not is_free,
            is_packed=config.packing,
            is_flat=is_free or plan.has_lengths,
            has_lengths=plan.has_lengths,
        )
        return cls(config, inputs.source, batch, device.type != "cpu")

    @classmethod
    def assumed(
        cls, config: RunConfig, source: ModelSource, plan: ParallelPlan, *, is_padded: bool
    ) -> RunMemory:
        """Return the memory of a step of rows of max_length, on a GPU unless use_cpu says else.

        Args:
            config: The run.
            source: Its model.
            plan: How ranks share it.
            is_padded: Whether rows have several lengths.
        """
        on_gpu = not config.use_cpu
        attention = assumed_attention(config, source, is_padded=is_padded, on_gpu=on_gpu)
        is_free = attention.padding_free and not config.packing
        batch = Batch(
            size=_num_sequences(config),
            length=_longest(config),
            is_padded=is_padded and not is_free,
            is_packed=config.packing,
            is_flat=is_free or attention.has_lengths,
            has_lengths=attention.has_lengths,
        )
        return cls(attention.applied(config), source, batch, on_gpu, plan)

    @functools.cached_property
    def found(self) -> MemoryEstimate | None:
        """The parts; None of a model whose step cannot be followed without data."""
        try:
            return self.estimate()
        except (ValueError, LigerError):
            return None

    def estimate(self) -> MemoryEstimate:
        """Return the parts.

        Raises:
            ValueError: The model's step cannot be followed without data.
            LigerError: The model cannot be built, or the adapter not be put on it.
        """
        return estimate_memory(
            self.config,
            self.source,
            self.batch,
            on_gpu=self.on_gpu,
            plan=self.plan,
            host_bytes=self.host_bytes,
        )

    def peak(self) -> int | None:
        return None if self.found is None else self.found.peak

    def share_of_eager(self) -> float | None:
        """Return the peak as a share of that of the model without patches."""
        eager = self.trying(ops="none").peak()
        now = self.peak()
        return None if eager is None or now is None else now / eager

    def trying(self, **keys: Any) -> RunMemory:
        """Return the same step with other values of keys that do not change its batch."""
        return replace(self, config=self.config.model_copy(update=keys))

    def resized(self, config: RunConfig) -> RunMemory:
        """Return a step of the batch and of rows of max_length of a configuration."""
        batch = replace(self.batch, size=_num_sequences(config), length=_longest(config))
        return replace(self, config=config, batch=batch)

    def with_remedies(self, *remedies: Remedy) -> RunMemory:
        """Return the same run with remedies applied to it."""
        config, length = self.config, self.batch.length
        for remedy in remedies:
            config = config.model_copy(update=dict(remedy.keys))
        length = min(length, _longest(config))
        batch = replace(self.batch, size=_num_sequences(config), length=length)
        plan = explicit_plan(config, self.plan.num_processes) or self.plan
        return replace(self, config=config, batch=batch, plan=plan)


# Compared by identity: its mappings have no hash.
@dataclass(frozen=True, eq=False)
class Remedy:
    """Something that makes a step take less.

    Attributes:
        words: The flags, and what they cost.
        keys: What they change in the configuration.
    """

    words: str
    keys: Mapping[str, Any]


def _row_lengths(config: RunConfig, inputs: Inputs) -> list[int]:
    # A stream has no rows to look at, and images would be read for their lengths alone.
    if config.streaming or inputs.data.has_images or not inputs.train:
        return [_longest(config)]
    count = min(_ROWS_LOOKED_AT, len(inputs.train))
    return [length for i in range(count) for length in answer_lengths(inputs.train[i])]


def _num_sequences(config: RunConfig) -> int:
    """Return the sequences of a forward pass: both answers of a pair, or packed rows."""
    size = config.per_device_train_batch_size
    return size if config.packing else size * config.answers_per_row


def _longest(config: RunConfig) -> int:
    return config.max_length * (config.answers_per_row if config.packing else 1)


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has in all."""
    if device.type == "cpu":
        return host_memory()
    module = getattr(torch, device.type)
    return int(module.get_device_properties(device).total_memory)


def check_memory(
    config: RunConfig, meta_model: Any, device: torch.device, *, trains: bool = True
) -> None:
    """Refuse a model that cannot fit on a CPU, where Linux would end the process without a word.

    Raises:
        OutOfMemory: The parameters, and in training gradients and moments, are more than there is.
    """
    if device.type != "cpu":
        return
    sizes = [(p.numel(), p.requires_grad) for p in meta_model.parameters()]
    parameter_bytes = parameter_dtype(config, device, adapts=is_adapted(meta_model)).itemsize
    needed, what = sum(size for size, _ in sizes) * parameter_bytes, "weights"
    if trains:
        trained = sum(size for size, is_trained in sizes if is_trained)
        needed += round(trained * (parameter_bytes + state_bytes(config, parameter_bytes)))
        what = "weights, gradients and optimizer"
    if needed > host_memory():
        raise OutOfMemory(
            f"{config.model} needs {format_bytes(needed)} for its {what} alone; "
            f"this machine has {format_bytes(host_memory())}",
            hint="Take a smaller model, or --dtype bfloat16 for half of it.",
        )


def parts_line(found: MemoryEstimate) -> str:
    """Return the parts of an estimate in words."""
    parts = {
        "weights": found.weights,
        "reference": found.reference,
        "optimizer": found.optimizer,
        "gradients": found.gradients,
        **{f"activations of {name}": size for name, size in found.activations.items()},
        "logits": found.logits,
        "head buffers": found.head_buffers,
        **found.of_ranks,
        CHECKPOINT_COPY: found.at_peak.get(CHECKPOINT_COPY, 0),
    }
    words = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    return f"{words}; at most {format_bytes(found.peak)} at once"


def out_of_memory(error: BaseException, memory: RunMemory, device: torch.device) -> OutOfMemory:
    """Return the error that says where the memory of a step goes, and what would make it less."""
    lines = [f"out of memory: {_first_line(error)}"]
    found = memory.found
    if found is not None:
        has = format_bytes(device_memory(device))
        lines.append(f"a step is estimated to take: {parts_line(found)}, of {has}")
    remedies = list(cheapest_remedies(memory, device_memory(device)))
    if memory.config.per_device_train_batch_size > 1 and not memory.config.auto_fit:
        remedies.append("--auto-fit finds a micro-batch that fits, with the same rows a step")
    return OutOfMemory("\n".join(lines), hint="\n".join(remedies) or None)


def evaluation_out_of_memory(error: BaseException, config: RunConfig) -> OutOfMemory:
    """Return the error of an evaluation, whose result no batch size changes."""
    size = config.per_device_eval_batch_size
    hint = f"--per-device-eval-batch-size {size // 2} gives the same figures." if size > 1 else None
    return OutOfMemory(f"out of memory in evaluation: {_first_line(error)}", hint=hint)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def cheapest_remedies(memory: RunMemory, num_bytes: int) -> Iterator[str]:
    """Yield words for the cheapest remedies that fit into so many bytes, three at most.

    Where none does alone it is those that help most, and what they come to together.
    """
    now = memory.peak()
    if now is None:
        return
    useful: dict[Remedy, int] = {}
    fitting: list[Remedy] = []
    # They come in the order of their cost, so that more than enough of them need not be tried.
    for remedy in _remedies(memory):
        peak = memory.with_remedies(remedy).peak() or now
        if peak >= _WORTH_IT * now:
            continue
        useful[remedy] = peak
        if peak <= num_bytes:
            fitting.append(remedy)
        if len(fitting) == _NUM_REMEDIES:
            break
    others = sorted(useful.keys() - fitting, key=useful.__getitem__)
    chosen = [*fitting, *others][:_NUM_REMEDIES]
    for remedy in chosen:
        yield f"{remedy.words}: predicted {format_bytes(useful[remedy])}"
    if len(chosen) > 1 and not fitting:
        together = memory.with_remedies(*chosen).peak() or now
        yield f"all of these: predicted {format_bytes(together)}"


def _remedies(memory: RunMemory) -> Iterator[Remedy]:
    """Yield remedies, the cheapest first: in time, then in data, then in the model."""
    config, size = memory.config, memory.config.per_device_train_batch_size
    if config.ops not in ("auto", "all"):
        yield Remedy("--ops auto", {"ops": "auto"})
    if size > 1:
        size, accumulation = smaller_batches(size, config.gradient_accumulation_steps)
        flags = f"--per-device-train-batch-size {size} --gradient-accumulation-steps {accumulation}"
        keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        yield Remedy(f"{flags} (the same step)", keys)
    if not config.gradient_checkpointing:
        words = "--gradient-checkpointing (about a third more time)"
        yield Remedy(words, {"gradient_checkpointing": True})
    yield from _remedies_of_long_rows(memory)
    if memory.plan.num_processes > memory.plan.dp_shard:
        keys = {"dp_replicate_size": 1, "dp_shard_size": -1}
        yield Remedy("--dp-replicate-size 1 --dp-shard-size -1 (all ranks share the model)", keys)
    if config.optim not in ("adafactor", "sgd"):
        yield Remedy("--optim adafactor", {"optim": "adafactor"})
    if config.max_length > _SHORT:
        half = config.max_length // 2
        yield Remedy(f"--max-length {half} (longer rows are cut)", {"max_length": half})
    if config.adapter == "none" and memory.source.adapter is None:
        words = "--adapter lora (trains an adapter instead of the model)"
        yield Remedy(words, {"adapter": "lora"})


def _remedies_of_long_rows(memory: RunMemory) -> Iterator[Remedy]:
    config = memory.config
    if config.torch_compile is True:
        return
    tokens = memory.batch.size * memory.batch.length
    if config.tile_size is None and config.ops != "none" and tokens > AUTO_TILE:
        cost = "little" if config.gradient_checkpointing else "about a fifth more"
        words = f"--tile-tokens {AUTO_TILE} (MLPs in pieces of tokens, {cost} time)"
        yield Remedy(words, {"tile_tokens": str(AUTO_TILE)})
    if config.activation_offloading is not True and memory.on_gpu:
        keys = {"gradient_checkpointing": True, "activation_offloading": True}
        flags = "" if config.gradient_checkpointing else "--gradient-checkpointing "
        words = f"{flags}--activation-offloading true (inputs of layers in host memory)"
        yield Remedy(words, keys)
