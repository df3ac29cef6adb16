"""Run a gated MLP over pieces of tokens, forward and backward, and keep its input alone.

Of M tokens of width H no (M, intermediate) tensor exists: gate, up, their product and the gradients
of all three are those of one piece. Backward runs each piece forward again before its backward, by
the code that runs without tiles, so the numbers are the same to rounding. Gradients of weights are
summed over the pieces, in fp32 where they are many. Dropout draws its mask piece by piece.

Inside a checkpoint, which stops recomputing once the last saved tensor is there, the MLP is not run
once more for nothing: its input is saved by a function before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.generators import generator_at, generator_state
from liger_kernels.ops.losses.chunk_size import accumulator_dtype
from liger_kernels.ops.rows import rows_of
from liger_kernels.transformers.recognise import MlpSpec
from liger_kernels.transformers.replacements.calls import is_plain
from liger_kernels.transformers.replacements.recompute import recomputing
from liger_kernels.transformers.replacements.subclasses import SPEC_ATTRIBUTE

__all__ = ["is_tiled", "run_in_tiles", "tile_mlps"]


def tile_mlps(model: nn.Module, tile_tokens: int | None) -> int:
    """Let the patched gated MLPs of a model run over pieces of so many tokens; None: whole.

    Returns:
        How many there are.
    """
    mlps: list[Any] = [
        module
        for module in model.modules()
        if isinstance(getattr(type(module), SPEC_ATTRIBUTE, None), MlpSpec)
    ]
    for mlp in mlps:
        mlp._tile_tokens = tile_tokens
    return len(mlps)


def is_tiled(module: Any, x: Any) -> bool:
    """Return whether a patched MLP runs x, (..., H), over pieces."""
    tile_tokens = module._tile_tokens
    if tile_tokens is None or torch.compiler.is_compiling() or not is_plain(x) or not x.numel():
        return False
    return bool(x.numel() // x.shape[-1] > tile_tokens)


def run_in_tiles(module: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return run(x) of a patched MLP, whose rows do not depend on each other.

    Args:
        module: The MLP, whose parameters run reads.
        run: (rows, H) -> (rows, H_out).
        x: (..., H).
    """
    call = _Call(module, run, x.device)
    trained = [p for p in call.parameters if p.requires_grad]
    rows = rows_of(x)
    if torch.is_grad_enabled() and (x.requires_grad or trained):
        with recomputing(x):
            rows = _Save.apply(rows, call, *trained)
        y = _Tiles.apply(rows, call, *trained)
    else:
        y = call.forward(rows)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Call:
    """One call of an MLP: what its pieces need in forward and once more in backward.

    Attributes:
        parameters: Of the MLP.
        saved: The autograd function that holds the input.
    """

    def __init__(self, module: Any, run: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._run, self._tile_tokens, self._device = run, module._tile_tokens, device
        self.parameters = list(module.parameters())
        self.saved: Any = None
        self._versions = [p._version for p in self.parameters]
        draws = any(isinstance(m, nn.Dropout) and m.training and m.p for m in module.modules())
        self._state = generator_state(device) if draws else None
        kind = device.type
        self._autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        self._dtype = torch.get_autocast_dtype(kind) if self._autocast else None

    def _pieces(self, num_rows: int) -> list[slice]:
        starts = range(0, num_rows, self._tile_tokens)
        return [slice(start, start + self._tile_tokens) for start in starts]

    @contextlib.contextmanager
    def _as_called(self) -> Iterator[None]:
        """Compute as at the time of the call; weights that autocast casts are not kept."""
        if self._dtype is None:
            yield
            return
        with torch.autocast(self._device.type, dtype=self._dtype, cache_enabled=False):
            yield

    def _as_drawn(self) -> contextlib.AbstractContextManager[None]:
        """Draw what forward has drawn."""
        if self._state is None:
            return contextlib.nullcontext()
        return generator_at(self._state, self._device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of all pieces."""
        y: Tensor | None = None
        with self._as_called():
            for piece in self._pieces(len(x)):
                part = self._run(x[piece])
                if y is None:
                    y = part.new_empty((len(x), part.shape[-1]))
                y[piece] = part
                del part
        assert y is not None
        return y

    def backward(
        self, dy: Tensor, needs_dx: bool, trained: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of the input, None where it needs none, and of `trained`.

        Raises:
            RuntimeError: A parameter was changed since forward.
        """
        if self._versions != [p._version for p in self.parameters]:
            raise RuntimeError(
                "a parameter of an MLP has been modified by an inplace operation between forward "
                "and backward, which computes with it again: change it after backward"
            )
        (x,) = self.saved.saved_tensors
        dx = torch.empty_like(x) if needs_dx else None
        pieces = self._pieces(len(x))
        sums = _Sums(trained, len(pieces))
        with self._as_drawn(), self._as_called(), torch.enable_grad():
            for piece in pieces:
                part = x[piece].detach().requires_grad_(needs_dx)
                wanted = [*([part] if needs_dx else []), *trained]
                y = self._run(part)
                grads = list(torch.autograd.grad(y, wanted, dy[piece], allow_unused=True))
                del y
                if dx is not None:
                    dx[piece] = grads.pop(0)
                sums.add(grads)
                del grads
        return dx, sums.result()


class _Sums:
    """Sums of gradients over pieces, in a dtype wide enough for as many; None of what has none."""

    def __init__(self, trained: Sequence[Tensor], num_pieces: int) -> None:
        self._trained, self._num_pieces = trained, num_pieces
        self._sums: list[Tensor | None] = [None] * len(trained)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of a piece, one a parameter."""
        for i, (p, grad) in enumerate(zip(self._trained, grads, strict=True)):
            total = self._sums[i]
            if grad is None:
                continue
            if total is None:
                dtype = accumulator_dtype(p.dtype, p.dtype, self._num_pieces, p.device)
                self._sums[i] = grad.to(dtype)
            else:
                total.add_(grad)

    def result(self) -> list[Tensor | None]:
        """Return the sums in the dtypes of the parameters."""
        pairs = zip(self._sums, self._trained, strict=True)
        return [None if total is None else total.to(p.dtype) for total, p in pairs]


class _Save(torch.autograd.Function):
    """Save the input of a call that follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        call.saved = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None) -> tuple[Any, ...]:
        return dx, *(None,) * (len(ctx.needs_input_grad) - 1)


@differentiable_once("a gated MLP over pieces of tokens")
class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *trained: Tensor) -> Tensor:
        ctx.call, ctx.trained = call, trained
        return call.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dx, grads = ctx.call.backward(rows_of(dy), ctx.needs_input_grad[0], ctx.trained)
        return dx, None, *grads
