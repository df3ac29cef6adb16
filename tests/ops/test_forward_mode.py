"""Forward-mode AD through each op: one sentence, where torch has no words for it."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from liger_kernels.ops.glu_mlp import glu_mlp
from liger_kernels.ops.registry import OPS


def _is_differentiated(x):
    return isinstance(x, torch.Tensor) and x.requires_grad


@pytest.mark.parametrize("name", OPS)
def test_case_215_an_op_says_that_it_has_no_forward_mode(name):
    op = OPS[name]
    sample = op.sample(
        op.cases[0], torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0)
    )
    places = [i for i, x in enumerate(sample.args) if _is_differentiated(x)]
    assert places
    for place in places:
        with forward_ad.dual_level():
            args = [x.detach() if _is_differentiated(x) else x for x in sample.args]
            plain = op.function(*args, **sample.kwargs)
            args[place] = forward_ad.make_dual(args[place], torch.ones_like(args[place]))
            with pytest.raises(RuntimeError, match=r"no derivative in forward mode.*backward"):
                op.function(*args, **sample.kwargs)
        assert plain is not None


def test_case_215_the_gated_mlp_says_so_too():
    x, gate, up, down = (torch.ones(*shape) for shape in ((2, 4), (6, 4), (6, 4), (4, 6)))
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="glu_mlp has no derivative in forward mode"):
            glu_mlp(x, gate, up, down)
