"""LoRA layers of peft, and which linear layers of a module read the module's own input.

peft is looked for among the modules that are loaded: who has LoRA layers has imported it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernels.transformers.recognise.mlps import ProbeLinear
from liger_kernels.transformers.recognise.probe import (
    call_forward,
    is_close,
    is_linear,
    linear_sizes,
    new_generator,
    original_class,
    probe_copy,
    quiet,
    randn,
)
from liger_kernels.transformers.recognise.specs import NO_KERNEL, LoraRefusal, LoraSpec, Refusal

__all__ = ["computes_dora", "input_readers", "is_lora_linear", "lora_group", "recognise_lora"]

# The class of all layers of LoRA, and those that are linear: what they wrap is one matrix.
_LAYERS = ("peft.tuners.lora.layer", "LoraLayer")
_LINEARS = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
)
_ROWS, _WIDTH, _OUT, _RANK = 4, 8, 6, 3
_SCALE = 0.5


def _loaded(place: tuple[str, str]) -> Any:
    """Return a class of a module that is imported already, else None."""
    return getattr(sys.modules.get(place[0]), place[1], None)


def is_lora_linear(module: nn.Module) -> bool:
    """Return whether a module is of a LoRA class that may run the op, patched or not."""
    cls = original_class(type(module))
    return any(cls is _loaded(place) for place in _LINEARS)


def recognise_lora(module: nn.Module) -> LoraSpec | Refusal | None:
    """Return the form of a linear layer with LoRA adapters; a Refusal for its other layers."""
    layers = _loaded(_LAYERS)
    if layers is None or not isinstance(module, layers):
        return None
    cls = original_class(type(module))
    if is_lora_linear(module):
        if computes_lora(cls):
            return LoraSpec()
        return LoraRefusal(f"LoRA of another form than x W' + s (x A') B'{NO_KERNEL}")
    kind = f"LoRA as {cls.__module__.rpartition('.')[2]}.{cls.__name__} computes it"
    # Of an embedding or a convolution it is no candidate, of a matrix in few bits it is one.
    return (LoraRefusal if _wraps_matrix(module) else Refusal)(kind + NO_KERNEL)


def _wraps_matrix(module: Any) -> bool:
    base = module.get_base_layer()
    others = (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    # Experts have no weight of this name.
    return hasattr(base, "weight") and is_linear(base) and not isinstance(base, others)


@functools.cache
def computes_lora(cls: Any) -> bool:
    """Return whether a LoRA class adds s (x A') B' to what its base layer returns."""
    return _computes(cls, is_dora=False)


def computes_dora(cls: Any, variant: Any, magnitude: Any) -> bool:
    """Return whether a LoRA class computes DoRA.

    Args:
        cls: The layer's class.
        variant: The class of what it holds in lora_variant.
        magnitude: The class of the module that holds the magnitudes.
    """
    return _computes(cls, variant, magnitude, is_dora=True)


def _computes(cls: Any, *parts: Any, is_dora: bool) -> bool:
    generator = new_generator()
    weight, a, b = (
        randn(generator, *shape) for shape in ((_OUT, _WIDTH), (_RANK, _WIDTH), (_OUT, _RANK))
    )
    x, magnitude = randn(generator, _ROWS, _WIDTH), randn(generator, _OUT)
    with quiet():
        layer = object.__new__(cls)
        nn.Module.__init__(layer)
        name = "default"
        layer.__dict__ |= {
            "base_layer": ProbeLinear(weight),
            "lora_A": {name: ProbeLinear(a)},
            "lora_B": {name: ProbeLinear(b)},
            "lora_dropout": {name: nn.Identity()},
            "scaling": {name: _SCALE},
            "lora_variant": {},
            "use_dora": {name: is_dora},
            "merged_adapters": [],
            "cast_input_dtype_enabled": True,
            "fan_in_fan_out": False,
            "_active_adapter": name,
            "_disable_adapters": False,
        }
        wanted = x @ weight.t() + _SCALE * (x @ a.t()) @ b.t()
        try:
            if is_dora:
                variant, holder = parts
                held = holder(fan_in_fan_out=False)
                # Registered, it would go to meta while transformers builds an empty model.
                held._parameters["weight"] = nn.Parameter(magnitude)
                layer.__dict__ |= {
                    "lora_variant": {name: variant()},
                    "lora_magnitude_vector": {name: held},
                }
                wanted = wanted * magnitude / (weight + _SCALE * b @ a).norm(dim=1)
            y = call_forward(layer, x)
        except Exception:
            return False
        return is_close(y, wanted)


def lora_group(owner: Any, name: str, readers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the LoRA layers that compute together with one; () of one alone.

    Args:
        owner: The module that holds them.
        name: The layer's in it.
        readers: input_readers(owner).
    """
    layers = tuple(one for one in readers if is_lora_linear(owner._modules[one]))
    return layers if name in layers and len(layers) > 1 else ()


class _Spy(nn.Module):
    """A linear layer that records a call with the tensor that is looked for."""

    def __init__(self, name: str, sizes: tuple[int, int], given: Tensor, readers: list[str]):
        super().__init__()
        self.in_features, self.out_features = sizes
        self._name, self._given, self._readers = name, given, readers

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x is self._given:
            self._readers.append(self._name)
        return x.new_empty((*x.shape[:-1], self.out_features))


class _Pass(nn.Module):
    """Any other child: a norm, an activation, dropout."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


def input_readers(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the linear layers that a module's forward gives its own input, in order.

    The forward of its class runs on tensors without data, with spies for the layers, until it
    ends or lacks something; q, k and v of attention are called by then. What a module does not
    show in this way is no reader.
    """
    linears = {name: child for name, child in module.named_children() if is_linear(child)}
    if len(linears) < 2:
        return ()
    width = linear_sizes(next(iter(linears.values())))[0]
    given = torch.empty((1, 2, width), device="meta")
    readers: list[str] = []
    children: dict[str, nn.Module] = {
        name: _Spy(name, linear_sizes(child), given, readers) if name in linears else _Pass()
        for name, child in module.named_children()
    }
    clone: Any = probe_copy(module, modules=children)
    with quiet(), warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        # It has no cache, mask or table, and may say so; what it called before counts.
        type(clone).forward(clone, given, **_other_inputs(module))
    # A layer that runs twice is left to itself.
    return tuple(name for name in dict.fromkeys(readers) if readers.count(name) == 1)


def _other_inputs(module: nn.Module) -> dict[str, Any]:
    """Return the arguments of a forward after its input: tables of positions, else None."""
    parameters = list(inspect.signature(original_class(type(module)).forward).parameters.values())
    table = torch.empty((1, 2, getattr(module, "head_dim", 2)), device="meta")
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        p.name: (table, table) if p.name == "position_embeddings" else None
        for p in parameters[2:]
        if p.kind not in rest and (p.default is p.empty or p.name == "position_embeddings")
    }
