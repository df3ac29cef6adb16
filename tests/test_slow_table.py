"""The table of slow tests names tests that exist, and keeps some of each that has a pattern.

Groups of tests whose processes or files are made once stay on one worker.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import slow

TESTS = "\n".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))


@pytest.mark.parametrize("name", [*slow.SLOW, *slow.INTERPRETED])
def test_every_row_is_a_test_with_a_reason(name):
    reason, kept = {**slow.SLOW, **slow.INTERPRETED}[name]
    assert re.search(rf"^def {name}\(", TESTS, re.MULTILINE), f"no test is called {name}"
    assert reason
    re.compile(kept)


def test_a_row_leaves_out_what_its_pattern_does_not_keep():
    assert slow.reason_of("test_precisions_train[--dtype=bfloat16]", interpreted=False)
    assert slow.reason_of("test_precisions_train[--bf16]", interpreted=False) is None
    assert slow.reason_of("test_anything_else", interpreted=True) is None


@pytest.mark.xdist_group("alone")
def test_a_group_stays_on_one_worker(request):
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("no workers that keep groups: make test has them")
    assert request.node.nodeid.endswith("@alone")
