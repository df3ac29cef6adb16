"""The rows of a forward pass, and the memory that a training step of them takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CHECKPOINT_COPY", "Batch", "MemoryEstimate"]

CHECKPOINT_COPY = "copy for a checkpoint"


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass.

    Attributes:
        label_share: Of the tokens those that have a label.
        is_padded: Whether rows have several lengths: transformers then makes a mask of attention.
        is_packed: Whether a row holds several documents, which position_ids separate.
        is_flat: Whether the rows lie end to end in one.
        has_lengths: Whether that one says where documents begin.
    """

    size: int
    length: int
    label_share: float = 1.0
    is_padded: bool = False
    is_packed: bool = False
    is_flat: bool = False
    has_lengths: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step on one rank by part; the parts are not all there at once.

    Attributes:
        weights: What the device holds from step to step; so are optimizer and gradients.
        reference: The weights that dpo, kto or distill compares with, where they are in memory.
        optimizer: What it holds from step to step.
        gradients: Of all trained parameters.
        activations: What forward keeps for backward, by kind of layer.
        logits: The most that logits, their copies and their gradients take together.
        head_buffers: The gradient of the head, as the fused loss makes it in forward.
        kept_for_loss: What forward keeps of logits, their loss and these buffers.
        of_ranks: The most that is there for the other ranks: gathered weights, gradients to sum.
        offloaded: What is in the memory of the host instead of the device's.
        inputs_on_host: Inputs of layers that are there, and those that stay on the device since it
            is full.
        at_peak: What is there at the moment when most is, by part.
        phases: The most that is there in the optimizer's step, in forward and in backward.
        checkpoint_copy: What async_save copies into the memory of the host; on a CPU it is in
            at_peak and phases as well. Of copies of the model rank 0 alone makes one.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: Mapping[str, int]
    logits: int
    head_buffers: int
    kept_for_loss: int
    of_ranks: Mapping[str, int]
    offloaded: Mapping[str, int]
    at_peak: Mapping[str, int]
    phases: Mapping[str, int]
    reference: int = 0
    checkpoint_copy: int = 0
    inputs_on_host: tuple[int, int] = (0, 0)

    @property
    def peak(self) -> int:
        return max(self.phases.values())
