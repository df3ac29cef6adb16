"""The values of run reports: what a command found, as one value that goes to JSON and back.

Units: bytes, ms, tokens a second. GB is 1e9 bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from liger_cli.common.numbers import finite
from liger_cli.common.outputs import write_file
from liger_cli.common.readers import parse_json
from liger_cli.report.layout import LayoutPart

__all__ = [
    "MIN_MEMORY_NOISE",
    "MIN_SPEED_NOISE",
    "AgainstPart",
    "Arm",
    "AssertPart",
    "AttentionPart",
    "BestPart",
    "DataPart",
    "EvalPart",
    "Finite",
    "FitPart",
    "GainPart",
    "LayerPart",
    "ModuleRow",
    "ParityPart",
    "PeerPart",
    "RatiosPart",
    "RunReport",
    "StopPart",
    "SweepPoint",
    "TrainPart",
]

SCHEMA_VERSION = 1

# Clock and temperature move the speed of equal runs by about this much on a quiet machine.
MIN_SPEED_NOISE = 0.03
MIN_MEMORY_NOISE = 0.01

ModuleRow = dict[str, str | None]


def _drop_non_finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


# JSON has no NaN or infinity: such a number is None from the start.
Finite = Annotated[float | None, AfterValidator(_drop_non_finite)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BatchPart(_Part):
    """The batch of an optimizer step as it was, in means over the steps of the run.

    Attributes:
        rows: Over all micro-batches and processes; packed rows count once. None of a stream.
        tokens, trained_tokens: Without padding; those with a label.
        micro_batch_rows: At most, of one micro-batch on one process.
        micro_batches: Of a step on one process.
    """

    rows: Finite
    tokens: float
    trained_tokens: float
    micro_batch_rows: int
    micro_batches: int
    processes: int


class TrainPart(_Part):
    """Results of training. tokens: fed and not padding; trained_tokens: those with a label."""

    steps: int
    tokens: int
    trained_tokens: int
    first_loss: Finite
    final_loss: Finite
    tokens_per_s: Finite
    step_ms: Finite
    peak_memory_bytes: int | None
    # None of a run that has not finished.
    batch: BatchPart | None = None


class GainPart(_Part):
    """Against the unpatched model: times faster, and the share of its peak memory."""

    source: Literal["measured", "estimated"]
    speed: Finite = None
    memory: Finite = None


class DataPart(_Part):
    """The data that were read: the rows used and left out, as DataStats counts them."""

    name: str
    rows: int
    dropped_rows: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    eval_rows: int
    columns: list[str]
    left_out: dict[str, int] = {}
    unused_columns: list[str] = []
    fields: list[str] = []


class LayerPart(_Part):
    """The attention of all layers of a type: what computes it, and why nothing faster does."""

    layer_type: str
    num_layers: int
    backend: Literal["varlen", "flex", "mask"]
    reason: str | None


class AttentionPart(_Part):
    """The attention of rows of documents, packed or laid end to end (padding_free).

    layers is empty where transformers computes it with a mask, or by the flash attention that was
    asked for; reason then says why liger_varlen does not.
    """

    implementation: str | None
    padding_free: bool
    layers: list[LayerPart] = []
    reason: str | None = None


class EvalPart(_Part):
    """Evaluation over all tokens with a label, all pairs, labelled answers or rows with a class.

    entropy is in nats a token. Of pairs and answers there are TRL's names beside, such as
    rewards/margins; of rows accuracy, f1 and f1/NAME, and the rows of each class by what they are
    said to be (confusion), in the order of the f1/NAME.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Finite]

    loss: Finite
    perplexity: Finite = None
    token_accuracy: Finite = None
    entropy: Finite = None
    tokens: int | None = None
    pairs: int | None = None
    answers: int | None = None
    rows: int | None = None
    confusion: list[list[int]] | None = None

    @property
    def means(self) -> dict[str, float | None]:
        """The means over pairs, answers or rows, by name."""
        return dict(self.__pydantic_extra__)

    @model_serializer(mode="wrap")
    def _given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the figures that this kind of evaluation has not."""
        values: dict[str, Any] = serialize(self)
        given = self.model_fields_set | self.__pydantic_extra__.keys()
        return {name: value for name, value in values.items() if name in given}


class BestPart(_Part):
    """The best evaluation during training; checkpoint is that of its step, if there is one."""

    step: int
    metric: str
    value: float
    checkpoint: str | None


class StopPart(_Part):
    """A run that ended before its last step: so many evaluations in turn were no better."""

    step: int
    evaluations: int


class Arm(_Part):
    """One side of a comparison: medians over all its runs; a loss that is not finite is None.

    The first step of a run, which compiles and warms up, is in first_step_ms alone, where the
    longest of all runs stands. error says why a side has no figures; note what to know of it.
    """

    name: str
    tokens_per_s: Finite = None
    step_ms: Finite = None
    step_p20_ms: Finite = None
    step_p80_ms: Finite = None
    first_step_ms: Finite = None
    peak_memory_bytes: int | None = None
    losses: list[Finite] = []
    grad_norms: list[Finite] = []
    runs: int = 1
    note: str | None = None
    error: str | None = None


class RatiosPart(_Part):
    """The patched arm against another: speed above 1 is faster, memory below 1 is smaller.

    noise and memory_noise are how far apart equal runs were; a difference below says nothing. They
    are None where a side ran once: then they are unknown.
    """

    speed: Finite = None
    memory: Finite = None
    noise: Finite = MIN_SPEED_NOISE
    memory_noise: Finite = MIN_MEMORY_NOISE


class ParityPart(_Part):
    """How far the losses of two arms are apart, step by step from the same weights and data.

    The norms of the gradients are compared alike, where both arms have them; equal is about both.
    """

    steps: int
    max_loss_difference: Finite
    max_relative_difference: Finite
    tolerance: float
    max_grad_norm_difference: Finite = None
    grad_norm_tolerance: Finite = None
    equal: bool


class AgainstPart(_Part):
    """Two arms compared; the verdict says it in words, with a reason where there is no gain."""

    ratios: RatiosPart
    parity: ParityPart
    verdict: str


class SweepPoint(_Part):
    """One size of a sweep.

    An arm with an error has no figures: it did not fit, or was not tried, since a smaller size did
    not fit either. against: patched against each other arm, and eager with one op against eager.
    """

    batch_size: int
    sequence_length: int
    arms: list[Arm]
    against: dict[str, AgainstPart] = {}


class FitPart(_Part):
    """The sizes of an arm that fit: by sequence length the largest batch, None where none does."""

    arm: str
    largest_batch_size: int | None
    longest_sequence: int | None
    by_sequence: dict[int, int | None]


class AssertPart(_Part):
    """A bound of --assert and what was measured; where is the comparison it was measured in."""

    bound: str
    where: str
    found: Finite = None
    met: bool


class PeerPart(_Part):
    """The library that patched the model instead of ours, how many modules look different, and the
    loss on pairs that is its, or why none is.
    """

    name: str
    version: str | None
    num_changed: int
    loss: str | None = None


def _check_coverage(value: dict[str, dict[str, int]] | None) -> dict[str, dict[str, int]] | None:
    for op, counts in (value or {}).items():
        if not {"patched", "candidates"} <= set(counts):
            raise ValueError(f"{op} should have patched and candidates")
    return value


def _check_modules(value: list[ModuleRow] | None) -> list[ModuleRow] | None:
    for number, row in enumerate(value or ()):
        if missing := {"name", "op", "status", "backend", "reason"} - set(row):
            raise ValueError(f"row {number} has no {', '.join(sorted(missing))}")
    return value


def _check_environment(value: dict[str, Any] | None) -> dict[str, Any] | None:
    devices = (value or {}).get("devices") or []
    if not isinstance(devices, list) or not all(isinstance(device, dict) for device in devices):
        raise ValueError("devices should be a list of objects")
    for device in devices:
        if not isinstance(device.get("memory_bytes") or 0, int | float):
            raise ValueError("memory_bytes of a device should be a number")
    return value


class RunReport(_Part):
    """The result of one command. Parts it does not have are None here and absent from the JSON.

    Attributes:
        coverage: {op: {"patched": n, "candidates": m}} for every op with a candidate.
        modules: One row a module: name, class, op, status, backend, reason, source.
        missing: Ops asked for by name that have no place in the model.
        attention: Only where rows hold several documents.
        others: How many modules run the kernels of each other package.
        eval, eval_sets: Of all evaluation data, and of each set where they have names.
        ratios, parity: The patched arm against the first it was to be compared with.
        against: The same for every one of them, by name.
        ablation: By op, eager with that op alone against eager.
        peer: Only of a run that a peer's patch was measured in.
        interrupted: True if a comparison was stopped, so that arms are missing or ran less often.
    """

    command: str
    model: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    environment: Annotated[dict[str, Any] | None, AfterValidator(_check_environment)] = None
    coverage: Annotated[dict[str, dict[str, int]] | None, AfterValidator(_check_coverage)] = None
    modules: Annotated[list[ModuleRow] | None, AfterValidator(_check_modules)] = None
    missing: list[str] | None = None
    layout: LayoutPart | None = None
    attention: AttentionPart | None = None
    others: dict[str, int] | None = None
    data: DataPart | None = None
    train: TrainPart | None = None
    gain: GainPart | None = None
    eval: EvalPart | None = None
    eval_sets: dict[str, EvalPart] | None = None
    best: BestPart | None = None
    stop: StopPart | None = None
    arms: list[Arm] | None = None
    ratios: RatiosPart | None = None
    parity: ParityPart | None = None
    against: dict[str, AgainstPart] | None = None
    ablation: dict[str, AgainstPart] | None = None
    sweep: list[SweepPoint] | None = None
    fits: list[FitPart] | None = None
    asserted: list[AssertPart] | None = None
    peer: PeerPart | None = None
    interrupted: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, without the parts it does not have."""
        absent = {name for name in type(self).model_fields if getattr(self, name) is None}
        # Not by pydantic's own writer, which refuses half of a surrogate pair in a file's name.
        values = finite(self.model_dump(mode="json", exclude=absent))
        return {"schema_version": SCHEMA_VERSION, **values}

    def to_json(self) -> str:
        """Return the report as one JSON document; NaN and infinity are null."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> RunReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is no report, or one of a newer schema.
        """
        values = parse_json(text)
        version = values.pop("schema_version", None) if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"report: schema_version is {version}, expected {SCHEMA_VERSION}")
        return cls.model_validate(values)

    def write(self, path: Path) -> None:
        """Write the report in one step.

        Raises:
            EnvironmentProblem: It cannot be written.
        """
        write_file(path, self.to_json() + "\n")
