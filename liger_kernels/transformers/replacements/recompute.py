"""Recompute norm outputs and gated products in backward instead of keeping them.

Autograd keeps the input of every projection for the gradient of its weight. Where that input is a
norm's output, the norm keeps all it takes to recompute it; where it is a gated product, the gate
does. So a patched module keeps a recipe of its output, and while the projections run, hooks on
saved tensors save the recipe in place of the tensor. The numbers are the same to the bit, since the
same kernel runs again. It works with any projection class, an adapter's included.

Hooks of saved tensors do not nest: inside gradient checkpointing, activation offloading and the
like, which have their own, everything is kept as they wish.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from liger_kernels.transformers.replacements.calls import has_transform


class _Recipe:
    """How to recompute one tensor, for all those that saved the recipe in its place."""

    def __init__(self, make: Callable[[], Tensor], version: int) -> None:
        self._make = make
        self.version = version
        self.num_kept = 0
        self._num_made = 0
        self._made: Tensor | None = None

    def make(self) -> Tensor:
        """Return the tensor, recomputed once for all who saved it: q, k and v run close by."""
        if self._made is None:
            with torch.no_grad():
                self._made = self._make()
        made = self._made
        self._num_made += 1
        if self._num_made % self.num_kept == 0:
            self._made = None
        return made


# A tensor as it was saved, and the version it had: a plain tuple, since there are many of them.
_Kept = tuple[Tensor, int]


class _Remade(NamedTuple):
    """A recipe in place of a tensor, and the shape it was saved in."""

    recipe: _Recipe
    shape: torch.Size


# Not an attribute of the tensor, which torch.save would pickle. Recipes do not hold their key.
_RECIPES = WeakTensorKeyDictionary()


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or has_transform()


def remember(y: Tensor, make: Callable[[], Tensor]) -> None:
    """Save make as the recipe of y. It must not hold y, nor tensors that have a graph."""
    if y.requires_grad and y.is_contiguous() and not _is_traced():
        _RECIPES[y] = _Recipe(make, y._version)


@contextmanager
def recomputing(*values: Any) -> Iterator[None]:
    """Save recipes for backward in place of those values that have one.

    Values without a recipe, of any type, are ignored; so is everything under torch.compile, which
    decides itself about recomputing, and under torch.func, whose tensors have no address.
    """
    if _is_traced():
        yield
        return
    recipes: dict[int, tuple[Tensor, _Recipe]] = {}
    for value in values:
        recipe = _RECIPES.get(value) if isinstance(value, Tensor) else None
        if recipe is not None and recipe.version == value._version:
            recipes[value.data_ptr()] = value, recipe
    del values
    if not recipes or not torch.is_grad_enabled() or not hooks_are_free():
        yield
        return

    def pack(x: Tensor) -> _Kept | _Remade:
        # Detached, because a saved output that its own graph holds would never be freed.
        kept = x.detach(), x._version
        if type(x) is not Tensor or not x.numel() or x.data_ptr() not in recipes:
            return kept
        y, recipe = recipes[x.data_ptr()]
        is_whole = x.numel() == y.numel() and x.dtype == y.dtype and x.is_contiguous()
        if not is_whole or x._version != recipe.version:
            return kept
        recipe.num_kept += 1
        return _Remade(recipe, x.shape)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield
    finally:
        # Saved tensors hold pack, which must not hold the tensors that are not kept.
        recipes.clear()


def _unpack(packed: _Kept | _Remade) -> Tensor:
    if isinstance(packed, _Remade):
        return packed.recipe.make().view(packed.shape)
    tensor, version = packed
    # Autograd checks versions of tensors it saved itself, not of those that went through hooks.
    if tensor._version != version:
        raise RuntimeError(
            "a tensor needed for gradient computation has been modified by an inplace operation: "
            f"{tensor.dtype} {tuple(tensor.shape)} is at version {tensor._version}; "
            f"expected version {version} instead"
        )
    return tensor


def hooks_are_free() -> bool:
    """Return whether nobody else has hooks on saved tensors, nor has forbidden them."""
    state: Any = torch._C._autograd
    return (
        state._saved_tensors_hooks_is_enabled()
        and state._top_saved_tensors_default_hooks(False) is None
    )


def is_checkpointed() -> bool:
    """Return whether saved tensors go through hooks that are not ours, as in a checkpoint."""
    if torch.compiler.is_compiling():
        return False
    state: Any = torch._C._autograd
    hooks = state._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[1] is not _unpack


def run_recomputable(module: Any, op: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Return op(*tensors), remembered as an output that is cheap to recompute."""
    y = op(*tensors)
    # A frozen norm whose input has no gradient keeps nothing to make its output from.
    if module._saves_memory and y.requires_grad:
        remember(y, functools.partial(op, *[None if x is None else x.detach() for x in tensors]))
    return y
