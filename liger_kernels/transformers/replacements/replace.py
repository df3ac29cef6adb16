"""Replacements: a subclass for each recognised class, and swapping an instance's class for it.

A patched class adds one forward (or one gate) to the class it stands for and keeps its name, so
isinstance, state_dict, print, deepcopy and save_pretrained see no difference. Its forward reads the
instance's own parameters and calls its own children as modules: nothing is copied, hooks, adapters
and quantised layers keep working. Patched classes are cached and remade by name when unpickled.

A forward gives way to the one it replaces when the call is not the plain one: extra arguments,
tensor subclasses (a sharded DTensor), dtypes other than fp32, bf16 and fp16, meta tensors; and when
the module is not what it was patched as: another activation or setting, another forward of its
class, a weight of another shape. Weights, layers and eps are read at every call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernels.ops import gated_rms_norm, geglu, glu_mlp, layer_norm, rms_norm, swiglu
from liger_kernels.transformers.recognise import (
    ACTIVATIONS,
    ExpertsSpec,
    GatedNormSpec,
    LayerNormSpec,
    MlpSpec,
    NormSpec,
    RopeSpec,
    Spec,
    global_names,
    reachable_functions,
    run_experts,
    split_gate,
)
from liger_kernels.transformers.replacements.attention import attention_forward, globals_read
from liger_kernels.transformers.replacements.calls import (
    is_bare,
    is_plain,
    is_transformed,
    note,
    runs_stock_linear,
)
from liger_kernels.transformers.replacements.recompute import hooks_are_free, recomputing, remember
from liger_kernels.transformers.replacements.subclasses import is_as_patched, stand_in

_AnyNorm = NormSpec | LayerNormSpec | GatedNormSpec


def patched_class(base: Any, spec: Spec, saves_memory: bool = True) -> type[nn.Module]:
    """Return the subclass of `base` that computes what `spec` says through an op.

    Args:
        base: The class it replaces.
        spec: What modules of the class compute.
        saves_memory: Whether outputs that are cheap to recompute are not kept for backward.
    """
    # A tool may give a class another forward between one call and the next.
    code: tuple[Any, ...] = (base.forward,)
    if isinstance(spec, ExpertsSpec) and not spec.is_sorted:
        code = (base.forward, base._apply_gate)
    elif isinstance(spec, RopeSpec):
        code = (base.forward, *(value for _, _, value in globals_read(base, spec)))
    return _patched_class(base, _Same(code), spec, saves_memory)


class _Same:
    """A key that equals another of the same objects, which need no hash."""

    def __init__(self, objects: tuple[Any, ...]) -> None:
        self.objects = objects

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.objects)))


@functools.cache
def _patched_class(base: Any, code: _Same, spec: Spec, saves_memory: bool) -> type[nn.Module]:
    if isinstance(spec, NormSpec):
        namespace: dict[str, Any] = {"forward": _rms_norm_forward(base, spec)}
    elif isinstance(spec, LayerNormSpec):
        namespace = {"forward": _layer_norm_forward(base, spec)}
    elif isinstance(spec, GatedNormSpec):
        namespace = {"forward": _gated_norm_forward(base, spec)}
    elif isinstance(spec, MlpSpec):
        namespace = {"forward": _mlp_forward(base, spec)}
    elif isinstance(spec, ExpertsSpec) and spec.is_sorted:
        namespace = {"forward": _sorted_experts_forward(base, spec)}
    elif isinstance(spec, ExpertsSpec):
        namespace = _experts_namespace(base, spec)
    else:
        assert isinstance(spec, RopeSpec), "heads belong to head_patch.py"
        namespace = {"forward": attention_forward(base, spec)}
    namespace["_saves_memory"] = saves_memory
    reads = frozenset() if isinstance(spec, RopeSpec) else _names_read(base) - _names_live(spec)
    return stand_in(base, spec, namespace, make_patched, saves_memory, reads=reads)


def _names_read(base: Any) -> frozenset[str]:
    """Return the names that the forward of a class, its gate and its methods look up."""
    names: set[str] = set()
    waiting = [base.forward, getattr(base, "_apply_gate", None)]
    while waiting:
        for function in reachable_functions(waiting.pop()):
            new = global_names(function.__code__) - names
            names |= new
            methods = (getattr(base, name, None) for name in new if not hasattr(nn.Module, name))
            waiting += filter(inspect.isfunction, methods)
    return frozenset(names - vars(nn.Module()).keys())


def _names_live(spec: Spec) -> set[str]:
    """Return the attributes that a replaced forward reads itself, at every call."""
    if isinstance(spec, MlpSpec):
        return {spec.gate, spec.up, spec.down, "config"}
    if isinstance(spec, (NormSpec, LayerNormSpec, GatedNormSpec)):
        return {spec.eps_attr}
    return {"config"}


def make_patched(base: Any, spec: Spec, saves_memory: bool = True) -> nn.Module:
    """Return an empty patched instance; pickle and deepcopy fill it."""
    cls: Any = patched_class(base, spec, saves_memory)
    return cls.__new__(cls)


def norm_inputs(module: Any, spec: _AnyNorm, x: Any) -> tuple[Tensor | None, float] | None:
    """Return the weight and eps that a patched norm has at this call, or None to run its own code.

    Args:
        module: The norm.
        spec: The form that it had when it was patched.
        x: Its input, of any type.
    """
    if not is_as_patched(module):
        return None
    weight = _parameter(module, spec.weight_attr, spec.has_weight)
    eps = getattr(module, spec.eps_attr, None) if spec.eps is None else spec.eps
    if not is_plain(x, weight) or x is None or not isinstance(eps, (float, int)) or eps < 0:
        return None
    if not _fits(weight, spec.has_weight, x):
        return None
    return weight, eps


def _parameter(module: Any, name: str, is_wanted: bool) -> Any:
    """Return a norm's weight or bias; where it had none, what was registered as one since."""
    # What wraps a module may keep the weight as a plain attribute; a buffer is no weight.
    return getattr(module, name, None) if is_wanted else module._parameters.get(name)


def _fits(parameter: Tensor | None, is_wanted: bool, x: Tensor) -> bool:
    """Return whether a norm still has a parameter, of x's width, or still has none."""
    if parameter is None or not is_wanted:
        return parameter is None and not is_wanted
    return parameter.dim() == 1 and x.dim() > 0 and parameter.shape[0] == x.shape[-1]


def _run(module: Any, op: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Return op(*tensors), noted as something that is cheap to make again."""
    y = op(*tensors)
    # A frozen norm whose input has no gradient keeps nothing to make its output from.
    if module._saves_memory and y.requires_grad:
        remember(y, functools.partial(op, *(None if x is None else x.detach() for x in tensors)))
    return y


def _rms_norm_forward(base: Any, spec: NormSpec) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = norm_inputs(self, spec, args[0]) if len(args) == 1 and not kwargs else None
        if found is None:
            return base.forward(self, *args, **kwargs)
        (x,), (weight, eps) = args, found
        if spec.needs_one_dtype and weight is not None and weight.dtype != x.dtype:
            return base.forward(self, x)
        note(self)
        if spec.is_l2:
            return _l2_norm(x, eps)
        op = functools.partial(rms_norm, eps=eps, offset=spec.offset, cast=spec.cast)
        return _run(self, op, x, weight)

    return forward


def _l2_norm(x: Tensor, eps: float) -> Tensor:
    # The root of a sum is that of a mean times the root of the width.
    width = x.shape[-1]
    weight = torch.full((width,), width**-0.5, dtype=torch.float32, device=x.device)
    return rms_norm(x, weight, eps / width, cast="end")


def _layer_norm_forward(base: Any, spec: LayerNormSpec) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = norm_inputs(self, spec, args[0]) if len(args) == 1 and not kwargs else None
        bias = _parameter(self, spec.bias_attr, spec.has_bias)
        if found is None or not is_plain(bias) or not _fits(bias, spec.has_bias, args[0]):
            return base.forward(self, *args, **kwargs)
        (x,), (weight, eps) = args, found
        if spec.offset:
            # Nemotron casts in a way of its own under autocast.
            if torch.is_autocast_enabled(x.device.type):
                return base.forward(self, x)
            weight = None if weight is None else weight + spec.offset
        note(self)
        op = functools.partial(layer_norm, eps=eps)
        return _run(self, op, x, weight, bias)

    return forward


def _gated_norm_forward(base: Any, spec: GatedNormSpec) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given: dict[str, Any] = {**dict(zip(spec.inputs, args, strict=False)), **kwargs}
        x: Any = given.get(spec.inputs[0])
        gate = given.get(spec.inputs[1])
        is_extra = len(given) != 2 or len(args) + len(kwargs) != 2
        found = None if is_extra else norm_inputs(self, spec, x)
        if found is None or gate is None or not is_plain(gate) or gate.shape != x.shape:
            return base.forward(self, *args, **kwargs)
        weight, eps = found
        if weight is None:
            return base.forward(self, *args, **kwargs)
        note(self)
        return gated_rms_norm(
            x,
            gate,
            weight,
            eps,
            gate_first=spec.gate_first,
            activation=spec.activation,
            cast=spec.cast,
            num_groups=spec.num_groups,
        )

    return forward


def _glu(module: nn.Module, activation: str, gate: Tensor, up: Tensor) -> Tensor:
    if not is_plain(gate, up) or gate.shape != up.shape:
        return ACTIVATIONS[activation](gate) * up
    note(module)
    if activation == "silu":
        return swiglu(gate, up)
    return geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")


def _mlp_forward(base: Any, spec: MlpSpec) -> Callable[..., Any]:
    layers = (spec.gate, spec.up, spec.down)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The activation is not called: a hook on it is the stock forward's to run.
        others = (child for name, child in self._modules.items() if name not in layers)
        is_plain_call = len(args) == 1 and not kwargs and not is_transformed()
        if not is_plain_call or not is_as_patched(self):
            return base.forward(self, *args, **kwargs)
        if not all(child is None or is_bare(child) for child in others):
            return base.forward(self, *args, **kwargs)
        (x,) = args
        weights = _weights_of(self, spec, x)
        if weights is not None:
            note(self)
            with recomputing(x):
                keeps = not self._saves_memory
                return glu_mlp(x, *weights, activation=spec.activation, keeps_product=keeps)
        with recomputing(x):
            gate = getattr(self, spec.gate)(x)
            if spec.layout == "separate":
                # After the gate, as the class does it: adapters with dropout draw in this order.
                up = getattr(self, spec.up)(x)
            else:
                gate, up = split_gate(gate, spec.layout)
        h = _run(self, functools.partial(_glu, self, spec.activation), gate, up)
        with recomputing(h):
            return getattr(self, spec.down)(h)

    return forward


def _weights_of(
    module: Any, spec: MlpSpec, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """Return the weights of an MLP that is plain enough to run as one function, else None.

    Inside a checkpoint it is not: that stops making activations again before the last product.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not is_plain(x):
        return None
    if torch.is_autocast_enabled(x.device.type) or not hooks_are_free():
        return None
    if not spec.is_one_function:
        return None
    names = (spec.gate, spec.up, spec.down) if spec.layout == "separate" else (spec.gate, spec.down)
    layers = [getattr(module, name) for name in names]
    weights = [layer.weight for layer in layers if _is_plain_linear(layer)]
    if len(weights) < len(layers) or not is_plain(*weights):
        return None
    if any(w.dtype != x.dtype or w.device != x.device for w in weights):
        return None
    first, *middle, last = weights
    return first, middle[0] if middle else None, last


def _is_plain_linear(layer: nn.Module) -> bool:
    """Return whether calling the layer is its product with its weight, and nothing else."""
    is_linear = type(layer) is nn.Linear and runs_stock_linear(layer)
    return is_linear and layer.bias is None and is_bare(layer)


def _sorted_experts_forward(base: Any, spec: ExpertsSpec) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_plain_call = len(args) == 1 and not kwargs and is_as_patched(self)
        if not is_plain_call or not is_plain(args[0], self.gate_up_proj, self.down_proj):
            return base.forward(self, *args, **kwargs)

        (x,) = args
        num_experts, width, _ = self.gate_up_proj.shape
        h = torch.bmm(x.view(num_experts, -1, width), self.gate_up_proj)
        h = _glu(self, spec.activation, *split_gate(h, spec.layout))
        return torch.bmm(h, self.down_proj).view(-1, width)

    return forward


def _experts_namespace(base: Any, spec: ExpertsSpec) -> dict[str, Any]:
    stock_gate = base._apply_gate

    def _apply_gate(self: Any, gate_up_out: Tensor) -> Tensor:
        if base._apply_gate is not stock_gate or not is_as_patched(self):
            gated: Tensor = base._apply_gate(self, gate_up_out)
            return gated
        return _glu(self, spec.activation, *split_gate(gate_up_out, spec.layout))

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The eager loop computes the gate in line; the grouped and batched ones call _apply_gate.
        is_eager = getattr(self.config, "_experts_implementation", None) in (None, "eager")
        is_plain_call = len(args) == 3 and not kwargs and is_as_patched(self)
        if is_eager and is_plain_call and is_plain(args[0]):
            hidden, experts, weights = args
            return run_experts(self, hidden, experts, weights, self._apply_gate)
        return base.forward(self, *args, **kwargs)

    gate = {"_apply_gate": functools.wraps(base._apply_gate)(_apply_gate)}
    return {**gate, "forward": forward} if spec.has_plain_loop else gate
