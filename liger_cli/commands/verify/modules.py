"""Each patched module on the very inputs it gets in the model, against its stock self.

A wrong gradient anywhere spoils those of all layers below. Alone, on the same inputs and the same
gradient of its output, only the module that is wrong is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from liger_cli.commands.verify.errors import GRADIENT, Errors, errors_of, judge, largest
from liger_cli.commands.verify.precision import in_precision
from liger_cli.report.verify import ModulePart
from liger_kernels.transformers.patching.engine import PatchRecord, restore
from liger_kernels.transformers.patching.plan import LOSSES, Patch

__all__ = ["compare_modules"]

# As liger_kernels.compare has it.
_TIMES = 2.0


def compare_modules(
    model: Any, record: PatchRecord, run: Callable[[], object], seed: int
) -> list[ModulePart]:
    """Return a row for every patched module but the head, from its first call in a run.

    Args:
        model: The patched model.
        record: What was patched in it.
        run: Runs the model forward, with gradients.
        seed: Of the gradients that are given to the modules.
    """
    modules = dict(model.named_modules())
    patches = [patch for patch in record.patches if patch.op not in LOSSES]
    found: dict[Patch, _Found | str] = {}
    # While a module is compared its parts are called too, which is not their call in the model.
    busy = False

    def compare_first(patch: Patch) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal busy
            if busy or patch in found:
                return
            busy = True
            try:
                found[patch] = _compare(module, args, kwargs, seed)
            finally:
                busy = False

        return hook

    handles = [
        modules[patch.name].register_forward_pre_hook(compare_first(patch), with_kwargs=True)
        for patch in patches
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(_judge_all(patches, found, next(model.parameters())))


@dataclass(frozen=True)
class _Found:
    """The errors of one module's tensors."""

    ours: Errors
    eager: Errors


def _judge_all(
    patches: Sequence[Patch], found: Mapping[Patch, _Found | str], like: torch.Tensor
) -> Iterator[ModulePart]:
    """Judge every patch, in their order: all at once, layer beside layer."""
    ours: dict[str, float] = {}
    eager: dict[str, float] = {}
    for patch, errors in found.items():
        if isinstance(errors, _Found):
            ours |= {_key(name, patch): error for name, error in errors.ours.items()}
            eager |= {_key(name, patch): error for name, error in errors.eager.items()}
    parts = {part.name: part for part in judge(ours, eager, _TIMES, like.dtype, like.device)}
    for patch in patches:
        errors = found.get(patch, "not called by itself in this batch")
        tensor = note = None
        if isinstance(errors, str):
            note = errors
        else:
            own = ((name, parts[_key(name, patch)]) for name in errors.ours)
            renamed = (part.model_copy(update={"name": name}) for name, part in own)
            tensor = max(renamed, key=lambda part: part.share)
        yield ModulePart(
            name=patch.name,
            module_class=patch.module_class,
            op=patch.op,
            tensor=tensor,
            note=note,
        )


def _key(tensor: str, patch: Patch) -> str:
    return f"{tensor} of {patch.name} ({patch.op})"


def _compare(module: nn.Module, args: Any, kwargs: Any, seed: int) -> _Found | str:
    """Return the errors of one call, or why there are none."""
    if not any(map(_is_floating, tree_leaves((args, kwargs)))):
        return "called without a tensor of numbers"
    stock = copy.deepcopy(module)
    restore(stock)
    try:
        with in_precision(stock, torch.float64):
            truth = _outcome(stock, args, kwargs, torch.float64, seed)
        eager = errors_of(_outcome(stock, args, kwargs, None, seed), truth, largest)
        ours = errors_of(_outcome(module, args, kwargs, None, seed), truth, largest)
    except torch.OutOfMemoryError:
        return "does not fit beside the model in fp64"
    return _Found(ours, eager)


def _outcome(
    module: nn.Module, args: Any, kwargs: Mapping[str, Any], dtype: torch.dtype | None, seed: int
) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one call on copies of the inputs, cast if a dtype is given."""
    leaves: list[torch.Tensor] = []

    def fresh(value: Any) -> Any:
        if not _is_floating(value):
            return value
        # A separate detached view keeps an unusual layout, which a clone would pack.
        leaf = value.detach() if dtype is None else value.detach().to(dtype)
        if value.requires_grad:
            leaves.append(leaf.requires_grad_())
        return leaf

    with torch.enable_grad():
        copied_args, copied_kwargs = tree_map(fresh, (args, dict(kwargs)))
        outputs = [
            y for y in tree_flatten(module(*copied_args, **copied_kwargs))[0] if _is_floating(y)
        ]
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    generator = torch.Generator().manual_seed(seed)
    differentiable = [y for y in outputs if y.requires_grad]
    # A random direction: a plain sum would hide errors that cancel.
    directions = [
        torch.randn(y.shape, generator=generator).to(device=y.device, dtype=y.dtype)
        for y in differentiable
    ]
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    names = [f"input {i}" for i in range(len(leaves))] + list(parameters)
    wanted = [*leaves, *parameters.values()]
    if differentiable and wanted:
        gradients = torch.autograd.grad(differentiable, wanted, directions, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                found[f"{GRADIENT}{name}"] = gradient
    return found


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
