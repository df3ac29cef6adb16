"""Under TRITON_INTERPRET=1 only test_interpreter.py of these runs: the interpreter is slow."""

from __future__ import annotations

import pytest

from liger_kernels.ops.backend import INTERPRETED

_OURS = (
    "test_api.py",
    "test_engine.py",
    "test_families.py",
    "test_multimodal.py",
    "test_plan.py",
    "test_recognise.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        return
    skip = pytest.mark.skip(reason="runs without the interpreter; test_interpreter.py runs with it")
    for item in items:
        if item.path.name in _OURS:
            item.add_marker(skip)
