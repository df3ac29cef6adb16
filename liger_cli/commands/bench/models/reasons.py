"""Reasons why a patched model gains nothing, in words: from sizes, device and coverage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liger_cli.common.numbers import format_bytes
from liger_cli.report import MIN_SPEED_NOISE, Arm, RatiosPart

__all__ = ["Facts", "no_gain"]

# Elements of the hidden states below which a kernel over them takes a GPU less time than the host
# needs to start it (5 us): 2 x 2 bytes each at 2 to 3 TB/s.
_HOST_BOUND_ELEMENTS = 2**21
# Logits, their fp32 copy and their gradient, in bytes for each element.
_LOGITS_BYTES = 10
_SMALL_SHARE = 0.1
_FUSED_LOSS = "fused_linear_cross_entropy"


@dataclass(frozen=True)
class Facts:
    """Facts of a step.

    Attributes:
        num_tokens: Of a forward pass.
        hidden_size, vocab_size: None where the configuration does not say.
        patched: Ops with at least one patched module.
        loss_reason: Why the loss is not fused, if it is not.
    """

    on_gpu: bool
    num_tokens: int
    hidden_size: int | None
    vocab_size: int | None
    patched: tuple[str, ...]
    loss_reason: str | None

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any] | None,
        *,
        on_gpu: bool,
        num_tokens: int,
        coverage: Mapping[str, Mapping[str, int]],
        modules: list[dict[str, str | None]],
    ) -> Facts:
        """Collect them from a model's configuration and what an arm reported."""
        text = (config or {}).get("text_config") or config or {}
        patched = tuple(op for op, counts in coverage.items() if counts["patched"])
        reasons = (row["reason"] for row in modules if row["op"] == _FUSED_LOSS)
        return cls(
            on_gpu=on_gpu,
            num_tokens=num_tokens,
            hidden_size=text.get("hidden_size") or text.get("n_embd"),
            vocab_size=text.get("vocab_size"),
            patched=patched,
            loss_reason=next((reason for reason in reasons if reason), None),
        )


def no_gain(ratios: RatiosPart, facts: Facts, other: Arm) -> list[str]:
    """Return a sentence for speed and one for memory where patched gains nothing over another.

    Where the noise is unknown nothing is judged, so there is nothing to explain.
    """
    sentences = []
    speed, noise = ratios.speed, ratios.noise
    if speed is not None and noise is not None and speed <= 1 + noise:
        if noise > MIN_SPEED_NOISE and speed >= 1 / (1 + noise):
            sentences.append(
                "the noise hides whether there is a gain in speed: more --steps, "
                "--repeats or a quieter machine can show it"
            )
        else:
            sentences.append(f"no speed is gained here, because {_why_not_faster(facts, other)}")
    memory, noise = ratios.memory, ratios.memory_noise
    if memory is not None and noise is not None and memory >= 1 - noise:
        sentences.append(f"no memory is saved here, because {_why_not_smaller(facts, other)}")
    return sentences


def _why_not_faster(facts: Facts, other: Arm) -> str:
    if not facts.on_gpu:
        return "on a CPU the ops are torch code; what is faster are their kernels on a GPU"
    if other.name in ("compile", "patched+compile"):
        return (
            "a compiled step starts fewer kernels, which counts where a GPU waits for the host; "
            "--torch-compile compiles the patched model too (patched+compile)"
        )
    if facts.hidden_size and facts.num_tokens * facts.hidden_size < _HOST_BOUND_ELEMENTS:
        return (
            f"{facts.num_tokens} tokens of {facts.hidden_size} elements are too few to keep a GPU "
            "busy: the host's time to start the kernels counts, whichever they are"
        )
    return f"what is patched ({', '.join(facts.patched)}) takes little of this step"


def _why_not_smaller(facts: Facts, other: Arm) -> str:
    if _FUSED_LOSS not in facts.patched:
        why = f" ({facts.loss_reason})" if facts.loss_reason else ""
        return f"the loss, where most can be saved, is not fused{why}"
    peak = other.peak_memory_bytes or 0
    logits = _LOGITS_BYTES * facts.num_tokens * (facts.vocab_size or 0)
    if logits < _SMALL_SHARE * peak:
        return (
            f"the logits that are not made are about {format_bytes(logits)} of a peak of "
            f"{format_bytes(peak)}"
        )
    return "the peak is not where the logits would be"
