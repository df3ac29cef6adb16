"""The memory of graphics cards, of which a run has what the driver leaves."""

from __future__ import annotations

from dataclasses import dataclass

from liger_cli.errors import ConfigError
from liger_kernels.nearest import nearest_name

__all__ = ["CARDS", "Card", "find_card"]

# What the driver keeps (0.5 GB of an H100), and what the CUDA context, its libraries and their
# kernels take outside torch's allocator.
_RESERVED = 3 << 29

# MiB in all, as nvidia-smi and rocm-smi show them.
_MIB = {
    "B200-180GB": 183359,
    "H200-141GB": 143771,
    "H100-80GB": 81559,
    "H100-NVL-94GB": 95830,
    "A100-80GB": 81920,
    "A100-40GB": 40960,
    "L40S-48GB": 46068,
    "L4-24GB": 23034,
    "A10-24GB": 23028,
    "T4-16GB": 15360,
    "V100-32GB": 32768,
    "V100-16GB": 16384,
    "RTX-6000-Ada-48GB": 49140,
    "RTX-A6000-48GB": 49140,
    "RTX-5090-32GB": 32607,
    "RTX-4090-24GB": 24564,
    "RTX-3090-24GB": 24576,
    "MI300X-192GB": 196592,
}


@dataclass(frozen=True)
class Card:
    """A card, and the bytes that tensors can have on it."""

    name: str
    usable: int


CARDS = {name: Card(name, (mib << 20) - _RESERVED) for name, mib in _MIB.items()}


def find_card(text: str) -> Card:
    """Return the card of a name, in any case and without its size where one has that name.

    A number is a card of so many GB.

    Raises:
        ConfigError: No card has the name, or several.
    """
    try:
        num_bytes = round(float(text.lower().removesuffix("gb")) * 1e9)
    except ValueError:
        return _named(text)
    if not _RESERVED < num_bytes < 1 << 60:
        raise ConfigError(f"gpu is {text}: it needs more than {_RESERVED / 1e9:.1f} GB")
    return Card(f"{num_bytes / 1e9:g} GB", num_bytes - _RESERVED)


def _named(text: str) -> Card:
    wanted = text.lower().replace("_", "-").replace(" ", "-")
    found = [card for name, card in CARDS.items() if name.lower() == wanted]
    found = found or [c for name, c in CARDS.items() if name.lower().startswith(f"{wanted}-")]
    if len(found) == 1:
        return found[0]
    names = [card.name for card in found] or list(CARDS)
    near = nearest_name(wanted, [name.lower() for name in names])
    hint = next((name for name in names if name.lower() == near), None)
    problem = "is more than one card" if found else "is no card that liger knows"
    raise ConfigError(
        f"gpu {text!r} {problem}" + (f"; did you mean {hint}?" if hint and not found else ""),
        hint=f"One of {', '.join(names)}, or a number of GB.",
    )
