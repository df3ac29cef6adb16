"""Self-check: try an op at small shapes in the form, width and dtype that a module needs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from liger_kernels.compare import FLOOR, CheckResult, check_op
from liger_kernels.ops.backend import backend
from liger_kernels.ops.op import Case
from liger_kernels.transformers.recognise import Spec
from liger_kernels.transformers.replacements.table import trial_cases

__all__ = ["try_op"]


def try_op(op: str, spec: Spec, module: nn.Module, model: nn.Module) -> CheckResult | None:
    """Check an op against fp64 on a model's device, in the form that one of its modules needs.

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
    ms = 0.0
    for name, shape, options in trial_cases(op, spec, module, _text_config(model)):
        result = _try(name, shape, tuple(options.items()), parameter.dtype, parameter.device)
        ms += result.ms
        if not result.ok:
            break
    return replace(result, op=op, ms=ms)


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
