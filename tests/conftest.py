"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from slow import reason_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if reason_of(item.name, interpreted=interpreted) is not None:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; run make test-gpu on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """The device under test: the GPU where there is one, unless kernels are interpreted."""
    from liger_kernels.ops.backend import INTERPRETED

    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True)
def freed_gpu() -> Iterator[None]:
    """Give cached GPU memory back after each test: several processes share the card."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
