"""A linear layer and a loss on its outputs, a chunk of tokens at a time: all logits never exist.

    z = hidden @ weight.T + bias;  loss_rows(z) gives the loss and writes dz over z
    dhidden = dz @ weight,  dweight += dz.T @ hidden,  dbias += sum of dz's rows

Legend: N tokens, R tokens that take part, H hidden width, V vocabulary.
Rounding: z and dz have the compute dtype; sums over chunks are fp32, except the weight gradient's
over few chunks (_accumulator_dtype).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liger_kernels.ops.handover import scaled
from liger_kernels.ops.launch import cdiv, num_sms
from liger_kernels.ops.loss_kernel import loss_rows, wide_dtype
from liger_kernels.ops.loss_options import LossOptions

# On a GPU the product with the weight's transpose starves first: its 128 x 256 tiles should fill
# whole waves of the multiprocessors. With fewer than 1024 tokens the weight gradient's product
# waits for memory; more than 4096 gain nothing.
_GPU_TOKENS = range(1024, 4096 + 1, 128)
_TILE_TOKENS, _TILE_HIDDEN = 128, 256
# Logits of a chunk, unless 1024 tokens need more.
_GPU_BYTES = 512 << 20
# On a CPU: 32 MiB of SmolLM2's logits took 1.19 s of CPU time for 512 tokens, 8 MiB 1.52 s, eager
# code 1.30 s.
_CPU_BYTES = 32 << 20
_CPU_GRAIN = 8
# Above this share of the tokens it does not pay to gather those that take part.
_GATHER_BELOW = 0.95
# A sum of n partial sums, each rounded to bf16, is off by about sqrt((n + 1) / 2) roundings;
# twice the one rounding of eager code is allowed.
_MAX_BF16_CHUNKS = 4


class LabelCount:
    """The number of labels of a batch, on its way to the host."""

    def __init__(self, count: torch.Tensor | int, event: torch.Event | None = None) -> None:
        self._count = count
        self._event = event

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
    """
    if torch.compiler.is_compiling() or is_capturing(target):
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


def rows_with_labels(label: torch.Tensor, ignore_index: int, bound: int) -> torch.Tensor | None:
    """Return the indices of the tokens to compute, or None for all, given at most `bound` labels.

    They are the first in an order that puts labels before ignored tokens. So the host need not know
    the exact number, and every index is a token of its own.
    """
    if bound > _GATHER_BELOW * label.numel():
        return None
    return (label == ignore_index).to(torch.uint8).argsort(stable=True)[:bound]


def chunk_tokens(
    num_rows: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Return how many tokens a chunk has."""
    if device.type == "cpu":
        grain, most = _CPU_GRAIN, max(_CPU_GRAIN, _CPU_BYTES // (4 * vocab))
    else:
        sms = num_sms(device)

        def waves_filled(tokens: int) -> tuple[float, int]:
            tiles = cdiv(tokens, _TILE_TOKENS) * cdiv(width, _TILE_HIDDEN)
            return tiles / (sms * cdiv(tiles, sms)), tokens

        limit = max(_GPU_TOKENS[0], _GPU_BYTES // (vocab * dtype.itemsize))
        grain, most = _TILE_TOKENS, max((c for c in _GPU_TOKENS if c <= limit), key=waves_filled)
    # Chunks of equal size: a tail of four tokens would cost a whole reading of the weight.
    num_chunks = max(1, cdiv(num_rows, most))
    return max(1, cdiv(cdiv(num_rows, num_chunks), grain)) * grain


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
    # (R,) tokens that take part, or None for all.
    rows: torch.Tensor | None = None


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


def _accumulator_dtype(compute: torch.dtype, final: torch.dtype, num_chunks: int) -> torch.dtype:
    """Return the dtype of the weight gradient's running sum.

    Never fp16: such sums are not yet divided by the number of labels and would overflow.
    """
    if compute == final == torch.bfloat16 and num_chunks <= _MAX_BF16_CHUNKS:
        return compute
    return wide_dtype(compute)


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, is_first: bool) -> None:
    """Set out to a @ b, or add it; out may be wider than a and b."""
    if out.dtype == a.dtype:
        if is_first:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
    elif a.is_cuda and torch.version.hip is None:
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
    with torch.autocast(weight.device.type, enabled=False):
        return _sweep(hidden, weight, bias, call, outputs, coef, entropy_coef, needs)


def _sweep(hidden, weight, bias, call, outputs, coef, entropy_coef, needs):
    dtype, device, final_dtype = call.compute_dtype, weight.device, weight.dtype
    wide = wide_dtype(dtype)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    (num_tokens, width), vocab = hidden.shape, weight.shape[0]
    rows, label, num_rows = call.rows, call.label, num_tokens
    if rows is not None:
        num_rows, label = rows.numel(), label[rows]
        coef = None if coef is None else coef[rows]
        entropy_coef = None if entropy_coef is None else entropy_coef[rows]
    chunk = chunk_tokens(num_rows, width, vocab, dtype, device)
    found = {
        name: torch.empty(num_rows, dtype=torch.int64 if name == "best" else wide, device=device)
        for name in outputs
    }
    grads = HeadGradients()
    needs_hidden, needs_weight, needs_bias = needs
    if needs_hidden:
        allocate = torch.empty if rows is None else torch.zeros
        grads.hidden = allocate((num_tokens, width), dtype=dtype, device=device)
    if needs_weight:
        # The first chunk writes it; without a chunk it is 0.
        allocate = torch.empty if num_rows else torch.zeros
        kept = _accumulator_dtype(dtype, final_dtype, cdiv(num_rows, chunk))
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
        if needs_hidden and rows is None:
            torch.mm(z, weight, out=grads.hidden[part])
        elif needs_hidden:
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
