"""The nearest known name in an error: which one it is, and that the search for it is bounded."""

from __future__ import annotations

import difflib
import random
import string
from pathlib import Path

import pytest

import liger_kernels
from liger_cli.config import find_problems, load_config
from liger_cli.errors import ConfigError
from liger_kernels.nearest import nearest_name
from liger_kernels.ops.registry import OPS, find_op
from liger_kernels.transformers.patching.plan import resolve_ops

ROOT = Path(liger_kernels.__file__).parents[1]


@pytest.fixture
def searches(monkeypatch):
    """The words that were searched for, each with the number of names that were looked at."""
    found = []
    search = difflib.get_close_matches

    def note(word, possibilities, **options):
        found.append((word, len(possibilities)))
        return search(word, possibilities, **options)

    monkeypatch.setattr(difflib, "get_close_matches", note)
    return found


def test_case_245_the_nearest_name_is_that_of_difflib():
    generator = random.Random(0)
    names = [*OPS, "auto", "all", "none"]
    for _ in range(200):
        word = list(generator.choice(names))
        for _ in range(generator.randint(0, 3)):
            word[generator.randrange(len(word))] = generator.choice(string.ascii_lowercase)
        wanted = difflib.get_close_matches("".join(word), names, n=1)
        assert nearest_name("".join(word), names) == next(iter(wanted), None)


@pytest.mark.parametrize("size", [101, 10**6])
def test_case_245_a_name_that_nobody_misspells_is_not_searched(searches, size):
    assert nearest_name("rope" * size, ["rope"]) is None
    with pytest.raises(ValueError, match="unknown op"):
        find_op("rope" * size)
    assert not searches


def test_case_245_at_most_5000_names_are_looked_at(searches):
    assert nearest_name("name1x", (f"name{i}" for i in range(10**6))) == "name1"
    assert [number for _, number in searches] == [5000]


def test_case_245_a_hundred_thousand_ops_are_one_search(searches):
    assert resolve_ops(["rope"] * 100_000).ops == ("rope",)
    assert not searches
    with pytest.raises(ValueError, match="unknown op 'x0'"):
        resolve_ops([f"x{i}" for i in range(100_000)])
    assert len(searches) == 1


def test_case_245_a_file_of_unknown_keys_is_twenty_searches(searches, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("".join(f"learning_rat{i}: 1\n" for i in range(300)))
    problems = find_problems(path)
    assert len(problems) == 300
    assert problems[0].endswith("unknown key 'learning_rat0'; did you mean 'learning_rate'?")
    assert problems[-1].endswith("unknown key 'learning_rat299'")
    assert len(searches) <= 40


def test_case_245_a_long_value_is_refused_without_a_search(searches):
    with pytest.raises(ConfigError, match="lr_scheduler_type should be"):
        load_config(flags={"model": "llama", "lr_scheduler_type": "cosine" * 10**5})
    assert not searches


def test_case_245_every_search_is_the_shared_one():
    for package in ("liger_kernels", "liger_cli"):
        for path in (ROOT / package).rglob("*.py"):
            assert "import difflib" not in path.read_text() or path.name == "nearest.py", path
