"""OPS: every op of the package, one line each, in the order of reports."""

from __future__ import annotations

from collections.abc import Collection

from liger_kernels.nearest import nearest_name
from liger_kernels.ops.cross_entropy import OP as CROSS_ENTROPY
from liger_kernels.ops.divergence import OP as DIVERGENCE
from liger_kernels.ops.fused_add_rms_norm import OP as FUSED_ADD_RMS_NORM
from liger_kernels.ops.fused_linear_cross_entropy import OP as FUSED_LINEAR_CROSS_ENTROPY
from liger_kernels.ops.fused_linear_divergence import OP as FUSED_LINEAR_DIVERGENCE
from liger_kernels.ops.fused_linear_logprobs import OP as FUSED_LINEAR_LOGPROBS
from liger_kernels.ops.gated_rms_norm import OP as GATED_RMS_NORM
from liger_kernels.ops.glu import GEGLU, SWIGLU
from liger_kernels.ops.glu_mlp import OP as GLU_MLP
from liger_kernels.ops.layer_norm import OP as LAYER_NORM
from liger_kernels.ops.lora_linear import OP as LORA_LINEAR
from liger_kernels.ops.moe_experts import OP as MOE_EXPERTS
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
    GLU_MLP,
    MOE_EXPERTS,
    LORA_LINEAR,
    CROSS_ENTROPY,
    FUSED_LINEAR_CROSS_ENTROPY,
    FUSED_LINEAR_LOGPROBS,
    DIVERGENCE,
    FUSED_LINEAR_DIVERGENCE,
)
OPS: dict[str, Op] = {op.name: op for op in _ROWS}
_FULL_NAMES = {name: op.name for op in _ROWS for name in (op.name, *op.aliases)}


# The names that --ops, --require and coverage use, in the order reports show them.
PATCH_OPS = tuple(op.name for op in _ROWS if op.name in op.patch_names)


def find_op(name: str, among: Collection[str] = tuple(OPS), words: tuple[str, ...] = ()) -> Op:
    """Return the op called `name`, by its full name or an alias; dashes read as underscores.

    Args:
        name: As a user wrote it.
        among: Full names of the ops that are allowed here; all by default.
        words: What else is allowed here, for the message alone.

    Raises:
        ValueError: no such op has that name; the message has the nearest one and all names, or the
            names of the ops that it is a part of.
    """
    wanted = name.strip().lower().replace("-", "_")
    found = OPS[_FULL_NAMES[wanted]] if wanted in _FULL_NAMES else None
    if found is not None and found.name in among:
        return found
    hint = "."
    if found is not None and found.part_of:
        hint = f" here: it runs as a part of {' and '.join(found.patch_names)}."
    elif found is not None and not found.patch_names:
        hint = " here: patching does not use it."
    else:
        names = [alias for alias, full in _FULL_NAMES.items() if full in among]
        if near := nearest_name(wanted, [*names, *words]):
            hint = f"; did you mean {near!r}?"
    raise ValueError(f"unknown op {name!r}{hint} Known: {', '.join((*among, *words))}")
