"""Trials: an op at small shapes in the form, width and dtype that a module of a model needs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from liger_kernels.compare import FLOOR, CheckResult, check_op
from liger_kernels.ops.launch import backend
from liger_kernels.ops.op import Case
from liger_kernels.transformers.recognise import (
    ExpertsSpec,
    GatedNormSpec,
    LayerNormSpec,
    MlpSpec,
    NormSpec,
    RopeSpec,
    Spec,
)

__all__ = ["try_op"]

# Enough rows of 2048 elements for several programs and their partial sums; few enough that sums
# over them cost no digit.
_ROWS = 33
# Of a loss, whose rows are as wide as the vocabulary. A CPU's product of fewer rows sums a
# vocabulary one by one, and loses a digit.
_LOSS_ROWS = 24
# Of the input of a head or of a whole MLP, whose products are cuBLAS's matter.
_INPUT_WIDTH = 16
# Where a module does not say.
_WIDTH, _HEAD_SIZE, _HEADS = 128, 64, (4, 2)


def try_op(op: str, spec: Spec, module: nn.Module, model: nn.Module) -> CheckResult | None:
    """Return whether an op is right on a model's device in what one of its modules needs.

    Of an MLP that can run as one function, that function is tried too: a failure of it is one of
    the op. Every form is tried once a process. None: untried, because the model is on meta, because
    the device has no fp64 for the truth, or because it is the interpreter's, a tool of the tests.

    Args:
        op: What the module will run.
        spec: What the module computes.
        module: The module.
        model: The model, for its device and dtype and for what its configuration says.
    """
    parameter = next((p for p in model.parameters() if p.dtype in FLOOR), None)
    if parameter is None or parameter.device.type in ("meta", "mps"):
        return None
    if backend(parameter.device) == "triton-interpreter":
        return None
    shape, options = _case(op, spec, module, _text_config(model))
    given = parameter.dtype, parameter.device
    result = _try(op, shape, tuple(options.items()), *given)
    if not result.ok or not isinstance(spec, MlpSpec) or not spec.is_one_function:
        return result
    rows, inner = shape
    forms = {"activation": spec.activation, "layout": options.get("layout", "separate")}
    whole = _try("glu_mlp", (rows, _INPUT_WIDTH, inner), tuple(forms.items()), *given)
    return replace(whole, op=op, ms=result.ms + whole.ms)


@cache
def _try(
    op: str,
    shape: tuple[int, ...],
    options: tuple[tuple[str, Any], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> CheckResult:
    name = "x".join(map(str, shape))
    return check_op(op, device, case=Case(name, shape, dict(options)), dtype=dtype)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _case(op: str, spec: Spec, module: Any, config: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape and options of a case, as the op's sample function reads them."""
    if isinstance(spec, NormSpec):
        options: dict[str, Any] = {"offset": spec.offset, "cast": spec.cast}
        return (_ROWS, _norm_width(module, spec)), options | {"has_weight": spec.has_weight}
    if isinstance(spec, LayerNormSpec):
        options = {"has_weight": spec.has_weight, "has_bias": spec.has_bias}
        return (_ROWS, _norm_width(module, spec)), options
    if isinstance(spec, GatedNormSpec):
        width = _norm_width(module, spec) // spec.num_groups * spec.num_groups
        names = ("gate_first", "activation", "cast", "num_groups", "has_weight")
        return (_ROWS, width), {name: getattr(spec, name) for name in names}
    if isinstance(spec, MlpSpec | ExpertsSpec):
        options = {} if spec.layout in ("separate", "interleaved") else {"layout": "halves"}
        if op == "geglu":
            options["approximate"] = "tanh" if spec.activation == "gelu_tanh" else "none"
        return (_ROWS, _product_width(module, spec)), options
    if isinstance(spec, RopeSpec):
        head_size = getattr(module, "head_dim", None) or _HEAD_SIZE
        table = {"once": "half", "repeated": "interleaved"}.get(spec.angles, "full")
        options = {"style": spec.style, "rotary_dim": head_size, "table": table}
        return (1, _ROWS, *_HEADS, head_size), options
    # What is left is a head.
    vocab_size = int(getattr(module, "out_features", _WIDTH))
    softcap = getattr(config, "final_logit_softcapping", None)
    options = {"softcap": softcap} if softcap else {}
    if op == "cross_entropy":
        return (_LOSS_ROWS, vocab_size), options
    return (_LOSS_ROWS, _INPUT_WIDTH, vocab_size), options


def _norm_width(module: Any, spec: NormSpec | LayerNormSpec | GatedNormSpec) -> int:
    weight = getattr(module, spec.weight_attr, None)
    return _WIDTH if weight is None else int(weight.shape[-1])


def _product_width(module: Any, spec: MlpSpec | ExpertsSpec) -> int:
    gate = getattr(module, spec.gate, None) if isinstance(spec, MlpSpec) else None
    width = getattr(gate, "out_features", None) or 2 * _WIDTH
    return int(width) // (1 if spec.layout == "separate" else 2)
