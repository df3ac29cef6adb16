"""Launching: what the host remembers of a kernel, and what a tracer sees of an op.

No GPU is needed: Triton compiles for one, and a driver that launches nothing notes what it is given.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from liger_kernels.ops import launch
from liger_kernels.ops.launch import QuickKernel, sum_partials_kernel, tl, triton
from liger_kernels.ops.rms_norm_kernel import rms_norm_bwd_kernel, rms_norm_fwd_kernel

pytestmark = pytest.mark.skipif(
    not launch.HAS_TRITON or launch.INTERPRETED, reason="Triton's interpreter compiles nothing"
)


def _add(x_ptr, y_ptr, out_ptr, N, scale, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < N, other=0.0)
    if y_ptr is not None:
        x += tl.load(y_ptr + cols, mask=cols < N, other=0.0)
    tl.store(out_ptr + cols, x * scale, mask=cols < N)
