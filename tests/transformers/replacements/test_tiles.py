"""Gated MLPs over pieces of tokens: the numbers of the whole MLP, and no wide tensor of all."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.replacements.tiles import tile_mlps

FAMILIES = ("llama", "gemma2", "phi3", "glm4", "qwen3_moe", "mllama")


class Widths(TorchDispatchMode):
    """The most rows that a tensor has which is as wide as the MLP's inside, or more."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] >= self.width:
                self.most = max(self.most, x.numel() // x.shape[-1])
        return result


def adapted(model, dropout: float = 0.0):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    settings = LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False
    )
    return get_peft_model(model, settings)


def built(family: str, tile: int | None, *, lora: bool = False, dtype=torch.float64, **options):
    model = zoo.build(family).train()
    model = adapted(model, **options) if lora else model
    apply_liger_kernel(model, "auto")
    # fp64 is what no op takes: the layers of an MLP run one by one.
    model = model.to(dtype)
    assert tile_mlps(model, tile) > 0
    return model


def step(model, checkpoints: bool, autocast: bool = False, seed: int = 0):
    if checkpoints:
        base = getattr(model, "base_model", model)
        getattr(base, "model", base)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**zoo.text_inputs(batch=2, length=11), use_cache=False).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_close(got, wanted, tolerance: float) -> None:
    assert abs(got[0] - wanted[0]) <= tolerance * abs(wanted[0])
    assert got[1].keys() == wanted[1].keys()
    largest = max(grad.norm() for grad in wanted[1].values())
    for name, grad in wanted[1].items():
        scale = max(grad.norm(), 1e-3 * largest)
        assert (got[1][name] - grad).norm() <= tolerance * scale, name


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_compute_what_the_whole_does(family, lora, checkpoints):
    if lora:
        pytest.importorskip("peft")
    dtype = torch.float32
    wanted = step(built(family, None, lora=lora, dtype=dtype), checkpoints)
    # 22 tokens: pieces of 5 and a rest of 2.
    assert_close(step(built(family, 5, lora=lora, dtype=dtype), checkpoints), wanted, 2e-6)
