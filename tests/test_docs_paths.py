"""Paths, links, flags and imports of the pages exist."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from liger_cli.app import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md", "SECURITY.md")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# In backticks: a path that begins with one of these folders, or a Python file by its last parts.
TOP = ("liger_kernels", "liger_cli", "configs", "docs", "scripts", "tests")
FOREIGN = ("convert_hf_to_gguf.py",)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_PATH = re.compile(r"[\w.-]+(?:/[\w.*-]+)*/?")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```[^\n]*$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


def prose(page: Path) -> str:
    """Return the text of a page without its blocks of code."""
    return _FENCE.sub("", page.read_text())


def paths(text: str) -> Iterator[str]:
    """Yield what names a file or folder of this repository, in backticks."""
    for code in _CODE.findall(text):
        for word in code.split():
            name = word.strip("(),:;")
            is_below = "/" in name and name.split("/")[0] in TOP
            is_module = name.endswith(".py") and name not in FOREIGN
            if (is_below or is_module) and _PATH.fullmatch(name):
                yield name


@functools.cache
def files() -> tuple[str, ...]:
    found = (path for folder in TOP for path in (ROOT / folder).rglob("*.py"))
    return tuple(f"/{path.relative_to(ROOT)}" for path in found)


def exists(name: str) -> bool:
    if "*" in name:
        return any(ROOT.glob(name))
    return (ROOT / name).exists() or any(path.endswith(f"/{name}") for path in files())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        anchor = name
        while anchor in found:
            number += 1
            anchor = f"{name}-{number}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page):
    missing = sorted({name for name in paths(prose(page)) if not exists(name)})
    assert not missing, f"{page.relative_to(ROOT)} names {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    problems = []
    for link in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            problems.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            problems.append(f"{link}: no such heading")
    assert not problems, "\n".join([str(page.relative_to(ROOT)), *problems])


def test_layout_of_architecture_exists():
    """Folders of the tree in docs/architecture.md by their indentation, files by their folder."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text.split("## Layout")[1].split("```")[1]
    missing, found, parents = [], 0, [(-1, ROOT)]
    for line in filter(str.strip, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        while parents[-1][0] >= indent:
            parents.pop()
        first = line.split()[0]
        folder = parents[-1][1]
        if first.endswith("/"):
            folder /= first
            parents.append((indent, folder))
        names = re.findall(r"[\w*]+\.py\b", line)
        found += 1 + len(names)
        missing += [str(folder)] * (not folder.is_dir())
        missing += [f"{folder}/{name}" for name in names if not any(folder.glob(name))]
    assert found > 50
    assert not missing, f"docs/architecture.md names {', '.join(missing)}"


def test_classes_of_architecture_exist():
    """Each name in backticks that is written as a class is one."""
    names = set(
        re.findall(r"`([A-Z][a-z]+[A-Z]\w*)", (ROOT / "docs" / "architecture.md").read_text())
    )
    sources = (path.read_text() for tree in TOP[:2] for path in (ROOT / tree).rglob("*.py"))
    defined = {name for text in sources for name in re.findall(r"^class (\w+)", text, re.M)}
    assert len(names) >= 8
    assert names <= defined, f"no class of this name: {', '.join(sorted(names - defined))}"


@functools.cache
def flags(command: str) -> frozenset[str]:
    """Return the flags of a command and of the commands below it, in kebab case."""
    found = importlib.import_module(f"liger_cli.commands.{command}.cli").command
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command()(found)
        found = app
    waiting, names = [typer.main.get_command(found)], {"--help", "-h"}
    while waiting:
        one = waiting.pop()
        waiting += getattr(one, "commands", {}).values()
        for parameter in one.params:
            names |= {
                name.replace("_", "-") for name in (*parameter.opts, *parameter.secondary_opts)
            }
    return frozenset(names)


def unknown_flags(text: str) -> Iterator[str]:
    """Yield the flags behind `liger COMMAND` that the command does not take."""
    for command, rest in re.findall(r"\bliger (\w+)([^\n`#]*)", text):
        if command in COMMANDS:
            for flag in re.findall(r"(?<=[\s\[(])--?[a-z][\w-]*", rest):
                if flag not in flags(command):
                    yield f"liger {command} {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_exist(page):
    # An option's line may be continued by a backslash.
    missing = sorted(set(unknown_flags(page.read_text().replace("\\\n", ""))))
    assert not missing, f"{page.relative_to(ROOT)} has {', '.join(missing)}"


def test_unknown_flags_are_found():
    assert list(
        unknown_flags("`liger train -c a --ops auto,-rope --nope -z`, liger is --fast")
    ) == [
        "liger train --nope",
        "liger train -z",
    ]
    assert list(unknown_flags("liger bench ops --quick --nope")) == ["liger bench --nope"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_imports_of_examples_exist(page):
    missing = []
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for module, names in re.findall(
            r"^from (liger_\w+\.[\w.]+|liger_cli) import (.+)$", block, re.M
        ):
            if module.startswith("liger_kernel."):
                # The drop-in's name, which is there after compat.install().
                continue
            found = importlib.import_module(module)
            missing += [f"{module}.{n}" for n in re.findall(r"\w+", names) if not hasattr(found, n)]
    assert not missing, f"{page.relative_to(ROOT)} imports {', '.join(missing)}"


def test_diff_of_contributing_is_the_code():
    """Each added line of the example is a line of the file it names, in the same order."""
    (example,) = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    files = re.split(r"^\+\+\+ b/(.*)\n", example, flags=re.MULTILINE)[1:]
    assert len(files) == 4
    for name, text in zip(files[::2], files[1::2], strict=True):
        rest = iter((ROOT / name).read_text().splitlines())
        for line in text.splitlines():
            assert line == "..." or line[1:] in rest, f"{name} has no line {line[1:]!r} there"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`docs/results/a.json` and `tests/ops`", ["docs/results/a.json", "tests/ops"]),
        ("`.venv/bin/python scripts/models_page.py`", ["scripts/models_page.py"]),
        ("`python/docs`, `docs`, docs/none.md", []),
        ("`train/none.py` and `none.py`, `convert_hf_to_gguf.py`", ["train/none.py", "none.py"]),
        ("`liger_cli/commands/<command>/`", []),
    ],
)
def test_paths_are_found(text, found):
    assert list(paths(text)) == found


def test_anchors_are_as_on_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `code`, and more\n## Same\n## Same\n```\n# no heading\n```\n")
    assert anchors(page) == {"a-code-and-more", "same", "same-1"}
