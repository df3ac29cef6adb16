"""Random generators of every kind: their state, and how it is kept."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["kept_random_state", "random_state", "set_random_state"]


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of this process's generators as values that torch.load reads safely."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else _module(device).get_rng_state(),
    }


def set_random_state(values: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what random_state returned."""
    random.setstate(values["python"])
    np.random.set_state(values["numpy"])
    torch.set_rng_state(values["torch"])
    if values["device"] is not None and device.type != "cpu":
        _module(device).set_rng_state(values["device"])


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Leave every generator as it was, whatever was drawn meanwhile."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


def _module(device: torch.device) -> Any:
    # Its functions mean the current device, which accelerate has set.
    return torch.get_device_module(device)
