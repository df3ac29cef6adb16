"""Run a gated MLP or experts over pieces of tokens, forward and backward, and keep the input alone.

Of M tokens of width H no (M, intermediate) tensor exists: gate, up, their product and the gradients
of all three are those of one piece. Backward runs each piece forward again before its backward, but
for the last product, whose result nobody reads, by the code that runs without tiles: so the numbers
are the same to rounding. Gradients of weights are summed over the pieces, in fp32 where they are
many. Dropout draws its mask piece by piece.

Inside a checkpoint, which stops recomputing once the last saved tensor is there, the module is not
run once more for nothing: its input is saved by a function before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.generators import generator_at, generator_state
from liger_kernels.ops.losses.chunk_size import accumulator_dtype
from liger_kernels.ops.rows import pieces_of, rows_of
from liger_kernels.transformers.recognise import (
    GLU_OPS,
    ExpertListSpec,
    ExpertsSpec,
    MlpSpec,
    MoeBlockSpec,
)
from liger_kernels.transformers.replacements.calls import is_plain
from liger_kernels.transformers.replacements.recompute import recomputing
from liger_kernels.transformers.replacements.subclasses import SPEC_ATTRIBUTE

__all__ = ["TILED_OPS", "Run", "is_tiled", "run_in_tiles", "tile_modules"]

# The ops of the forms that have tiles.
TILED_OPS = frozenset({*GLU_OPS.values(), "moe_experts"})
_TILED = (MlpSpec, ExpertsSpec, ExpertListSpec, MoeBlockSpec)


class Run(Protocol):
    """Compute some rows of a module, (rows, H_out), each from those of the inputs alone.

    Without makes_output the values are not read: the last product may be left out.
    """

    def __call__(self, *inputs: Any, makes_output: bool) -> Tensor: ...


def tile_modules(model: nn.Module, tile_tokens: int | None) -> int:
    """Let patched gated MLPs and experts run over pieces of so many tokens; None: whole.

    Returns:
        How many there are.
    """
    modules: list[Any] = [
        module
        for module in model.modules()
        if isinstance(getattr(type(module), SPEC_ATTRIBUTE, None), _TILED)
    ]
    for module in modules:
        module._tile_tokens = tile_tokens
    return len(modules)


def is_tiled(module: Any, x: Any) -> bool:
    """Return whether a patched module runs x, (..., H), over pieces."""
    tile_tokens = module._tile_tokens
    if tile_tokens is None or torch.compiler.is_compiling() or not is_plain(x) or not x.numel():
        return False
    return bool(x.numel() // x.shape[-1] > tile_tokens)


def run_in_tiles(
    module: nn.Module,
    run: Run,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor | None] = (),
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """Return run(*rows, *shared), piece by piece.

    Args:
        module: The patched module.
        run: Its computation.
        rows: Inputs with a row a token, (..., N) each.
        shared: Inputs that every piece reads whole, such as weights.
        parameters: What run reads itself, once more in backward.

    Returns:
        (..., H_out), of the leading shape of the first rows.
    """
    leading = rows[0].shape[:-1]
    trained = [p for p in parameters if p.requires_grad]
    inputs = [*map(rows_of, rows), *shared]
    call = _Call(module, run, inputs, len(rows), parameters)
    if torch.is_grad_enabled() and (any(call.needs_grad) or trained):
        with recomputing(*rows):
            inputs[0] = _Save.apply(call, *inputs, *trained)
        y = _Tiles.apply(call, *inputs, *trained)
    else:
        y = call.forward(inputs)
    return y.view(*leading, y.shape[-1])


class _Call:
    """One call of a module: what its pieces need in forward and once more in backward.

    Attributes:
        needs_grad: Of each input, whether it needs a gradient.
        saved: The autograd function that holds the inputs.
    """

    def __init__(
        self,
        module: Any,
        run: Run,
        inputs: Sequence[Tensor | None],
        num_rows: int,
        parameters: Sequence[Tensor],
    ) -> None:
        self._run, self._tile_tokens, self._num_rows = run, module._tile_tokens, num_rows
        self.needs_grad = [x is not None and x.requires_grad for x in inputs]
        self.saved: Any = None
        self._parameters = parameters
        self._versions = [p._version for p in parameters]
        assert inputs[0] is not None
        self._device = inputs[0].device
        draws = any(isinstance(m, nn.Dropout) and m.training and m.p for m in module.modules())
        self._state = generator_state(self._device) if draws else None
        kind = self._device.type
        self._autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        self._dtype = torch.get_autocast_dtype(kind) if self._autocast else None

    def _pieces(self, num_tokens: int) -> list[slice]:
        return pieces_of(num_tokens, self._tile_tokens)

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

    def forward(self, inputs: Sequence[Any]) -> Tensor:
        """Return the output of all pieces."""
        rows, shared = inputs[: self._num_rows], inputs[self._num_rows :]
        y: Tensor | None = None
        with self._as_called():
            for piece in self._pieces(len(rows[0])):
                part = self._run(*(x[piece] for x in rows), *shared, makes_output=True)
                if y is None:
                    y = part.new_empty((len(rows[0]), part.shape[-1]))
                y[piece] = part
                del part
        assert y is not None
        return y

    def backward(self, dy: Tensor, trained: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of the inputs, None of those that need none, and of `trained`.

        Raises:
            RuntimeError: A parameter was changed since forward.
        """
        if self._versions != [p._version for p in self._parameters]:
            raise RuntimeError(
                "a parameter of an MLP has been modified by an inplace operation between forward "
                "and backward, which computes with it again: change it after backward"
            )
        inputs = self.saved.saved_tensors
        needs, of_shared = self.needs_grad[: self._num_rows], self.needs_grad[self._num_rows :]
        rows, shared = inputs[: self._num_rows], _leaves(inputs[self._num_rows :], of_shared)
        pairs = zip(rows, needs, strict=True)
        grads = [torch.empty_like(x) if need else None for x, need in pairs]
        sums = _Sums([*_needed(shared), *trained], -(-len(dy) // self._tile_tokens))
        with self._as_drawn(), self._as_called(), torch.enable_grad():
            for piece in self._pieces(len(dy)):
                parts = _leaves([x[piece] for x in rows], needs)
                y = self._run(*parts, *shared, makes_output=False)
                wanted = [*_needed(parts), *sums.tensors]
                found = list(torch.autograd.grad(y, wanted, dy[piece], allow_unused=True))
                del y, parts
                for grad in grads:
                    if grad is not None:
                        part = found.pop(0)
                        grad[piece] = 0 if part is None else part
                sums.add(found)
                del found
        totals = iter(sums.result())
        grads += [next(totals) if need else None for need in of_shared]
        return [*grads, *totals]


def _leaves(tensors: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
    pairs = zip(tensors, needs, strict=True)
    return [None if x is None else x.detach().requires_grad_(need) for x, need in pairs]


def _needed(tensors: Sequence[Any]) -> list[Tensor]:
    return [x for x in tensors if x is not None and x.requires_grad]


class _Sums:
    """Sums of gradients over pieces, in a dtype wide enough for as many; None of what has none."""

    def __init__(self, tensors: Sequence[Tensor], num_pieces: int) -> None:
        self.tensors, self._num_pieces = tensors, num_pieces
        self._sums: list[Tensor | None] = [None] * len(tensors)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of a piece, one a tensor."""
        for i, (x, grad) in enumerate(zip(self.tensors, grads, strict=True)):
            total = self._sums[i]
            if grad is None:
                continue
            if total is None:
                dtype = accumulator_dtype(x.dtype, x.dtype, self._num_pieces, x.device)
                self._sums[i] = grad.to(dtype)
            else:
                total.add_(grad)

    def result(self) -> list[Tensor | None]:
        """Return the sums in the dtypes of the tensors."""
        pairs = zip(self._sums, self.tensors, strict=True)
        return [None if total is None else total.to(x.dtype) for total, x in pairs]


class _Save(torch.autograd.Function):
    """Save the inputs of a call that follows, and return the first."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: len(call.needs_grad)])
        call.saved = ctx
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None) -> tuple[Any, ...]:
        return None, dx, *(None,) * (len(ctx.needs_input_grad) - 2)


@differentiable_once("a module over pieces of tokens")
class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        num_inputs = len(call.needs_grad)
        ctx.call, ctx.trained = call, tensors[num_inputs:]
        return call.forward(tensors[:num_inputs])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return None, *ctx.call.backward(rows_of(dy), ctx.trained)
