"""The words of docstrings, comments, messages and pages: plain, and those of the field."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("liger_cli", "liger_kernels", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

# A word or phrase, and one to write in its place.
AVOIDED = {
    "told": "passed, given, reported",
    "tells": "reports, shows, says",
    "made again": "recomputed",
    "anew": "again",
    "whoever": "the caller, the user",
    "stands for": "is, means, represents",
    "stand for": "are, mean, represent",
    "besides": "also, in addition to",
    "handed over": "passed",
    "goes on with": "continues with, resumes from",
    "of its own": "its own ..., a separate ...",
}
_AVOIDED = re.compile(rf"\b({'|'.join(AVOIDED).replace(' ', '[ ]')})\b", re.IGNORECASE)

# First words of docstrings that say what a function does instead of naming it.
THIRD_PERSON = re.compile(
    r"""
    Adds | Answers | Appends | Applies | Asks | Begins | Builds | Calls | Checks | Chooses |
    Collects | Compares | Computes | Copies | Counts | Creates | Decides | Deletes | Describes |
    Draws | Ends | Evaluates | Finds | Forgets | Formats | Frees | Generates | Gets | Gives |
    Holds | Keeps | Leaves | Lets | Lists | Loads | Logs | Makes | Matches | Measures |
    Multiplies | Notes | Parses | Patches | Prints | Puts | Raises | Reads | Recognises |
    Recomputes | Refuses | Removes | Renders | Repairs | Replaces | Restores | Returns | Runs |
    Samples | Saves | Says | Seeds | Sets | Shows | Starts | Sums | Swaps | Takes | Tells |
    Tokenises | Traces | Trains | Turns | Undoes | Validates | Waits | Warns | Widens | Writes |
    Yields
    """,
    re.VERBOSE,
)


def avoided(text: str) -> Iterator[str]:
    """Yield each word of a text to avoid, with the words to write in its place."""
    # A phrase may be broken over two lines.
    for match in _AVOIDED.finditer(" ".join(text.split())):
        yield f"{match[0]!r} (write: {AVOIDED[match[0].lower()]})"


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every string and every block of comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    start, block = 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            start = start if block else token.start[0]
            block.append(token.string.lstrip("# "))
        elif token.type != tokenize.NL and block:
            yield start, " ".join(block)
            block = []


def docstrings(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield the line and the text of every docstring, and whether it is a function's."""
    for node in ast.walk(ast.parse(source)):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function or isinstance(node, ast.Module | ast.ClassDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text, is_function


def first_words(text: str) -> str | None:
    """Return the problem of a docstring's first words, or None."""
    if re.match(r"Returns? what\b", text):
        return "starts with 'Return what': name the value"
    if text.startswith("What "):
        return "starts with 'What': begin with a verb or a noun"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_of_source(path):
    source = path.read_text()
    problems = [f"{line}: {word}" for line, text in texts(source) for word in avoided(text)]
    for line, text, is_function in docstrings(source):
        if problem := first_words(text):
            problems.append(f"{line}: a docstring {problem}")
        word = text.split(maxsplit=1)[0]
        if is_function and THIRD_PERSON.fullmatch(word):
            problems.append(f"{line}: a docstring starts with {word!r}: use the imperative")
    assert not problems, "\n".join([str(path.relative_to(ROOT)), *problems])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_of_pages(path):
    paragraphs = re.split(r"\n\s*\n", path.read_text())
    problems = [word for text in paragraphs for word in avoided(text)]
    assert not problems, "\n".join([str(path.relative_to(ROOT)), *problems])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""Whoever calls this."""\n', 1),
        ("# made\n# again\nx = 1\n", 1),
        ('x = f"{1} is told"\n', 1),
        ("told = 1  # retold, a stand\n", 0),
        ('raise ValueError("the tokens " "stand for")\n', 1),
    ],
)
def test_words_are_found_in_strings_and_comments(source, found):
    assert sum(1 for _, text in texts(source) for _ in avoided(text)) == found


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [
        ("Return what a head is.", True),
        ("Returns what it is.", True),
        ("What every op needs.", True),
        ("Return the head.", False),
        ("Whatever is left.", False),
    ],
)
def test_first_words(text, is_wrong):
    assert (first_words(text) is not None) is is_wrong
