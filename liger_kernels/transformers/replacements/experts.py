"""Forwards and gates of experts, whose weights are 3-D."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger_kernels.transformers.recognise import ExpertsSpec, run_experts, split_gate
from liger_kernels.transformers.replacements.calls import is_plain
from liger_kernels.transformers.replacements.mlps import gate_and_multiply
from liger_kernels.transformers.replacements.subclasses import is_as_patched


def experts_members(base: Any, spec: ExpertsSpec) -> dict[str, Any]:
    """Return the gate of experts, and their forward where they have one that can be replaced."""
    if spec.is_sorted:
        return {"forward": _sorted_experts_forward(base, spec)}
    stock_gate = base._apply_gate

    def _apply_gate(self: Any, gate_up_out: Tensor) -> Tensor:
        if base._apply_gate is not stock_gate or not is_as_patched(self):
            gated: Tensor = base._apply_gate(self, gate_up_out)
            return gated
        return gate_and_multiply(self, spec.activation, *split_gate(gate_up_out, spec.layout))

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The eager loop computes the gate in line; the grouped and batched ones call _apply_gate.
        is_eager = getattr(self.config, "_experts_implementation", None) in (None, "eager")
        is_plain_call = len(args) == 3 and not kwargs and is_as_patched(self)
        if is_eager and is_plain_call and is_plain(args[0]):
            hidden, experts, weights = args
            return run_experts(self, hidden, experts, weights, self._apply_gate)
        return base.forward(self, *args, **kwargs)

    gate = {"_apply_gate": functools.wraps(base._apply_gate)(_apply_gate)}
    return {**gate, "forward": forward} if spec.has_plain_loop else gate


def _sorted_experts_forward(base: Any, spec: ExpertsSpec) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_plain_call = len(args) == 1 and not kwargs and is_as_patched(self)
        if not is_plain_call or not is_plain(args[0], self.gate_up_proj, self.down_proj):
            return base.forward(self, *args, **kwargs)

        (x,) = args
        num_experts, width, _ = self.gate_up_proj.shape
        h = torch.bmm(x.view(num_experts, -1, width), self.gate_up_proj)
        h = gate_and_multiply(self, spec.activation, *split_gate(h, spec.layout))
        return torch.bmm(h, self.down_proj).view(-1, width)

    return forward
