"""Run the patching tests on each transformers version that is promised, one environment a version.

python scripts/test_versions.py                     all versions; their tests' log in docs/results
python scripts/test_versions.py --versions 5.17.0

An environment under .venv-versions holds the packages that a version pins, and sees everything else
(torch above all) in the environment that runs this script: it takes seconds and megabytes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-versions"
# transformers 4 needs a hub client below 1, and datasets that take one; 5.17 needs it below 2.
PINS = {
    "4.57.6": {
        "transformers": "4.57.6",
        "tokenizers": "0.22.2",
        "huggingface_hub": "0.36.2",
        "datasets": "4.0.0",
    },
    "5.17.0": {
        "transformers": "5.17.0",
        "tokenizers": "0.23.3",
        "huggingface_hub": "1.33.0",
        # What that hub client talks through, and the later one no longer does.
        "httpx": "0.28.1",
        "httpcore": "1.0.9",
        "h11": "0.16.0",
        "anyio": "4.16.0",
    },
    "5.24.0": {
        "transformers": "5.24.0",
        "tokenizers": "0.23.3",
        "huggingface_hub": "2.4.0",
    },
}


def make_environment(version: str) -> Path:
    """Return the Python of a version's environment; create it unless it is there as pinned."""
    folder = ENVIRONMENTS / version
    python = folder / "bin" / "python"
    stamp = folder / "pins.txt"
    pins = [f"{name}=={pin}" for name, pin in PINS[version].items()]
    base = sysconfig.get_path("purelib")
    wanted = "\n".join([base, *pins])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    venv.create(folder, clear=True)
    missing = [pin for pin in pins if not _is_here(*pin.split("=="))]
    if missing:
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", *missing], check=True)
    # Last, or pip would take what stands there for installed. addsitedir, as one .pth file does not
    # make Python read those of the folder it names, and the editable install is one.
    own = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (own / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
    stamp.write_text(wanted)
    return python


def _is_here(name: str, version: str) -> bool:
    try:
        return importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        return False


def run_tests(python: Path, arguments: list[str]) -> tuple[int, str]:
    """Return the exit code and the log of the tests in one environment."""
    names = ("transformers", "torch", "tokenizers", "huggingface_hub", "datasets", "peft")
    code = f"import importlib.metadata as m; print({{n: m.version(n) for n in {names}}})"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "--disable-warnings",
        "-m",
        "not slow",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, f"{found.stdout}{done.stdout}{done.stderr}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", default=",".join(PINS), help="of transformers, with commas")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--workers", default="2", help="processes that run the tests of a version")
    parser.add_argument("tests", nargs="*", default=["tests/transformers", "tests/compat"])
    options = parser.parse_args()
    versions = options.versions.split(",")
    for version in versions:
        if version not in PINS:
            parser.error(f"no pins for transformers {version}; there are {', '.join(PINS)}")
    log = f"{datetime.date.today()}  Python {sys.version.split()[0]}\n$ make test-versions\n"
    codes = []
    for version in versions:
        python = make_environment(version)
        code, text = run_tests(python, ["-n", options.workers, *options.tests])
        print(f"transformers {version}: {text.strip().splitlines()[-1]}", flush=True)
        log += f"\n== transformers {version} ==\n{text}"
        codes.append(code)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "test-versions.log").write_text(log)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
