"""docs/configuration.md says what RunConfig says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "config_page.py"


@pytest.fixture
def script():
    return runpy.run_path(str(SCRIPT))


def test_page_is_up_to_date(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--check"])
    assert script["main"]() == 0, f"run python {SCRIPT.name}"


def test_check_finds_an_old_page(script, monkeypatch, tmp_path, capsys):
    page = tmp_path / "configuration.md"
    page.write_text(script["page"]().replace("`max_length`", "`max_len`"))
    monkeypatch.setitem(script["main"].__globals__, "PAGE", page)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--check"])
    assert script["main"]() == 1
    assert "is out of date" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [SCRIPT.name])
    assert script["main"]() == 0
    assert page.read_text() == script["page"]()


def test_page_has_every_key(script):
    from liger_cli.config import ALIASES, RunConfig

    text = script["page"]()
    for key in (*RunConfig.model_fields, *ALIASES):
        assert f"`{key}`" in text
