"""Every op of the registry, on every case of its row, in every dtype: no worse than eager."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from liger_kernels.compare import check_op, compare, run
from liger_kernels.ops.registry import OPS, find_op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _rows():
    for op in OPS.values():
        for case in op.cases:
            for dtype in DTYPES:
                name = f"{op.name}-{case.id}-{str(dtype).removeprefix('torch.')}"
                marks = [pytest.mark.gpu] if case.needs_gpu else []
                yield pytest.param(op, case, dtype, id=name, marks=marks)


@pytest.mark.parametrize(("op", "case", "dtype"), list(_rows()))
def test_op_is_no_worse_than_eager(op, case, dtype, device):
    result = compare(op, case, dtype, device)
    assert result.ok, str(result)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_op_is_bitwise_reproducible(op, device):
    for case in (case for case in op.cases if not case.needs_gpu):
        sample = op.sample(case, torch.float32, device, torch.Generator().manual_seed(0))
        first, second = (run(op.function, sample, None, seed=0) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{case.id}: {name} changed between two runs"


def test_registry_finds_names_and_aliases():
    assert find_op("flce") is OPS["fused_linear_cross_entropy"]
    assert find_op("RMSNorm").name == find_op("rms-norm").name == "rms_norm"
    with pytest.raises(ValueError, match="rmsnrm.*did you mean 'rmsnorm'"):
        find_op("rmsnrm")


def test_check_op_passes_here_and_reports_a_broken_op(device, monkeypatch):
    assert check_op("rms_norm", device).ok
    op = OPS["rms_norm"]
    broken = dataclasses.replace(op, function=lambda *a, **k: 1.01 * op.function(*a, **k))
    monkeypatch.setitem(OPS, "rms_norm", broken)
    result = check_op("rms_norm", device)
    assert not result.ok
    assert "output 0 is off by" in result.reason
