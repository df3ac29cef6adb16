"""A linear layer and a loss on its outputs, a chunk of tokens at a time: all logits never exist.

    z = hidden @ weight.T + bias;  loss_rows(z) gives the loss and writes dz over z
    dhidden = dz @ weight,  dweight += dz.T @ hidden,  dbias += sum of dz's rows

Legend: N tokens, R tokens that take part, H hidden width, V vocabulary.
Rounding: z and dz have the compute dtype; sums over chunks are fp32, except the weight gradient's
over few chunks (accumulator_dtype).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liger_kernels.ops.launch import cdiv, lookup, num_sms, remembered
from liger_kernels.ops.losses.grads_in_forward import scaled
from liger_kernels.ops.losses.options import (
    LossOptions,
    label_argument,
    wide_dtype,
    without_autocast,
)
from liger_kernels.ops.losses.rows import loss_rows

# Tiles of a GPU's matrix products: of the logits, and of the gradient of hidden.
_TILE_TOKENS, _TILE_WIDTH = 128, 256
# By vocabulary: bytes of a chunk's logits.
_GPU_BYTES = ((255_999, 512 << 20), (1 << 62, 960 << 20))
# The same without a weight gradient: with the gradient of hidden as much as the first, unless that
# leaves less than the second.
_FROZEN_BYTES, _LEAST_FROZEN_BYTES = 300 << 20, 192 << 20
# Tiles of tokens a chunk has, whatever they take, with a weight gradient and without.
_LEAST_TILES, _LEAST_FROZEN_TILES = 8, 2
# More gain nothing, unless they keep the weight gradient's sum in bf16.
_ENOUGH_TILES = 16
# H100, bf16: the time of a chunk's products, as a multiple of what it would be at the rate of a
# large square product. Means of the heads 4096 x 128256, 2048 x 128256, 2304 x 256000 and
# 4096 x 32000, which scatter by 0.1 (docs/results/tune-losses-h100.jsonl):
#   tokens               256  384  512  640  768  896 1024 1152 1408 1664 1792 2048 2816 4096
#   logits              1.30 1.08 1.10 1.07 1.05 1.14 1.06 1.05 1.13 1.09 1.06 1.04 1.05 1.03
#   gradient of hidden  1.13 1.01 0.94 0.96 1.00 1.07 0.99 1.02 1.07 1.18 1.09 1.01 1.08 1.01
#   of weight, added    2.96 1.94 1.54 1.42 1.32 1.29 1.24 1.25 1.15 1.17 1.12 1.13 1.10 1.11
#   the same in fp32    5.69 3.69 2.79 2.30 1.98 1.76 1.65 1.58 1.42 1.36 1.29 1.25 1.18 1.17
# So in _cost, in tiles of tokens: a chunk costs something besides its tokens, and more where it
# adds to a weight gradient; fewer than four tiles wait for memory; the odd one of seven or more
# costs half as much again; and the gradient of hidden fills whole waves of the multiprocessors,
# which the card's clock makes up for in part, unless they would be so empty that the library sums
# parts of the vocabulary side by side.
_CHUNK_TILES, _ADD_TILES, _ODD_TILES, _WAITING_TILES = 0.5, 2.0, 0.5, 4
_WAVE_SHARE, _MOST_IDLE, _SIDE_BY_SIDE = 0.75, 0.3, 1.05
# On a CPU: 32 MiB of SmolLM2's logits took 1.19 s of CPU time for 512 tokens, 8 MiB 1.52 s, eager
# code 1.30 s.
_CPU_BYTES = 32 << 20
_CPU_GRAIN = 8
# Above this share of the tokens it does not pay to gather those that take part.
_GATHER_BELOW = 0.95
# A sum of n partial sums, each rounded to bf16, has (n + 1) / 2 times the variance of one rounding.
# Eager code rounds the sum once, and the logits' gradient before it adds as much again, here too:
# 8 chunks give sqrt((4.5 + 1) / 2) = 1.7 times eager's error, and twice is allowed. Products on a
# CPU are rounded before they are added.
_MAX_BF16_CHUNKS = 8
_MAX_CPU_BF16_CHUNKS = 4


class LabelCount:
    """The number of labels of a batch, on its way to the host."""

    def __init__(self, count: torch.Tensor | int, event: torch.Event | None = None) -> None:
        self._count = count
        self._event = event

    def is_here(self) -> bool:
        """Return whether there is nothing to wait for."""
        return self._event is None or self._event.query()

    def wait(self) -> int:
        """Return the number, after waiting for its own copy and nothing else."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return int(self._count)


def count_labels(target: torch.Tensor, ignore_index: int = -100) -> LabelCount:
    """Return the number of labels in target that are not ignore_index, without waiting for it.

    Call it as soon as the labels are on their device: the copy to the host then runs beside the
    model. In a CUDA graph or compiled code nothing can be waited for: there it is target's size.

    Raises:
        ValueError: target is no tensor.
    """
    if not isinstance(target, torch.Tensor):
        raise label_argument("target").error(target)
    if target.is_meta or torch.compiler.is_compiling() or is_capturing(target):
        return LabelCount(target.numel())
    count = (target != ignore_index).sum()
    if count.device.type not in ("cuda", "xpu"):
        return LabelCount(count)
    host = torch.empty((), dtype=count.dtype, pin_memory=True)
    host.copy_(count, non_blocking=True)
    runtime = torch.get_device_module(count.device)
    event = runtime.Event()
    event.record(runtime.current_stream(count.device))
    return LabelCount(host, event)


def is_capturing(x: torch.Tensor) -> bool:
    """Return whether a CUDA graph is being captured on the current stream."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def rows_with_labels(
    label: torch.Tensor, ignore_index: int, count: LabelCount
) -> torch.Tensor | None:
    """Return the indices of the tokens to compute, or None for all; count is an upper bound.

    They are the first in an order that puts labels before ignored tokens. So the host need not know
    the exact number, and every index is a token of its own.
    """
    most = _GATHER_BELOW * label.numel()
    if count.is_here() and count.wait() > most:
        return None
    # Started before the wait, which would leave the GPU idle until the host is awake again.
    order = (label == ignore_index).to(torch.uint8).argsort(stable=True)
    bound = count.wait()
    return None if bound > most else order[:bound]


def _of_rows(x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """Return x (N,) at rows, without a copy where all are the same number."""
    if x is None or x.stride(0) == 0:
        return None if x is None else x[: rows.numel()]
    return x[rows]


def chunk_tokens(
    num_rows: int,
    width: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    needs_weight: bool = True,
    sms: int | None = None,
) -> int:
    """Return how many tokens a chunk has: all have as many, but for the last.

    sms is the number of multiprocessors of a GPU, by default that of device.
    """
    if device.type == "cpu":
        num_chunks = max(1, cdiv(num_rows, max(_CPU_GRAIN, _CPU_BYTES // (4 * vocab))))
        # A tail of four tokens would cost a whole reading of the weight.
        return max(1, cdiv(cdiv(num_rows, num_chunks), _CPU_GRAIN)) * _CPU_GRAIN
    least, num_bytes = _LEAST_TILES, lookup(_GPU_BYTES, vocab)
    if not needs_weight:
        least = _LEAST_FROZEN_TILES
        num_bytes = max(_LEAST_FROZEN_BYTES, _FROZEN_BYTES - num_rows * width * dtype.itemsize)
    most = max(least, num_bytes // (_TILE_TOKENS * vocab * dtype.itemsize))
    sms = num_sms(device) if sms is None else sms
    num_tiles = max(1, cdiv(num_rows, _TILE_TOKENS))
    return _TILE_TOKENS * _chunk_tiles(num_tiles, most, width, sms, needs_weight)


@remembered
def _chunk_tiles(num_tiles: int, most: int, width: int, sms: int, needs_weight: bool) -> int:
    # With fewer tiles there are so many chunks that the weight gradient's sum is fp32.
    narrow = cdiv(num_tiles, _MAX_BF16_CHUNKS) if needs_weight else 1
    most = min(num_tiles, most, max(_ENOUGH_TILES, narrow))
    least = max(cdiv(most, 2), narrow if narrow <= most else 1)

    def total(tiles: int) -> tuple[float, int]:
        num_full, rest = divmod(num_tiles, tiles)
        cost = num_full * _cost(tiles, width, sms, needs_weight)
        return cost + (_cost(rest, width, sms, needs_weight) if rest else 0.0), -tiles

    return min(range(least, most + 1), key=total)


def _cost(tiles: int, width: int, sms: int, needs_weight: bool) -> float:
    """Return the time of a chunk's products, in that of a tile of tokens in one of them."""
    tiles = max(tiles, _WAITING_TILES)
    columns = cdiv(width, _TILE_WIDTH)
    idle = cdiv(tiles * columns, sms) * sms / columns / tiles - 1.0
    hidden = tiles * (1.0 + _WAVE_SHARE * idle if idle <= _MOST_IDLE else _SIDE_BY_SIDE)
    logits = tiles + (_ODD_TILES if tiles > 6 and tiles % 2 else 0.0)
    weight = tiles + _ADD_TILES if needs_weight else 0.0
    return logits + hidden + weight + _CHUNK_TILES


@dataclass(frozen=True)
class HeadCall:
    """What is to be computed, besides hidden, weight and bias."""

    label: torch.Tensor  # (N,)
    options: LossOptions
    compute_dtype: torch.dtype
    # Outputs of loss_rows, and those of them that are differentiated.
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...]
    # Which of hidden, weight and bias get a gradient.
    needs: tuple[bool, bool, bool]
    class_weight: torch.Tensor | None = None  # (V,) in the wide dtype
    # Of the tokens that take part, at most; None: all do.
    label_count: LabelCount | None = None


@dataclass
class HeadGradients:
    """Gradients of hidden, weight and bias before a last factor; None where not asked for."""

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def times(
        self, factor: torch.Tensor, dtypes: tuple[torch.dtype | None, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the three times factor, each in its dtype; the buffers are used up."""
        buffers = (self.hidden, self.weight, self.bias)
        return tuple(
            None if buffer is None else scaled(buffer, factor, dtype)
            for buffer, dtype in zip(buffers, dtypes, strict=True)
        )


def accumulator_dtype(
    compute: torch.dtype, final: torch.dtype, num_chunks: int, device: torch.device
) -> torch.dtype:
    """Return the dtype of the weight gradient's running sum.

    Never fp16: such sums are not yet divided by the number of labels and would overflow.
    """
    most = _MAX_CPU_BF16_CHUNKS if device.type == "cpu" else _MAX_BF16_CHUNKS
    if compute == final == torch.bfloat16 and num_chunks <= most:
        return compute
    return wide_dtype(compute)


def _has_wide_products(device: torch.device) -> bool:
    """Return whether mm and addmm of torch take an out_dtype on this device: on sm_80 and newer."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, is_first: bool) -> None:
    """Set out to a @ b, or add it; out may be wider than a and b."""
    if out.dtype != a.dtype == torch.float16 and not _has_wide_products(a.device):
        # An fp16 product would overflow before it is divided by the number of labels.
        a, b = a.to(out.dtype), b.to(out.dtype)
    if out.dtype == a.dtype:
        if is_first:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
    elif _has_wide_products(a.device):
        if is_first:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif is_first:
        out.copy_(torch.mm(a, b))
    else:
        out.add_(torch.mm(a, b))


def sweep(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    call: HeadCall,
    *,
    outputs: tuple[str, ...] = (),
    coef: torch.Tensor | None = None,
    entropy_coef: torch.Tensor | None = None,
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[dict[str, torch.Tensor], HeadGradients]:
    """Return the named outputs of loss_rows for each token, and the gradients asked for.

    hidden (N, H), weight (V, H) and bias (V,) have any floating dtypes. coef and entropy_coef (N,),
    what each token's loss and entropy is times, may have stride 0.
    """
    # Autocast would recast some of the products, in backward perhaps unlike in forward.
    with without_autocast(weight.device):
        return _sweep(hidden, weight, bias, call, outputs, coef, entropy_coef, needs)


def _sweep(hidden, weight, bias, call, outputs, coef, entropy_coef, needs):
    dtype, device, final_dtype = call.compute_dtype, weight.device, weight.dtype
    wide = wide_dtype(dtype)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    (num_tokens, width), vocab = hidden.shape, weight.shape[0]
    rows, label, num_rows = None, call.label, num_tokens
    if call.label_count is not None:
        rows = rows_with_labels(label, call.options.ignore_index, call.label_count)
    if rows is not None:
        num_rows, label = rows.numel(), label[rows]
        coef, entropy_coef = _of_rows(coef, rows), _of_rows(entropy_coef, rows)
    needs_hidden, needs_weight, needs_bias = needs
    # With neither gradient the weight is only read, as when it is frozen.
    chunk = chunk_tokens(num_rows, width, vocab, dtype, device, needs_weight)
    found = {
        name: torch.empty(num_rows, dtype=torch.int64 if name == "best" else wide, device=device)
        for name in outputs
    }
    grads = HeadGradients()
    if needs_hidden:
        allocate = torch.empty if rows is None else torch.zeros
        grads.hidden = allocate((num_tokens, width), dtype=dtype, device=device)
    if needs_weight:
        # The first chunk writes it; without a chunk it is 0.
        allocate = torch.empty if num_rows else torch.zeros
        kept = accumulator_dtype(dtype, final_dtype, cdiv(num_rows, chunk), device)
        grads.weight = allocate((vocab, width), dtype=kept, device=device)
    if needs_bias:
        grads.bias = torch.zeros(vocab, dtype=wide, device=device)

    # Rows begin at multiples of 16 elements on a GPU, so that an odd vocabulary is read in vectors.
    pitch = vocab if device.type == "cpu" else cdiv(vocab, 16) * 16
    buffer = torch.empty((min(chunk, num_rows), pitch), dtype=dtype, device=device)[:, :vocab]
    for start in range(0, num_rows, chunk):
        part = slice(start, min(start + chunk, num_rows))
        x = hidden[part] if rows is None else hidden.index_select(0, rows[part])
        x = x.to(dtype)
        z = buffer[: x.shape[0]]
        if bias is None:
            torch.mm(x, weight.t(), out=z)
        else:
            torch.addmm(bias, x, weight.t(), out=z)
        loss_rows(
            z,
            label[part],
            call.options,
            class_weight=call.class_weight,
            coef=coef[part] if any(needs) else None,
            entropy_coef=None if entropy_coef is None else entropy_coef[part],
            dx=z if any(needs) else None,
            overwrite=True,
            **{name: out[part] for name, out in found.items()},
        )
        if needs_hidden:
            if rows is None:
                torch.mm(z, weight, out=grads.hidden[part])
            else:
                grads.hidden.index_copy_(0, rows[part], torch.mm(z, weight))
        if needs_weight:
            _add_product(grads.weight, z.t(), x, is_first=start == 0)
        if needs_bias:
            grads.bias.add_(z.sum(0, dtype=wide))
    if rows is not None:
        for name, out in found.items():
            absent = -1 if name == "best" else 0
            found[name] = out.new_full((num_tokens,), absent).index_copy_(0, rows, out)
    return found, grads
