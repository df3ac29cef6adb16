"""torch_compile auto: what is measured, what is decided, and that measuring leaves no trace."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket

import pytest
import torch
from run_files import assert_same, metrics
from torch import nn

from liger_cli.config import load_config
from liger_cli.config.describe import allowed, json_schema
from liger_cli.training import auto_compile
from liger_cli.training.auto_compile import Decision, _agreed, decide_early
from liger_cli.training.checkpoints.files import read_manifest, write_manifest
from liger_cli.training.runtime import device_timer

CPU = torch.device("cpu")
# As packed rows are of one length, one graph does for them.
PACKED = ("--packing",)


class FakeTimer:
    """A device whose clock and profiler say what they are asked to; what it times does run."""

    def __init__(self, elapsed=(0.1,), busy=0.05):
        self.elapsed_s, self.busy_s = list(elapsed), busy
        self.num_passes = 0

    def elapsed(self, function):
        function()
        self.num_passes += 1
        seconds = self.elapsed_s.pop(0) if len(self.elapsed_s) > 1 else self.elapsed_s[0]
        if isinstance(seconds, Exception):
            raise seconds
        return seconds

    def busy(self, function):
        function()
        self.num_passes += 1
        if isinstance(self.busy_s, Exception):
            raise self.busy_s
        return self.busy_s


@pytest.fixture
def device(monkeypatch):
    """Gives the CPU a clock and a profiler."""

    def use(*args, **options) -> FakeTimer:
        timer = FakeTimer(*args, **options)
        monkeypatch.setattr(device_timer, "device_timer", lambda _: timer)
        return timer

    yield use
    torch.compiler.reset()


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces forward and backward and runs them as they are: C++ takes minutes to compile."""
    compiled = []
    compile_module = nn.Module.compile

    def compile_quickly(module):
        compiled.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    return compiled


def line_of(done) -> str:
    [line] = [line for line in done.err.splitlines() if line.startswith("torch_compile: auto:")]
    return line


def settled(run_dir) -> list:
    """torch_compile in config.yaml, in the manifests and in the report."""
    found = [load_config(run_dir / "config.yaml").torch_compile]
    for checkpoint in sorted(run_dir.glob("checkpoint-*")):
        found.append(read_manifest(checkpoint)["config"]["torch_compile"])
    report = run_dir / "report.json"
    return [*found, json.loads(report.read_text())["config"]["torch_compile"]]


def test_values_of_the_key(tmp_path):
    file = tmp_path / "train.yaml"
    for text, value in (("auto", "auto"), ("true", True), ("false", False)):
        file.write_text(f"model: qwen3\ntorch_compile: {text}\n")
        config = load_config(file)
        assert config.torch_compile is value or config.torch_compile == value == "auto"
        file.write_text(config.to_yaml())
        assert load_config(file) == config
        assert load_config(file, sets=["torch_compile=auto"]).torch_compile == "auto"
        assert load_config(file, flags={"torch_compile": False}).torch_compile is False
    assert load_config(flags={"model": "qwen3"}).torch_compile == "auto"
    assert allowed("torch_compile") == "one of auto, true, false"
    assert json_schema()["properties"]["torch_compile"]["enum"] == ["auto", True, False]


@pytest.mark.parametrize("value", ["on_gpu", "1", "0.0", "null", "[auto]"])
def test_other_values_are_refused(liger, value):
    done = liger("config", "show", "--set", f"torch_compile={value}")
    assert done.code == 2
    assert "torch_compile should be auto, true or false" in done.err


def test_a_cpu_decides_at_once(train, run_dir, monkeypatch):
    def measure(*_):
        raise AssertionError("a CPU has nothing to measure")

    monkeypatch.setattr(auto_compile, "make_feed", measure)
    done = train()
    assert done.code == 0, done.err
    assert "torch_compile" not in done.err
    assert settled(run_dir) == [False] * 3


def test_dry_run_says_what_is_to_come(train, device):
    assert line_of(train("--dry-run")) == "torch_compile: auto: not compiled: the run is on cpu"
    timer = device()
    assert "measured on the first batch, before the first step" in line_of(train("--dry-run"))
    assert "inside of the layers" in line_of(train("--dry-run", "--gradient-checkpointing"))
    assert not timer.num_passes
    done = train("--dry-run", "--no-torch-compile")
    assert "torch_compile: auto" not in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("--adapter", "lora", "--lora-r", 4, "--lora-dropout", 0.3),
        ("--gradient-accumulation-steps", 2, "--dataloader-num-workers", 1, "--auto-fit"),
        ("--streaming", "--shuffle-buffer-size", 5),
        ("--model", "qwen3-moe", "--eval-fraction", 0.2, "--eval-on-start"),
        (*PACKED, "--adapter", "lora", "--lora-r", 4, "--lora-dropout", 0.3),
    ],
    ids=["dropout", "workers", "stream", "evaluated", "packed"],
)
def test_measuring_leaves_no_trace(train, tmp_path, device, words):
    """The run that measured and did not compile is the run that was not asked to, to the bit."""
    words = (*words, "--learning-rate", 1e-2)
    plain = train(*words, "--no-torch-compile", "--output-dir", tmp_path / "plain")
    assert plain.code == 0, plain.err
    timer = device(busy=0.095)
    measured = train(*words, "--output-dir", tmp_path / "measured")
    assert measured.code == 0, measured.err
    assert timer.num_passes == 2
    assert "not compiled: at most 10%" in line_of(measured)
    assert_same(tmp_path / "plain", tmp_path / "measured")
    assert settled(tmp_path / "measured") == [False] * 3
    plain, measured = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("plain", "measured")
    )
    assert plain["data"] == measured["data"]


COMPILED = (*PACKED, "--max-steps", 4, "--save-steps", 2)


def test_layers_are_compiled_where_the_device_waits(train, run_dir, device, quick_compiler):
    timer = device(elapsed=[10.0, 9.0], busy=4.0)
    done = train(*COMPILED)
    assert done.code == 0, done.err
    assert line_of(done) == (
        "torch_compile: auto: the GPU waits for the host 60% of a step of 10000 ms; 4 steps save "
        "up to 24 s, compiling costs 20 s; 2 layers are compiled, one by one"
    )
    assert done.err.index("torch_compile: auto") < done.err.index("train 4/4")
    assert len(quick_compiler) == 2
    assert timer.num_passes == 3
    assert settled(run_dir) == [True] * 4


def test_compiled_run_is_that_which_was_asked_for_and_resumes(
    train, run_dir, tmp_path, device, quick_compiler
):
    asked = train(*COMPILED, "--torch-compile", "--output-dir", tmp_path / "asked")
    assert asked.code == 0, asked.err
    torch.compiler.reset()
    device(elapsed=[10.0, 9.0], busy=4.0)
    assert train(*COMPILED).code == 0
    assert_same(tmp_path / "asked", run_dir)
    before = metrics(run_dir)
    # Resumed, it compiles without a measurement, whatever the device does by now.
    timer = device(busy=0.1)
    shutil.rmtree(run_dir / "checkpoint-4")
    done = train(*COMPILED, "--resume", "auto")
    assert done.code == 0, done.err
    assert line_of(done) == "torch_compile: auto: compiled, as before the resume"
    assert not timer.num_passes
    assert len(quick_compiler) == 6
    assert metrics(run_dir, "loss") == [pytest.approx((row[1],), rel=1e-5) for row in before]
    assert settled(run_dir) == [True] * 4


REFUSALS = [
    ({"elapsed": [10.0], "busy": 5.1}, (), "4 steps save up to 20 s, compiling costs 20 s; not"),
    ({"elapsed": [10.0], "busy": 9.0}, (), "10% of a step of 10000 ms; not compiled: at most 10%"),
    # Kernels of several streams at once.
    ({"elapsed": [10.0], "busy": 11.0}, (), "waits for the host 0% of a step"),
    ({"busy": 0.0}, (), "torch.profiler sees no kernels here (CUPTI)"),
    ({"busy": RuntimeError("CUPTI is in use\nby others")}, (), "RuntimeError: CUPTI is in use"),
    (
        {"elapsed": [torch.OutOfMemoryError("CUDA")]},
        (),
        "memory ran out in the passes that measure",
    ),
    ({"busy": torch.OutOfMemoryError("CUDA")}, (), "memory ran out"),
    ({}, ("--gradient-checkpointing",), "torch compiles nothing inside of the layers"),
    ({}, ("--no-use-regional-compilation",), "auto compiles layers one by one"),
]


@pytest.mark.parametrize(
    ("options", "words", "message"), REFUSALS, ids=[str(i) for i in range(len(REFUSALS))]
)
def test_reasons_not_to_compile(train, run_dir, device, quick_compiler, options, words, message):
    device(**options)
    done = train(*PACKED, "--max-steps", 4, *words)
    assert done.code == 0, done.err
    assert message in line_of(done)
    assert "not compiled" in line_of(done)
    assert not quick_compiler
    assert settled(run_dir) == [False] * 3


def test_rows_of_many_lengths_are_compiled_twice(train, device, quick_compiler):
    device(elapsed=[10.0], busy=1.0)
    assert "compiling costs 40 s; not compiled" in line_of(train("--max-steps", 4))


@pytest.mark.parametrize(
    ("elapsed", "backend", "message"),
    [
        ([100.0, 100.0], "aot_eager", "compiled, a pass takes 100000 ms, 100000 ms without"),
        ([100.0, 1.0], "broken", "compiling fails: BackendCompilerFailed: backend="),
        ([100.0, torch.OutOfMemoryError("CUDA")], "aot_eager", "compiling fails: memory ran out"),
    ],
    ids=["slower", "failing", "memory"],
)
def test_layers_that_gain_nothing_run_as_before(
    train, tmp_path, device, monkeypatch, elapsed, backend, message
):
    def broken(graph, inputs):
        raise ValueError("no such instruction")

    compiled = []
    compile_module = nn.Module.compile

    def compile_layer(module):
        compiled.append(module)
        compile_module(module, backend=broken if backend == "broken" else backend)

    monkeypatch.setattr(nn.Module, "compile", compile_layer)
    words = ("--adapter", "lora", "--lora-r", 4, "--lora-dropout", 0.3, "--learning-rate", 1e-2)
    plain = train(*words, "--no-torch-compile", "--output-dir", tmp_path / "plain")
    assert plain.code == 0, plain.err
    device(elapsed=elapsed, busy=1.0)
    done = train(*words, "--output-dir", tmp_path / "measured")
    assert done.code == 0, done.err
    assert message in line_of(done)
    assert len(compiled) == 2
    assert all(module._compiled_call_impl is None for module in compiled)
    assert_same(tmp_path / "plain", tmp_path / "measured")
    assert settled(tmp_path / "measured") == [False] * 3


def test_a_quantised_model_is_not_compiled(device):
    device()
    config = load_config(flags={"model": "qwen3"})
    decision = decide_early(config, CPU, is_quantised=True, saved=None)
    assert decision == Decision(False, "not compiled: the model is quantised")
    assert decide_early(config, CPU, is_quantised=False, saved=None) is None
    tiled = config.model_copy(update={"tile_tokens": "64"})
    for saved in (None, True):
        decision = decide_early(tiled, CPU, is_quantised=False, saved=saved)
        assert not decision.compiles
        assert "tile_tokens" in decision.line


def test_a_resume_takes_the_decision_unless_it_no_longer_holds(device):
    config = load_config(flags={"model": "qwen3"})
    checkpointed = config.model_copy(update={"gradient_checkpointing": True})

    def decided(config, saved):
        return decide_early(config, CPU, is_quantised=False, saved=saved).compiles

    assert not decided(config, True), "resumed on a CPU"
    device()
    assert decided(config, True)
    assert not decided(config, False)
    assert not decided(checkpointed, True)


def test_old_checkpoints_resume_as_they_were_trained(train, run_dir, device):
    """Manifests have booleans, and those from before the key have none: nothing was compiled."""
    words = ("--max-steps", 4, "--save-steps", 2)
    done = train(*words, "--no-torch-compile")
    assert done.code == 0, done.err
    timer = device()
    for drops in (False, True):
        shutil.rmtree(run_dir / "checkpoint-4")
        if drops:
            manifest = read_manifest(run_dir / "checkpoint-2")
            del manifest["config"]["torch_compile"], manifest["files"]
            (run_dir / "checkpoint-2" / "manifest.json").unlink()
            write_manifest(run_dir / "checkpoint-2", manifest)
        done = train(*words, "--resume", "auto")
        assert done.code == 0, done.err
        assert line_of(done) == "torch_compile: auto: not compiled, as before the resume"
        assert "torch_compile is" not in done.err
    assert not timer.num_passes


def decide_in_a_process(rank, port, queue, decisions):
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(decisions)}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})
    from accelerate import PartialState

    PartialState(cpu=True, backend="gloo")
    queue.put((rank, _agreed(decisions[rank])))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("compiles", "expected"),
    [((True, False), False), ((False, True), False), ((True, True), True)],
    ids=["other", "main", "both"],
)
def test_processes_agree(compiles, expected):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    decisions = [Decision(value, f"reason {rank}") for rank, value in enumerate(compiles)]
    arguments = [(rank, port, queue, decisions) for rank in range(2)]
    processes = [context.Process(target=decide_in_a_process, args=args) for args in arguments]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert found[0] == found[1]
    assert found[0].compiles is expected
    main_decides = compiles != (True, False)
    reason = "reason 0" if main_decides else "not compiled, because of process 1: reason 1"
    assert found[0].reason == reason


def test_one_process_agrees_with_itself():
    assert _agreed(Decision(True, "so")) == Decision(True, "so")


@pytest.mark.gpu
def test_timer_of_a_gpu():
    """A device that works all the time is busy; one whose host sleeps is not."""
    import time

    gpu = torch.device("cuda", torch.cuda.current_device())
    timer = device_timer.device_timer(gpu)
    x = torch.randn(8192, 8192, device=gpu)

    def work():
        for _ in range(10):
            torch.mm(x, x)

    def wait():
        torch.mm(x, x)
        time.sleep(0.5)

    for function, is_idle in ((work, False), (wait, True)):
        function()
        elapsed, busy = timer.elapsed(function), timer.busy(function)
        assert busy > 0
        assert (1 - busy / elapsed > 0.2) is is_idle, (elapsed, busy)


@pytest.mark.gpu
def test_auto_on_a_gpu(train, run_dir, tmp_path):
    """A tiny model waits for the host, and 20 steps are too few to compile for."""
    words = ("--no-use-cpu", "--max-steps", 20)
    done = train(*words)
    assert done.code == 0, done.err
    assert "waits for the host" in line_of(done)
    assert line_of(done).endswith("; not compiled")
    assert settled(run_dir) == [False] * 3
    plain = train(*words, "--no-torch-compile", "--output-dir", tmp_path / "plain")
    assert plain.code == 0, plain.err
    assert metrics(tmp_path / "plain") == metrics(run_dir)
