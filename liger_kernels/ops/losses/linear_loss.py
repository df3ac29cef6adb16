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

from liger_kernels.ops.launcher import cdiv
from liger_kernels.ops.losses.chunk_size import accumulator_dtype, chunk_tokens
from liger_kernels.ops.losses.grads_in_forward import scaled
from liger_kernels.ops.losses.label_count import LabelCount, rows_with_labels
from liger_kernels.ops.losses.options import LossOptions, wide_dtype, without_autocast
from liger_kernels.ops.losses.row_gradient import gradient_rows
from liger_kernels.ops.losses.row_loss import loss_rows
from liger_kernels.ops.losses.row_loss_torch import Coefs, KeptRows
from liger_kernels.ops.products import has_wide_products
from liger_kernels.ops.rows import pieces_of


def _of_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return x (N,) at rows, without a copy where all are the same number."""
    return x[: rows.numel()] if x.stride(0) == 0 else x[rows]


@dataclass(frozen=True)
class LinearLossCall:
    """The arguments of a linear loss, except hidden, weight and bias."""

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
    # Whether the outputs are values of each token, not one sum.
    is_per_token: bool = False


@dataclass
class LinearGradients:
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
            None if buffer is None or dtype is None else scaled(buffer, factor, dtype)
            for buffer, dtype in zip(buffers, dtypes, strict=True)
        )


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, is_first: bool) -> None:
    """Set out to a @ b, or add it; out may be wider than a and b."""
    if out.dtype != a.dtype == torch.float16 and not has_wide_products(a.device):
        # An fp16 product would overflow before it is divided by the number of labels.
        a, b = a.to(out.dtype), b.to(out.dtype)
    if out.dtype == a.dtype:
        if is_first:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
    elif has_wide_products(a.device):
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
    call: LinearLossCall,
    *,
    outputs: tuple[str, ...] = (),
    coefs: Coefs | None = None,
    kept: KeptRows | None = None,
) -> tuple[dict[str, torch.Tensor], LinearGradients]:
    """Return the named outputs of loss_rows for each token, and the gradients asked for.

    hidden (N, H), weight (V, H) and bias (V,) have any floating dtypes. coefs (N,), the gradients
    that come in for each token, may have stride 0; without them there are no gradients, and without
    kept rows there is that of the loss alone. With kept rows (N,), of a sweep of the same call, the
    gradients alone are computed.
    """
    # Autocast would recast some of the products, in backward perhaps unlike in forward.
    with without_autocast(weight.device):
        return _sweep(hidden, weight, bias, call, outputs, coefs, kept)


def _sweep(hidden, weight, bias, call, outputs, coefs, kept):
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
        coefs = None if coefs is None else coefs.map(lambda t: _of_rows(t, rows))
        kept = None if kept is None else kept.map(lambda t: t[rows])
    # With neither gradient the weight is only read, as when it is frozen. Of values per token every
    # sweep has the same chunks: a product of another size may round its logits otherwise.
    needs_weight = None if call.is_per_token else call.needs[1]
    chunk = chunk_tokens(num_rows, width, vocab, dtype, device, needs_weight)
    has_grads = coefs is not None and any(call.needs)
    needs_hidden, needs_weight, needs_bias = call.needs if has_grads else (False, False, False)
    found = {
        name: torch.empty(num_rows, dtype=torch.int64 if name == "best" else wide, device=device)
        for name in outputs
    }
    grads = LinearGradients()
    if needs_hidden:
        allocate = torch.empty if rows is None else torch.zeros
        grads.hidden = allocate((num_tokens, width), dtype=dtype, device=device)
    if needs_weight:
        # The first chunk writes it; without a chunk it is 0.
        allocate = torch.empty if num_rows else torch.zeros
        sum_dtype = accumulator_dtype(dtype, final_dtype, cdiv(num_rows, chunk), device)
        grads.weight = allocate((vocab, width), dtype=sum_dtype, device=device)
    if needs_bias:
        grads.bias = torch.zeros(vocab, dtype=wide, device=device)

    # Rows begin at multiples of 16 elements on a GPU, so that an odd vocabulary is read in vectors.
    pitch = vocab if device.type == "cpu" else cdiv(vocab, 16) * 16
    buffer = torch.empty((min(chunk, num_rows), pitch), dtype=dtype, device=device)[:, :vocab]
    for part in pieces_of(num_rows, chunk):
        x = hidden[part] if rows is None else hidden.index_select(0, rows[part])
        x = x.to(dtype)
        z = buffer[: x.shape[0]]
        if bias is None:
            torch.mm(x, weight.t(), out=z)
        else:
            torch.addmm(bias, x, weight.t(), out=z)
        _rows_of_chunk(z, label[part], call, coefs if has_grads else None, found, kept, part)
        if needs_hidden:
            if rows is None:
                torch.mm(z, weight, out=grads.hidden[part])
            else:
                grads.hidden.index_copy_(0, rows[part], torch.mm(z, weight))
        if needs_weight:
            add_product(grads.weight, z.t(), x, is_first=part.start == 0)
        if needs_bias:
            grads.bias.add_(z.sum(0, dtype=wide))
    if rows is not None:
        for name, out in found.items():
            absent = -1 if name == "best" else 0
            found[name] = out.new_full((num_tokens,), absent).index_copy_(0, rows, out)
    return found, grads


def _rows_of_chunk(z, label, call, coefs, found, kept, part):
    """Fill the outputs of a chunk's rows from logits z, which become their gradient."""
    coefs = None if coefs is None else coefs.map(lambda t: t[part])
    rows = None if kept is None else kept.map(lambda t: t[part])
    options = {"class_weight": call.class_weight}
    outputs = {name: out[part] for name, out in found.items()}
    if call.is_per_token and kept is None:
        # The gradient apart from the outputs, which are then the same to the bit without it.
        if coefs is not None:
            like = {"dtype": coefs.loss.dtype, "device": z.device}
            outputs = {name: torch.empty(len(z), **like) for name in KeptRows._fields[:2]} | outputs
            rows = KeptRows(outputs["peak"], outputs["log_total"])
        loss_rows(z, label, call.options, overwrite=coefs is None, **options, **outputs)
    elif kept is None:
        gradient = {} if coefs is None else {"coef": coefs.loss, "dx": z}
        loss_rows(z, label, call.options, overwrite=True, **options, **gradient, **outputs)
    if rows is not None:
        gradient_rows(z, label, call.options, rows, coefs=coefs, **options)
