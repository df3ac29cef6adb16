"""Count what the host does for a step of LoRA: Python calls and operations of torch, by layer.

    .venv/bin/python scripts/lora_profile.py            # on any machine, no GPU needed

The counts are of one decoder layer of a llama with an adapter of rank 16 on all linear layers,
forward and backward, and do not depend on its size: stock peft, patched without lora_linear, and
patched. On a GPU each operation is a launch or more, and is sorted by what it does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SIDES = {"stock": None, "patched, without lora_linear": "all,-lora_linear", "patched": "all"}
# Operations that start no kernel.
_FREE = ("view", "transpose", "t", "slice", "select", "split", "expand", "detach", "alias")
_FREE += ("_unsafe_view", "unsqueeze", "squeeze", "permute", "as_strided", "empty", "new_empty")
_FREE += ("empty_like", "empty_strided", "chunk", "unbind", "_reshape_alias")
_KINDS = {
    "products": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "casts and copies": ("_to_copy", "copy_", "clone", "cat"),
    "additions and scalings": ("add", "add_", "mul", "mul_", "sum", "zeros_like", "fill_"),
}


class _Operations(TorchDispatchMode):
    """Count the operations that start a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_calls(step: Any) -> int:
    """Return how many Python functions a step calls."""
    calls = 0

    def called(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(called)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def build(num_layers: int, dtype: torch.dtype) -> Any:
    """Build a small llama in dtype with an adapter in fp32, as peft makes it."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    settings = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, settings).train()


def measure(ops: str | None, num_layers: int, dtype: torch.dtype) -> tuple[int, Counter[str]]:
    """Return the Python calls and operations of a step under autocast."""
    from liger_kernels.transformers import apply_liger_kernel

    model = build(num_layers, dtype)
    if ops is not None:
        apply_liger_kernel(model, ops)
    ids = torch.zeros((1, 16), dtype=torch.int64)

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    for _ in range(2):
        step()
    calls = count_calls(step)
    with _Operations() as operations:
        step()
    return calls, operations.counts


def main() -> None:
    """Print the counts of a layer of each side, as the difference of models of 3 and 2 layers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="One JSON document.")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    found = {}
    for side, ops in SIDES.items():
        (more_calls, more), (calls, fewer) = (measure(ops, n, dtype) for n in (3, 2))
        more.subtract(fewer)
        row = {"python calls": more_calls - calls, "operations": sum(more.values())}
        for kind, names in _KINDS.items():
            row[kind] = sum(more[name] for name in names)
        row["others"] = row["operations"] - sum(row[kind] for kind in _KINDS)
        found[side] = row
    if options.json:
        print(json.dumps(found, indent=1))
        return
    columns = list(next(iter(found.values())))
    print("a layer, forward and backward".ljust(32), *(f"{name:>24}" for name in columns))
    for side, row in found.items():
        print(side.ljust(32), *(f"{row[name]:>24}" for name in columns))


if __name__ == "__main__":
    main()
