"""Frozen linear layers with LoRA adapters: the products that lora_linear and lora_mlp share.

    xa = x (s A)',  y = x W' + bias + xa B'
    dxa = dy B,  dB = dy' xa,  dA = s dxa' x,  dx = dy W + dxa (s A)

Legend: M rows, K and N the widths of x and y, r the rank, s the scale.
Layers that read one x are a group: their matrices A lie above one another, so that xa, dA and
dxa (s A) are one product for all of them, and dx is one buffer that the products add up in.
Rounding: all products are of the dtype of x; A and B are cast to it once a call, in one launch. s
is a factor of a matrix multiplication, and the products of the adapters are added to those of the
weights by the multiplication itself. dA and dB come out in fp32 where the device can.
Memory: saves x once and xa. A weight in 4 bits is dequantised for each product and dropped again.
A layer with a magnitude (DoRA, magnitude.py) saves its output before it too.
Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685, eq. 3.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from liger_kernels.ops.generators import generator_at, generator_state
from liger_kernels.ops.magnitude import direction_norms, factor_gradients, magnify
from liger_kernels.ops.packed_weight import frozen_weight
from liger_kernels.ops.products import wide_product
from liger_kernels.ops.rows import rows_of

_NOTHING = contextlib.nullcontext()


class AdaptedLinear(NamedTuple):
    """One frozen linear layer and the adapter on it.

    Attributes:
        weight: (N, K), without a gradient; or as bitsandbytes packs it in 4 bits (`quant_state`).
        bias: (N,) or None.
        a: (r, K) of any floating dtype; None of a layer without an adapter.
        b: (N, r); None with a.
        magnitude: (N,) of any floating dtype, the adapter's of DoRA; None of LoRA.
        scale: What the adapter's output is times.
        dropout: The probability that a number of the adapter's input is dropped; 0 in evaluation.
        dropout_dtype: What the input is cast to before: a mask follows the dtype on some devices.
    """

    weight: Any
    bias: Any
    a: Any = None
    b: Any = None
    magnitude: Any = None
    scale: float = 1.0
    dropout: float = 0.0
    dropout_dtype: torch.dtype | None = None


class LayerGradients(NamedTuple):
    """Which of a layer's bias, a, b and magnitude get a gradient, or these; None of the others."""

    bias: Any = None
    a: Any = None
    b: Any = None
    magnitude: Any = None


class Magnified(NamedTuple):
    """Values of a layer with a magnitude that backward reads.

    Attributes:
        z: (M, N), its output before the magnitude and the bias; None where that is not trained.
        norms: (N,) of W + s B A, in fp32.
    """

    z: Any
    norms: Any


class LayerGroup:
    """Layers that read one x.

    Args:
        layers: In the order in which they draw their dropout.
        dtype: Of x and of all products.
        states: The generator's states before each layer's dropout, of a forward that has run.
        magnified: Of the layers that have a magnitude, by number, likewise.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedLinear],
        dtype: torch.dtype,
        states: Sequence[torch.Tensor | None] = (),
        magnified: Mapping[int, Magnified] | None = None,
    ) -> None:
        self.layers = layers
        self.dtype = dtype
        self.states = list(states)
        self.magnified = dict(magnified or {})
        # The columns of xa that belong to each layer.
        self.parts: list[slice | None] = []
        self.rank = 0
        self.has_dropout = False
        scales = set()
        for layer in layers:
            if layer.dropout:
                self.has_dropout = True
            if layer.a is None:
                self.parts.append(None)
                continue
            scales.add(layer.scale)
            end = self.rank + layer.a.shape[0]
            self.parts.append(slice(self.rank, end))
            self.rank = end
        # The factor of all products with A where it is one; else A is cast with its own.
        self._has_own_scales = len(scales) > 1
        self.scale = scales.pop() if len(scales) == 1 else 1.0
        self.a, self.bs = self._matrices()

    def forward(self, x: torch.Tensor, xa: Any) -> list[torch.Tensor]:
        """Return each layer's (M, N) of x (M, K) and of down(x)."""
        ys = []
        matrices = iter(self.bs)
        for i, (layer, part) in enumerate(zip(self.layers, self.parts, strict=True)):
            weight = frozen_weight(layer.weight, self.dtype)
            bias = None if layer.bias is None else layer.bias.to(self.dtype)
            if layer.magnitude is None:
                y = F.linear(x, weight, bias)
                if part is not None:
                    y.addmm_(xa[:, part], next(matrices).t())
            else:
                dropped = self._dropped_again(i, x)
                z = F.linear(dropped, weight).addmm_(xa[:, part], next(matrices).t())
                norms = direction_norms(weight, layer.a, layer.b, layer.scale)
                y = magnify(z, layer.magnitude / norms, bias)
                if layer.dropout:
                    y.addmm_(x - dropped, weight.t())
                self.magnified[i] = Magnified(z, norms)
            # A weight that was dequantised is not kept while the next one is.
            del weight
            ys.append(y)
        return ys

    def _matrices(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the matrices A above one another, (sum of ranks, K), and each B, in dtype."""
        stacked = torch.empty(0)
        bs: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        targets: list[torch.Tensor] = []
        for layer, part in zip(self.layers, self.parts, strict=True):
            if part is None:
                continue
            a, b = layer.a, layer.b
            if not bs:
                # Alone and of this dtype, it needs no place beside others.
                is_ready = part.stop == self.rank and a.dtype == self.dtype
                stacked = a if is_ready else a.new_empty(self.rank, a.shape[1], dtype=self.dtype)
            if self._has_own_scales:
                torch.mul(a, layer.scale, out=stacked[part])
            elif stacked is not a:
                sources.append(a)
                targets.append(stacked[part])
            bs.append(b if b.dtype == self.dtype else torch.empty_like(b, dtype=self.dtype))
            if bs[-1] is not b:
                sources.append(b)
                targets.append(bs[-1])
        if sources:
            # One launch for all of them.
            torch._foreach_copy_(targets, sources)
        return stacked, bs

    def down(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return xa (M, sum of ranks) of x (M, K), None without an adapter; draws the dropout."""
        if not self.rank:
            return None
        a = self.a
        xa = x.new_empty((x.shape[0], self.rank))
        if not self.has_dropout:
            return _scaled_mm(x, a.t(), self.scale, xa)
        for layer, part in zip(self.layers, self.parts, strict=True):
            self.states.append(generator_state(x.device) if layer.dropout else None)
            if part is not None:
                _scaled_mm(self._dropped(x, layer), a[part].t(), self.scale, xa[:, part])
        return xa

    def _dropped(self, x: torch.Tensor, layer: AdaptedLinear) -> torch.Tensor:
        """Return x as the layer's dropout leaves it, with the generator as it is."""
        if not layer.dropout:
            return x
        return F.dropout(x.to(layer.dropout_dtype or x.dtype), layer.dropout).to(self.dtype)

    def _dropped_again(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Return x with the mask that layer i drew in down()."""
        layer = self.layers[i]
        if not layer.dropout:
            return x
        with generator_at(self.states[i], x.device):
            return self._dropped(x, layer)

    def backward(
        self,
        dys: Sequence[torch.Tensor | None],
        xa: Any,
        needs: Sequence[LayerGradients],
        needs_dx: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, list[LayerGradients]]:
        """Return dx (M, K), dxa for a_gradients(), and the gradients of all but a of each layer.

        dys are (M, N) or None, which counts as zeros; dx is None where it is not needed or zero.
        """
        dx, dxa, grads = None, None, []
        for dy, need in zip(dys, needs, strict=True):
            if dy is not None and dxa is None and self.rank and (needs_dx or need.a):
                dxa = dy.new_empty((dy.shape[0], self.rank))
        matrices = iter(self.bs)
        for i, (layer, part, dy, need) in enumerate(
            zip(self.layers, self.parts, dys, needs, strict=True)
        ):
            b: Any = None if part is None else next(matrices)
            if dy is None:
                if part is not None and dxa is not None:
                    dxa[:, part] = 0
                grads.append(LayerGradients())
                continue
            dbias = dy.sum(0).to(layer.bias.dtype) if need.bias else None
            dz, dmagnitude = dy, None
            if layer.magnitude is not None:
                dz, dmagnitude = self._before_magnitude(i, dy, need)
            db = wide_product(dz.t(), xa[:, part]).to(layer.b.dtype) if need.b else None
            if part is not None and dxa is not None:
                torch.mm(dz, b, out=dxa[:, part])
            if needs_dx:
                weight = frozen_weight(layer.weight, self.dtype)
                if layer.magnitude is not None and layer.dropout:
                    # Where such an adapter drops, the base layer's own product does not.
                    back = self._dropped_again(i, (dz - dy) @ weight)
                    dx = back if dx is None else dx.add_(back)
                    dz = dy
                dx = dz @ weight if dx is None else dx.addmm_(dz, weight)
                # A weight that was dequantised is not kept while the next one is.
                del weight
            grads.append(LayerGradients(dbias, None, db, dmagnitude))
        if dx is not None and dxa is not None:
            self._add_adapters(dx, dxa)
        return dx, dxa, grads

    def _before_magnitude(
        self, i: int, dy: torch.Tensor, need: LayerGradients
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients of what layer i's magnitude scales, and of the magnitude."""
        magnitude = self.layers[i].magnitude
        z, norms = self.magnified[i]
        dz = magnify(dy, magnitude / norms, None)
        if not need.magnitude:
            return dz, None
        return dz, (factor_gradients(dy, z) / norms).to(magnitude.dtype)

    def _add_adapters(self, dx: torch.Tensor, dxa: torch.Tensor) -> None:
        """Add to dx (M, K) what reaches x by way of the adapters."""
        a = self.a
        if not self.has_dropout:
            dx.addmm_(dxa, a, alpha=self.scale)
            return
        for layer, part, state in zip(self.layers, self.parts, self.states, strict=True):
            if part is None:
                continue
            if not layer.dropout:
                dx.addmm_(dxa[:, part], a[part], alpha=self.scale)
                continue
            back = dxa.new_empty(dx.shape)
            _scaled_mm(dxa[:, part], a[part], self.scale, back)
            with generator_at(state, dx.device):
                # The same draw as in forward: what was dropped gets nothing, the rest as much more.
                dx.add_(self._dropped(back, layer))

    def a_gradients(
        self, dxa: Any, x: Any, needs: Sequence[LayerGradients]
    ) -> list[torch.Tensor | None]:
        """Return the gradient of each layer's a, None where none is needed, of x as forward had."""
        whole = None if self.has_dropout else wide_product(dxa.t(), x)
        if whole is not None and not self._has_own_scales:
            whole.mul_(self.scale)
        grads: list[torch.Tensor | None] = []
        for i, (layer, part, need) in enumerate(zip(self.layers, self.parts, needs, strict=True)):
            if not need.a:
                grads.append(None)
                continue
            if whole is not None:
                da = whole[part].mul_(layer.scale) if self._has_own_scales else whole[part]
                grads.append(da.to(layer.a.dtype))
                continue
            with generator_at(self.states[i], x.device) if layer.dropout else _NOTHING:
                da = wide_product(dxa[:, part].t(), self._dropped(x, layer))
            grads.append(da.mul_(layer.scale).to(layer.a.dtype))
        return grads


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, scale: float, out: torch.Tensor) -> torch.Tensor:
    """Write scale * a @ b into out, scaled by the multiplication itself."""
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


# Tensors of a layer, which are the first fields of AdaptedLinear. All but the weight may have a
# gradient.
NUM_TENSORS = 5


def flatten(layers: Sequence[AdaptedLinear]) -> list[torch.Tensor]:
    """Return the tensors of layers that may have a gradient, as an autograd function takes them.

    The layers go with them, and backward reads the tensors there: autograd would call its hooks for
    each one that it saves.
    """
    tensors: list[torch.Tensor] = []
    for layer in layers:
        for x in layer[1:NUM_TENSORS]:
            if isinstance(x, torch.Tensor):
                tensors.append(x)
    return tensors


def versions_of(layers: Sequence[AdaptedLinear]) -> list[int]:
    """Return the version of each tensor, by which backward sees that none was changed."""
    versions: list[int] = []
    for layer in layers:
        for x in layer[:NUM_TENSORS]:
            if isinstance(x, torch.Tensor):
                versions.append(x._version)
    return versions


def check_versions(layers: Sequence[AdaptedLinear], versions: Sequence[int]) -> None:
    """Raise a RuntimeError, as autograd does, if a tensor was changed since forward."""
    if versions_of(layers) != versions:
        raise RuntimeError(
            "a weight, bias or matrix of an adapter has been modified by an inplace operation "
            "between forward and backward, whose gradients would be wrong: change it after backward"
        )


def needs_of(
    layers: Sequence[AdaptedLinear], needs_input_grad: Sequence[bool]
) -> list[LayerGradients]:
    """Return which tensors of each layer need a gradient, of the flags of the flat tensors."""
    flags = iter(needs_input_grad)
    needs = []
    for _, bias, a, b, magnitude, *_ in layers:
        needs.append(
            LayerGradients(
                bias is not None and next(flags),
                a is not None and next(flags),
                b is not None and next(flags),
                magnitude is not None and next(flags),
            )
        )
    return needs


def flat_gradients(
    layers: Sequence[AdaptedLinear],
    grads: Sequence[LayerGradients],
    da: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Return the gradients of the flat tensors; those of a are `da`."""
    flat: list[torch.Tensor | None] = []
    for layer, (bias, _, b, magnitude), one in zip(layers, grads, da, strict=True):
        for x, grad in zip(layer[1:NUM_TENSORS], (bias, one, b, magnitude), strict=True):
            if x is not None:
                flat.append(grad)
    return flat


def rows_of_all(dys: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return gradients as rows; None stays."""
    return [None if dy is None else rows_of(dy) for dy in dys]


def own_dtype(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which products have the dtype of their factors, under autocast too."""
    # Asked first: entering the context costs the host more than the question.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING
