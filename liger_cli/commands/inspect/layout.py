"""Which ranks would hold which part of each parameter, found without ranks and without weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from liger_cli.config import RunConfig
from liger_cli.report.layout import LayoutPart, ParameterRow
from liger_cli.report.values import ModuleRow
from liger_cli.training.memory import meta_model_of
from liger_cli.training.model.source import ModelSource
from liger_cli.training.parallel.assumed import assumed_plan, check_layout
from liger_cli.training.parallel.groups import groups_of
from liger_cli.training.parallel.mesh import ParallelPlan
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["describe_layout"]


def describe_layout(
    config: RunConfig, source: ModelSource, modules: list[ModuleRow], num_ranks: int
) -> LayoutPart:
    """Return the group, the placement and the bytes of each parameter in a launch of so many ranks.

    Args:
        config: The run: its model, its adapter and the sizes of its layout.
        source: Its model.
        modules: The rows of a report: which modules are patched.

    Raises:
        LigerError: The ranks cannot share the model in this way.
    """
    plan, why = assumed_plan(config, source, num_ranks), "as the keys say"
    if plan is None:
        plan = ParallelPlan(dp_shard=num_ranks)
        check_layout(config, source, plan)
        why = "taken to be shared by all; train copies it to each where the memory allows"
    # In the dtypes that a run has on a GPU.
    whole = meta_model_of(config, source)
    model = inner_model(whole)
    groups = _groups(model, whole, plan)
    ops = {str(row["name"]): row["op"] for row in modules if row["status"] == "patched"}
    rows = []
    for name, parameter in model.named_parameters():
        rows.append(
            ParameterRow(
                name=name,
                shape=list(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                group=groups.get(id(parameter), "") if plan.is_sharded else None,
                placement=_placement(plan),
                bytes_per_rank=_largest_shard(parameter, plan.dp_shard),
                op=_op_of(name, ops),
            )
        )
    sizes: dict[str | None, int] = {}
    for row, parameter in zip(rows, model.parameters(), strict=True):
        size = parameter.numel() * parameter.element_size()
        sizes[row.group] = sizes.get(row.group, 0) + size
    return LayoutPart(
        name=plan.name,
        why=why,
        dp_replicate_size=plan.dp_replicate,
        dp_shard_size=plan.dp_shard,
        bytes_per_rank=sum(row.bytes_per_rank for row in rows),
        largest_group=max(sizes.values(), default=0),
        parameters=rows,
    )


def _groups(model: Any, whole: Any, plan: ParallelPlan) -> dict[int, str]:
    """Return the name of the group of each parameter by its id; those of the root are missing."""
    names = {id(module): name for name, module in model.named_modules()}
    return {
        id(parameter): names[id(group)]
        for group in (groups_of(whole) if plan.is_sharded else ())
        for parameter in group.parameters()
    }


def _placement(plan: ParallelPlan) -> str:
    if not plan.is_sharded:
        return "Replicate()"
    return "Shard(0)" if plan.dp_replicate == 1 else "Replicate(), Shard(0)"


def _largest_shard(x: Tensor, num_shards: int) -> int:
    """Return the bytes of the first rank's rows: the last ranks may have fewer, or none."""
    if x.dim() == 0:
        return x.element_size()
    rows = -(-x.shape[0] // num_shards)
    return rows * math.prod(x.shape[1:]) * x.element_size()


def _op_of(name: str, ops: Mapping[str, str | None]) -> str | None:
    """Return the op of the nearest module around a parameter that is patched below its layer."""
    place = name.rpartition(".")[0]
    while place:
        if place in ops:
            return ops[place]
        place = place.rpartition(".")[0]
    return None
