"""Which modules are patched, and rows for a trainer."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernels.transformers.replacements.subclasses import is_patched


def patched_classes(model: nn.Module) -> set[str]:
    """Return the classes of patched modules; Linear is the head."""
    return {type(module).__name__ for module in model.modules() if is_patched(module)}


def rows(count: int) -> list[dict[str, list[int]]]:
    ids = torch.randint(10, 90, (count, 12), generator=torch.Generator().manual_seed(7)).tolist()
    return [
        {"input_ids": row, "attention_mask": [1] * 12, "labels": [-100] * i + row[i:]}
        for i, row in enumerate(ids)
    ]
