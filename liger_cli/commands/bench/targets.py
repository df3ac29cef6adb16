"""The workloads of `liger bench ops`: the shapes of every op, and its targets on an H100.

A share is the least bytes of an op over its GPU time and the copy rate of the same run, or its
FLOPs over its GPU time and the matmul rate. Speeds are ratios of wall time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from liger_cli.commands.bench.timing import Part
from liger_cli.errors import ConfigError
from liger_kernels.nearest import nearest_name
from liger_kernels.ops.op import Case, Op, Sample
from liger_kernels.ops.registry import OPS, find_op

__all__ = ["Measure", "Target", "Variant", "Workload", "select"]

# share, forward share: at least, of the limit of the hardware. speed: at least, times `against`.
# memory: bytes at most. memory share, host share: at most, of `against`. time share: at most, of
# the same shape without its variant.
Measure = Literal[
    "share", "forward share", "speed", "memory", "memory share", "time share", "host share"
]
# The fused loss where not every label counts and where the head is not trained, log-probabilities
# without any gradient, and the time the host needs to start an op that is too small to matter to
# the GPU.
Variant = Literal["", "40 % of labels", "frozen head", "no gradient", "host time"]

MIB = 2**20
PEER = "liger-kernel"
TRL = "trl"
_VALID = 0.4
LOGPROBS = "fused_linear_logprobs"
DIVERGENCE = "fused_linear_divergence"
# Share of the products that are left, by op and variant: of the loss's three those without the
# weight's; of the eight units of log-probabilities six, and the forward's two.
_LEFT = {
    ("fused_linear_cross_entropy", "40 % of labels"): _VALID,
    ("fused_linear_cross_entropy", "frozen head"): 2 / 3,
    (LOGPROBS, "frozen head"): 6 / 8,
    (LOGPROBS, "no gradient"): 2 / 8,
}


@dataclass(frozen=True)
class Target:
    """A bound on one figure; `against` names the arm of a ratio."""

    measure: Measure
    limit: float
    against: str = ""

    @property
    def is_floor(self) -> bool:
        return self.measure in ("share", "forward share", "speed")


@dataclass(frozen=True)
class Workload:
    """One op on one shape."""

    op: str
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: Variant = ""
    targets: tuple[Target, ...] = ()

    @property
    def definition(self) -> Op:
        return OPS[self.op]

    @property
    def case(self) -> Case:
        ignored = {"ignored": 1 - _VALID} if self.variant == "40 % of labels" else {}
        return Case(self.shape_text, self.shape, {**self.options, **ignored})

    @property
    def shape_text(self) -> str:
        if self.op == "rope":
            return "{}x{}x{}/{}x{}".format(*self.shape)
        return "x".join(map(str, self.shape))

    @property
    def has_all_arms(self) -> bool:
        """Whether it is compared with torch too: a variant of a loss is only with its peers."""
        return self.variant in ("", "host time") or self.op == LOGPROBS

    @property
    def parts(self) -> tuple[Part, ...]:
        """The timed parts; the fused loss makes its gradients in forward, so one part is enough."""
        return ("forward", "full") if self.variant in ("", "host time") else ("full",)

    def sample(self, dtype: torch.dtype, device: torch.device) -> Sample:
        """Return the same arguments at every call, drawn on the device: a CPU takes minutes."""
        generator = torch.Generator(device).manual_seed(0)
        with torch.device(device):
            sample = self.definition.sample(self.case, dtype, device, generator)
        if self.variant == "frozen head":
            hidden, weight, *rest = sample.args
            sample = replace(sample, args=(hidden, weight.detach(), *rest))
        elif self.variant == "no gradient":
            sample = replace(sample, args=tuple(x.detach() for x in sample.args))
        return sample

    def least_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Return the bytes that a forward, and a forward with its backward, cannot do without."""
        forward, backward = self.definition.num_bytes(self.case, dtype)
        if self.op == "cross_entropy":
            # One read and one write, in forward, where the gradient is made: backward reads the
            # logits again only where it is not.
            return backward, backward
        return forward, forward + backward

    def num_flops(self) -> float:
        """Return the FLOPs of the matrix products of a forward and backward; 0 without any."""
        flops = self.definition.num_flops(self.case)
        return flops * _LEFT.get((self.op, self.variant), 1.0)


def _speed(limit: float, against: str = PEER) -> Target:
    return Target("speed", limit, against)


def _glu(op: str, *shape: int) -> Workload:
    # The output and two gradients, in bf16.
    size = 3 * 2 * shape[0] * shape[1]
    targets = (Target("forward share", 0.97), Target("share", 0.97), Target("memory", size))
    return Workload(op, shape, targets=targets)


def _loss(rows: int, vocab: int, share: float) -> Workload:
    targets = (Target("share", share), _speed(1.3))
    return Workload("cross_entropy", (rows, vocab), {"ignored": 0.0}, targets=targets)


def _fused_losses(tokens: int, width: int, vocab: int, speed: float) -> tuple[Workload, ...]:
    share = 0.90 if width >= 4096 else 0.86
    spare = 1024 if vocab >= 256_000 else 600
    full = Workload(
        "fused_linear_cross_entropy",
        (tokens, width, vocab),
        {"ignored": 0.0},
        targets=(
            Target("share", share),
            # The weight gradient, in bf16, and what it takes to make it.
            Target("memory", 2 * vocab * width + spare * MIB),
            _speed(speed),
            _speed(1.0, "torch.compile"),
            # About half.
            Target("memory share", 0.55, "torch.compile"),
        ),
    )
    frozen = (Target("share", 0.88), Target("memory", 300 * MIB))
    return (
        full,
        replace(full, variant="40 % of labels", targets=(Target("time share", 0.45),)),
        replace(full, variant="frozen head", targets=frozen),
    )


def _logprobs(tokens: int, width: int, vocab: int) -> tuple[Workload, ...]:
    def of(variant: Variant, gradient: int) -> Workload:
        targets = (
            Target("share", 0.88),
            Target("memory", gradient + 600 * MIB),
            _speed(1.2, TRL),
            _speed(1.0, "torch.compile"),
        )
        options = {"outputs": ("logprob",)}
        return Workload(LOGPROBS, (tokens, width, vocab), options, variant, targets)

    return of("", 2 * vocab * width), of("frozen head", 0), of("no gradient", 0)


def _norms() -> Iterable[Workload]:
    for shape in ((16384, 2048), (16384, 4096), (8192, 8192)):
        own = 1.0 if shape == (16384, 2048) else 1.3
        targets = (Target("share", 0.85), _speed(1.3), _speed(own, "torch"))
        yield Workload("rms_norm", shape, targets=targets)
        targets = (Target("share", 0.80), _speed(1.5, "torch"), _speed(3.0))
        yield Workload("layer_norm", shape, targets=targets)
        yield Workload("fused_add_rms_norm", shape)
    yield Workload("rms_norm", (262144, 128), targets=(Target("share", 0.70),))
    host = (Target("host share", 0.5, PEER),)
    for op in ("rms_norm", "layer_norm"):
        yield Workload(op, (64, 1024), variant="host time", targets=host)


_ROPE = (Target("share", 0.80), _speed(1.5), _speed(2.0, "torch.compile"))

# Of experts: routers give their weights in fp32.
_ROUTED = {"weights_dtype": torch.float32}
_EXPERTS = (
    (16384, 2048, 768, 128, 8),
    (16384, 4096, 14336, 8, 2),
    (16384, 2048, 1024, 64, 8),
    (2048, 2048, 768, 128, 8),
)
_GPT_OSS = {
    "activation": "gpt_oss",
    "is_interleaved": True,
    "is_transposed": True,
    "has_bias": True,
}

_DIVERGENCE_TARGETS = (Target("share", 0.85), _speed(1.3, TRL))

# q and k of rope are transposed views of what a projection gives, as attention makes them.
_ON_GPU = (
    *_norms(),
    Workload("rope", (4, 4096, 32, 8, 128), targets=_ROPE),
    Workload("rope", (8, 2048, 32, 8, 64), targets=_ROPE),
    *(_glu(op, *s) for op in ("swiglu", "geglu") for s in ((16384, 8192), (8192, 14336))),
    Workload("glu_mlp", (8192, 2048, 8192)),
    Workload("glu_mlp", (8192, 4096, 14336)),
    # Tokens, width, inner width, experts, choices: qwen3-30b-a3b, mixtral, olmoe, few tokens an
    # expert, and gpt-oss-20b.
    *(Workload("moe_experts", shape, _ROUTED) for shape in _EXPERTS),
    Workload("moe_experts", (16384, 2880, 2880, 32, 4), {**_ROUTED, **_GPT_OSS}),
    # Rows, width of x, width of y, rank.
    Workload("lora_linear", (8192, 4096, 4096, 16), {"scale": 2.0}),
    Workload("lora_linear", (8192, 4096, 14336, 16), {"scale": 2.0}),
    Workload("lora_linear", (8192, 14336, 4096, 64), {"scale": 2.0}),
    _loss(16384, 32000, 0.86),
    _loss(8192, 128256, 0.78),
    _loss(4096, 262144, 0.65),
    *_fused_losses(8192, 4096, 128256, 1.7),
    *_fused_losses(4096, 4096, 128256, 3.0),
    *_fused_losses(16384, 2048, 128256, 1.2),
    *_fused_losses(8192, 2304, 256000, 3.0),
    *_fused_losses(4096, 4096, 32000, 1.3),
    *_logprobs(8192, 4096, 128256),
    *_logprobs(4096, 2048, 151936),
    Workload("divergence", (8192, 128256)),
    # Tokens, width of the student and of the teacher, vocabulary.
    *(
        Workload(DIVERGENCE, shape, {"reduction": "mean"}, targets=_DIVERGENCE_TARGETS)
        for shape in ((8192, 4096, 4096, 128256), (8192, 2048, 4096, 128256))
    ),
)

# What a CPU does in seconds. They show that the ops work and cost nothing, not how fast a GPU is.
_SMALL = (
    ("rms_norm", (512, 1024)),
    ("rms_norm", (8192, 64)),
    ("fused_add_rms_norm", (512, 1024)),
    ("layer_norm", (512, 1024)),
    ("gated_rms_norm", (512, 1024)),
    ("rope", (2, 256, 8, 2, 64)),
    ("swiglu", (512, 2048)),
    ("geglu", (512, 2048)),
    ("glu_mlp", (256, 256, 1024)),
    ("moe_experts", (256, 128, 64, 8, 2)),
    ("lora_linear", (256, 256, 1024, 16)),
    ("cross_entropy", (256, 8192)),
    ("fused_linear_cross_entropy", (256, 256, 8192)),
    ("fused_linear_logprobs", (256, 256, 8192)),
    ("divergence", (256, 8192)),
    ("fused_linear_divergence", (256, 128, 256, 8192)),
)


def _on_cpu() -> Iterable[Workload]:
    for op, shape in _SMALL:
        options = {"ignored": 0.0} if op.endswith("cross_entropy") else {}
        workload = Workload(op, shape, options)
        yield workload
        if op == "fused_linear_cross_entropy":
            yield replace(workload, variant="40 % of labels")
            yield replace(workload, variant="frozen head")
    for op in ("rms_norm", "layer_norm"):
        yield Workload(op, (64, 1024), variant="host time")


def _all(is_gpu: bool) -> list[Workload]:
    """Return every workload in the registry's order; an op without a line has a registered case."""
    listed = _ON_GPU if is_gpu else tuple(_on_cpu())
    found = []
    for name, op in OPS.items():
        own = [workload for workload in listed if workload.op == name]
        cases = [case for case in op.cases if case.needs_gpu == is_gpu] or list(op.cases)
        case = max(cases, key=lambda case: torch.Size(case.shape).numel())
        found += own or [Workload(name, case.shape, case.options)]
    return found


def select(
    ops: str | None, shapes: str | None, *, is_gpu: bool, is_quick: bool = False
) -> list[Workload]:
    """Return the workloads of a run.

    Args:
        ops: Names with commas between them, full or short; None for every op.
        shapes: Shapes as the tables show them, with commas between them; None for all.
        is_gpu: Whether the full shapes fit the device, rather than small ones.
        is_quick: The first shape of each op alone, after the other choices.

    Raises:
        ConfigError: An op or a shape is unknown.
    """
    workloads = _all(is_gpu)
    if ops is not None:
        try:
            names = {find_op(name).name for name in ops.split(",")}
        except ValueError as error:
            raise ConfigError(f"--ops: {error}") from None
        workloads = [workload for workload in workloads if workload.op in names]
    if shapes is not None:
        wanted = [shape.strip() for shape in shapes.split(",")]
        _check_shapes(wanted, [workload.shape_text for workload in workloads])
        workloads = [workload for workload in workloads if workload.shape_text in wanted]
    if is_quick:
        workloads = list({workload.op: workload for workload in reversed(workloads)}.values())[::-1]
    return workloads


def _check_shapes(wanted: Sequence[str], known: Sequence[str]) -> None:
    for shape in wanted:
        if shape not in known:
            near = nearest_name(shape, known)
            hint = f"; did you mean {near}?" if near else "."
            names = ", ".join(dict.fromkeys(known))
            raise ConfigError(
                f"--shapes: none of these ops is measured on {shape!r}{hint} Shapes: {names}"
            )
