"""Rotary functions are recognised by the numbers they compute, and look-alikes are refused."""

from __future__ import annotations

import types

import pytest
import torch
from rotary_functions import (
    apply_rotary_backwards,
    apply_rotary_last,
    apply_rotary_of_two,
    apply_rotary_sin_first,
    apply_rotary_single,
)
from torch import nn
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from liger_kernels.transformers.recognise import (
    Recogniser,
    Refusal,
    RopeSpec,
    recognise_rope,
    rope_functions,
)


def vision_rope(q, k, cos, sin):
    """Qwen2-VL: (S, H, D), but also (B, S, H, D): broadcast from the right."""
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()

    def turn(x):
        wide = x.float()
        return (wide * cos + modeling_llama.rotate_half(wide) * sin).to(x.dtype)

    return turn(q), turn(k)


def apply_rotary_interleaved(q, k, cos, sin, unsqueeze_dim=1):
    """Cohere: neighbours, each angle twice in a row."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turn(x):
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin

    return turn(q), turn(k)


def apply_rotary_of_four(x, cos, sin):
    """Twice the same, and once another."""
    return apply_rotary_of_two(apply_rotary_backwards(x, x, cos, sin)[0], cos, sin)


def apply_rotary_odd(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin


def apply_rotary_with_sections(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def _attention(function):
    class Attention(nn.Module):
        def forward(self, q, k, cos, sin):
            return apply_rotary(q, k, cos, sin)  # noqa: F821

    forward = types.FunctionType(Attention.forward.__code__, {"apply_rotary": function})
    Attention.forward = forward
    return Attention()


ROPES = {
    "half": (modeling_llama.apply_rotary_pos_emb, ("half", "twice", 1, False, False)),
    "vision": (vision_rope, ("half", "twice", -2, False, True)),
    "repeated": (apply_rotary_interleaved, ("pairs", "repeated", 1, False, False)),
    "single": (apply_rotary_single, ("half", "twice", 1, True, False)),
    "backwards": (apply_rotary_backwards, ("half", "twice", 1, False, False, True)),
    "last": (apply_rotary_last, ("pairs", "once", 1, True, False, False, True)),
    "sin-first": (apply_rotary_sin_first, ("pairs", "once", -2, True, False)),
    "odd": (apply_rotary_odd, None),
    "odd-inside": (apply_rotary_of_four, None),
    "sections": (apply_rotary_with_sections, None),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope(case):
    function, wanted = ROPES[case]
    found = recognise_rope(_attention(function))
    if wanted is None:
        assert isinstance(found, Refusal)
    else:
        assert found == RopeSpec("apply_rotary", *wanted)


def test_rope_inside_a_function():
    found = recognise_rope(_attention(apply_rotary_of_two))
    wanted = RopeSpec("apply_rotary_single", "half", "twice", 1, True, False, inside="apply_rotary")
    assert found == wanted


class SectionedRotary(nn.Module):
    """HunYuan-VL: [c, c] is cut into sections of kinds of positions, across its middle or not."""

    def __init__(self, sections):
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(8))
        self.sections = sections

    def forward(self, x, positions):
        angles = positions.expand(len(self.sections), -1, -1)[..., None] * self.inv_freq
        angles = torch.cat((angles, angles), -1).split(
            self.sections * (16 // sum(self.sections)), -1
        )
        angles = torch.cat([part[i % len(self.sections)] for i, part in enumerate(angles)], -1)
        return angles.cos(), angles.sin()


class SectionedModel(nn.Module):
    def __init__(self, sections):
        super().__init__()
        self.attention = _attention(modeling_llama.apply_rotary_pos_emb)
        self.rotary = SectionedRotary(sections)


# The function is the usual one; the tables of some models are not.
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("sections", "is_served"),
    [([2, 3, 3], True), ([4, 4], True), ([4, 6, 6], False), ([8, 8], False), ([4] * 4, False)],
    ids=str,
)
def test_rope_tables_with_other_halves(sections, is_served, device):
    model = SectionedModel(sections).to(device)
    found = Recogniser(model).recognise(model.attention)
    assert isinstance(found, RopeSpec) == is_served
    assert is_served or "second half" in found.reason
    # The attention alone does not show it.
    assert isinstance(Recogniser().recognise(model.attention), RopeSpec)


def test_rope_of_two_functions():
    """DeepSeek-V3: the configuration says which of two is called."""

    class Attention(nn.Module):
        def forward(self, q, k, cos, sin, interleave):
            if interleave:
                return apply_rotary_interleave(q, k, cos, sin)  # noqa: F821
            return apply_rotary(q, k, cos, sin)  # noqa: F821

    def interleave(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        half = cos.shape[-1] // 2
        cos, sin = (t[..., :half].unsqueeze(unsqueeze_dim) for t in (cos, sin))

        def turn(x):
            a, b = x[..., ::2], x[..., 1::2]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        return turn(q), turn(k)

    namespace = {
        "apply_rotary": modeling_llama.apply_rotary_pos_emb,
        "apply_rotary_interleave": interleave,
    }
    Attention.forward = types.FunctionType(Attention.forward.__code__, namespace)
    found = recognise_rope(Attention())
    assert found.function == "apply_rotary"
    assert found.others == (
        RopeSpec("apply_rotary_interleave", "pairs_to_half", "twice", 1, False, False),
    )
    namespace["apply_rotary"] = apply_rotary_odd
    assert isinstance(recognise_rope(Attention()), Refusal)


def test_rope_of_attention_that_does_not_rotate():
    assert recognise_rope(nn.MultiheadAttention(8, 2)) is None
    assert set(rope_functions(modeling_gemma2.Gemma2Attention)) == {"apply_rotary_pos_emb"}
