"""Every tensor argument of a wrong type, device, dtype or rank: a ValueError that names it."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from rows import arguments_of, cases_with, each_tensor

from liger_kernels.ops import (
    cross_entropy,
    fused_linear_cross_entropy,
    fused_linear_logprobs,
    swiglu,
)
from liger_kernels.ops.losses import label_count
from liger_kernels.ops.registry import OPS

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.complex64, torch.complex128,
)  # fmt: skip
each_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
each_argument = pytest.mark.parametrize(
    ("op", "name"), list(each_tensor()), ids=lambda value: getattr(value, "name", value)
)


def row_of(op, name):
    return next(row for row in op.tensors if row.name == name)


def given(op, name, device):
    """The arguments of a case with the named tensor, and with as many others as may be."""
    cases = [arguments_of(op, case, device) for case in cases_with(op, name)]
    assert cases, f"no case of {op.name} has a {name}"
    return max(cases, key=lambda found: sum(map(torch.is_tensor, found.values())))


def refusal(op, arguments) -> str:
    with pytest.raises(ValueError, match=" must ") as caught:
        op.function(**arguments)
    return str(caught.value)


@each_op
def test_the_row_of_an_op_lists_every_parameter(op):
    listed = [row.name for row in (*op.tensors, *op.options)]
    assert sorted(listed) == sorted(inspect.signature(op.function).parameters)


@each_argument
def test_case_205_wrong_types_are_refused_by_name(op, name, device):
    arguments = given(op, name, device)
    value = arguments[name]
    wrong = [value.tolist(), 5, 1.5, "text", np.asarray(value.cpu()), value.to_sparse()]
    if not row_of(op, name).is_optional:
        wrong.append(None)
    for other in wrong:
        message = refusal(op, {**arguments, name: other})
        assert re.match(rf"{name} must .*, got ", message), message


@each_argument
def test_case_205_a_wrong_device_is_refused_by_name(op, name, device):
    arguments = given(op, name, device)
    others = [row.name for row in op.tensors if isinstance(arguments.get(row.name), torch.Tensor)]
    message = refusal(op, {**arguments, name: arguments[name].to("meta")})
    assert name in message, message
    assert any(message.startswith(f"{other} must be on ") for other in others), message
    assert {"meta", str(arguments[name].device)} <= set(re.split(r"[ ,]", message)), message


@each_op
def test_tensors_without_data_are_taken_together(op):
    case = next(case for case in op.cases if not case.options)
    arguments = arguments_of(op, case, torch.device("cpu"))
    wanted = op.function(**arguments)
    outputs = op.function(
        **{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    )
    for mine, other in zip(
        *(y if isinstance(y, tuple) else (y,) for y in (outputs, wanted)), strict=True
    ):
        assert mine.is_meta
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)


@each_argument
def test_case_206_dtypes_that_are_not_listed_are_refused(op, name, device):
    arguments = given(op, name, device)
    row = row_of(op, name)
    for dtype in set(DTYPES) - set(row.dtypes):
        message = refusal(op, {**arguments, name: torch.ones_like(arguments[name]).to(dtype)})
        assert re.match(rf"{name} must .*got {dtype} ", message), message
        assert re.search(r"its dtype may be .*\.to\(torch\.", message), message


@each_argument
def test_dtypes_that_are_listed_are_taken(op, name, device):
    arguments = given(op, name, device)
    row = row_of(op, name)
    shared = [other.name for other in op.tensors if row.shares_dtype and other.shares_dtype]
    present = [other for other in (shared or [name]) if arguments.get(other) is not None]
    for dtype in row.dtypes:
        outputs = op.function(**{**arguments, **{k: arguments[k].to(dtype) for k in present}})
        for y in outputs if isinstance(outputs, tuple) else (outputs,):
            assert y is None or y.isfinite().all()


@each_argument
def test_case_205_a_wrong_rank_is_refused_by_name(op, name, device):
    arguments = given(op, name, device)
    value, shape = arguments[name], row_of(op, name).shape
    wrong = [value.flatten()[0]]
    # Another rank may fit where every rank does, unless another tensor has the same sizes.
    is_alone = sum("..." in row.shape for row in op.tensors) == 1
    if "..." not in shape or not is_alone:
        wrong.append(value.unsqueeze(0))
    for other in wrong:
        message = refusal(op, {**arguments, name: other})
        # Where several tensors share sizes, another may be the one that does not fit.
        named = [row.name for row in op.tensors if message.startswith(f"{row.name} must be ")]
        assert named, message
        assert str(tuple((arguments | {name: other})[named[0]].shape)) in message, message


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, name in each_tensor() if torch.float32 in row_of(op, name).dtypes],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_lazy_minus_sign_is_refused_by_name(op, name, device):
    """The memory of such a view, which a kernel reads, holds the other sign."""
    arguments = given(op, name, device)
    value = arguments[name]
    lazy = torch.complex(value, -value).conj().imag
    assert lazy.is_neg()
    assert torch.equal(lazy, value)
    message = refusal(op, {**arguments, name: lazy})
    assert re.match(rf"{name} must .*resolve_neg", message), message


def test_case_205_the_examples():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="up must be on cpu as gate is, got a tensor on meta"):
        swiglu(x, x.to("meta"))
    with pytest.raises(ValueError, match="gate must be a floating tensor .* got None"):
        swiglu(None, x)
    empty, target = torch.randn(2, 0), torch.tensor([0, 1])
    for op in (fused_linear_cross_entropy, fused_linear_logprobs):
        with pytest.raises(ValueError, match=r"weight must be .* of 1 at least, got .*\(3, 0\)"):
            op(empty, torch.randn(3, 0), target)
    with pytest.raises(ValueError, match=r"logits must be .* a class at least, got .*\(2, 0\)"):
        cross_entropy(empty, target)
    with pytest.raises(ValueError, match="normalizer must hold a number, got a tensor on meta"):
        fused_linear_cross_entropy(x, x, target, normalizer=torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="target must hold int32 or int64 labels, got None"):
        label_count.count_labels(None)


def test_case_206_an_fp8_weight_is_refused():
    x, target = torch.randn(2, 8), torch.tensor([0, 1])
    weight = torch.randn(4, 8).to(torch.float8_e4m3fn)
    advice = r"got torch.float8_e4m3fn \(4, 8\); its dtype may be float32.*\.to\(torch.float32\)"
    with pytest.raises(ValueError, match=f"weight must be .*{advice}"):
        fused_linear_cross_entropy(x, weight, target)
