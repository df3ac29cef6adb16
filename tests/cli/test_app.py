"""The program around the commands: help, exit codes, messages instead of tracebacks."""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
import types

import pytest
import torch

from liger_cli import app
from liger_cli.errors import DataError, LigerError


def liger(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        app.main(words)
    return stop.value.code or 0


@pytest.fixture
def failing(monkeypatch):
    """Makes `liger doctor` raise an error."""

    def install(error: BaseException) -> None:
        def command() -> None:
            raise error

        module = types.SimpleNamespace(command=command)
        monkeypatch.setitem(sys.modules, "liger_cli.commands.doctor.cli", module)

    return install


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from liger_cli.app import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'pydantic', 'transformers'} & {*sys.modules}))"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # Of the processor, and the least of three: the machine may be doing something else as well.
    assert min(seconds) < 0.5


def test_module_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "liger_cli", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("liger ")


def test_every_command_has_a_line_and_a_module(capsys):
    assert liger("--help") == 0
    output = capsys.readouterr().out
    for name in app.COMMANDS:
        assert f" {name} " in output
    for title in ("Train", "Before a run", "Proof", "After training", "This installation"):
        assert f"─ {title} ─" in output
        assert importlib.import_module(f"liger_cli.commands.{name}.cli").command


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert liger(name, "--help") == 0
    assert f"liger {name}" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    assert liger("trian") == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_snake_case_flags(capsys):
    assert liger("doctor", "--jsn") == 2
    assert "--json" in capsys.readouterr().err


def test_error_is_a_message_and_its_exit_code(failing, capsys):
    failing(DataError("row 3 of a.jsonl is no JSON", hint="Mend it."))
    assert liger("doctor") == 4
    output = capsys.readouterr()
    assert output.err == "error: row 3 of a.jsonl is no JSON\nMend it.\n"
    assert output.out == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried ...\nmore"), 5, "--max-length"),
        (MemoryError("no"), 5, "out of memory"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
        (OSError(28, "No space left on device"), 3, "No space left on device"),
        (LigerError("failed"), 1, "error: failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_other_errors(failing, capsys, error, code, words):
    failing(error)
    assert liger("doctor") == code
    output = capsys.readouterr().err
    assert words in output
    assert "Traceback" not in output


def test_debug_shows_the_traceback(failing, capsys):
    failing(ZeroDivisionError("by zero"))
    assert liger("--debug", "doctor") == 1
    output = capsys.readouterr().err
    assert "Traceback" in output
    assert "error: ZeroDivisionError: by zero" in output
