"""Forwards of gated MLPs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from liger_kernels.ops import geglu, glu_mlp, swiglu
from liger_kernels.ops.adapted_linear import AdaptedLinear
from liger_kernels.ops.glu_mlp import glu_mlp_graph
from liger_kernels.ops.lora_mlp import lora_mlp
from liger_kernels.ops.rows import no_values
from liger_kernels.transformers.recognise import ACTIVATIONS, MlpSpec, split_gate
from liger_kernels.transformers.replacements.adapters import is_lora_patched, lora_call, sharing
from liger_kernels.transformers.replacements.calls import (
    have_plain_types,
    is_bare,
    is_plain,
    is_transformed,
    record_call,
    runs_stock_linear,
)
from liger_kernels.transformers.replacements.recompute import (
    hooks_are_free,
    is_checkpointed,
    recomputing,
    run_recomputable,
)
from liger_kernels.transformers.replacements.subclasses import is_as_patched
from liger_kernels.transformers.replacements.tiles import is_tiled, run_in_tiles


def mlp_forward(base: Any, spec: MlpSpec) -> Callable[..., Any]:
    """Return the forward of a gated MLP class: one glu_mlp, or swiglu or geglu between layers."""
    layers = (spec.gate, spec.up, spec.down)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The activation is not called: a hook on it is the stock forward's to run.
        others = [
            child
            for name, child in self._modules.items()
            if child is not None and name not in layers
        ]
        is_plain_call = len(args) == 1 and not kwargs and not is_transformed()
        if not is_plain_call or not is_as_patched(self):
            return base.forward(self, *args, **kwargs)
        if not is_bare(*others):
            return base.forward(self, *args, **kwargs)
        (x,) = args
        self._adopt_adapters()
        if not is_tiled(self, x):
            return _run(self, spec, x)
        run = functools.partial(_run, self, spec)
        return run_in_tiles(self, run, [x], parameters=list(self.parameters()))

    return forward


def _run(module: Any, spec: MlpSpec, x: Any, *, makes_output: bool = True) -> Any:
    """Compute a patched MLP of x: as one function, or its layers one by one.

    Without makes_output the values are undefined, and the graph is that of x, (M, H).
    """
    y = run_adapted(module, spec, x, makes_output=makes_output)
    if y is not None:
        return y
    weights = _weights_of(module, spec, x)
    if weights is not None:
        record_call(module)
        with recomputing(x):
            keeps = not module._saves_memory
            compute = glu_mlp if makes_output else glu_mlp_graph
            return compute(x, *weights, activation=spec.activation, keeps_product=keeps)
    with recomputing(x), sharing(module):
        gate = getattr(module, spec.gate)(x)
        if spec.layout == "separate":
            # After the gate, as the class does it: adapters with dropout draw in this order.
            up = getattr(module, spec.up)(x)
        else:
            gate, up = split_gate(gate, spec.layout)
    multiply = functools.partial(gate_and_multiply, module, spec.activation)
    h = run_recomputable(module, multiply, gate, up)
    down = getattr(module, spec.down)
    leaves_out = not makes_output and _is_stock_linear(down)
    with recomputing(h), _WithoutProducts() if leaves_out else contextlib.nullcontext():
        return down(h)


class _WithoutProducts(TorchDispatchMode):
    """Leave out matrix products: the graph is theirs, the values are undefined."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return no_values(args[-2], args[-1].shape[1])
        return func(*args, **(kwargs or {}))


def _weights_of(
    module: Any, spec: MlpSpec, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """Return the weights of an MLP that is plain enough to run as one function, else None.

    Inside a checkpoint it is not: that stops recomputing before the last product.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not is_plain(x):
        return None
    if torch.is_autocast_enabled(x.device.type) or not hooks_are_free():
        return None
    if not spec.is_one_function:
        return None
    layers = _layers_of(module, spec)
    weights = [layer.weight for layer in layers if _is_plain_linear(layer)]
    if len(weights) < len(layers) or not is_plain(*weights):
        return None
    if any(w.dtype != x.dtype or w.device != x.device for w in weights):
        return None
    first, *middle, last = weights
    return first, middle[0] if middle else None, last


def _layers_of(module: nn.Module, spec: MlpSpec) -> list[Any]:
    """Return gate, up and down; gate is both where they are one layer."""
    names = (spec.gate, spec.up, spec.down) if spec.layout == "separate" else (spec.gate, spec.down)
    return [getattr(module, name) for name in names]


def run_adapted(module: nn.Module, spec: MlpSpec, x: Any, *, makes_output: bool) -> Tensor | None:
    """Run an MLP whose layers have LoRA adapters as one function; None where it must not be one.

    It runs under no transform.

    As in _weights_of, inside a checkpoint the layers run one by one.
    """
    if torch.compiler.is_compiling() or not spec.is_one_function or is_checkpointed():
        return None
    layers = _layers_of(module, spec)
    adapted = [layer for layer in layers if is_lora_patched(layer)]
    # What is not called as a module must not have hooks, on itself or inside.
    if not adapted or not have_plain_types((x,)) or not x.numel() or not is_bare(*layers):
        return None
    found: list[AdaptedLinear] = []
    dtypes = None
    for layer in layers:
        call = lora_call(layer, x)
        if call is None or dtypes not in (None, call[1:]):
            return None
        if call.layer.magnitude is not None:
            # DoRA keeps the outputs of its layers, which are no more to be had from gate and up.
            return None
        found.append(call.layer)
        dtypes = call[1:]
    assert dtypes is not None
    record_call(module, *adapted)
    with recomputing(x):
        y = lora_mlp(x, found, spec.activation, dtypes[0], makes_output=makes_output)
        return y.to(dtypes[1])


def _is_plain_linear(layer: nn.Module) -> bool:
    """Return whether calling the layer is its product with its weight, and nothing else."""
    return _is_stock_linear(layer) and layer.bias is None


def _is_stock_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and runs_stock_linear(layer) and is_bare(layer)


def gate_and_multiply(module: nn.Module, activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """Return activation(gate) * up, by an op where it serves these tensors."""
    if not is_plain(gate, up) or gate.shape != up.shape:
        return ACTIVATIONS[activation](gate) * up
    record_call(module)
    if activation == "silu":
        return swiglu(gate, up)
    return geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")
