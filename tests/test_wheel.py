"""The wheel, installed in a fresh virtual environment, works outside the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# On one worker of xdist: the wheel is built once.
pytestmark = pytest.mark.xdist_group("wheel")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", home, ROOT),
        cwd=home,
    )
    (wheel,) = home.glob("*.whl")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    python = home / "venv" / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"),
        *("--no-index", wheel),
        cwd=home,
    )
    # torch and the other dependencies come from this environment; a path line does not carry over
    # this environment's editable install of the checkout.
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home
    ).strip()
    (Path(purelib) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import liger_cli; print(liger_cli.__file__)", cwd=home)
    assert where.startswith(purelib), where
    return home


def test_inspect_outside_the_checkout(installed):
    out = run(
        *(installed / "venv/bin/liger", "inspect", "--model", "llama-8b", "--json"), cwd=installed
    )
    coverage = json.loads(out)["coverage"]
    assert coverage["rope"] == {"patched": 32, "candidates": 32}
    assert coverage["fused_linear_cross_entropy"] == {"patched": 1, "candidates": 1}


def test_wheel_carries_configs_types_and_licence(installed):
    (wheel,) = installed.glob("*.whl")
    names = run(sys.executable, "-m", "zipfile", "-l", wheel, cwd=installed)
    assert "liger_cli/report/templates/report.html" in names
    assert "liger_cli/configs/models/llama-8b.yaml" in names
    assert "liger_cli/data/templates/chatml.jinja" in names
    assert "liger_kernels/py.typed" in names
    assert "liger_cli/py.typed" in names
    assert "licenses/LICENSE" in names
    assert "tests/" not in names
