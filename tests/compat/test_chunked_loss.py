"""liger_kernel.chunked_loss of the drop-in against what liger_kernel 0.8.5 computes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chunked_cases import CASES, arguments_of, labels, wave
from torch import Tensor

from liger_kernels.ops.backend import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.skipif(
        "liger_kernel" in sys.modules or importlib.util.find_spec("liger_kernel") is not None,
        reason="the original liger_kernel is installed; the drop-in refuses then",
    ),
]
# Made by scripts/liger_chunked_values.py.
VALUES = json.loads((Path(__file__).parent / "chunked_values.json").read_text())
# It rounds log-probabilities to fp32 on the way.
BOUND = {"rtol": 3e-6, "atol": 3e-6}


@pytest.fixture
def chunked(alias: Any) -> Any:
    return importlib.import_module("liger_kernel.chunked_loss")


def test_every_case_has_its_values():
    assert VALUES.keys() == CASES.keys()


@pytest.mark.parametrize("key", CASES)
def test_losses_and_gradients_are_those_of_liger_kernel(key, chunked):
    case, wanted = CASES[key], VALUES[key]
    given, leaves = arguments_of(case)
    found = getattr(chunked, case["name"])(**case["options"])(**given)
    loss, beside = (found, ()) if isinstance(found, Tensor) else (found[0], found[1:])
    if len(beside) == 1:
        (beside,) = beside
    torch.testing.assert_close(loss.item(), wanted["loss"], **BOUND)
    assert len(beside) == len(wanted["beside"])
    for ours, theirs in zip(beside, wanted["beside"], strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours.double(), torch.tensor(theirs).double(), **BOUND)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        theirs = torch.tensor(wanted["gradients"][name], dtype=torch.float64)
        torch.testing.assert_close(gradient.flatten(), theirs, **BOUND)


def test_losses_in_lower_precision_are_fp32_and_near(chunked):
    key = "LigerFusedLinearORPOLoss bias nll_target beta=0.7"
    given, _ = arguments_of(CASES[key])
    given = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in given.items()
    }
    loss, beside = chunked.LigerFusedLinearORPOLoss(beta=0.7)(**given)
    assert {loss.dtype, *(value.dtype for value in beside)} == {torch.float32}
    torch.testing.assert_close(loss.item(), VALUES[key]["loss"], rtol=2e-2, atol=0)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "odd": ("CPO", {}, {"rows": 5}, ValueError, "as many chosen as rejected answers.*got 5"),
    "no-reference": ("DPO", {}, {}, ValueError, "needs ref_input and ref_weight"),
    "reference": (
        *("DPO", {"use_ref_model": False}, {"ref_bias": torch.ones(11)}),
        *(ValueError, "got a reference, but use_ref_model is False"),
    ),
    "type": (
        "DPO",
        {"loss_type": "ipo"},
        {},
        ValueError,
        "loss_type must be one of sigmoid.*'ipo'",
    ),
    "smoothing": (
        *("DPO", {"label_smoothing": 0.1}, {}),
        *(ValueError, "must be 0, as liger_kernel leaves it out of it, .*'sigmoid', got 0.1"),
    ),
    "exo": ("DPO", {"loss_type": "exo_pair"}, {}, ValueError, "above 0 and below 1.*got 0.0"),
    "chunks": ("ORPO", {"chunk_size": 0}, {}, ValueError, "chunk_size must be .*got 0"),
    "compiled": ("ORPO", {"compiled": 1}, {}, ValueError, "compiled must be True or False, got 1"),
    "labels": ("KTO", {}, {}, ValueError, r"preference_labels of shape \(6,\), got None"),
    "kl": (
        *("KTO", {}, {"preference_labels": torch.ones(6), "kl": torch.ones(6)}),
        *(ValueError, r"one number for kl, got a tensor \(6,\)"),
    ),
    "vespo": ("GRPO", {"loss_type": "vespo"}, {}, NotImplementedError, "TRL's GRPOTrainer has it"),
    "policy": ("GRPO", {"loss_type": "ppo"}, {}, ValueError, "one of grpo, bnpo.*got 'ppo'"),
    "level": (
        *("GRPO", {"loss_type": "cispo", "importance_sampling_level": "sequence"}, {}),
        *(ValueError, "'cispo' must be token, got 'sequence'"),
    ),
    "length": ("GRPO", {"loss_type": "dr_grpo"}, {}, ValueError, "needs max_completion_length"),
    "other": ("GRPO", {"vespo_k_pos": 2.0}, {}, ValueError, "got vespo_k_pos, which no loss_type"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, chunked):
    name, options, given, error, words = REFUSED[case]
    loss = getattr(chunked, f"LigerFusedLinear{name}Loss")
    rows = given.get("rows", 6)
    more = {key: value for key, value in given.items() if key != "rows"}
    tensors = {"_input": wave(rows, 5, 8), "lin_weight": wave(11, 8), "target": labels()[:rows]}
    with pytest.raises(error, match=words):
        loss(**options)(**tensors, **more)


def test_shapes_that_would_be_broadcast_are_refused(chunked):
    case = CASES["LigerFusedLinearGRPOLoss old ref num_items"]
    given, _ = arguments_of(case)
    loss = chunked.LigerFusedLinearGRPOLoss()
    for name, value, shape in (
        ("advantages", given["advantages"][:, None], r"\(6,\), got \(6, 1\)"),
        ("attention_mask", given["attention_mask"][:1], r"\(6, 5\), got \(1, 5\)"),
        ("old_per_token_logps", given["old_per_token_logps"][0], r"\(6, 5\), got \(5,\)"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {shape}"):
            loss(**{**given, name: value})
    with pytest.raises(ValueError, match=r"target must be \(answers, tokens\), got \(30,\)"):
        chunked.LigerFusedLinearCPOLoss()(wave(11, 8), wave(30, 8), labels().flatten())


def test_names_that_are_elsewhere_say_where(chunked):
    with pytest.raises(ImportError, match="CosineSimilarityLoss is not in the drop-in: .*JSDLoss"):
        exec("from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss", {})
    with pytest.raises(ImportError, match="triton_grpo_loss is not in the drop-in"):
        exec("from liger_kernel.transformers.grpo_loss import triton_grpo_loss", {})
    with pytest.raises(ImportError, match="cannot import name 'NoSuchLoss'"):
        exec("from liger_kernel.chunked_loss import NoSuchLoss", {})
    assert not hasattr(chunked, "NoSuchLoss")
    # A module that was not imported by name is an attribute of its package all the same.
    package = importlib.import_module("liger_kernel")
    assert package.chunked_loss is chunked
    assert callable(package.transformers.functional.liger_swiglu)


def test_dapo_divides_by_the_tokens_of_all_processes(chunked, monkeypatch):
    """As liger_kernel does on two ranks of gloo: the mean over ranks is that of all tokens."""
    case = CASES["LigerFusedLinearGRPOLoss old ref loss_type=dapo max_completion_length=8"]
    given, _ = arguments_of(case)
    loss = chunked.LigerFusedLinearGRPOLoss(**case["options"])
    alone = loss(**given)[0]
    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    # The other rank has 9 tokens for the 23 here.
    monkeypatch.setattr(dist, "all_reduce", lambda count: count.add_(9))
    torch.testing.assert_close(loss(**given)[0], alone * 23 / 16)
    torch.testing.assert_close(loss(**given, num_items_in_batch=50)[0], alone * 23 / 25)


def test_selective_log_softmax_is_that_of_the_next_tokens(chunked):
    select = importlib.import_module("liger_kernel.ops.grpo_loss").fused_selective_log_softmax
    logits = wave(2, 6, 11).requires_grad_()
    ids, mask = torch.arange(10).view(2, 5) % 11, torch.arange(10).view(2, 5) % 3 > 0
    wanted = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    # Of more ids the last count.
    prompted = torch.cat([ids[:, :2] + 1, ids], dim=1)
    torch.testing.assert_close(select(logits, prompted), wanted)
    found = select(logits, ids, 0.9, mask)
    torch.testing.assert_close(found, wanted * mask)
    grads = [torch.autograd.grad((value * mask).sum(), logits)[0] for value in (found, wanted)]
    torch.testing.assert_close(*grads)
