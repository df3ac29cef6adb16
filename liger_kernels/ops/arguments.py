"""Arguments of the public functions: each op's row lists them, and one check serves all ops.

A row of TensorArgument or of an option is both the check that runs in every call and the table that
the property tests go through, so that a new op is tested by its row alone.
"""

from __future__ import annotations

import numbers
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

# Dtypes of the values that ops compute with, and of labels.
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.int64, torch.int32)
INTEGERS = (*LABELS, torch.int16, torch.int8, torch.uint8)
# The largest fp32 number, and the smallest normal one: kernels take options as fp32.
LARGEST = 3.4028234663852886e38
SMALLEST = 2.0**-126
_INT64 = 2**63


@dataclass(frozen=True)
class TensorArgument:
    """A tensor that an op takes."""

    name: str
    # Sizes in the words of the docstring, "(..., N)"; "..." says that any rank from 1 will do.
    shape: str
    # What completes "<name> must ..." in an error.
    must: str = ""
    dtypes: tuple[torch.dtype, ...] = FLOATING
    is_optional: bool = False
    # It may lie on another device than the other tensors and is moved to theirs.
    is_moved: bool = False
    # It gets no gradient.
    is_constant: bool = False
    # All such tensors of an op have one dtype.
    shares_dtype: bool = False

    def error(self, value: Any) -> ValueError:
        """Return the error for a value that is no tensor or has another dtype or layout."""
        must = f"{self.name} must {self.must or 'be floating ' + self.shape}"
        if not isinstance(value, torch.Tensor):
            other = " or None" if self.is_optional else ""
            return ValueError(f"{must}{other}, got {describe(value)}")
        found = f"got {value.dtype} {tuple(value.shape)}"
        if value.dtype not in self.dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            advice = f"convert it first, for example with .to({self.dtypes[0]})"
            return ValueError(f"{must}, {found}; its dtype may be {allowed}: {advice}")
        if value.layout is not torch.strided:
            return ValueError(f"{must}, {found} of layout {value.layout}; use .to_dense()")
        return ValueError(f"{must}, {found} with a lazy minus sign; use .resolve_neg()")


def check_tensors(rows: tuple[TensorArgument, ...], *values: Any) -> None:
    """Validate type, dtype, layout and device of the tensors of one call.

    Args:
        rows: One row a value; the first that is not moved is on the device of all.
        values: As the caller gave them.

    Raises:
        ValueError: A value is no tensor, of a dtype that its row does not list, not dense, a lazily
            negated view, or on another device.
    """
    first, device = rows[0], None
    is_traced = torch.compiler.is_compiling()
    for row, value in zip(rows, values, strict=True):
        if value is None and row.is_optional:
            continue
        if (
            not isinstance(value, torch.Tensor)
            or value.dtype not in row.dtypes
            or value.layout is not torch.strided
            # A kernel reads memory, where the sign is not.
            or (not is_traced and value.is_neg())
        ):
            raise row.error(value)
        if device is None:
            first, device = row, value.device
        elif value.device != device and (
            not row.is_moved or "meta" in (value.device.type, device.type)
        ):
            where = f"on {device} as {first.name} is"
            raise ValueError(f"{row.name} must be {where}, got a tensor on {value.device}")


def describe(value: Any) -> str:
    """Return a value in the words of an error: a tensor by its dtype and shape, the rest short."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {value.dtype} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


@dataclass(frozen=True)
class Number:
    """A finite number that an op takes, as a kernel does: in fp32."""

    name: str
    least: float = -LARGEST
    most: float = LARGEST
    # What completes "<name> must be ..." in an error.
    allowed: str = "a finite number"

    def of(self, value: Any) -> float:
        """Return the value as a float.

        Args:
            value: A Python or NumPy number, or a tensor with one that requires no grad.

        Raises:
            ValueError: It is of another type, NaN, or out of range.
        """
        given = value
        if type(value) is not float:
            value = as_float(value)
        # NaN compares false with everything.
        if value is None or not self.least <= value <= self.most:
            is_wide = value is not None and not abs(value) <= LARGEST
            hint = ": it must be finite in fp32" if is_wide else ""
            raise ValueError(f"{self.name} must be {self.allowed}, got {describe(given)}{hint}")
        return value


def as_float(value: Any) -> float | None:
    """Return a number of any type as a float, or None for what is no number."""
    if isinstance(value, torch.Tensor):
        is_number = value.numel() == 1 and not value.requires_grad and not value.is_complex()
        return float(value) if is_number and value.dtype != torch.bool else None
    if isinstance(value, bool) or not isinstance(
        value, (int, float, numbers.Real, torch.SymInt, torch.SymFloat)
    ):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


@dataclass(frozen=True)
class Cap:
    """A softcap: None or infinity for no cap, else a positive number."""

    name: str

    def of(self, value: Any) -> float | None:
        """Return the cap as a float, None where there is none.

        Raises:
            ValueError: It is no number, NaN, or not positive.
        """
        if value is None:
            return None
        cap = value if type(value) is float else as_float(value)
        if cap == float("inf"):
            return None
        if cap is None or not SMALLEST <= cap <= LARGEST:
            raise ValueError(f"{self.name} must be None or positive, got {describe(value)}")
        return cap


@dataclass(frozen=True)
class Integer:
    """A whole number that an op takes."""

    name: str
    allowed: str = "an int"
    is_optional: bool = False

    def of(self, value: Any) -> Any:
        """Return the value as an int; range checks that need a size are the op's.

        Raises:
            ValueError: It is no whole number of 64 bits.
        """
        if type(value) is int and -_INT64 <= value < _INT64:
            return value
        if value is None and self.is_optional:
            return None
        is_whole = isinstance(value, (numbers.Integral, torch.SymInt))
        if isinstance(value, bool) or not is_whole or not -_INT64 <= value < _INT64:
            raise ValueError(f"{self.name} must be {self.allowed}, got {describe(value)}")
        return value if isinstance(value, torch.SymInt) else int(value)


@dataclass(frozen=True)
class Choice:
    """One of a few words that an op takes."""

    name: str
    choices: Collection[str]
    # Other spellings that are accepted, and the choice each one means.
    aliases: Mapping[str, str] = field(default_factory=dict)

    def of(self, value: Any) -> Any:
        """Return the choice.

        Raises:
            ValueError: It is none of the choices or aliases.
        """
        if not isinstance(value, str) or value not in self.choices:
            if isinstance(value, str) and value in self.aliases:
                return self.aliases[value]
            allowed = ", ".join(self.choices)
            raise ValueError(f"{self.name} must be one of {allowed}, got {describe(value)}")
        return value


@dataclass(frozen=True)
class Choices:
    """Several of a few words that an op takes, each once, in the order that is asked for."""

    name: str
    choices: Collection[str]

    def of(self, value: Any) -> tuple[str, ...]:
        """Return the choices as a tuple.

        Raises:
            ValueError: It is no list or tuple, is empty, or holds another word or one twice.
        """
        found = tuple(value) if isinstance(value, (list, tuple)) else ()
        is_known = all(isinstance(word, str) and word in self.choices for word in found)
        if not found or not is_known or len(set(found)) < len(found):
            allowed = ", ".join(self.choices)
            raise ValueError(f"{self.name} must be some of {allowed}, got {describe(value)}")
        return found


@dataclass(frozen=True)
class Flag:
    """A switch that an op takes."""

    name: str

    def of(self, value: Any) -> bool:
        """Return the value.

        Raises:
            ValueError: It is neither True nor False: a tensor or a word would be true.
        """
        if value is not True and value is not False:
            raise ValueError(f"{self.name} must be True or False, got {describe(value)}")
        return value


@dataclass(frozen=True)
class Instance:
    """An object of one class that an op takes, or None."""

    name: str
    type: type
    source: str

    def of(self, value: Any) -> Any:
        """Return the value.

        Raises:
            ValueError: It is of another class.
        """
        if value is not None and not isinstance(value, self.type):
            must = f"None or a {self.type.__name__} from {self.source}"
            raise ValueError(f"{self.name} must be {must}, got {describe(value)}")
        return value


class Option(Protocol):
    """An option of an op: Number, Cap, Integer, Choice, Choices, Flag, Instance, or similar."""

    @property
    def name(self) -> str:
        """Return the name of the parameter."""

    def of(self, value: Any) -> Any:
        """Validate a value and return it in the type that kernels take."""


# The options that several ops share.
EPS = Number("eps", least=0.0, allowed="a finite number, not negative")
