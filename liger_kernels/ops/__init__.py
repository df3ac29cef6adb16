"""Fused operations. Each runs Triton kernels on a GPU and torch code elsewhere."""

from liger_kernels.ops.cross_entropy import cross_entropy
from liger_kernels.ops.divergence import divergence
from liger_kernels.ops.fused_add_rms_norm import fused_add_rms_norm
from liger_kernels.ops.fused_linear_cross_entropy import (
    LabelCount,
    Stats,
    count_labels,
    fused_linear_cross_entropy,
)
from liger_kernels.ops.fused_linear_divergence import fused_linear_divergence
from liger_kernels.ops.fused_linear_logprobs import fused_linear_logprobs
from liger_kernels.ops.gated_rms_norm import gated_rms_norm
from liger_kernels.ops.glu import geglu, swiglu
from liger_kernels.ops.glu_mlp import glu_mlp
from liger_kernels.ops.layer_norm import layer_norm
from liger_kernels.ops.lora_linear import lora_linear
from liger_kernels.ops.moe_experts import moe_experts
from liger_kernels.ops.rms_norm import rms_norm
from liger_kernels.ops.rope import rope
from liger_kernels.ops.sequence_sums import sequence_sums

__all__ = [
    "LabelCount",
    "Stats",
    "count_labels",
    "cross_entropy",
    "divergence",
    "fused_add_rms_norm",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "fused_linear_logprobs",
    "gated_rms_norm",
    "geglu",
    "glu_mlp",
    "layer_norm",
    "lora_linear",
    "moe_experts",
    "rms_norm",
    "rope",
    "sequence_sums",
    "swiglu",
]
