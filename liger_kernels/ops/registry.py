"""OPS: every op of the package, one line each, in the order of reports."""

from __future__ import annotations

import difflib

from liger_kernels.ops.cross_entropy import OP as CROSS_ENTROPY
from liger_kernels.ops.fused_add_rms_norm import OP as FUSED_ADD_RMS_NORM
from liger_kernels.ops.fused_linear_cross_entropy import LOGPROBS
from liger_kernels.ops.fused_linear_cross_entropy import OP as FUSED_LINEAR_CROSS_ENTROPY
from liger_kernels.ops.gated_rms_norm import OP as GATED_RMS_NORM
from liger_kernels.ops.glu import GEGLU, SWIGLU
from liger_kernels.ops.layer_norm import OP as LAYER_NORM
from liger_kernels.ops.op import Op
from liger_kernels.ops.rms_norm import OP as RMS_NORM
from liger_kernels.ops.rope import OP as ROPE

_ROWS = (
    ROPE,
    RMS_NORM,
    FUSED_ADD_RMS_NORM,
    LAYER_NORM,
    GATED_RMS_NORM,
    SWIGLU,
    GEGLU,
    CROSS_ENTROPY,
    FUSED_LINEAR_CROSS_ENTROPY,
    LOGPROBS,
)
OPS: dict[str, Op] = {op.name: op for op in _ROWS}


def find_op(name: str) -> Op:
    """Return the op called `name`, by its full name or an alias; dashes read as underscores.

    Raises:
        ValueError: no op has that name; the message names the nearest one and all names.
    """
    wanted = name.strip().lower().replace("-", "_")
    names = {alias: op for op in OPS.values() for alias in (op.name, *op.aliases)}
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown op {name!r}{hint} Known: {', '.join(OPS)}")
