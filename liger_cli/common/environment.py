"""The machine and the installation: versions, devices, commit.

torch is imported when devices are asked for, not before.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from liger_cli.common.cgroups import group_memory

__all__ = [
    "PACKAGES",
    "cache_directory",
    "commit",
    "devices",
    "environment",
    "free_host_memory",
    "host_memory",
    "package_version",
]

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "peft",
    "liger-kernels",
)


def cache_directory() -> Path:
    """Return the cache directory: $XDG_CACHE_HOME/liger or ~/.cache/liger."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liger"


def package_version(name: str) -> str | None:
    """Return the installed version of a package, or None. Imports nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Return Python, package versions, devices, CPU count, commit and date, as JSON values."""
    versions = {name.replace("-", "_"): package_version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
        "devices": devices(),
        "cpu_count": os.cpu_count(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def devices() -> list[dict[str, Any]]:
    """Return the accelerators torch can use, or the CPU: type, name, memory_bytes, count."""
    import torch

    kind = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), None)
    if kind is None:
        kind = "mps" if torch.backends.mps.is_available() else "cpu"
        name = _cpu_name() if kind == "cpu" else platform.machine()
        return [{"type": kind, "name": name, "memory_bytes": host_memory(), "count": 1}]
    module = getattr(torch, kind)
    cards: Counter[tuple[str, int]] = Counter()
    for index in range(module.device_count()):
        properties = module.get_device_properties(index)
        cards[properties.name, properties.total_memory] += 1
    # torch calls a ROCm device cuda too.
    kind = "rocm" if torch.version.hip else kind
    return [
        {"type": kind, "name": name, "memory_bytes": memory, "count": count}
        for (name, memory), count in cards.items()
    ]


def host_memory() -> int:
    """Return the bytes of memory that this machine, or the limit of a container, has in all."""
    import psutil

    group, total = group_memory(), int(psutil.virtual_memory().total)
    return total if group is None else min(total, group.limit)


def free_host_memory() -> int:
    """Return the bytes of memory that new allocations can have, here or in a container."""
    import psutil

    group, free = group_memory(), int(psutil.virtual_memory().available)
    return free if group is None else min(free, group.free)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit of this package's own checkout, ending in -dirty if changed, or None."""
    root = Path(__file__).resolve().parents[2]
    # An installed package may lie inside somebody else's repository, which says nothing about it.
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
