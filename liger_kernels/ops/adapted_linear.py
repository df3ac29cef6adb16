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
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from liger_kernels.ops.generators import generator_at, generator_state
from liger_kernels.ops.magnitude import direction_norms, factor_gradients, magnify
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
    """Values of a layer with a magnitude that backward reads; None of the others.

    Attributes:
        z: (M, N), its output before the magnitude and the bias.
        norms: (N,) of W + s B A, in fp32.
    """

    z: Any = None
    norms: Any = None


class LayerGroup:
    """Layers that read one x.

    Args:
        layers: In the order in which they draw their dropout.
        dtype: Of x and of all products.
        states: The generator's states before each layer's dropout, of a forward that has run.
        magnified: Of each layer, likewise.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedLinear],
        dtype: torch.dtype,
        states: Sequence[torch.Tensor | None] = (),
        magnified: Sequence[Magnified] = (),
    ) -> None:
        self.layers = layers
        self.dtype = dtype
        self.states = list(states)
        self.magnified = list(magnified)
        # The columns of xa that belong to each layer.
        self.parts: list[slice | None] = []
        self.rank = 0
        for layer in layers:
            rank = 0 if layer.a is None else layer.a.shape[0]
            self.parts.append(None if layer.a is None else slice(self.rank, self.rank + rank))
            self.rank += rank
        self.has_dropout = any(layer.dropout for layer in layers)
        scales = {layer.scale for layer in layers if layer.a is not None}
        # The factor of all products with A where it is one; else A is cast with its own.
        self.scale = scales.pop() if len(scales) == 1 else 1.0
        self._has_own_scales = bool(scales)
        self._cast: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def forward(self, x: torch.Tensor, xa: Any) -> list[torch.Tensor]:
        """Return each layer's (M, N) of x (M, K) and of down(x)."""
        ys = []
        matrices = iter(self._matrices()[1])
        for i, (layer, part) in enumerate(zip(self.layers, self.parts, strict=True)):
            weight = frozen_weight(layer.weight, self.dtype)
            bias = None if layer.bias is None else layer.bias.to(self.dtype)
            if layer.magnitude is None:
                y = F.linear(x, weight, bias)
                if part is not None:
                    y.addmm_(xa[:, part], next(matrices).t())
                self.magnified.append(Magnified())
            else:
                dropped = self._dropped_again(i, x)
                z = F.linear(dropped, weight).addmm_(xa[:, part], next(matrices).t())
                norms = direction_norms(weight, layer.a, layer.b, layer.scale)
                y = magnify(z, layer.magnitude / norms, bias)
                if layer.dropout:
                    y.addmm_(x - dropped, weight.t())
                self.magnified.append(Magnified(z, norms))
            # A weight that was dequantised is not kept while the next one is.
            del weight
            ys.append(y)
        return ys

    def _matrices(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the matrices A above one another, (sum of ranks, K), and each B, in dtype."""
        if self._cast is None:
            adapted = [layer for layer in self.layers if layer.a is not None]
            if not adapted:
                return torch.empty(0), []
            wanted = [layer.b for layer in adapted]
            matrices = [b if b.dtype == self.dtype else self._like(b) for b in wanted]
            stacked = adapted[0].a
            if len(adapted) > 1 or stacked.dtype != self.dtype or self._has_own_scales:
                stacked = stacked.new_empty((self.rank, stacked.shape[1]), dtype=self.dtype)
                parts = [stacked[part] for part in self.parts if part is not None]
                if self._has_own_scales:
                    for layer, part in zip(adapted, parts, strict=True):
                        torch.mul(layer.a, layer.scale, out=part)
                else:
                    wanted, matrices = wanted + [one.a for one in adapted], matrices + parts
            pairs = [(x, y) for x, y in zip(wanted, matrices, strict=True) if x is not y]
            if pairs:
                # One launch for all of them.
                torch._foreach_copy_([y for _, y in pairs], [x for x, _ in pairs])
            self._cast = stacked, matrices[: len(adapted)]
        return self._cast

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x, dtype=self.dtype)

    def down(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return xa (M, sum of ranks) of x (M, K), None without an adapter; draws the dropout."""
        if not self.rank:
            return None
        a, _ = self._matrices()
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
        dx = None
        dxa = None
        if self.rank and (needs_dx or any(need.a for need in needs)):
            rows = next(dy for dy in dys if dy is not None)
            dxa = rows.new_empty((rows.shape[0], self.rank))
        grads = []
        matrices = iter(self._matrices()[1])
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
            dz, dmagnitude = self._before_magnitude(i, dy, need)
            db = wide_product(dz.t(), xa[:, part]).to(layer.b.dtype) if need.b else None
            if part is not None and dxa is not None:
                torch.mm(dz, b, out=dxa[:, part])
            if needs_dx:
                dx = self._add_product(dx, i, dy, dz)
            grads.append(LayerGradients(dbias, None, db, dmagnitude))
        if dx is not None and dxa is not None:
            self._add_adapters(dx, dxa)
        return dx, dxa, grads

    def _before_magnitude(
        self, i: int, dy: torch.Tensor, need: LayerGradients
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients of what layer i's magnitude scales, and of the magnitude."""
        magnitude = self.layers[i].magnitude
        if magnitude is None:
            return dy, None
        z, norms = self.magnified[i]
        dz = magnify(dy, magnitude / norms, None)
        if not need.magnitude:
            return dz, None
        return dz, (factor_gradients(dy, z) / norms).to(magnitude.dtype)

    def _add_product(
        self, dx: torch.Tensor | None, i: int, dy: torch.Tensor, dz: torch.Tensor
    ) -> torch.Tensor:
        """Return dx plus what reaches x by way of the weight of layer i, added in-place."""
        layer = self.layers[i]
        weight = frozen_weight(layer.weight, self.dtype)
        # Where an adapter with a magnitude drops, the base layer's own product does not.
        has_two = layer.magnitude is not None and bool(layer.dropout)
        rows = dy if has_two else dz
        dx = rows @ weight if dx is None else dx.addmm_(rows, weight)
        return dx.add_(self._dropped_again(i, (dz - dy) @ weight)) if has_two else dx

    def _add_adapters(self, dx: torch.Tensor, dxa: torch.Tensor) -> None:
        """Add to dx (M, K) what reaches x by way of the adapters."""
        a, _ = self._matrices()
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


class PackedFormat:
    """The format of a frozen weight that is held in few bits, kept on the weight as `quant_state`.

    A linear layer whose weight has one computes x @ unpack(weight).t() + bias, and nothing else.
    States of bitsandbytes are known without it.
    """

    # (N, K), as the unpacked weight.
    shape: torch.Size

    def unpack(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (N, K) in dtype."""
        raise NotImplementedError


def frozen_weight(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a frozen weight (N, K) in dtype: itself, cast, or dequantised from few bits."""
    if has_own_format(weight):
        unpacked: torch.Tensor = weight.quant_state.unpack(weight, dtype)
        return unpacked
    if is_packed(weight):
        # The code that made the weight has imported it.
        functional = sys.modules["bitsandbytes"].functional
        weight = functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.to(dtype)


def is_packed(weight: Any) -> bool:
    """Return whether a weight is in 4 bits, as bitsandbytes packs it, or in a format given."""
    return getattr(weight, "quant_state", None) is not None


def has_own_format(weight: Any) -> bool:
    """Return whether a weight brings the way to unpack it, a PackedFormat."""
    return isinstance(getattr(weight, "quant_state", None), PackedFormat)


# Tensors of a layer, which are the first fields of AdaptedLinear.
NUM_TENSORS = 5


def flatten(layers: Sequence[AdaptedLinear]) -> tuple[tuple[AdaptedLinear, ...], list[Any]]:
    """Return the layers without their tensors, and the tensors, as an autograd function takes them.

    A packed weight stays: its class is another, which saved tensors do not give back.
    """
    tensors: list[Any] = []
    settings = []
    for layer in layers:
        packed = layer.weight if is_packed(layer.weight) else None
        tensors += [None if packed is not None else layer.weight, *layer[1:NUM_TENSORS]]
        settings.append(layer._replace(weight=packed, bias=None, a=None, b=None, magnitude=None))
    return tuple(settings), tensors


def unflatten(
    settings: Sequence[AdaptedLinear], tensors: Sequence[torch.Tensor | None]
) -> list[AdaptedLinear]:
    """Return the layers that were flattened."""
    layers = []
    for i, layer in enumerate(settings):
        weight, *others = tensors[NUM_TENSORS * i : NUM_TENSORS * (i + 1)]
        weight = layer.weight if weight is None else weight
        layers.append(AdaptedLinear._make((weight, *others, *layer[NUM_TENSORS:])))
    return layers


def needs_of(needs_input_grad: Sequence[bool]) -> list[LayerGradients]:
    """Return which tensors of each layer need a gradient, of the flags of the flat tensors."""
    flags = needs_input_grad
    ends = range(NUM_TENSORS, len(flags) + 1, NUM_TENSORS)
    return [LayerGradients(*flags[end - NUM_TENSORS + 1 : end]) for end in ends]


def flat_gradients(
    grads: Sequence[LayerGradients], da: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Return the gradients of the flat tensors; those of a are `da`."""
    flat: list[torch.Tensor | None] = []
    for grad, one in zip(grads, da, strict=True):
        flat += [None, grad.bias, one, grad.b, grad.magnitude]
    return flat


def rows_of_all(dys: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return gradients as rows; None stays."""
    return [None if dy is None else rows_of(dy) for dy in dys]


def own_dtype(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which products have the dtype of their factors, under autocast too."""
    # Asked first: entering the context costs the host more than the question.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
