"""Fixtures of the losses."""

from __future__ import annotations

import pytest

from liger_kernels.ops.losses import linear_loss


@pytest.fixture
def three_tokens_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "chunk_tokens", lambda *_: 3)
