"""Gated MLPs: which layers make gate and up, how they are laid out, and the activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from liger_kernels.transformers.recognise.probe import (
    call_forward,
    is_linear,
    linear_sizes,
    new_generator,
    original_class,
    probe_copy,
    quiet,
    randn,
    ranked_errors,
    takes_one_tensor,
)
from liger_kernels.transformers.recognise.specs import (
    ACTIVATIONS,
    GLU_OPS,
    Layout,
    MlpSpec,
    Refusal,
    other_activation,
    unserved,
)

Activations = Mapping[str, Callable[[Tensor], Tensor]]

CLAMPS = "gate that clamps its inputs"
SHIFTS = "gate that is multiplied with up + 1"
# Sizes of the probe: rows, and the width of x. The inner width stays the module's own, since some
# forwards split by a stored size.
_ROWS, _WIDTH = 32, 16


class ProbeLinear(nn.Linear):
    """A linear layer around a given weight; building it draws no random numbers."""

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        # Registered, the weight would go to meta while transformers builds an empty model.
        self._parameters |= {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}


def recognise_mlp(module: nn.Module) -> MlpSpec | Refusal | None:
    """Return the layout and activation of a gated MLP; a Refusal for other feed-forward modules."""
    cls = original_class(type(module))
    linears = {name: child for name, child in module.named_children() if is_linear(child)}
    others = [child for child in module.children() if not is_linear(child)]
    if len(linears) not in (2, 3) or any(True for m in others for _ in m.parameters()):
        return None
    if module._parameters or module._buffers or not takes_one_tensor(cls):
        return None
    own = {type(child).__name__: child for child in others}
    with quiet():
        found = (
            _probe(module, linears, ACTIVATIONS)
            or _probe(module, linears, own)
            or _probe(module, linears, ACTIVATIONS, is_near=True)
        )
    if found is None and any(word in cls.__name__ for word in ("MLP", "Mlp", "FeedForward")):
        return unserved("MLP of another form")
    return found


def _probe(
    module: nn.Module,
    linears: Mapping[str, nn.Module],
    activations: Activations,
    *,
    is_near: bool = False,
) -> MlpSpec | Refusal | None:
    """Return the form of an MLP with one of these activations.

    is_near: Whether to look for its form near 0 alone, to name the difference elsewhere.
    """
    sizes = {name: linear_sizes(child) for name, child in linears.items()}
    # Any layer may be the last one: names tell nothing, and square layers fit in each place.
    for down, (inner, _) in sizes.items():
        heads = [name for name in sizes if name != down]
        outs = {sizes[name][1] for name in heads}
        is_plain = len(heads) == 1 and outs == {inner}
        if outs != {inner * (3 - len(heads))} and not is_plain:
            continue
        probe = _probe_plain if is_plain else _probe_near if is_near else _probe_gated
        try:
            found = probe(_Trial(module, heads, down, inner), activations)
        except Exception:
            continue
        if found is not None:
            return found
    return None


class _Trial:
    """A probe copy of an MLP with small linear layers, and an input."""

    def __init__(self, module: nn.Module, heads: list[str], down: str, inner: int) -> None:
        self.heads, self.inner = heads, inner
        generator = new_generator()
        sizes = {name: linear_sizes(getattr(module, name))[1] for name in heads}
        self.layers: dict[str, nn.Module] = {
            name: ProbeLinear(_WIDTH**-0.5 * randn(generator, size, _WIDTH))
            for name, size in sizes.items()
        }
        self.down = self.layers[down] = ProbeLinear(inner**-0.5 * randn(generator, _WIDTH, inner))
        # Activations, and dropout, which a probe copy turns off.
        others = {n: probe_copy(m) for n, m in module.named_children() if n not in self.layers}
        # An activation that its configuration names may change there, which nobody would see.
        hidden = {"config": None} if "config" in vars(module) else {}
        self.clone = probe_copy(module, modules={**others, **self.layers}, attributes=hidden)
        # Pre-activations of spread 3, where gelu and its tanh form differ; small weights hide that.
        self.x = 3 * randn(generator, 1, _ROWS, _WIDTH)

    def call(self, scale: float = 1.0) -> Tensor:
        y: Tensor = call_forward(self.clone, scale * self.x)
        return y

    def errors(
        self, activations: Activations, scale: float = 1.0, shift: float = 0.0
    ) -> list[tuple[float, tuple[str, ...]]]:
        """Return the error of each layout and activation, the best first."""
        candidates = {
            (*key, activation): self.down(function(gate) * (up + shift))
            for key, (gate, up) in self._pairs(scale * self.x).items()
            for activation, function in activations.items()
        }
        return ranked_errors(self.call(scale), candidates) or []

    def _pairs(self, x: Tensor) -> dict[tuple[str, ...], tuple[Tensor, Tensor]]:
        if len(self.heads) == 2:
            a, b = self.heads
            first, second = self.layers[a](x), self.layers[b](x)
            return {("separate", a, b): (first, second), ("separate", b, a): (second, first)}
        (name,) = self.heads
        h = self.layers[name](x)
        first, second = h[..., : self.inner], h[..., self.inner :]
        return {
            ("gate_first", name, name): (first, second),
            ("up_first", name, name): (second, first),
            ("interleaved", name, name): (h[..., ::2], h[..., 1::2]),
        }


def _probe_gated(trial: _Trial, activations: Activations) -> MlpSpec | Refusal | None:
    key = _clear_winner(trial.errors(activations))
    if key is None:
        return None
    # A clamp inside the gate shows only far out.
    far = {k: error for error, k in trial.errors(activations, 30.0)}
    if not far.get(key, 1.0) < 2e-5:
        return unserved(CLAMPS)
    y = trial.call()
    for part in (trial.clone, *trial.clone.children()):
        part.training = True
    if not torch.equal(trial.call(), y):
        return Refusal(
            "MLP with dropout inside, which no kernel draws: set it to 0 in the configuration"
        )
    layout, gate, up, activation = key
    if activation not in GLU_OPS:
        return other_activation(activation)
    down = next(name for name, layer in trial.layers.items() if layer is trial.down)
    return MlpSpec(cast(Layout, layout), gate, up, down, activation)


def _probe_near(trial: _Trial, activations: Activations) -> Refusal | None:
    """Return how a gate with an activation near 0 differs far from it, as by a limit."""
    for shift, what in ((0.0, CLAMPS), (1.0, SHIFTS)):
        errors = trial.errors(activations, 0.1, shift)
        if errors and errors[0][0] < 2e-5:
            return unserved(what)
    return None


def _probe_plain(trial: _Trial, activations: Activations) -> Refusal | None:
    h = trial.layers[trial.heads[0]](trial.x)
    candidates: dict[tuple[str, ...], Tensor] = {
        (name,): trial.down(function(h)) for name, function in activations.items()
    }
    if _clear_winner(ranked_errors(trial.call(), candidates) or []) is None:
        return None
    return Refusal("plain MLP (no gate): nothing to fuse")


def _clear_winner(errors: list[tuple[float, tuple[str, ...]]]) -> tuple[str, ...] | None:
    """Return the key of the one formula that gives the module's output."""
    if not errors:
        return None
    (error, key), *others = errors
    is_clear = not others or others[0][0] >= 5 * max(error, 1e-7)
    # gate * up alone is the same in both orders, and served in neither.
    return key if error <= 2e-5 and (is_clear or key[-1] == "linear") else None
