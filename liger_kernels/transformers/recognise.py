"""What a module computes, found by running it on small numbers: norm form, MLP layout, RoPE kind.

A probe never touches the module itself. It runs the class's forward on a stand-in that shares the
module's attributes and holds small random weights on the CPU, so it costs the same for a tiny model
and for a 70B one, and works on meta tensors and on quantised or LoRA-wrapped linear layers. Random
numbers come from local generators, and the global one is put back in case a forward draws from it.

Every recogniser returns a spec (the module computes what an op computes), a Refusal (it looks like
a candidate but must be left alone, in words a user can act on), or None (it is something else).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernels.ops.rms_norm import rms_norm_ref

Cast = Literal["mid", "end"]
Layout = Literal["separate", "gate_first", "up_first", "interleaved"]
Style = Literal["half", "pairs", "pairs_to_half"]
# How the function gets its angles: cos and sin as [c, c], [c] or each number twice in a row; or one
# complex tensor instead of the two, for each sample or (T, 1, D / 2) for all of them; or as [c, c]
# of three kinds of positions (3, B, T, D), and how many numbers of a head each kind turns.
Angles = Literal["twice", "once", "repeated", "complex", "complex_shared", "sections"]


@dataclass(frozen=True)
class NormSpec:
    """A root mean square norm: (weight + offset) * x / rms(x), rounded as `cast` says."""

    offset: float
    cast: Cast
    has_weight: bool
    eps_attr: str


@dataclass(frozen=True)
class LayerNormSpec:
    """A layer norm over the last dimension."""

    has_weight: bool
    has_bias: bool
    eps_attr: str


@dataclass(frozen=True)
class MlpSpec:
    """A gated MLP: down(activation(gate(x)) * up(x)); gate and up may be one fused linear layer."""

    layout: Layout
    gate: str
    # The same name as gate when the two are fused.
    up: str
    down: str
    activation: str


@dataclass(frozen=True)
class ExpertsSpec:
    """Experts as 3-D weights, whose gate is computed by `_apply_gate` or between two products."""

    layout: Layout
    activation: str
    # Whether the plain loop over experts is the one `run_experts` does, so that it can be replaced.
    has_plain_loop: bool
    # True: forward takes as many rows for every expert, sorted, and is two products of all experts.
    is_sorted: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """An attention whose forward calls the module-level function `function` to rotate q and k."""

    function: str
    style: Style
    angles: Angles
    # Where cos and sin gain a dimension when the call does not say; -2 counts from the right of q.
    unsqueeze_dim: int
    # True: the function takes one tensor, not q and k.
    is_single: bool
    # True: the result keeps q's dtype even if cos has a wider one.
    keeps_dtype: bool
    # The same of other functions that forward may call instead, as its configuration decides.
    others: tuple[RopeSpec, ...] = ()


@dataclass(frozen=True)
class Tail:
    """What happens to logits before a loss: times scale, then softcap * tanh(logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class HeadSpec:
    """The language-model head: whatever makes its logits is resolved when it is called."""


Spec = NormSpec | LayerNormSpec | MlpSpec | ExpertsSpec | RopeSpec | HeadSpec


@dataclass(frozen=True)
class Refusal:
    """Why a module that looks like a candidate is left as it is."""

    reason: str
    # True: the form is one the ops know, and a setting of this module rules it out.
    is_known_form: bool = False


@dataclass(frozen=True)
class Mismatch(Refusal):
    """A class that does not compute what its family's row says."""


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# The op that computes activation(gate) * up; the other activations have no kernel.
GLU_OPS = {"silu": "swiglu", "gelu_tanh": "geglu", "gelu": "geglu"}

# The attribute of a patched class that holds the class it stands for.
BASE_ATTRIBUTE = "_patch_base"


def original_class(cls: type) -> Any:
    """Return the class that a patched class stands for; any other class is its own."""
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


def stand_in(
    module: nn.Module,
    parameters: Mapping[str, Tensor] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    attributes: Mapping[str, Any] | None = None,
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
        "_buffers": dict(module._buffers),
        "training": False,
        **(attributes or {}),
    }
    clone.__dict__.update(state)
    return clone


def _forward(module: nn.Module, *args: Any) -> Any:
    # The class's forward, not __call__: hooks are the caller's and have no part in the formula.
    return type(module).forward(module, *args)


def _takes_one_tensor(cls: type[nn.Module]) -> bool:
    """Return whether forward is (self, x); a gated norm, (x, gate=None), looks like a plain one."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) == 1 and not any(p.kind is p.KEYWORD_ONLY for p in parameters)


def _generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _close(value: Any, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    if not isinstance(value, Tensor) or value.shape != wanted.shape:
        return False
    return torch.allclose(value.float(), wanted.float(), atol=tolerance, rtol=tolerance)


# Norms ------------------------------------------------------------------------------------------


def recognise_norm(module: nn.Module) -> NormSpec | LayerNormSpec | Refusal | None:
    """Return the form of a norm module, or why it has none that a kernel computes."""
    cls = original_class(type(module))
    is_named_norm = "Norm" in cls.__name__ and not module._modules
    if cls.__module__.startswith("torch.") and cls not in (nn.LayerNorm, nn.RMSNorm):
        return None
    names = set(module._parameters)
    weight = module._parameters.get("weight")
    if weight is None and not is_named_norm:
        return None
    unknown = Refusal("norm of a form that no kernel computes") if is_named_norm else None
    if (
        names - {"weight", "bias"}
        or any(p is not None and p.dim() != 1 for p in module._parameters.values())
        or module._modules
        or module._buffers
    ):
        return unknown
    if not _takes_one_tensor(cls):
        return Refusal("norm with more than one input (gated)") if is_named_norm else None
    try:
        with quiet():
            return _probe_norm(module) or unknown
    except Exception:
        # Whatever the class does with the probe, it is not the formula.
        return unknown


def _probe_norm(module: nn.Module) -> NormSpec | LayerNormSpec | Refusal | None:
    generator = _generator()
    given = module._parameters.get("weight")
    # torch's norms insist on their width; others without a weight take any.
    shape: Any = getattr(module, "normalized_shape", (16,)) if given is None else given.shape
    width = shape[0]
    if width < 2:
        return None
    weight = None if given is None else _uniform(generator, width)
    has_bias = module._parameters.get("bias") is not None
    bias = _randn(generator, width) if has_bias else None
    x = _randn(generator, 16, width)

    def call(
        x: Tensor, dtype: torch.dtype = torch.float32, attributes: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = {"weight": weight, "bias": bias}
        parameters = {k: v.to(dtype) for k, v in tensors.items() if v is not None}
        return _forward(stand_in(module, parameters, attributes=attributes), x)

    def matches(formula: Callable[[Tensor, float], Tensor], eps_attr: str) -> bool:
        # Small inputs let eps decide; another eps in the attribute proves that it is the one read.
        small, eps, moved = 1e-3 * x, getattr(module, eps_attr), 0.37
        return (
            _close(call(x), formula(x, eps))
            and _close(call(small), formula(small, eps))
            and _close(call(small, attributes={eps_attr: moved}), formula(small, moved))
        )

    def layer_norm(x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, (width,), weight, bias, eps)

    def rms_norm(x: Tensor, eps: float, offset: float) -> Tensor:
        return rms_norm_ref(x, weight, eps, offset=offset, cast="end")

    for name in _float_attributes(module):
        if matches(layer_norm, name):
            y = call(x.bfloat16(), torch.bfloat16)
            if y.dtype != torch.bfloat16 or not _close(y, call(x), 3e-2):
                return Refusal("layer norm that rounds in its own way")
            return LayerNormSpec(weight is not None, has_bias, name)
        if has_bias:
            continue
        for offset in (0.0, 1.0) if weight is not None else (0.0,):
            if matches(functools.partial(rms_norm, offset=offset), name):
                rounding = _norm_cast(call, x, weight, getattr(module, name), offset)
                if isinstance(rounding, Refusal):
                    return rounding
                return NormSpec(offset, rounding, weight is not None, name)
    return None


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") + 0.5


def _float_attributes(module: nn.Module) -> list[str]:
    """Return the attributes that may be eps: small positive numbers, the usual names first."""
    names = [k for k, v in vars(module).items() if isinstance(v, float) and 0 < v < 0.1]
    return sorted(names, key=lambda name: "eps" not in name)


def _norm_cast(
    call: Callable[..., Any], x: Tensor, weight: Tensor | None, eps: float, offset: float
) -> Cast | Refusal:
    """Return where the norm rounds: by its bits in bf16, and by its dtype with an fp32 weight."""
    narrow = (3 * x).bfloat16()
    for form in get_args(Cast):
        agrees = True
        for dtype in (torch.bfloat16, torch.float32):
            wanted = rms_norm_ref(
                narrow,
                None if weight is None else weight.to(dtype),
                eps,
                offset=offset,
                cast=form,
            )
            y = call(narrow, dtype)
            # x * rsqrt(v) and x / sqrt(v) differ in the last bit of fp32, which seldom flips one in
            # bf16; another place of rounding flips every fifth.
            agrees &= y.dtype == wanted.dtype and (y != wanted).float().mean().item() < 0.02
        if agrees:
            return cast(Cast, form)
    return Refusal("norm that rounds at a point no kernel reproduces")


# Gated MLPs -------------------------------------------------------------------------------------


class _ProbeLinear(nn.Linear):
    """A linear layer around a given weight; building it draws no random numbers."""

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        # Registered, the weight would go to meta while transformers builds an empty model.
        self._parameters |= {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}


def _sizes(linear: nn.Module) -> tuple[int, int]:
    return cast(int, linear.in_features), cast(int, linear.out_features)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: plain, quantised, or wrapped by an adapter."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)


def recognise_mlp(module: nn.Module) -> MlpSpec | Refusal | None:
    """Return the layout and activation of a gated MLP; a Refusal for other feed-forward modules."""
    cls = original_class(type(module))
    linears = {name: child for name, child in module.named_children() if is_linear(child)}
    others = [child for child in module.children() if not is_linear(child)]
    if len(linears) not in (2, 3) or any(True for m in others for _ in m.parameters()):
        return None
    if module._parameters or module._buffers or not _takes_one_tensor(cls):
        return None
    with quiet():
        found = _probe_mlp(module, linears)
    if found is None and any(word in cls.__name__ for word in ("MLP", "Mlp", "FeedForward")):
        return Refusal("MLP of a form that no kernel computes")
    return found


# Sizes of the probe: rows, and the width of x. The inner width stays the module's own, since some
# forwards split by a stored size.
_ROWS, _WIDTH = 32, 16


def _probe_mlp(module: nn.Module, linears: Mapping[str, nn.Module]) -> MlpSpec | Refusal | None:
    sizes = {name: _sizes(child) for name, child in linears.items()}
    # Any layer may be the last one: names tell nothing, and square layers fit in each place.
    for down, (inner, _) in sizes.items():
        heads = [name for name in sizes if name != down]
        outs = {sizes[name][1] for name in heads}
        is_plain = len(heads) == 1 and outs == {inner}
        if outs != {inner * (3 - len(heads))} and not is_plain:
            continue
        probe = _probe_plain if is_plain else _probe_gated
        try:
            found = probe(module, heads, down, inner)
        except Exception:
            continue
        if found is not None:
            return found
    return None


def _probe_gated(
    module: nn.Module, heads: list[str], down: str, inner: int
) -> MlpSpec | Refusal | None:
    def pair(layers: Mapping[str, nn.Module], x: Tensor) -> dict[tuple[str, ...], Any]:
        if len(heads) == 2:
            a, b = heads
            return {
                ("separate", a, b): (layers[a](x), layers[b](x)),
                ("separate", b, a): (layers[b](x), layers[a](x)),
            }
        (name,) = heads
        h = layers[name](x)
        return {
            ("gate_first", name, name): (h[..., :inner], h[..., inner:]),
            ("up_first", name, name): (h[..., inner:], h[..., :inner]),
            ("interleaved", name, name): (h[..., ::2], h[..., 1::2]),
        }

    def candidates(layers: Mapping[str, nn.Module], x: Tensor) -> dict[tuple[str, ...], Tensor]:
        return {
            (*key, activation): layers[down](function(gate) * up)
            for key, (gate, up) in pair(layers, x).items()
            for activation, function in ACTIVATIONS.items()
        }

    found = _best(module, heads, down, inner, 2 // len(heads), candidates)
    if found is None or isinstance(found, Refusal):
        return found
    layout, gate, up, activation = found
    if activation not in GLU_OPS:
        return Refusal(f"activation {activation} has no kernel", is_known_form=True)
    return MlpSpec(cast(Layout, layout), gate, up, down, activation)


def _probe_plain(module: nn.Module, heads: list[str], down: str, inner: int) -> Refusal | None:
    def candidates(layers: Mapping[str, nn.Module], x: Tensor) -> dict[tuple[str, ...], Tensor]:
        h = layers[heads[0]](x)
        return {(name,): layers[down](function(h)) for name, function in ACTIVATIONS.items()}

    found = _best(module, heads, down, inner, 1, candidates)
    if found is None or isinstance(found, Refusal):
        return found
    return Refusal("plain MLP (no gate): nothing to fuse")


def _best(
    module: nn.Module,
    heads: list[str],
    down: str,
    inner: int,
    width_factor: int,
    candidates: Callable[[Mapping[str, nn.Module], Tensor], dict[tuple[str, ...], Tensor]],
) -> tuple[str, ...] | Refusal | None:
    """Return the key of the one formula that gives the module's output, in training and far out."""
    generator = _generator()
    scale = _WIDTH**-0.5
    layers = {
        name: _ProbeLinear(scale * _randn(generator, width_factor * inner, _WIDTH))
        for name in heads
    }
    layers[down] = _ProbeLinear(inner**-0.5 * _randn(generator, _WIDTH, inner))
    clone = stand_in(module, modules=layers)
    # Pre-activations of spread 3, where gelu and its tanh form differ; small weights hide that.
    x = 3 * _randn(generator, 1, _ROWS, _WIDTH)
    y = _forward(clone, x)
    errors = _errors(y, candidates(layers, x))
    if errors is None:
        return None
    (error, key), (runner_up, _) = errors[:2]
    if error > 2e-5 or runner_up < 5 * max(error, 1e-7):
        return None
    # A clamp inside the gate shows only far out.
    far = _errors(_forward(clone, 30 * x), {key: candidates(layers, 30 * x)[key]})
    if far is None or far[0][0] > 2e-5:
        return Refusal("gated MLP that clamps its activations")
    clone.training = True
    if not torch.equal(_forward(clone, x), y):
        return Refusal("MLP with dropout inside: training and evaluation differ")
    return key


def _errors(
    y: Any, candidates: Mapping[tuple[str, ...], Tensor]
) -> list[tuple[float, tuple[str, ...]]] | None:
    if not isinstance(y, Tensor) or any(y.shape != value.shape for value in candidates.values()):
        return None
    scale = y.abs().max().item()
    if not scale:
        return None
    return sorted(((v - y).abs().max().item() / scale, key) for key, v in candidates.items())


# Experts ----------------------------------------------------------------------------------------


def recognise_experts(module: nn.Module) -> ExpertsSpec | Refusal | None:
    """Return how 3-D experts gate, for modules of transformers' experts interface."""
    fused, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
    if fused is None or down is None or fused.dim() != 3 or down.dim() != 3:
        return None
    cls = original_class(type(module))
    gate = getattr(cls, "_apply_gate", None)
    if gate is None:
        found = _probe_sorted(module, fused, down) if _takes_one_tensor(cls) else None
        return found or Refusal(
            "experts whose activation runs inside their own forward: no place for a kernel"
        )
    inner = fused.shape[2 if getattr(module, "is_transposed", False) else 1] // 2
    try:
        with quiet():
            x = 3 * _randn(_generator(), _ROWS, 2 * inner)
            clone = stand_in(module)
            errors = _errors(gate(clone, x), _gates(x))
            far = _errors(gate(clone, 30 * x), _gates(30 * x))
    except Exception:
        errors = far = None
    if errors is None or far is None or errors[0][0] > 2e-5 or far[0][0] > 2e-5:
        return Refusal("experts with a gate of their own: no kernel")
    layout, activation = errors[0][1]
    if activation not in GLU_OPS:
        return Refusal(f"activation {activation} has no kernel", is_known_form=True)
    return ExpertsSpec(cast(Layout, layout), activation, _has_plain_loop(module))


def _gates(x: Tensor) -> dict[tuple[str, ...], Tensor]:
    return {
        (layout, name): function(gate) * up
        for layout in ("gate_first", "interleaved")
        for gate, up in (split_gate(x, layout),)
        for name, function in ACTIVATIONS.items()
    }


def split_gate(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return views (gate, up) of x (..., 2 * I) in one of the fused layouts."""
    if layout == "interleaved":
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return (first, second) if layout == "gate_first" else (second, first)


def run_experts(
    module: Any,
    hidden: Tensor,  # (T, H)
    expert_ids: Tensor,  # (T, K), num_experts or more where a slot is empty
    weights: Tensor,  # (T, K)
    gate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the weighted sum of each token's experts: transformers' eager loop."""
    out = torch.zeros_like(hidden)
    for expert in expert_ids.unique().tolist():
        if expert >= module.gate_up_proj.shape[0]:
            continue
        slot, token = torch.where(expert_ids.t() == expert)
        h = F.linear(hidden[token], module.gate_up_proj[expert])
        h = F.linear(gate(h), module.down_proj[expert]) * weights[token, slot, None]
        out.index_add_(0, token, h.to(out.dtype))
    return out


def _has_plain_loop(module: nn.Module) -> bool:
    """Return whether the class's own (eager) forward is the loop of `run_experts`."""
    cls: Any = original_class(type(module))
    # transformers' decorator chooses an implementation by name and keeps the eager one here.
    loop = getattr(cls.forward, "__wrapped__", None)
    fused = module._parameters["gate_up_proj"]
    if loop is None or fused is None:
        return False
    generator = _generator()
    num_experts, inner, width, num_tokens = fused.shape[0], 4, 6, 5
    parameters = {
        "gate_up_proj": _randn(generator, num_experts, 2 * inner, width),
        "down_proj": _randn(generator, num_experts, width, inner),
    }
    hidden = _randn(generator, num_tokens, width)
    ids = torch.randint(num_experts, (num_tokens, 2), generator=generator, device="cpu")
    weights = _uniform(generator, num_tokens, 2)
    clone = stand_in(module, parameters)
    try:
        with quiet():
            gate = functools.partial(cls._apply_gate, clone)
            wanted = run_experts(clone, hidden, ids, weights, gate)
            return _close(loop(clone, hidden, ids, weights), wanted)
    except Exception:
        return False


def _probe_sorted(module: nn.Module, fused: Tensor, down: Tensor) -> ExpertsSpec | Refusal | None:
    """Return the gate of experts that each take their share of the rows, in one product of all."""
    num_experts, wide, twice = fused.shape
    if down.shape != (num_experts, twice // 2, wide):
        return None
    generator = _generator()
    inner, width = 24, 16
    parameters = {
        "gate_up_proj": width**-0.5 * _randn(generator, num_experts, width, 2 * inner),
        "down_proj": inner**-0.5 * _randn(generator, num_experts, inner, width),
    }
    # Sizes that forward may read; of other names it would fail on the small weights.
    sizes = {"hidden_size": width, "intermediate_size": inner, "expert_dim": inner}
    sizes = {name: size for name, size in sizes.items() if name in vars(module)}
    clone = stand_in(module, parameters, attributes=sizes)
    x = 3 * _randn(generator, num_experts * _ROWS, width)

    def candidates(x: Tensor) -> dict[tuple[str, ...], Tensor]:
        h = torch.bmm(x.view(num_experts, -1, width), parameters["gate_up_proj"])
        return {
            key: torch.bmm(gated, parameters["down_proj"]).view(-1, width)
            for key, gated in _gates(h).items()
        }

    try:
        with quiet():
            errors = _errors(_forward(clone, x), candidates(x))
            far = _errors(_forward(clone, 30 * x), candidates(30 * x))
    except Exception:
        return None
    if errors is None or far is None or errors[0][0] > 2e-5 or far[0][0] > 2e-5:
        return None
    layout, activation = errors[0][1]
    if activation not in GLU_OPS:
        return Refusal(f"activation {activation} has no kernel", is_known_form=True)
    return ExpertsSpec(cast(Layout, layout), activation, has_plain_loop=False, is_sorted=True)


# RoPE -------------------------------------------------------------------------------------------


def reachable_functions(function: Callable[..., Any]) -> list[types.FunctionType]:
    """Return a function and those hidden in its decorators' closures."""
    found: list[types.FunctionType] = []
    waiting: list[Any] = [function]
    while waiting:
        current = waiting.pop()
        current = getattr(current, "__func__", current)
        if not isinstance(current, types.FunctionType) or current in found:
            continue
        found.append(current)
        waiting.append(getattr(current, "__wrapped__", None))
        for cell in current.__closure__ or ():
            # An empty cell belongs to a function that is still being defined.
            try:
                waiting.append(cell.cell_contents)
            except ValueError:
                continue
    return found


def rope_functions(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Return the module-level functions that forward calls to rotate, by their global name."""
    found = {}
    for function in reachable_functions(cls.forward):
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            is_rotary = "apply" in name and ("rotary" in name or "rope" in name)
            if is_rotary and callable(value) and not isinstance(value, type):
                found[name] = value
    return found


def recognise_rope(module: nn.Module) -> RopeSpec | Refusal | None:
    """Return how an attention rotates, or why no kernel does it; None where it rotates nothing."""
    functions = rope_functions(original_class(type(module)))
    if not functions:
        return None
    specs = []
    for name, function in sorted(functions.items()):
        try:
            with quiet():
                spec = _probe_rope(name, function)
        except Exception:
            spec = None
        if spec is None:
            return Refusal(f"{name} rotates in a way that no kernel does")
        specs.append(spec)
    return replace(specs[0], others=tuple(specs[1:]))


_BATCH, _TOKENS, _HEADS, _KV_HEADS, _HEAD_DIM = 2, 5, 4, 3, 16


def _probe_rope(name: str, function: Callable[..., Any]) -> RopeSpec | None:
    is_single = rope_inputs(function) == 1
    generator = _generator()
    # Forms that a narrow rotation answered with none of the styles: a whole head cannot tell which
    # of its numbers they turn (deepseek_v4 turns the last ones).
    elsewhere: set[tuple[int, str]] = set()
    # A narrower rotation than the head, and the whole head.
    for rotary_dim in (_HEAD_DIM // 2, _HEAD_DIM):
        angles = _randn(generator, _BATCH, _TOKENS, rotary_dim // 2)
        for unsqueeze_dim in (1, -2):
            inputs = [
                _randn(generator, _BATCH, n, _TOKENS, _HEAD_DIM)
                if unsqueeze_dim == 1
                else _randn(generator, _BATCH, _TOKENS, n, _HEAD_DIM)
                for n in (_HEADS, _KV_HEADS)[: 1 if is_single else 2]
            ]
            for layout in get_args(Angles):
                given = angles[:1] if layout == "complex_shared" else angles
                tables = _tables(given, layout)
                try:
                    outputs = _as_tuple(function(*inputs, *tables))
                except Exception:
                    continue
                if (unsqueeze_dim, layout) in elsewhere:
                    continue
                elsewhere.add((unsqueeze_dim, layout))
                for style in get_args(Style):
                    wanted = [rotate(x, given, style, unsqueeze_dim) for x in inputs]
                    if len(outputs) == len(wanted) and all(map(_close, outputs, wanted)):
                        narrow = _as_tuple(function(*(x.bfloat16() for x in inputs), *tables))
                        keeps_dtype = narrow[0].dtype == torch.bfloat16
                        return RopeSpec(name, style, layout, unsqueeze_dim, is_single, keeps_dtype)
    return None


def rope_parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a rotary function's parameters."""
    # With the `kernels` package the function is a module, whose __call__ has no names.
    called = function.forward if isinstance(function, nn.Module) else function
    return tuple(inspect.signature(called).parameters)


def rope_inputs(function: Callable[..., Any]) -> int:
    """Return how many tensors a rotary function turns: those before its angles."""
    names = rope_parameters(function)
    is_angle = [name == "cos" or name.startswith("freqs") for name in names]
    return is_angle.index(True)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _tables(angles: Tensor, layout: Angles) -> tuple[Any, ...]:
    cos, sin = angles.cos(), angles.sin()
    if layout == "complex":
        return (torch.complex(cos, sin),)
    if layout == "complex_shared":
        return (torch.complex(cos, sin)[0].unsqueeze(1),)
    if layout == "twice":
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    if layout == "sections":
        quarter = angles.shape[-1] // 4
        sizes = [quarter, quarter, angles.shape[-1] - 2 * quarter]
        # Each kind of positions has the angles of its own section, and others elsewhere.
        kind = torch.arange(3).repeat_interleave(torch.tensor(sizes))
        kinds = [torch.where(kind == i, angles, angles + i + 1) for i in range(3)]
        three = torch.stack([torch.cat((table, table), -1) for table in kinds])
        return three.cos(), three.sin(), sizes
    if layout == "repeated":
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    return cos, sin


def rotate(x: Tensor, angles: Tensor, style: str, unsqueeze_dim: int) -> Tensor:
    """Return x with the first 2 * angles.shape[-1] numbers of each head rotated: the definition."""
    cos, sin = (t.unsqueeze(unsqueeze_dim) for t in (angles.cos(), angles.sin()))
    rotary_dim = 2 * angles.shape[-1]
    turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
    if style == "half":
        a, b = turned.chunk(2, dim=-1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
    parts = (a * cos - b * sin, b * cos + a * sin)
    if style == "pairs":
        turned = torch.stack(parts, -1).flatten(-2)
    else:
        turned = torch.cat(parts, -1)
    return torch.cat((turned, kept), -1)


# All together -----------------------------------------------------------------------------------


class Recogniser:
    """Recognises modules of one model; equal modules are probed once.

    Lives as long as one plan: its keys name objects by id, which only holds while the model does.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def recognise(self, module: nn.Module) -> Spec | Refusal | None:
        """Return what a module computes, why it is left alone, or None if it is nothing known."""
        if isinstance(module, torch.jit.ScriptModule):
            return None
        key = _fingerprint(module)
        if key not in self._known:
            self._known[key] = (
                recognise_norm(module)
                or recognise_experts(module)
                or recognise_mlp(module)
                or self._rope(module)
            )
        return self._known[key]

    def _rope(self, module: nn.Module) -> RopeSpec | Refusal | None:
        # Decided by the class alone, while two attentions seldom have the same attributes.
        cls = original_class(type(module))
        if cls not in self._known:
            self._known[cls] = recognise_rope(module)
        return self._known[cls]


# What a module carries besides the numbers its forward reads.
_BOOKKEEPING = {*vars(nn.Module()), "forward", "layer_idx", "_old_forward", "_hf_hook"}


def _fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Return what a forward may depend on besides the values of weights."""
    children = tuple(
        (name, *_sizes(child))
        if is_linear(child)
        else (name, type(child), _attributes(child), *map(id, child.children()))
        for name, child in module.named_children()
    )
    shapes = tuple(
        (k, None if p is None else tuple(p.shape)) for k, p in module._parameters.items()
    )
    return (original_class(type(module)), _attributes(module), shapes, children)


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, value if isinstance(value, (bool, int, float, str, type(None))) else id(value))
        for name, value in vars(module).items()
        if name not in _BOOKKEEPING
    )
