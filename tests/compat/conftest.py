"""Fixtures of programs that import liger_kernel."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from liger_kernels import compat


@pytest.fixture
def alias() -> Iterator[Any]:
    """liger_kernel.transformers while the drop-in is installed."""
    compat.install()
    try:
        yield importlib.import_module("liger_kernel.transformers")
    finally:
        compat.uninstall()
