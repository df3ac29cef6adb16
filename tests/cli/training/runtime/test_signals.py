"""case_241: SIGINT and SIGTERM end every command alike, wherever it is, with exit code 130."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from liger_cli.training.runtime.stop_signals import Interruption, StopRequest

TRAIN = ("train", "-m", "qwen3", "-d", "synthetic", "--max-steps", 2, "--use-cpu")
EVAL = ("eval", "-m", "qwen3", "-d", "synthetic", "--use-cpu")
PREVIEW = ("data", "preview", "-m", "qwen3", "-d", "synthetic")
GENERATE = ("generate", "-m", "qwen3", "--prompt", "a", "--use-cpu")

# A command, and a function that it calls on its way.
PLACES = [
    (TRAIN, "liger_cli.commands.train.prepare.resolve_model"),
    (TRAIN, "liger_cli.commands.train.prepare.load_inputs"),
    (TRAIN, "liger_cli.commands.train.prepare.inspect_model"),
    (TRAIN, "liger_cli.commands.train.run.check_memory"),
    (TRAIN, "liger_cli.training.parallel.engine.load_patched"),
    (TRAIN, "liger_cli.commands.train.run.announce_kernels"),
    (TRAIN, "liger_cli.training.session.make_optimizer"),
    (EVAL, "liger_cli.commands.eval.run.load_inputs"),
    (EVAL, "liger_cli.training.evaluate.evaluate"),
    (
        ("bench", "-m", "qwen3", "--steps", 2),
        "liger_cli.commands.bench.models.comparison.resolve_model",
    ),
    (("bench", "-m", "qwen3", "--steps", 2), "liger_cli.training.runtime.arms._run"),
    (("bench", "ops", "--quick", "--no-compile"), "liger_cli.commands.bench.ops.rounds.copy_rate"),
    (("verify", "-m", "qwen3", "--use-cpu"), "liger_cli.commands.verify.run.verify"),
    (GENERATE, "liger_cli.commands.generate.conversation.load_model"),
    (PREVIEW, "liger_cli.commands.data.preview.preview_data"),
    (("inspect", "-m", "qwen3"), "liger_cli.report.inspection.inspect_source"),
    (("estimate", "-m", "qwen3"), "liger_cli.commands.estimate.describe.describe_estimate"),
    (("doctor",), "liger_cli.commands.doctor.checks.run_checks"),
    (("models",), "liger_cli.training.model.presets.list_presets"),
    (("config", "show", "-m", "qwen3"), "liger_cli.config.resolve.ResolvedConfig.describe"),
]


def signalled(*args, **options):
    signal.raise_signal(signal.SIGTERM)
    pytest.fail("it went on")


@pytest.mark.parametrize(
    ("words", "place"), PLACES, ids=[f"{words[0]}-{place}" for words, place in PLACES]
)
def test_case_241_before_the_first_step(liger, tmp_path, monkeypatch, words, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(place, signalled)
    done = liger(*words, "--json")
    assert done.code == 130, done.err
    assert done.json()["error"] == {
        "kind": "Interrupted",
        "exit_code": 130,
        "message": "interrupted",
        "hint": None,
    }
    assert "error: interrupted\n" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_case_241_text(liger, monkeypatch, number):
    monkeypatch.setattr(
        "liger_cli.report.inspection.inspect_source", lambda *args: signal.raise_signal(number)
    )
    done = liger("inspect", "-m", "qwen3")
    assert (done.code, done.out, done.err) == (130, "", "error: interrupted\n")


def test_case_241_handlers_are_put_back(liger, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("liger_cli.report.inspection.inspect_source", signalled)
    assert liger("inspect", "-m", "qwen3").code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_case_241_error_that_a_library_makes_of_it(liger, monkeypatch):
    def importing(*args):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr("liger_cli.report.inspection.inspect_source", importing)
    done = liger("inspect", "-m", "qwen3", "--json")
    assert done.code == 130
    assert done.json()["error"]["message"] == "interrupted"


def test_case_241_swallowed_signal_stops_the_loop():
    with Interruption():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with StopRequest() as stop:
            assert stop.requested
    with Interruption(), StopRequest() as stop:
        assert not stop.requested


def test_case_241_echo_is_no_second_signal(monkeypatch):
    """The launcher forwards what the terminal has sent already."""
    with Interruption():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        later = time.monotonic() + 2
        monkeypatch.setattr("liger_cli.training.runtime.stop_signals.time.monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_case_241_other_threads_set_no_handler():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def use():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [before]


WAITS = """
import sys, time
import liger_cli.commands.train.prepare
from liger_cli.app import main

def wait(*args, **options):
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)

liger_cli.commands.train.prepare.load_inputs = wait
main(sys.argv[1:])
"""


def test_case_241_whole_process(tmp_path):
    """The signal comes from outside, while the run reads its data."""
    words = [*map(str, TRAIN), "-o", str(tmp_path / "run"), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline() == "waiting\n"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(out)["error"]["kind"] == "Interrupted"
    assert err == "error: interrupted\n"
    assert not (tmp_path / "run").exists()
