"""Ops that patching runs as a part of others: reports have them, --ops and coverage do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from liger_cli.commands.bench.targets import select
from liger_cli.errors import ConfigError
from liger_cli.report.required_ops import parse_ops
from liger_kernels.compare import check_op
from liger_kernels.ops import glu_mlp
from liger_kernels.ops.registry import OPS, PATCH_OPS, find_op
from liger_kernels.transformers.patching.plan import resolve_ops

PARTS = {name: op for name, op in OPS.items() if op.part_of is not None}


def test_glu_mlp_is_a_row_whose_names_are_those_of_gated_mlps():
    assert find_op("glu-mlp") is OPS["glu_mlp"]
    assert OPS["glu_mlp"].function is glu_mlp
    assert OPS["glu_mlp"].patch_names == ("swiglu", "geglu")
    assert OPS["swiglu"].patch_names == ("swiglu",)
    assert check_op("glu_mlp").ok


def test_every_part_is_of_ops_that_can_be_named():
    by_hand = {"fused_linear_logprobs", "divergence", "fused_linear_divergence"}
    assert {"glu_mlp", "fused_add_rms_norm", *by_hand} == PARTS.keys()
    assert tuple(name for name in OPS if name not in PARTS) == PATCH_OPS
    for op in PARTS.values():
        assert set(op.part_of) <= set(PATCH_OPS)


# fused_add_rms_norm was a name of --ops once: test_retired_op.py.
@pytest.mark.parametrize("name", sorted(PARTS.keys() - {"fused_add_rms_norm"}))
@pytest.mark.parametrize("request_", ["{}", "auto,{}", "auto,-{}", "all,-{}"])
def test_a_part_is_no_name_of_ops(name, request_):
    with pytest.raises(ValueError, match=f"unknown op '{name}'") as caught:
        resolve_ops(request_.format(name))
    *_, known = str(caught.value).partition("Known: ")
    assert name not in known
    for whole in PARTS[name].part_of:
        assert whole in str(caught.value).partition("Known: ")[0]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_cannot_be_required(name):
    """No coverage ever counts it, so that the requirement could not be met."""
    with pytest.raises(ConfigError, match=f"unknown op '{name}'"):
        parse_ops("auto", name)
    assert parse_ops("auto", "swiglu,flce") == ["swiglu", "fused_linear_cross_entropy"]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_measured_on_shapes_of_its_own(name):
    for is_gpu in (False, True):
        [*workloads] = select(name, None, is_gpu=is_gpu)
        assert workloads
        for workload in workloads:
            # Of products: a norm, and a divergence of given logits, have none.
            assert (workload.num_flops() > 0) == (name not in ("fused_add_rms_norm", "divergence"))


def test_bytes_and_flops_of_a_gated_mlp():
    op = OPS["glu_mlp"]
    rows, width, inner = 8, 3, 5
    case = dataclasses.replace(op.cases[0], shape=(2, 4, width, inner))
    weights, x, h = 3 * width * inner, rows * width, rows * inner
    # Forward: x and weights to y, gate and up. Backward: x, dy, gate, up and weights to gradients.
    assert op.num_bytes(case, torch.bfloat16) == (
        2 * (weights + 2 * x + 2 * h),
        2 * (2 * weights + 3 * x + 2 * h),
    )
    assert op.num_flops(case) == 3 * 3 * 2 * rows * width * inner
