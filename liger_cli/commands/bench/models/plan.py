"""The plan of `liger bench`: sides, sizes, bounds, and the defaults of the device."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.runtime.peer_interpreter import PeerInterpreter
from liger_cli.training.runtime.peer_patch import PEER

__all__ = [
    "AGAINST",
    "BenchPlan",
    "BenchRequest",
    "Bound",
    "check_against",
    "parse_bounds",
    "parse_sizes",
    "plan_bench",
]

# What a patched model can be compared with.
AGAINST = ("eager", "compile", "patched+compile", PEER)

# Largest relative difference of a loss between two correct arms over some tens of steps.
_TOLERANCE_FP32 = 1e-3
_TOLERANCE_LOW_PRECISION = 2e-2

_QUANTITIES = ("speed", "memory")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_BOUND = re.compile(r"\s*(?P<name>[^<>=!\s]*)\s*(?P<operator>[<>=!]*)\s*(?P<limit>.*?)\s*")
_SIZE = re.compile(r"(\d{1,9})(k?)", re.IGNORECASE)


@dataclass(frozen=True)
class Bound:
    """One part of --assert, on a ratio of patched to the first side it is compared with."""

    quantity: str
    operator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.quantity}{self.operator}{self.limit:g}"

    def holds(self, found: float | None) -> bool:
        """Return whether a figure is within; one that was not measured is not."""
        return found is not None and _OPERATORS[self.operator](found, self.limit)


@dataclass(frozen=True)
class BenchRequest:
    """The flags of `liger bench` that are not keys of the configuration, as they were written.

    Attributes:
        steps, repeats: None takes the default of the device.
        against: Names of AGAINST with commas between.
        seq, batch: Sizes of a sweep, as parse_sizes reads them.
        bounds: As parse_bounds reads them.
        peer_python, peer_path: Where the peer is installed.
    """

    steps: int | None = None
    repeats: int | None = None
    against: str = "eager"
    ablate: bool = False
    seq: str | None = None
    batch: str | None = None
    bounds: str | None = None
    peer_python: Path | None = None
    peer_path: Path | None = None


@dataclass(frozen=True)
class BenchPlan:
    """A comparison, resolved: the run of each arm, its steps, and how often each arm runs."""

    config: RunConfig
    steps: int
    repeats: int
    tolerance: float
    on_gpu: bool
    against: tuple[str, ...] = ("eager",)
    ablate: bool = False
    # A sweep, if there are any: every batch size at every sequence length.
    sequence_lengths: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    bounds: tuple[Bound, ...] = ()
    peer_python: Path | None = None
    peer_path: Path | None = None

    @property
    def grad_norm_tolerance(self) -> float:
        # A norm takes in the error of every gradient; the loss is a mean of them.
        return 5 * self.tolerance

    @property
    def is_sweep(self) -> bool:
        return bool(self.sequence_lengths)

    @property
    def summary(self) -> str:
        """Return a line: what is run on what."""
        batches = self.batch_sizes or (self.config.per_device_train_batch_size,)
        lengths = self.sequence_lengths or (self.config.max_length,)
        sizes = " x ".join(",".join(map(str, values)) for values in (batches, lengths))
        what = f"{self.config.model} on {self.config.dataset_name}"
        return f"{what}: {self.steps} steps of {sizes} tokens"

    def peer(self) -> AbstractContextManager[PeerInterpreter | None]:
        """Return the interpreter of the peer, if there is one to be compared with.

        Raises:
            ConfigError: The interpreter or folder that was named does not exist.
        """
        if PEER not in self.against:
            return nullcontext()
        return PeerInterpreter(self.peer_python, self.peer_path)


def check_against(text: str) -> tuple[str, ...]:
    """Return the names of --against.

    Raises:
        ConfigError: One is unknown.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in AGAINST:
            raise ConfigError(f"--against {name} is unknown; available: {', '.join(AGAINST)}")
    return names


def parse_sizes(flag: str, text: str) -> tuple[int, ...]:
    """Return the sizes of '512,1024,2k..8k' in rising order; k is 1024, a range doubles.

    Raises:
        ConfigError: It is not written so, or a size is 0.
    """
    sizes: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        ends = [_SIZE.fullmatch(end) for end in ([first, last] if dots else [first])]
        values = [int(end[1]) * (1024 if end[2] else 1) for end in ends if end]
        if len(values) < len(ends) or min(values) == 0 or values[-1] < values[0]:
            raise ConfigError(
                f"{flag} {text}: {part.strip()!r} is not a size above 0 such as 512 or 2k, nor a "
                "range such as 2k..8k, which doubles"
            )
        size = values[0]
        while size < values[-1]:
            sizes.add(size)
            size *= 2
        sizes.add(values[-1])
    return tuple(sorted(sizes))


def parse_bounds(text: str) -> tuple[Bound, ...]:
    """Return the bounds of 'speed>=1.1,memory<=0.7'.

    Raises:
        ConfigError: A name, an operator or a number is not one.
    """
    bounds = []
    for part in text.split(","):
        match = _BOUND.fullmatch(part)
        name, sign, limit = match.groups() if match else (part.strip(), "", "")
        if name not in _QUANTITIES:
            problem = f"{name!r} is not one of {', '.join(_QUANTITIES)}"
        elif sign not in _OPERATORS:
            problem = f"{sign!r} is not one of {', '.join(_OPERATORS)}"
        elif (value := _positive(limit)) is None:
            problem = f"{limit!r} is not a number above 0"
        else:
            bounds.append(Bound(name, sign, value))
            continue
        raise ConfigError(
            f"--assert {text}: {problem}",
            hint='A bound is written "speed>=1.1" or "memory<=0.7"; commas are between bounds.',
        )
    return tuple(bounds)


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def plan_bench(config: RunConfig, request: BenchRequest, *, has_gpu: bool) -> BenchPlan:
    """Return the comparison, with the defaults of the device for all that is not set.

    A CPU gets 2 x 512 tokens and 3 steps a run; a GPU 8 x 2048 and 20. Each arm runs twice, which
    shows the noise of the machine; in a sweep, which finds the sizes that fit, once.

    Raises:
        ConfigError: A flag cannot be read, is given twice, or conflicts with another.
    """
    names = check_against(request.against)
    _check_request(config, request, names)
    on_gpu = has_gpu and not config.use_cpu
    config = _with_defaults(config, on_gpu)
    if request.seq is not None and config.dataset != "synthetic" and not config.packing:
        raise ConfigError(
            f"--seq: the rows of {config.dataset_name} differ in length",
            hint="--packing fills rows of that length; without --dataset they are synthetic.",
        )
    lengths: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    is_sweep = request.seq is not None or request.batch is not None
    if is_sweep:
        lengths = _sizes("--seq", request.seq, config.max_length)
        batch_sizes = _sizes("--batch", request.batch, config.per_device_train_batch_size)
    max_steps = config.max_steps if config.max_steps > 0 else None
    return BenchPlan(
        config=config,
        steps=request.steps or max_steps or (20 if on_gpu else 3),
        repeats=request.repeats or (1 if is_sweep else 2),
        tolerance=_tolerance(config, on_gpu),
        on_gpu=on_gpu,
        against=names,
        ablate=request.ablate,
        sequence_lengths=lengths,
        batch_sizes=batch_sizes,
        bounds=parse_bounds(request.bounds) if request.bounds is not None else (),
        peer_python=request.peer_python,
        peer_path=request.peer_path,
    )


def _check_request(config: RunConfig, request: BenchRequest, names: tuple[str, ...]) -> None:
    """Check that no flag repeats a key, and that no key changes the sides unevenly."""
    is_set = config.model_fields_set
    if request.steps is not None and config.max_steps > 0:
        raise ConfigError("--steps and --max-steps are the same; give one of them")
    if request.seq is not None and "max_length" in is_set:
        raise ConfigError("--seq and --max-length are the same; give one of them")
    if request.batch is not None and "per_device_train_batch_size" in is_set:
        raise ConfigError(
            "--batch and --per-device-train-batch-size are the same; give one of them"
        )
    if (request.peer_python or request.peer_path) and PEER not in names:
        raise ConfigError(
            f"--peer-python and --peer-path say where {PEER} is, which --against does not name",
            hint=f"--against eager,{PEER} compares with it too.",
        )
    if config.torch_compile is True:
        raise ConfigError(
            "torch_compile is a side of the comparison here, so it cannot be set for all of them",
            hint="--no-torch-compile --against compile,patched+compile",
        )
    if config.auto_fit:
        raise ConfigError(
            "auto_fit would measure a side at another size than the one that is compared",
            hint="--no-auto-fit; a side that is out of memory is a result, and --batch finds what "
            "fits.",
        )


def _with_defaults(config: RunConfig, on_gpu: bool) -> RunConfig:
    defaults = {
        "dataset": "synthetic",
        "per_device_train_batch_size": 8 if on_gpu else 2,
        "max_length": 2048 if on_gpu else 512,
    }
    is_set = config.model_fields_set
    return config.model_copy(update={k: v for k, v in defaults.items() if k not in is_set})


def _sizes(flag: str, text: str | None, size: int) -> tuple[int, ...]:
    return (size,) if text is None else parse_sizes(flag, text)


def _tolerance(config: RunConfig, on_gpu: bool) -> float:
    is_auto_bf16 = config.dtype == "auto" and on_gpu
    is_low_precision = config.bf16 or config.fp16 or is_auto_bf16 or "16" in config.dtype
    return _TOLERANCE_LOW_PRECISION if is_low_precision else _TOLERANCE_FP32
