"""Rotary positions: which module-level functions an attention calls, and how they rotate."""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from liger_kernels.transformers.recognise.probe import (
    call_forward,
    is_close,
    new_generator,
    original_class,
    probe_copy,
    quiet,
    randn,
    uniform,
)
from liger_kernels.transformers.recognise.specs import Angles, Refusal, RopeSpec, Style, unserved


def reachable_functions(function: Callable[..., Any]) -> list[types.FunctionType]:
    """Return a function and those hidden in its decorators' closures."""
    found: list[types.FunctionType] = []
    waiting: list[Any] = [function]
    while waiting:
        current = waiting.pop()
        current = getattr(current, "__func__", current)
        if not isinstance(current, types.FunctionType) or current in found:
            continue
        found.append(current)
        waiting.append(getattr(current, "__wrapped__", None))
        for cell in current.__closure__ or ():
            # An empty cell belongs to a function that is still being defined.
            try:
                waiting.append(cell.cell_contents)
            except ValueError:
                continue
    return found


def global_names(code: types.CodeType) -> set[str]:
    """Return the names that a function looks up, also in the comprehensions inside it."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(global_names, inner))


def rope_functions(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Return the module-level functions that forward calls to rotate, by their global name."""
    return _rotary_globals(cls.forward)


def _rotary_globals(caller: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    found = {}
    for function in reachable_functions(caller):
        for name in global_names(function.__code__):
            value = function.__globals__.get(name)
            is_rotary = "apply" in name and ("rotary" in name or "rope" in name)
            if is_rotary and callable(value) and not isinstance(value, type):
                found[name] = value
    return found


def recognise_rope(module: nn.Module) -> RopeSpec | Refusal | None:
    """Return how an attention rotates, or why no kernel does it; None where it rotates nothing."""
    functions = rope_functions(original_class(type(module)))
    if not functions:
        return None
    specs = []
    for name, function in sorted(functions.items()):
        spec = recognise_rotary(name, function) or _recognise_inside(name, function)
        if spec is None:
            return unserved(f"{name} rotates in another way")
        specs.append(spec)
    return replace(specs[0], others=tuple(specs[1:]))


def recognise_rotary(name: str, function: Callable[..., Any]) -> RopeSpec | None:
    """Return how one function rotates, or None where no kernel does it so."""
    try:
        with quiet():
            return _probe_rope(name, function)
    except Exception:
        return None


def _recognise_inside(name: str, function: Callable[..., Any]) -> RopeSpec | None:
    """Return the one rotation that a function does on parts of its input (gemma4's vision)."""
    inner = _rotary_globals(function)
    if len(inner) != 1:
        return None
    spec = recognise_rotary(*inner.popitem())
    return None if spec is None else replace(spec, inside=name)


_BATCH, _TOKENS, _HEADS, _KV_HEADS, _HEAD_DIM = 2, 5, 4, 3, 16


def _probe_rope(name: str, function: Callable[..., Any]) -> RopeSpec | None:
    is_single = rope_inputs(function) == 1
    generator = new_generator()
    # Forms that a narrow rotation answered with none of the styles: a whole head cannot tell which
    # of its numbers they turn.
    elsewhere: set[tuple[int, str]] = set()
    # A narrower rotation than the head, and the whole head.
    for rotary_dim in (_HEAD_DIM // 2, _HEAD_DIM):
        angles = randn(generator, _BATCH, _TOKENS, rotary_dim // 2)
        for unsqueeze_dim in (1, -2):
            inputs = [
                randn(generator, _BATCH, n, _TOKENS, _HEAD_DIM)
                if unsqueeze_dim == 1
                else randn(generator, _BATCH, _TOKENS, n, _HEAD_DIM)
                for n in (_HEADS, _KV_HEADS)[: 1 if is_single else 2]
            ]
            for layout in get_args(Angles):
                given = angles[:1] if layout == "complex_shared" else angles
                tables = _tables(given, layout)
                if is_sin_first(function):
                    tables = tables[::-1]
                try:
                    outputs = _as_tuple(function(*inputs, *tables))
                except Exception:
                    continue
                if (unsqueeze_dim, layout) in elsewhere:
                    continue
                elsewhere.add((unsqueeze_dim, layout))
                for style, is_backward, is_last in _WAYS:
                    turn = -given if is_backward else given
                    wanted = [rotate(x, turn, style, unsqueeze_dim, is_last) for x in inputs]
                    if len(outputs) == len(wanted) and all(map(is_close, outputs, wanted)):
                        narrow = _as_tuple(function(*(x.bfloat16() for x in inputs), *tables))
                        return RopeSpec(
                            name,
                            style,
                            layout,
                            unsqueeze_dim,
                            is_single,
                            keeps_dtype=narrow[0].dtype == torch.bfloat16,
                            is_backward=is_backward,
                            is_last=is_last,
                        )
    return None


# Style, whether it turns backwards, whether it turns the last numbers of a head.
_WAYS: tuple[tuple[Style, bool, bool], ...] = tuple(
    (style, is_backward, is_last)
    for is_last, is_backward, style in itertools.product(
        (False, True), (False, True), get_args(Style)
    )
)


def splits_halves(module: nn.Module) -> bool:
    """Return whether a module makes tables [c, d], d not c, where kinds of positions differ.

    HunYuan-VL cuts [c, c] into one section for each kind, across its middle. The rotary function
    is the usual one, and the op reads c alone.
    """
    frequencies = module._buffers.get("inv_freq")
    if frequencies is None:
        return False
    generator = new_generator()
    x = randn(generator, 1, 1)
    buffers = {"inv_freq": uniform(generator, *frequencies.shape)}

    def has_equal_halves(positions: Tensor) -> bool:
        cos, _ = call_forward(probe_copy(module, buffers=buffers), x, positions)
        first, second = cos.chunk(2, dim=-1)
        return torch.equal(first, second)

    for num_kinds in (2, 3, 4):
        positions = torch.arange(num_kinds * _TOKENS, device="cpu").view(num_kinds, 1, _TOKENS)
        try:
            with quiet():
                same = positions[:1].expand_as(positions)
                if has_equal_halves(same) and not has_equal_halves(positions):
                    return True
        except Exception:
            # It takes another number of kinds, or no positions.
            continue
    return False


def rope_parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a rotary function's parameters."""
    # With the `kernels` package the function is a module, whose __call__ has no names.
    called = function.forward if isinstance(function, nn.Module) else function
    return tuple(inspect.signature(called).parameters)


def rope_inputs(function: Callable[..., Any]) -> int:
    """Return how many tensors a rotary function turns: those before its angles."""
    names = rope_parameters(function)
    is_angle = [name in ("cos", "sin") or name.startswith("freqs") for name in names]
    return is_angle.index(True)


def is_sin_first(function: Callable[..., Any]) -> bool:
    """Return whether a rotary function takes its sines before its cosines, as GPT-J's does."""
    return rope_parameters(function)[rope_inputs(function)] == "sin"


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _tables(angles: Tensor, layout: Angles) -> tuple[Any, ...]:
    cos, sin = angles.cos(), angles.sin()
    if layout == "complex":
        return (torch.complex(cos, sin),)
    if layout == "complex_shared":
        return (torch.complex(cos, sin)[0].unsqueeze(1),)
    if layout == "twice":
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    if layout == "sections":
        quarter = angles.shape[-1] // 4
        sizes = [quarter, quarter, angles.shape[-1] - 2 * quarter]
        # Each kind of positions has its angles in its section, and others elsewhere.
        kind = torch.arange(3).repeat_interleave(torch.tensor(sizes))
        kinds = [torch.where(kind == i, angles, angles + i + 1) for i in range(3)]
        three = torch.stack([torch.cat((table, table), -1) for table in kinds])
        return three.cos(), three.sin(), sizes
    if layout == "repeated":
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    return cos, sin


def rotate(
    x: Tensor, angles: Tensor, style: str, unsqueeze_dim: int, is_last: bool = False
) -> Tensor:
    """Return x with 2 * angles.shape[-1] numbers of each head rotated: the definition."""
    cos, sin = (t.unsqueeze(unsqueeze_dim) for t in (angles.cos(), angles.sin()))
    rotary_dim = 2 * angles.shape[-1]
    at = x.shape[-1] - rotary_dim if is_last else 0
    before, turned, after = x.tensor_split((at, at + rotary_dim), dim=-1)
    if style == "half":
        a, b = turned.chunk(2, dim=-1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
    parts = (a * cos - b * sin, b * cos + a * sin)
    if style == "pairs":
        turned = torch.stack(parts, -1).flatten(-2)
    else:
        turned = torch.cat(parts, -1)
    return torch.cat((before, turned, after), -1)
