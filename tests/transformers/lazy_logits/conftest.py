"""Fixtures of the tests of deferred logits."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def accelerate() -> Any:
    module = pytest.importorskip("accelerate")
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
