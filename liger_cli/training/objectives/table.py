"""The objectives by name.

A new one (kto, reward, classify, distill) is a class with the methods of `Objective` in a file
here, a row of OBJECTIVES, and a row in liger_cli/config/objectives.py for the keys that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from liger_cli.config import RunConfig
from liger_cli.training.objectives.objective import Objective
from liger_cli.training.objectives.sft import NextToken

__all__ = ["OBJECTIVES", "make_objective"]

_Make = Callable[[RunConfig, Any, torch.device], Objective]

OBJECTIVES: dict[str, _Make] = {
    "sft": lambda config, model, device: NextToken(model, device),
}


def make_objective(config: RunConfig, model: Any, device: torch.device) -> Objective:
    """Return the objective of a run.

    Args:
        config: Names it, and has its keys.
        model: The model before it is prepared: wrappers may hide its signature.
        device: Where batches go.
    """
    return OBJECTIVES["sft"](config, model, device)
