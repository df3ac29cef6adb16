"""The memory of a rank of a sharded run at each moment of a step, beside its shards.

It follows the order of torch's FSDP2. In forward a group is gathered into a buffer and copied out
of it; the buffer lives until the next group has its own. In backward the next group is gathered
while one is at work, and gradients are copied into a buffer, in the dtype of their sum, that lives
until the next group is done. The root's group is there from forward to the end of backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from liger_cli.config import RunConfig
from liger_cli.training.memory.ledger import Ledger
from liger_cli.training.model.adapters import is_adapted
from liger_cli.training.parallel.groups import groups_of
from liger_cli.training.parallel.hollow import replace_parameters
from liger_cli.training.parallel.mesh import ParallelPlan

__all__ = ["BUCKETS", "GATHERED", "OF_RANKS", "TO_REDUCE", "ShardedStep", "shares_of"]

GATHERED, TO_REDUCE, BUCKETS = "gathered weights", "gradients to sum", "buckets of DDP"
OF_RANKS = (GATHERED, TO_REDUCE, BUCKETS)
# Represents weights and gradients that are counted where they lie.
_STAND_IN = "stand-ins"
_HELD = ("weights", "reference", "gradients", "optimizer")


def shares_of(config: RunConfig, plan: ParallelPlan) -> dict[str, float]:
    """Return the share of each part of the model that the device of a rank holds."""
    if not plan.is_sharded:
        return {}
    share = 0.0 if config.cpu_offload else 1 / plan.dp_shard
    return {**dict.fromkeys(_HELD, share), _STAND_IN: 0.0}


@dataclass(eq=False)
class _Group:
    """Parameters that are gathered together, and what is allocated for them now.

    Attributes:
        parameters: Stand-ins.
        weights: The gathered weights.
        ahead: The buffer that they are gathered into before they are needed.
    """

    parameters: list[nn.Parameter]
    weights: Tensor | None = None
    ahead: Tensor | None = None
    is_done: bool = False
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = sum(p.numel() * p.element_size() for p in self.parameters)


class ShardedStep:
    """Allocate in a step of a whole model what a rank that holds shards of it allocates.

    The model computes with stand-ins of its parameters in the dtype that they are gathered in.

    Args:
        config: The run.
        model: With storages that the ledger counts.
        ledger: Of this rank, with the shares of `shares_of`.
        num_shards: Ranks that share the parameters.
        on_gpu: Whether the run is on a GPU.
    """

    def __init__(
        self, config: RunConfig, model: Any, ledger: Ledger, num_shards: int, *, on_gpu: bool
    ) -> None:
        # It imports torch's FSDP, which takes a second.
        from liger_cli.training.parallel.wrapping import mixed_precision

        device = torch.device("cuda" if on_gpu else "cpu")
        policy = mixed_precision(config, device, adapts=is_adapted(model))
        self._ledger, self._model, self._num_shards = ledger, model, num_shards
        self._reduce_dtype = policy.reduce_dtype
        self._reshards = config.reshard_after_forward
        self._originals: dict[int, Tensor] = {}
        self._casts = False
        self._stand_in(policy.param_dtype)
        modules = groups_of(model)
        self._groups = [_Group(list(module.parameters())) for module in modules]
        inside = {id(p) for group in self._groups for p in group.parameters}
        self._root = _Group([p for p in model.parameters() if id(p) not in inside])
        self._in_flight: Tensor | None = None
        self._to_reduce: Tensor | None = None
        self._is_backward = False
        for module, group in zip(modules, self._groups, strict=True):
            self._watch(module, group)

    def _stand_in(self, dtype: torch.dtype | None) -> None:
        originals = list(self._model.parameters())
        with self._ledger.counting(_STAND_IN):
            replace_parameters(
                self._model,
                lambda p: torch.empty(p.shape, dtype=(dtype or p.dtype) if _floats(p) else p.dtype),
            )
        # Both lists have parameters that are shared once, in the same order.
        for old, new in zip(originals, self._model.parameters(), strict=True):
            self._originals[id(new)] = old
            self._casts |= old.dtype != new.dtype
            if (packed := getattr(old, "quant_state", None)) is not None:
                new.quant_state = packed
            if new.requires_grad:
                new.register_post_accumulate_grad_hook(
                    lambda p: self._ledger.move(p.grad, TO_REDUCE)
                )

    def _watch(self, module: nn.Module, group: _Group) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            if group.weights is None:
                self._gather(group)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            # In backward it is activation checkpointing that calls a layer again.
            if self._is_backward:
                return
            if self._reshards:
                group.weights = None
            for x in tree_leaves(output):
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(lambda grad: self._begin_backward_of(group))

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Gather the root's group, then let the others follow."""
        self._gather(self._root)
        yield
        self._in_flight = None

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Gather the last group ahead; in the end reduce what is left."""
        self._is_backward = True
        self._gather_ahead(len(self._groups) - 1)
        yield
        for group in [*reversed(self._groups), self._root]:
            self._finish(group)
        self._to_reduce = None

    def _gather(self, group: _Group) -> None:
        buffer = self._buffer(group)
        # That of the group before is freed when this one has arrived.
        self._in_flight = buffer
        with self._ledger.counting(GATHERED):
            group.weights = _bytes(group.num_bytes)

    def _buffer(self, group: _Group) -> Tensor:
        with self._ledger.counting(GATHERED):
            cast = _bytes(group.num_bytes // self._num_shards) if self._casts else None
            buffer = _bytes(group.num_bytes)
            del cast
        return buffer

    def _gather_ahead(self, index: int) -> None:
        if index >= 0 and self._groups[index].weights is None:
            self._groups[index].ahead = self._buffer(self._groups[index])

    def _begin_backward_of(self, group: _Group) -> None:
        index = self._groups.index(group)
        for later in reversed(self._groups[index + 1 :]):
            self._finish(later)
        if group.weights is None:
            buffer = self._buffer(group) if group.ahead is None else group.ahead
            with self._ledger.counting(GATHERED):
                group.weights = _bytes(group.num_bytes)
            group.ahead = None
            del buffer
        self._gather_ahead(index - 1)

    def _finish(self, group: _Group) -> None:
        """Reshard a group and sum its gradients over the ranks."""
        if group.is_done:
            return
        group.is_done, group.weights, group.ahead = True, None, None
        gradients = [p.grad for p in group.parameters if p.grad is not None]
        if not gradients:
            return
        self._to_reduce = None
        sizes = [g.numel() * (self._reduce_dtype or g.dtype).itemsize for g in gradients]
        with self._ledger.counting(TO_REDUCE):
            self._to_reduce = _bytes(sum(sizes))
        for parameter in group.parameters:
            if parameter.grad is None:
                continue
            self._ledger.move(parameter.grad, _STAND_IN)
            original = self._originals[id(parameter)]
            if original.grad is None:
                with self._ledger.counting("gradients"):
                    original.grad = torch.empty_like(original)


def _floats(x: Tensor) -> bool:
    return x.is_floating_point()


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
