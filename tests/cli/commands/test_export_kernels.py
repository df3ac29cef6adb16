"""liger export kernels: the layout that Hugging Face's `kernels` reads."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from liger_cli.app import main
from liger_cli.commands.export.kernels import BACKENDS, export_kernels
from liger_cli.errors import ConfigError
from liger_kernels.transformers import hub_layers


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["export", "kernels", *words])
    return int(end.value.code or 0)


def test_every_variant_is_a_package_of_our_layers(tmp_path, capsys):
    place = tmp_path / "repository"
    assert run(str(place), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(place)
    assert found["layers"].keys() == hub_layers.LAYERS.keys()
    assert {path.name for path in (place / "build").iterdir()} == {
        f"torch-{backend}" for backend in BACKENDS
    }
    ids = set()
    for backend in BACKENDS:
        variant = place / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert metadata["license"] == "Apache-2.0"
        # Pure Python: torch and triton are implied, and nothing else is needed.
        assert metadata["python-depends"] == []
        ids.add(metadata["id"])
        # Imported as `kernels` does: by its id, from its file.
        spec = importlib.util.spec_from_file_location(metadata["id"], variant / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[metadata["id"]] = module
        try:
            spec.loader.exec_module(module)
            for name, layer in found["layers"].items():
                assert getattr(module.layers, layer) is hub_layers.LAYERS[name]
        finally:
            for name in [n for n in sys.modules if n.startswith(metadata["id"])]:
                del sys.modules[name]
    assert len(ids) == len(BACKENDS)
    assert str(place) in (place / "README.md").read_text()


def test_the_readme_names_every_layer_and_its_code_compiles(tmp_path):
    place = tmp_path / 'a "quoted" {name}'
    export_kernels(place)
    text = (place / "README.md").read_text()
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "README.md", "exec")
    for name, layer in hub_layers.LAYERS.items():
        assert f'"{name}": "{layer.__name__}"' in blocks[0]


@pytest.mark.parametrize("place", ["full", "a:b"])
def test_a_place_that_cannot_be_a_repository_is_refused(place, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    words = {"full": "is not an empty directory", "a:b": "has a colon"}[place]
    with pytest.raises(ConfigError, match=words):
        export_kernels(tmp_path / place)
    assert run(str(tmp_path / place)) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_help_shows_the_kinds_of_export(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    assert "kernels" in text
    assert "gguf" in text
