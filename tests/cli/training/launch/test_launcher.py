"""A launch of several processes ends as one process does, whatever becomes of its ranks.

The ranks are small programs that import nothing of torch, so that a launch takes no time.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from liger_cli.errors import (
    ConfigError,
    DataError,
    EnvironmentProblem,
    Interrupted,
    LigerError,
    OutOfMemory,
)
from liger_cli.training.launch import launcher
from liger_cli.training.launch.launcher import run_ranks
from liger_cli.training.launch.plan import LaunchPlan

HOST = socket.gethostname()

RANK = """
import os, signal, sys, time
from liger_cli.common.ranks import find_rank
from liger_cli.errors import *
from liger_cli.training.launch.faults import fault_of, report_fault
rank = find_rank()
rank.end_with_launcher()

def fail(problem, error=None):
    report_fault(fault_of(problem, error or problem, rank), rank, sys.stderr)
    sys.exit(problem.exit_code)

def lose():
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    fail(LigerError(str(error)), error)

def time_out():
    error = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms")
    fail(LigerError(str(error)), error)

def stop_after_step(*signal):
    fail(Interrupted("interrupted after step 3; its checkpoint is checkpoint-3"))

def be_ready():
    open(os.environ["READY"] + f"/{rank.number}", "w").close()

def hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(100)

"""


def program(code):
    return [sys.executable, "-c", RANK + textwrap.dedent(code)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Wait less than a real launch, which waits five seconds and eight."""
    monkeypatch.setattr(launcher, "_GRACE_S", 3.0)
    monkeypatch.setattr(launcher, "_STOP_S", 1.0)


def end_of(code):
    """Return the error of a launch."""
    with pytest.raises(LigerError) as error:
        run_ranks(program(code), LaunchPlan(2))
    return error.value


def test_ranks_have_the_variables_of_torchrun_and_one_output(capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    print(*(os.environ[name] for name in names), os.environ["MASTER_PORT"].isdigit())
    print(f"messages of {rank.number}", file=sys.stderr)
    """
    run_ranks(program(code), LaunchPlan(3))
    threads = max(1, os.cpu_count() // 3)
    assert capfd.readouterr() == (f"0 3 0 3 {threads} True\n", "messages of 0\n")
    run_ranks(program(code), LaunchPlan(2, log_rank=1))
    out, err = capfd.readouterr()
    assert out.startswith("0 2 0 2 ")
    assert err == "messages of 1\n"


# What the ranks do, the kind of error, its message, and its hint.
ENDS = {
    "raises": (
        "fail(DataError('row 3 has no text', hint='Mend it.')) if rank.number else lose()",
        (DataError, f"rank 1 on {HOST}: row 3 has no text", "Mend it."),
    ),
    "raises-others-hang": (
        "fail(DataError('row 3 has no text')) if rank.number else hang()",
        (DataError, f"rank 1 on {HOST}: row 3 has no text", ""),
    ),
    "all-raise": (
        "fail(DataError('row 3 has no text'))",
        (DataError, "row 3 has no text", ""),
    ),
    "configuration": (
        "fail(ConfigError('output_dir is not empty')) if rank.number == 0 else lose()",
        (ConfigError, "output_dir is not empty", ""),
    ),
    "killed": (
        "os.kill(os.getpid(), signal.SIGKILL) if rank.number else lose()",
        (OutOfMemory, rf"rank 1 on {HOST}: killed \(signal 9\)", ""),
    ),
    "killed-others-hang": (
        "os.kill(os.getpid(), signal.SIGKILL) if rank.number else hang()",
        (OutOfMemory, rf"rank 1 on {HOST}: killed \(signal 9\)", ""),
    ),
    "crashed": (
        "if rank.number: print('assert in a kernel', flush=True); os.abort()\nlose()",
        (LigerError, f"rank 1 on {HOST}: ended by signal 6", "assert in a kernel"),
    ),
    "exit": (
        "if rank.number: print('a library gave up'); sys.exit(3)\nhang()",
        (LigerError, f"rank 1 on {HOST}: ended with exit code 3", "a library gave up"),
    ),
    "hangs": (
        "hang() if rank.number else time_out()",
        (LigerError, f"waited longer than ddp_timeout for rank 1 on {HOST}", ""),
    ),
    "all-lose": ("lose()", (LigerError, "Connection closed by peer", "")),
    "two-faults": (
        "if rank.number: fail(DataError('the second'))\n"
        "while not rank.fault_file.with_name('rank1.json').exists(): time.sleep(0.01)\n"
        "fail(EnvironmentProblem('the third'))",
        (DataError, "rank 1 on .*: the second", ""),
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_first_fault_is_the_end(case):
    code, (kind, message, hint) = ENDS[case]
    since = time.monotonic()
    end = end_of(code)
    # Of which four are the waits.
    assert time.monotonic() - since < 25
    assert type(end) is kind
    assert re.search(message, end.message), end.message
    assert hint in (end.hint or "")
    assert end.message.count("rank 1") <= 1


def test_no_rank_is_left_and_none_of_what_it_started(tmp_path):
    code = f"""
    import subprocess
    child = subprocess.Popen(["sleep", "100"])
    open({str(tmp_path)!r} + f"/{{rank.number}}", "w").write(f"{{os.getpid()}} {{child.pid}}")
    time.sleep(0.5)
    fail(DataError("bad row")) if rank.number else hang()
    """
    end_of(code)
    pids = [int(pid) for file in tmp_path.iterdir() for pid in file.read_text().split()]
    assert len(pids) == 4
    for pid in pids:
        for _ in range(50):
            if not is_alive(pid):
                break
            time.sleep(0.1)
        assert not is_alive(pid)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_checkpoint_to_continue_from_is_named(tmp_path):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    code = f"""
    from pathlib import Path
    rank.say_run_dir(Path({str(tmp_path)!r}))
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL) if rank.number else lose()
    """
    newest = tmp_path / "checkpoint-4"
    assert f"The newest checkpoint is {newest}; --resume {newest} continues" in end_of(code).hint


@pytest.fixture
def signals(tmp_path, monkeypatch):
    """Send signals to this process, the first as soon as two ranks call `be_ready`."""
    monkeypatch.setenv("READY", str(tmp_path))
    threads = []

    def send(number, *pauses):
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        for pause in (0.0, *pauses):
            time.sleep(pause)
            os.kill(os.getpid(), number)

    def start(*words):
        threads.append(threading.Thread(target=send, args=words))
        threads[0].start()

    yield start
    for thread in threads:
        thread.join()


STOPS = {
    "after-a-step": (
        "signal.signal(signal.SIGTERM, stop_after_step)\nbe_ready()\ntime.sleep(100)",
        "interrupted after step 3; its checkpoint is checkpoint-3",
    ),
    "before-its-handlers": ("be_ready()\ntime.sleep(100)", "interrupted"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("case", STOPS)
def test_a_signal_of_the_launcher_stops_the_ranks(case, number, signals):
    code, message = STOPS[case]
    signals(number)
    end = end_of(code)
    assert type(end) is Interrupted
    assert end.message == message


def test_a_second_signal_ends_what_does_not_stop(signals):
    signals(signal.SIGINT, 1.5)
    since = time.monotonic()
    end = end_of("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nbe_ready()\nhang()")
    assert type(end) is Interrupted
    assert time.monotonic() - since < 25


def test_an_error_while_stopping_is_no_interruption(signals):
    signals(signal.SIGTERM)
    code = """
    def full(*signal):
        fail(EnvironmentProblem("the disk is full")) if rank.number == 0 else lose()
    signal.signal(signal.SIGTERM, full)
    be_ready()
    time.sleep(100)
    """
    end = end_of(code)
    assert type(end) is EnvironmentProblem
    assert "the disk is full" in end.message


LAUNCHER = """
import sys
from liger_cli.common.failures import show_error
from liger_cli.errors import LigerError
from liger_cli.training.launch import launcher
from liger_cli.training.launch.plan import LaunchPlan
launcher._GRACE_S, launcher._STOP_S = 3.0, 1.0
try:
    launcher.run_ranks([sys.executable, "-c", CODE], LaunchPlan(**PLAN))
except LigerError as error:
    show_error(error)
    sys.exit(error.exit_code)
"""


def start_launcher(code, **plan):
    text = LAUNCHER.replace("CODE", repr(RANK + textwrap.dedent(code))).replace("PLAN", repr(plan))
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_launcher_leaves_no_rank():
    process = start_launcher("print(os.getpid(), flush=True)\nhang()", nproc=2)
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_endpoint():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ("127.0.0.1", free.getsockname()[1])


def test_a_host_whose_launcher_is_killed_ends_the_other(tmp_path):
    """The first host, which has the store; its ranks say nothing either."""
    code = f"open({str(tmp_path)!r} + f'/{{rank.number}}', 'w').close()\nhang()"
    common = {"nproc": 1, "nnodes": 2, "endpoint": free_endpoint()}
    first, second = (start_launcher(code, node_rank=number, **common) for number in (0, 1))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    since = time.monotonic()
    first.kill()
    first.communicate()
    _, err = second.communicate(timeout=60)
    assert time.monotonic() - since < 30
    assert second.returncode == 3
    assert "error: the launcher of host 0 cannot be reached" in err


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        ("print(rank.number, rank.num_ranks, rank.local)", 0, None),
        ("fail(DataError('bad row')) if rank.number == 2 else hang()", 4, "rank 2 on .*: bad row"),
    ],
    ids=["whole", "raises"],
)
def test_two_launchers_are_one_launch(code, exit_code, said):
    """The hosts have one rank and two."""
    common = {"nnodes": 2, "endpoint": free_endpoint()}
    second = start_launcher(code, nproc=2, node_rank=1, **common)
    first = start_launcher(code, nproc=1, node_rank=0, **common)
    ends = [process.communicate(timeout=120) for process in (first, second)]
    assert [first.returncode, second.returncode] == [exit_code, exit_code], ends
    if said is None:
        assert [out for out, _ in ends] == ["0 3 0\n", ""]
    for _, err in ends:
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(lines) == (said is not None)
        assert said is None or re.search(said, lines[0])
