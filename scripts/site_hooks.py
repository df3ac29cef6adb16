"""Hooks of mkdocs.yml: what pages link to outside of docs/ is a part of the site.

Links in pages stay relative to the file they are in, so that they work on GitHub too. README.md is
the home page, other files are below repository/. Scripts and notebooks become pages with their
code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
HOME = "README.md"
# A block of code, code in a line, or a link, whose target is the last group.
_TOKEN = re.compile(r"^```.*?^```|`[^`\n]+`|(\]\()([^)\s]+)(?=\))", re.MULTILINE | re.DOTALL)
# What GitHub shows as it is and mkdocs in other words: markdown in a folded part, the name of a
# file or another word at a block of code, a picture with a width.
_SPELLINGS = {
    r"^<details><summary>(.*)</summary>$": r"/// details | \1",
    r"^</details>$": "///",
    r"^```(\w+) (\S+\.\w+)$": r'```\1 title="\2"',
    r"^```(\w+) [\w-]+$": r"```\1",
    r'^<img src="(\S+)" width="(\d+)" alt="([^"]*)">$': r'![\3](\1){ width="\2" }',
}


def code_page(language: str) -> Callable[[str, str], str]:
    """Build a function that makes a page of a file's name and its code."""
    return lambda name, text: f"# {name}\n\n```{language}\n{text.rstrip()}\n```\n"


def notebook_page(name: str, text: str) -> str:
    """Return a notebook as a page: its text, its code, and the text that the code printed."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join("".join(out.get("text", "")) for out in cell.get("outputs", ()))
        parts += [f"```text\n{printed.rstrip()}\n```"] * bool(printed)
    return "\n\n".join(parts) + "\n"


SHOWN = {
    ".py": code_page("python"),
    ".sh": code_page("bash"),
    ".yaml": code_page("yaml"),
    ".ipynb": notebook_page,
}


def site_path(path: str) -> str:
    """Return where a file of the repository is in the site."""
    if path == HOME:
        return "index.md"
    is_in_docs = path.startswith("docs/")
    found = path.removeprefix("docs/") if is_in_docs else f"repository/{path}"
    return f"{found}.md" if PurePosixPath(path).suffix in SHOWN else found


def repository_path(uri: str) -> str:
    """Return the file of the repository that a page of the site is made of."""
    if uri == "index.md":
        return HOME
    found = uri.removeprefix("repository/")
    found = found if found != uri else f"docs/{uri}"
    source = found.removesuffix(".md")
    return source if PurePosixPath(source).suffix in SHOWN else found


def target(page: str, link: str) -> str | None:
    """Return the repository's path of a link of a page; None if it is an address or an anchor."""
    name = link.partition("#")[0]
    if not name or re.match(r"[a-z]+:|/", name):
        return None
    return os.path.normpath(f"{PurePosixPath(page).parent}/{name}")


def links(page: str, text: str) -> Iterator[str]:
    """Yield the files of the repository that a page links to."""
    for match in _TOKEN.finditer(text):
        path = target(page, match[2]) if match[2] else None
        if path is not None and (ROOT / path).is_file():
            yield path


def rewrite(page: str, text: str) -> str:
    """Return a page with the links of the site, in the spellings of mkdocs.

    Raises:
        PluginError: A link or picture is HTML, which mkdocs does not check.
    """
    here = PurePosixPath(site_path(page)).parent

    def moved(match: re.Match[str]) -> str:
        path = target(page, match[2]) if match[2] else None
        if path is None or path.startswith(".."):
            return match[0]
        anchor = match[2][len(match[2].partition("#")[0]) :]
        return f"{match[1]}{os.path.relpath(site_path(path), here)}{anchor}"

    for pattern, spelling in _SPELLINGS.items():
        text = re.sub(pattern, spelling, text, flags=re.MULTILINE)
    if found := re.search(r"<(?:a|img) [^>]*>", _TOKEN.sub("", text)):
        raise PluginError(f"{page}: write {found[0]} in markdown, so that its target is checked")
    return _TOKEN.sub(moved, text)


def added_file(path: str, config: MkDocsConfig) -> File:
    """Return a file of the repository as one of the site."""
    uri, source = site_path(path), ROOT / path
    level = InclusionLevel.NOT_IN_NAV
    if not uri.endswith(".md"):
        return File.generated(config, uri, abs_src_path=str(source), inclusion=level)
    text, show = source.read_text(), SHOWN.get(source.suffix)
    content = show(source.name, text) if show else text
    return File.generated(config, uri, content=content, inclusion=level)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root and all that pages link to; show code as pages."""
    for file in [file for file in files if PurePosixPath(file.src_uri).suffix in SHOWN]:
        files.remove(file)
        files.append(added_file(f"docs/{file.src_uri}", config))
    for page in sorted(ROOT.glob("*.md")):
        files.append(added_file(page.name, config))
    waiting = [page.src_uri for page in files.documentation_pages()]
    while waiting:
        uri = waiting.pop()
        for path in links(repository_path(uri), files.src_uris[uri].content_string):
            if site_path(path) not in files.src_uris:
                files.append(added_file(path, config))
                waiting += [site_path(path)] * site_path(path).endswith(".md")
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    return rewrite(repository_path(page.file.src_uri), markdown)
