"""liger verify as the ranks of a launch run it: equal to one process, and wrong where a rank is."""

from __future__ import annotations

import pytest
import sharded_runs

WORDS = ("verify", "--model", "qwen3", "--use-cpu", "--dtype", "float32")


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_shards_are_equal_to_one_process(adapter):
    assert sharded_runs.launch(2, *WORDS, "--adapter", adapter) == [0, 0]
