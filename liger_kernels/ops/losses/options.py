"""The options of the losses: validated once, with the same messages for every loss."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from liger_kernels.ops.arguments import (
    FLOATING,
    INTEGERS,
    LABELS,
    LARGEST,
    Cap,
    Choice,
    Integer,
    Number,
    TensorArgument,
    as_float,
    describe,
)

# The label of tokens without a loss: the default of F.cross_entropy and of every transformers loss.
IGNORE_INDEX = -100

REDUCTIONS = ("mean", "sum", "none")
REDUCTION = Choice("reduction", REDUCTIONS)
# In the order of LossOptions.of and of the public functions.
_IGNORE_INDEX = Integer("ignore_index")
_LABEL_SMOOTHING = Number("label_smoothing", least=0.0, most=1.0, allowed="from 0 to 1")
_Z_LOSS, _SOFTCAP, _SCALE = Number("z_loss"), Cap("softcap"), Number("scale")
LOSS_OPTIONS = (_IGNORE_INDEX, _LABEL_SMOOTHING, _Z_LOSS, _SOFTCAP, _SCALE, REDUCTION)


@dataclass(frozen=True)
class LossOptions:
    """The options of one row's loss; the fields are the public functions' arguments."""

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
        """Validate the options and return them as floats: a kernel is compiled once for 1 and 1.0.

        Raises:
            ValueError: One is of another type, not finite (softcap=inf is no cap) or out of range.
        """
        return cls(
            _IGNORE_INDEX.of(ignore_index),
            _LABEL_SMOOTHING.of(label_smoothing),
            _Z_LOSS.of(z_loss),
            _SOFTCAP.of(softcap),
            _SCALE.of(scale),
        )

    def kernel_arguments(self) -> dict[str, Any]:
        """Return the arguments of the kernels of rows that these options are."""
        return {
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap or 1.0,
            "scale": self.scale,
            "IGNORE_INDEX": self.ignore_index,
            "HAS_SMOOTHING": self.label_smoothing != 0.0,
            "HAS_Z_LOSS": self.z_loss != 0.0,
            "HAS_SOFTCAP": self.softcap is not None,
            "HAS_SCALE": self.scale != 1.0,
        }


# Asked once: torch.compile of torch 2.11 does not trace the question.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)
)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype losses are computed and returned in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_autocast(device: torch.device) -> bool:
    """Return whether autocast knows the device: tensors without data have none."""
    return device.type in _AUTOCAST_DEVICES


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which products have the dtype of their arguments."""
    if has_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def label_argument(name: str) -> TensorArgument:
    """Return the row of a tensor of labels."""
    return TensorArgument(name, "(...)", "hold int32 or int64 labels", LABELS, is_moved=True)


def class_weight_argument(name: str) -> TensorArgument:
    """Return the row of class weights."""
    return TensorArgument(name, "(V,)", is_optional=True, is_moved=True, is_constant=True)


def check_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ValueError unless weight is (V, H), hidden (..., H) and bias (V,) or None."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            "weight must be floating (V, H) with sizes of 1 at least, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    vocab, width = weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != width:
        raise ValueError(
            f"hidden must be floating (..., {width}) as weight's width, "
            f"got {hidden.dtype} {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias must be floating ({vocab},), got {bias.dtype} {tuple(bias.shape)}")


def check_class_weight(class_weight: torch.Tensor | None, vocab: int, name: str) -> None:
    """Raise ValueError unless class_weight has a weight for each class and is a constant."""
    if class_weight is None:
        return
    if class_weight.shape != (vocab,):
        given = f"{class_weight.dtype} {tuple(class_weight.shape)}"
        raise ValueError(f"{name} must be floating ({vocab},), got {given}")
    if class_weight.requires_grad:
        raise ValueError(f"{name} must not require grad: it gets no gradient")


def check_target(
    target: torch.Tensor, shape: torch.Size, vocab: int, ignore_index: int | None, name: str
) -> None:
    """Raise ValueError unless target has a label for each row; only a CPU's values are read."""
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


@dataclass(frozen=True)
class Normalizer:
    """The divisor of a sum of losses: a number, a tensor with one, or None for the count."""

    name: str = "normalizer"

    def of(self, value: Any) -> Any:
        """Return the value, a number as a float; a tensor's own number is not read.

        Raises:
            ValueError: It is of another type, negative or not finite, or a tensor of several
                numbers, of another dtype, or one that requires grad.
        """
        if value is None:
            return None
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ValueError(f"{self.name} must be one number, got {tuple(value.shape)}")
            if value.dtype not in (*FLOATING, *INTEGERS):
                raise ValueError(f"{self.name} must be floating or an integer, got {value.dtype}")
            if value.requires_grad:
                raise ValueError(f"{self.name} must not require grad: it gets no gradient")
            return value
        number = as_float(value)
        if number is None:
            must = "must be a number or a 0-dim tensor"
        elif number < 0.0:
            must = "must not be negative"
        elif number <= LARGEST:
            return number
        else:
            must = "must be finite"
        raise ValueError(f"{self.name} {must}, got {describe(value)}")


NORMALIZER = Normalizer()


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
        if total.is_meta and not label.is_meta:
            raise ValueError(f"normalizer must hold a number, got a tensor on {total.device}")
        if total.device.type == "cpu" != label.device.type and not torch.compiler.is_compiling():
            # A fill: a copy of one number from the host would wait.
            total = torch.full((), total.item(), device=label.device)
        total = total.to(label.device, non_blocking=True)
    elif normalizer is not None:
        total = torch.full((), float(normalizer), dtype=dtype, device=label.device)
    else:
        valid: Any = label != ignore_index
        if class_weight is None:
            total = valid.sum()
        else:
            # Labels out of range must not become addresses; their loss is NaN already.
            vocab = class_weight.shape[0]
            column = label.masked_fill((label < 0) | (label >= vocab), 0).long()
            total = (class_weight[column] * valid).sum()
    total = total.to(dtype)
    return total.masked_fill(total == 0, 1.0).reciprocal()
