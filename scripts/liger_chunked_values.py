"""Write tests/compat/chunked_values.json: losses and gradients by liger_kernel.chunked_loss.

liger_kernel is no dependency; it runs here as it is installed, on a CPU:

    python -m venv peer && peer/bin/pip install liger-kernel==0.8.5 transformers triton
    TRITON_INTERPRET=1 peer/bin/python scripts/liger_chunked_values.py
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import liger_kernel.chunked_loss as peer
import torch

ROOT = Path(__file__).parents[1]
OUT = ROOT / "tests/compat/chunked_values.json"
_SHARED = runpy.run_path(str(ROOT / "tests/compat/chunked_cases.py"))


def values_of(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Run a case; return its loss, what stands beside it, and gradients by argument."""
    given, leaves = _SHARED["arguments_of"](case)
    loss = getattr(peer, name)(compiled=False, **case["options"])(**given)
    beside: Any = ()
    if isinstance(loss, tuple):
        loss, *beside = loss
    if len(beside) == 1:
        (beside,) = beside
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {
        "loss": loss.item(),
        "beside": [value.detach().double().tolist() for value in map(torch.as_tensor, beside)],
        "gradients": {
            name: grad.double().flatten().tolist() for name, grad in zip(leaves, grads, strict=True)
        },
    }


def rounded(value: Any) -> Any:
    """Return numbers with the seven digits that liger_kernel has, which rounds to fp32."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else float(f"{value:.7g}")


def main() -> None:
    """Write the file."""
    torch.set_default_dtype(torch.float64)
    found = {key: values_of(case["name"], case) for key, case in _SHARED["CASES"].items()}
    lines = (f"{json.dumps(key)}: {json.dumps(rounded(value))}" for key, value in found.items())
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{OUT}: {len(found)} cases")


if __name__ == "__main__":
    main()
