"""The generator that dropout draws from: its state, and drawing once more from an earlier one."""

import contextlib
from collections.abc import Iterator

import torch


def generator_state(device: torch.device) -> torch.Tensor:
    """Return the state of the generator that dropout on a device draws from."""
    if device.type in ("cpu", "meta"):
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


@contextlib.contextmanager
def generator_at(state: torch.Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw from an earlier state of the device's generator inside, and leave it as it was."""
    module = torch if device.type in ("cpu", "meta") else torch.get_device_module(device)
    where = () if module is torch else (device,)
    now = module.get_rng_state(*where)
    module.set_rng_state(state, *where)
    try:
        yield
    finally:
        module.set_rng_state(now, *where)
