"""A stand-in for a GPU, so that a step of a model can run on tensors without data.

The step is the real one: the model's own forward, autograd's backward, the optimizer's step. What
asks for a device, or reads a tensor, gets here what a GPU would give: kernels are launched by
nothing, attention keeps what its kernels keep, and a number that the host reads is a plausible one.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import import_utils

from liger_cli.training.memory.attention import attention_on_gpu, flex_on_gpu, varlen_on_gpu
from liger_kernels.ops import backend, launcher
from liger_kernels.ops.losses import chunk_size, label_count, linear_loss
from liger_kernels.ops.rows import pieces_of
from liger_kernels.transformers.attention import interface, kernel, masks
from liger_kernels.transformers.replacements import calls, tiles

__all__ = ["BACKWARD", "Answers", "assumed_gpu", "gpu_stand_in", "plain_tensors"]

# The part of what autograd makes on its own, between the backward of one operation and the next.
BACKWARD = "backward"
# Multiprocessors of an H100, by which chunks of the fused loss are cut.
_NUM_SMS = 132
_GPU = torch.device("cuda")
_ATEN = torch.ops.aten


class Answers:
    """Answer operations whose result depends on data.

    Args:
        num_labels: What the host reads where it reads a count.
        num_experts: Each gets as many tokens, and each in its turn is the one that is read.
        is_masked: Whether rows are padded or hold several documents: then what is asked of all
            places is not true.
    """

    def __init__(self, num_labels: int, num_experts: int, *, is_masked: bool) -> None:
        self._num_labels = num_labels
        self._num_experts = num_experts
        self._experts = itertools.cycle(range(num_experts))
        self._is_masked = is_masked

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], part: str
    ) -> Any:
        """Return a result, or NotImplemented where the operation needs no data."""
        packet = func.overloadpacket
        if packet is _ATEN.any:
            # Errors are looked for in this way, and there are none.
            result = func(*args, **kwargs)
            result.is_false = True
            return result
        if packet is _ATEN._local_scalar_dense:
            return self._number(args[0])
        if packet is _ATEN.equal:
            return True
        if packet is _ATEN.nonzero:
            (x,) = args
            # Of one dimension it is asked for experts that have tokens, of more for the tokens.
            num_parts = self._num_experts if x.dim() > 1 else 1
            return x.new_empty((max(1, x.numel() // num_parts), x.dim()), dtype=torch.int64)
        if packet is _ATEN.index and any(_is_mask(index) for index in args[1]):
            return func(args[0], [place for index in args[1] for place in _places(index)])
        if packet is _ATEN._grouped_mm:
            # torch's own shapes are for bfloat16 alone; kernels take the other dtypes too.
            return args[0].new_empty(_grouped_shape(*args[:3], **kwargs))
        if packet is _ATEN.add and part == BACKWARD and _is_sum_of_equals(args):
            # Autograd adds a gradient to another in place, but not where they hold no data. What is
            # computed again has a graph.
            return NotImplemented if torch.is_grad_enabled() else args[0]
        return NotImplemented

    def _number(self, x: Tensor) -> bool | int | float:
        if x.dtype == torch.bool:
            return not (self._is_masked or getattr(x, "is_false", False))
        if x.dtype.is_floating_point:
            return 1.0
        # A count has no dimension, the index of an expert comes out of a list of them.
        return next(self._experts) if x.dim() else self._num_labels


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Return the indices of a mask's places, a tensor a dimension; other indices as they are."""
    if index is None or not _is_mask(index):
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]


def _grouped_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, **_: Any) -> tuple[int, ...]:
    """Return the shape of products of groups: of rows of a, columns of b, or the inner sum."""
    if a.dim() == b.dim() == 2:
        assert offs is not None
        return offs.shape[0], a.shape[0], b.shape[1]
    leading = () if a.dim() < b.dim() or b.dim() < a.dim() else a.shape[:1]
    return *leading, a.shape[-2], b.shape[-1]


def _is_sum_of_equals(args: tuple[Any, ...]) -> bool:
    a, b = args[:2]
    return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


@contextlib.contextmanager
def _patch(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a module or class another value; one that is inherited is so again."""
    assert hasattr(owner, name), name
    is_own = name in vars(owner)
    usual = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, usual)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Let the patched forwards, and transformers, take tensors without data for plain ones."""
    loaded = [name for name in sys.modules if name.startswith("liger_kernels.transformers")]
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        for module in (sys.modules[name] for name in loaded):
            if getattr(module, "Tensor", None) is Tensor:
                enter(_patch(module, "Tensor", FakeTensor))
        enter(_patch(calls, "_PLAIN_TYPES", (*calls._PLAIN_TYPES, FakeTensor)))
        enter(_patch(FakeTensor, "data_ptr", _address))
        for module in (tiles, linear_loss):
            enter(_patch(module, "pieces_of", _few_pieces))
        if hasattr(import_utils, "is_fake_tensor"):
            # It makes every mask where it thinks that it cannot read one.
            enter(_patch(import_utils, "is_fake_tensor", lambda x: False))
        yield


def _few_pieces(num_rows: int, size: int) -> list[slice]:
    """Return the first, the second, which finds sums of the first, and the last: all are alike."""
    pieces = pieces_of(num_rows, size)
    return pieces if len(pieces) <= 3 else [*pieces[:2], pieces[-1]]


@contextlib.contextmanager
def gpu_stand_in(num_labels: int) -> Iterator[None]:
    """Let tensors on the CPU go the ways of a GPU's.

    Args:
        num_labels: How many labels the fused loss finds.
    """
    count, chunk_tokens = label_count.LabelCount, chunk_size.chunk_tokens
    sum_dtype = chunk_size.accumulator_dtype

    def chunk_on_gpu(
        num_rows: int,
        width: int,
        vocab: int,
        dtype: torch.dtype,
        device: torch.device,
        needs_weight: bool,
    ) -> int:
        return chunk_tokens(num_rows, width, vocab, dtype, _GPU, needs_weight, _NUM_SMS)

    def sum_dtype_on_gpu(
        compute: torch.dtype, final: torch.dtype, num_chunks: int, device: torch.device
    ) -> torch.dtype:
        return sum_dtype(compute, final, num_chunks, _GPU)

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(assumed_gpu())
        enter(_patch(kernel, "_call", varlen_on_gpu))
        enter(_patch(interface, "flex_attention", flex_on_gpu))
        enter(_patch(masks.DeferredMask, "make", _mask_on_gpu(masks.DeferredMask.make)))
        enter(_patch(F, "scaled_dot_product_attention", attention_on_gpu))
        enter(_patch(backend, "backend", lambda device: "triton"))
        enter(_patch(launcher.Launch, "__call__", lambda self, *tensors: None))
        enter(_patch(count, "wait", lambda self: num_labels))
        enter(_patch(count, "is_here", lambda self: True))
        enter(_patch(linear_loss, "chunk_tokens", chunk_on_gpu))
        enter(_patch(linear_loss, "accumulator_dtype", sum_dtype_on_gpu))
        # On a GPU it adds in place, whatever the dtypes.
        enter(_patch(linear_loss, "add_product", lambda *args, **options: None))
        yield


@contextlib.contextmanager
def assumed_gpu() -> Iterator[None]:
    """Let the choice of attention be that of a data center GPU."""

    def head_problem(device: torch.device, size: int) -> str | None:
        limit = kernel.MAX_HEAD_SIZE
        return f"it takes heads of at most {limit}, not {size}" if size > limit else None

    with (
        _patch(kernel, "device_problem", lambda device: None),
        _patch(kernel, "head_problem", head_problem),
    ):
        yield


def _mask_on_gpu(make: Any) -> Any:
    def make_on_gpu(self: Any, name: str, lengths: Any = None) -> Any:
        # Blocks that are counted, not scores: nothing to speak of.
        return None if name == "flex_attention" else make(self, name, lengths)

    return make_on_gpu


def _address(x: Tensor) -> int:
    # Of a storage and a place in it, like an address.
    return (x.untyped_storage()._cdata << 24) + int(x.storage_offset()) * x.element_size()
