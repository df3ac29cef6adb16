"""Packages that only some runs need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from liger_cli.errors import EnvironmentProblem

__all__ = ["require_package"]


def require_package(module: str, what: str, install: str) -> Any:
    """Return a module.

    Args:
        module: Its importable name.
        what: The key that asks for it.
        install: The command that installs it.

    Raises:
        EnvironmentProblem: It is missing, or fails to import.
    """
    try:
        return import_module(module)
    # Compiled packages that do not fit this machine fail to import with any kind of error.
    except Exception as error:
        text = " ".join(str(error).split())
        raise EnvironmentProblem(f"{what} needs {module}: {text}", hint=install) from error
