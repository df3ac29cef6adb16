"""A peer's own patch on our model, so that the same loop can measure it.

Only its documented interface is called, in the interpreter that it is installed in.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from torch import nn

from liger_cli.errors import EnvironmentProblem
from liger_cli.training.model.adapters import is_adapted

__all__ = ["PEER", "PEER_PACKAGE", "apply_peer_patch"]

PEER = "liger-kernel"
PEER_PACKAGE = "liger_kernel"


def apply_peer_patch(model: Any) -> dict[str, Any]:
    """Let liger-kernel patch a model in place.

    Returns:
        The `peer` part of a report. num_changed counts the modules whose class or forward is
        another than before: none means that the peer does not know the model.

    Raises:
        EnvironmentProblem: The peer is not installed here.
    """
    try:
        peer = importlib.import_module(f"{PEER_PACKAGE}.transformers")
    except ImportError as error:
        raise EnvironmentProblem(f"{PEER} cannot be imported: {error}") from error
    # Of an adapted model it knows the one inside, as transformers' Trainer hands it over.
    target = model.get_base_model() if is_adapted(model) else model
    before = {name: _computes(module) for name, module in model.named_modules()}
    peer._apply_liger_kernel_to_instance(model=target)
    changed = sum(before.get(name) != _computes(module) for name, module in model.named_modules())
    return {"name": PEER, "version": _version(), "num_changed": changed}


def _computes(module: nn.Module) -> tuple[type, Any]:
    """Return the class and forward of a module: a patch changes one of them."""
    return type(module), getattr(module.forward, "__func__", module.forward)


def _version() -> str | None:
    try:
        return metadata.version(PEER)
    except metadata.PackageNotFoundError:
        return None
