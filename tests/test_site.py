"""The docs site: links out of docs/, code as pages, a strict build, a place for each name."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("liger_kernels.compat", "liger_kernels.ops", "liger_kernels.transformers")


@pytest.fixture(scope="module")
def hooks() -> Any:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("site_hooks")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_its_place_on_an_api_page(package):
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    # A function that has the name of its file is found in there.
    found = re.findall(rf"^::: {re.escape(package)}\.(?:(\w+)\.(?=\1$))?(\w+)$", pages, re.M)
    assert sorted(name for _, name in found) == sorted(importlib.import_module(package).__all__)


@pytest.mark.parametrize(
    ("page", "text", "found"),
    [
        ("README.md", "[a](docs/lora.md#qlora)", "[a](lora.md#qlora)"),
        ("README.md", "![a](docs/images/x.png)", "![a](images/x.png)"),
        ("CONTRIBUTING.md", "[a](AGENTS.md)", "[a](AGENTS.md)"),
        ("CONTRIBUTING.md", "[a](docs/data.md)", "[a](../data.md)"),
        ("docs/tutorial.md", "[a](../CONTRIBUTING.md#x)", "[a](repository/CONTRIBUTING.md#x)"),
        ("docs/tutorial.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/tutorial.md", "[a](#here)", "[a](#here)"),
        ("docs/tutorial.md", "[a](https://b.org/c.py)", "[a](https://b.org/c.py)"),
        ("docs/library.md", "[a](examples/trl_dpo.py)", "[a](examples/trl_dpo.py.md)"),
        ("docs/api/ops.md", "[a](../../configs/b.yaml)", "[a](../repository/configs/b.yaml.md)"),
        ("docs/lora.md", "`[a](../b.md)`\n```\n[a](../b.md)\n```", None),
        (
            "docs/lora.md",
            "<details><summary>2 rows</summary>\n\n| <details>3</details> |\n</details>\n",
            "/// details | 2 rows\n\n| <details>3</details> |\n///\n",
        ),
        ("docs/data.md", "```csv a/b.csv\n1\n```", '```csv title="a/b.csv"\n1\n```'),
        ("docs/data.md", "```python no-run\n1\n```", "```python\n1\n```"),
        (
            "README.md",
            '<img src="docs/images/a.png" width="390" alt="A, b">',
            '![A, b](images/a.png){ width="390" }',
        ),
    ],
)
def test_links_become_those_of_the_site(hooks, page, text, found):
    assert hooks.rewrite(page, text).startswith(found or text)


@pytest.mark.parametrize("html", ['<a href="none.md">', '<img src="none.png">'])
def test_a_link_that_is_not_checked_is_refused(hooks, html):
    assert hooks.rewrite("docs/lora.md", f"`{html}`") == f"`{html}`"
    with pytest.raises(Exception, match=f"docs/lora.md: write {html} in markdown"):
        hooks.rewrite("docs/lora.md", f"text {html}")


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", "docs/data.md", "docs/examples/tiny.py", "a/b.sh"]
)
def test_a_page_of_the_site_knows_its_file(hooks, path):
    assert hooks.repository_path(hooks.site_path(path)) == path


def test_a_notebook_is_a_page_of_text_code_and_output(hooks):
    printed = {"output_type": "stream", "text": ["1\n"]}
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "b"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [printed]},
    ]
    text = hooks.notebook_page("a.ipynb", json.dumps({"cells": cells}))
    assert text == "# A\nb\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n"


@pytest.mark.parametrize(
    ("pages", "warning"),
    [
        ({"a.md": "# A\n[b](b.md#b-and-c)", "b.md": "# B and c"}, None),
        ({"a.md": "[b](c.md)", "b.md": ""}, "'c.md'"),
        ({"a.md": "[b](b.md#c)", "b.md": "# B"}, "'b.md#c'"),
        ({"a.md": "[b](../none.md)", "b.md": ""}, "none.md"),
        ({"a.md": "", "b.md": "", "c.md": ""}, "c.md"),
        ({"a.md": ""}, "'b.md'"),
        ({"a.md": "::: liger_kernels.none", "b.md": ""}, "liger_kernels.none"),
    ],
    ids=["right", "page", "heading", "outside", "omitted", "missing", "name"],
)
def test_a_strict_build_ends_at_what_is_dead(hooks, pages, warning, tmp_path, caplog, monkeypatch):
    build = importlib.import_module("mkdocs.commands.build").build
    config = importlib.import_module("mkdocs.config").load_config
    exceptions = importlib.import_module("mkdocs.exceptions")
    monkeypatch.chdir(ROOT)
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, text in pages.items():
        (docs / name).write_text(text)
    loaded = config(
        str(ROOT / "mkdocs.yml"),
        docs_dir=str(docs),
        site_dir=str(tmp_path / "site"),
        hooks=[],
        nav=["a.md", "b.md"],
        strict=True,
    )
    if warning is None:
        build(loaded)
        return
    with pytest.raises(exceptions.Abort):
        build(loaded)
    assert warning in caplog.text
