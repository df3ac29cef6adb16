"""What the losses take besides tensors: checked once, the same words for every loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossOptions:
    """What is computed of a row; the fields are the public functions' arguments."""

    # None: every label counts.
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(
        cls,
        ignore_index: int | None,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        scale: float,
    ) -> LossOptions:
        """Return the options with whole numbers as floats: a kernel is compiled once for both."""
        cap = None if softcap is None else float(softcap)
        return cls(ignore_index, float(label_smoothing), float(z_loss), cap, float(scale))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype losses are computed and returned in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_options(
    options: LossOptions, reduction: str, vocab: int, class_weight: torch.Tensor | None, name: str
) -> None:
    """Raise ValueError for an option that is off; `name` is what class_weight is called."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if isinstance(options.ignore_index, bool) or not isinstance(options.ignore_index, int):
        raise ValueError(f"ignore_index must be an int, got {options.ignore_index!r}")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {options.label_smoothing}")
    if options.softcap is not None and not options.softcap > 0.0:
        raise ValueError(f"softcap must be None or positive, got {options.softcap}")
    if class_weight is None:
        return
    if class_weight.shape != (vocab,) or not class_weight.is_floating_point():
        given = f"{class_weight.dtype} {tuple(class_weight.shape)}"
        raise ValueError(f"{name} must be floating ({vocab},), got {given}")
    if class_weight.requires_grad:
        raise ValueError(f"{name} must not require grad: it gets no gradient")


def check_target(
    target: torch.Tensor, shape: torch.Size, vocab: int, ignore_index: int | None, name: str
) -> None:
    """Raise ValueError unless target has a label for each row; only a CPU's values are read."""
    if target.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must hold int32 or int64 labels, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(target.shape)}")
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    is_wrong = (target < 0) | (target >= vocab)
    if ignore_index is not None:
        is_wrong &= target != ignore_index
    if is_wrong.any():
        other = "" if ignore_index is None else f" or are ignore_index={ignore_index}"
        first = target[is_wrong][0].item()
        raise ValueError(f"{name} holds {first}; labels go from 0 to {vocab - 1}{other}")


def check_normalizer(normalizer: int | float | torch.Tensor | None, reduction: str) -> None:
    """Raise ValueError unless normalizer is one number, not negative, for a mean."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer is for reduction='mean', got reduction={reduction!r}")
    if isinstance(normalizer, torch.Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be one number, got {tuple(normalizer.shape)}")
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise ValueError(f"normalizer must be a number or a 0-dim tensor, got {normalizer!r}")
    elif not normalizer >= 0:
        raise ValueError(f"normalizer must not be negative, got {normalizer}")


def inverse_of_mean(
    label: torch.Tensor,
    ignore_index: int | None,
    class_weight: torch.Tensor | None,
    dtype: torch.dtype,
    normalizer: int | float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Return 1 / what a mean divides by as a 0-dim tensor, without a wait.

    That is the normalizer, the sum of the labels' class weights, or their number; 1 instead of 0,
    so that a batch without labels has a loss of 0.
    """
    if isinstance(normalizer, torch.Tensor):
        total = normalizer.detach().reshape(())
        if total.device.type == "cpu" != label.device.type and not torch.compiler.is_compiling():
            # A fill: a copy of one number from the host would wait.
            total = torch.full((), total.item(), device=label.device)
        total = total.to(label.device, non_blocking=True)
    elif normalizer is not None:
        total = torch.full((), float(normalizer), dtype=dtype, device=label.device)
    else:
        valid = label != ignore_index
        if class_weight is None:
            total = valid.sum()
        else:
            # Labels out of range must not become addresses; their loss is NaN already.
            vocab = class_weight.shape[0]
            column = label.masked_fill((label < 0) | (label >= vocab), 0).long()
            total = (class_weight[column] * valid).sum()
    total = total.to(dtype)
    return total.masked_fill(total == 0, 1.0).reciprocal()
