"""Run a probe: a copy of a module with small random weights, local generators, no side effects."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

# The attribute of a patched class that holds the class it replaces.
BASE_ATTRIBUTE = "_patch_base"


def original_class(cls: type) -> Any:
    """Return the class that a patched class replaces, or cls if it is no patched class."""
    return getattr(cls, BASE_ATTRIBUTE, cls)


@contextmanager
def quiet() -> Iterator[None]:
    """Run probes without gradients, autocast, or a trace in the global random generator."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def probe_copy(
    module: nn.Module,
    parameters: Mapping[str, Tensor] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    attributes: Mapping[str, Any] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return an object of module's original class, with its attributes but other weights.

    Nothing is copied and nothing shared is written: hooks and a bound forward stay behind.
    """
    clone: nn.Module = object.__new__(original_class(type(module)))
    state = {k: v for k, v in vars(module).items() if k not in ("forward", "_old_forward")}
    own = dict(module._parameters)
    own.update({k: nn.Parameter(v, requires_grad=False) for k, v in (parameters or {}).items()})
    state |= {
        "_parameters": own,
        "_modules": {**module._modules, **(modules or {})},
        "_buffers": {**module._buffers, **(buffers or {})},
        "training": False,
        **(attributes or {}),
    }
    clone.__dict__.update(state)
    return clone


def call_forward(module: nn.Module, *args: Any) -> Any:
    """Call the class's forward, not __call__: hooks are the caller's, no part of the formula."""
    return type(module).forward(module, *args)


def forward_inputs(cls: type[nn.Module]) -> tuple[str, ...] | None:
    """Return the names that forward may be given by position; None if it has others too."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.KEYWORD_ONLY for p in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)


def takes_one_tensor(cls: type[nn.Module]) -> bool:
    """Return whether forward is (self, x); a gated norm, (x, gate=None), looks like a plain one."""
    return len(forward_inputs(cls) or ()) == 1


def new_generator() -> torch.Generator:
    """Return a new generator, always of the same numbers."""
    return torch.Generator("cpu").manual_seed(0)


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Return normal numbers in fp32 on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Return numbers from 0.5 to 1.5, in fp32 on the CPU."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") + 0.5


def is_close(value: Any, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    """Return whether a result is a tensor like the wanted one, whatever its dtype."""
    if not isinstance(value, Tensor) or value.shape != wanted.shape:
        return False
    return torch.allclose(value.float(), wanted.float(), atol=tolerance, rtol=tolerance)


def ranked_errors(
    y: Any, candidates: Mapping[tuple[str, ...], Tensor]
) -> list[tuple[float, tuple[str, ...]]] | None:
    """Return (largest error relative to y, key) of each candidate, the best first."""
    if not isinstance(y, Tensor) or any(y.shape != value.shape for value in candidates.values()):
        return None
    scale = y.abs().max().item()
    if not scale:
        return None
    return sorted(((v - y).abs().max().item() / scale, key) for key, v in candidates.items())


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: plain, quantised, or wrapped by an adapter."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features)."""
    return cast(int, linear.in_features), cast(int, linear.out_features)


class Halved(nn.Module):
    """A part of a block that is known: half of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return half of x."""
        return 0.5 * x
