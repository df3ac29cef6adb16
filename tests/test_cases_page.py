"""docs/cases.md has a line for every case number in a test's name, and no line without a test."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def numbers_of_tests() -> set[int]:
    """The numbers in the names of test functions: test_case_88_89_of_..., test_copies_case_50."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(), re.MULTILINE):
            for numbers in re.findall(r"_case((?:_[0-9]+)+)(?![0-9a-z])", name):
                found |= {int(number) for number in numbers.strip("_").split("_")}
    return found


def lines_of_the_page() -> list[tuple[int, str, str]]:
    text = (ROOT / "docs" / "cases.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    return [(int(number), failure, answer) for number, failure, answer in rows]


def test_every_number_in_a_test_name_has_a_line():
    missing = numbers_of_tests() - {number for number, _, _ in lines_of_the_page()}
    assert not missing, f"docs/cases.md has no line for {sorted(missing)}"


def test_every_line_has_a_test():
    missing = {number for number, _, _ in lines_of_the_page()} - numbers_of_tests()
    assert not missing, f"no test is named after {sorted(missing)}"


def test_the_lines_are_in_order_and_each_number_once():
    numbers = [number for number, _, _ in lines_of_the_page()]
    assert numbers == sorted(set(numbers))
