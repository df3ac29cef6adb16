"""Small shapes for bench ops."""

from __future__ import annotations

from typing import Any

import torch

from liger_cli.commands.bench.ops.tables import (
    ArmPart,
    Spread,
    TimePart,
)

CPU = torch.device("cpu")


def side(name: str, full_ms: float, **more: Any) -> ArmPart:
    def part(wall: float, share: float) -> TimePart:
        spread = Spread(median_ms=wall, p20_ms=wall, p80_ms=wall)
        return TimePart(wall=spread, gpu=spread, share=share)

    return ArmPart(name=name, forward=part(full_ms / 2, 0.98), full=part(full_ms, 0.84), **more)
