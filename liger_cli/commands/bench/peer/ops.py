"""Times a peer's ops inside the peer's own interpreter, in turn with ours.

python -m liger_cli.commands.bench.peer.ops answers each line of JSON on stdin with one on stdout;
see process.py for the other end. Only the documented interface of a peer is called, with its
defaults. A function below takes what our op takes and returns a call without arguments, and the
tensors that it differentiates.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch

from liger_cli.commands.bench.targets import Workload
from liger_cli.commands.bench.timing import Arm, Stopwatch

__all__ = ["CALLS", "PACKAGE", "main"]

PACKAGE = "liger-kernel"

_Call = tuple[Callable[[], Any], tuple[torch.Tensor, ...]]


def _peer(*parts: str) -> Any:
    """Import the peer's public module; only the interpreter that has it knows its name."""
    return importlib.import_module(".".join(["liger_kernel.transformers", *parts]))


def _own(parameter: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> _Call:
    module = _peer().LigerRMSNorm(x.shape[-1])
    module.weight = _own(weight)
    return partial(module, x), (x, module.weight)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> _Call:
    module = _peer().LigerLayerNorm(x.shape[-1])
    module.weight, module.bias = _own(weight), _own(bias)
    return partial(module, x), (x, module.weight, module.bias)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> _Call:
    return partial(_peer("functional").liger_swiglu, gate, up), (gate, up)


def _geglu(gate: torch.Tensor, up: torch.Tensor) -> _Call:
    return partial(_peer("functional").liger_geglu, gate, up), (gate, up)


def _rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> _Call:
    return partial(_peer().liger_rotary_pos_emb, q, k, cos, sin), (q, k)


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> _Call:
    return partial(_peer().LigerCrossEntropyLoss(), logits, target), (logits,)


def _fused_loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> _Call:
    loss = _peer().LigerFusedLinearCrossEntropyLoss()
    return partial(loss, weight, hidden, target), (hidden, weight)


CALLS: dict[str, Callable[..., _Call]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "rope": _rope,
    "cross_entropy": _cross_entropy,
    "fused_linear_cross_entropy": _fused_loss,
}


class _Worker:
    """Answer questions about one workload after the other."""

    def __init__(self) -> None:
        self._stopwatch: Stopwatch | None = None
        self._arm: Arm | None = None

    def answer(self, ask: str, **question: Any) -> dict[str, Any]:
        if ask == "prepare":
            return self._prepare(**question)
        if ask == "release":
            self._release()
            return {}
        arm = self._arm
        assert arm is not None
        if ask == "times":
            return {"times": arm.times(**question)}
        return {"value": arm.host_us() if ask == "host" else arm.transient_bytes()}

    def _prepare(self, workload: dict[str, Any], device: str, dtype: str) -> dict[str, Any]:
        self._release()
        work = Workload(**{**workload, "shape": tuple(workload["shape"])})
        kind, torch_dtype = torch.device(device), getattr(torch, dtype)
        if self._stopwatch is None:
            self._stopwatch = Stopwatch(kind)
        function, leaves = CALLS[work.op](*work.sample(torch_dtype, kind).args)
        self._arm = Arm(PACKAGE, function, leaves, self._stopwatch, torch_dtype)
        overwrites = self._arm.warm_up()
        return {"overwrites": overwrites, "version": metadata.version(PACKAGE)}

    def _release(self) -> None:
        if self._arm is None or self._stopwatch is None:
            return
        self._arm.release()
        self._arm = None
        # Ours shares the card: what the allocator keeps here is missing there.
        self._stopwatch.free()


def main() -> None:
    # What a library prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(**json.loads(line))
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first_line}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
