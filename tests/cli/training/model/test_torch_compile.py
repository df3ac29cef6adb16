"""torch_compile: the same numbers, and the coverage still says what ran."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from liger_cli.config import load_config
from liger_cli.training.model import loading

# Rows of one length: each other one compiles anew.
ONE_LENGTH = ("--dataset", "synthetic", "--max-length", 32)


def metrics(run_dir, key):
    return [json.loads(line)[key] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces forward and backward and runs them as they are: C++ takes minutes to compile."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager")
    )


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--adapter", "lora", "--lora-r", 4, "--learning-rate", 1e-2),
        ("--gradient-accumulation-steps", 2, "--gradient-checkpointing"),
        ("--no-use-regional-compilation", "--gradient-accumulation-steps", 2),
        ("--no-use-regional-compilation", "--adapter", "lora", "--lora-r", 4),
    ],
    ids=["layers", "layers of an adapter's base", "checkpoints", "full", "full with an adapter"],
)
def test_compiled_run_equals_the_other(train, tmp_path, words, quick_compiler):
    check_compiled_run(train, tmp_path, words)


@pytest.mark.slow
def test_run_compiled_by_inductor_equals_the_other(train, tmp_path):
    check_compiled_run(train, tmp_path, ())


def check_compiled_run(train, tmp_path, words):
    from torch._dynamo import utils

    reports = {}
    for name, more in (("eager", ()), ("compiled", ("--torch-compile",))):
        utils.counters.clear()
        done = train(*ONE_LENGTH, *words, *more, "--output-dir", tmp_path / name, "--json")
        assert done.code == 0, done.err
        reports[name] = done.json()
        assert (utils.counters["stats"]["calls_captured"] > 0) == bool(more)
        is_whole = {"--no-use-regional-compilation", "--gradient-checkpointing"} & set(words)
        form = "the model as one graph" if is_whole else "2 layers, one by one"
        assert (f"torch_compile: {form}; the first step" in done.err) == bool(more)
    for key in ("loss", "grad_norm"):
        assert metrics(tmp_path / "compiled", key) == [
            pytest.approx(value, rel=1e-3) for value in metrics(tmp_path / "eager", key)
        ]
    assert reports["compiled"]["coverage"] == reports["eager"]["coverage"]
    assert {row["status"] for row in reports["compiled"]["modules"] if row["op"]} == {"patched"}
    for part in ("model.safetensors", "adapter_model.safetensors"):
        files = [tmp_path / name / "checkpoint-3" / part for name in ("eager", "compiled")]
        assert files[0].exists() == files[1].exists()


def test_layers_alone_keep_attention_from_a_mask(train, tmp_path, monkeypatch):
    """A graph of the whole model makes the causal mask that attention would do without."""
    from torch._dynamo.testing import CompileCounterWithBackend

    masks = {}
    compile_module = nn.Module.compile
    for words in (("--no-use-regional-compilation",), ()):
        torch.compiler.reset()
        backend = CompileCounterWithBackend("aot_eager")
        monkeypatch.setattr(
            nn.Module, "compile", lambda module, b=backend: compile_module(module, backend=b)
        )
        run = ("--torch-compile", *words, "--output-dir", tmp_path / f"{len(words)}")
        assert train(*ONE_LENGTH, *run).code == 0
        nodes = [node for graph in backend.graphs for node in graph.graph.nodes]
        calls = [node for node in nodes if "scaled_dot_product" in str(node.target)]
        masks[words] = {node.kwargs["attn_mask"] is None for node in calls}
    assert list(masks.values()) == [{False}, {True}], (
        "the first as one graph, the default by layers"
    )


OTHERS = (
    *("gemma", "gemma3", "gemma3-text", "glm4", "granite", "llama4", "llama4-text", "mistral"),
    *("mixtral", "mllama", "olmo2", "paligemma", "phi3", "qwen2", "qwen2-vl", "qwen2-5-vl"),
    *("qwen3", "qwen3-moe"),
)
# transformers collects what routers say in hooks that a tracer cannot enter.
ROUTED = ("llama4", "llama4-text", "mixtral", "qwen3-moe")


# Layers of two kinds; the others show other forms of attention, norm and MLP.
@pytest.mark.parametrize(
    "preset", ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_layers_of_a_family_are_compiled_once(train, tmp_path, monkeypatch, preset):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module: compile_module(module, backend=counter)
    )
    for words in ((), ("--torch-compile",)):
        run = ("--model", preset, *words, "--output-dir", tmp_path / f"{len(words)}")
        done = train(*ONE_LENGTH, *run)
        assert done.code == 0, done.err
    assert counter.frame_count == 1 or preset in ROUTED
    losses, compiled = (metrics(tmp_path / name, "loss") for name in ("0", "1"))
    assert compiled == [pytest.approx(loss, rel=1e-3) for loss in losses]


def test_layers_in_checkpoints_are_refused(train):
    done = train("--torch-compile", "--use-regional-compilation", "--gradient-checkpointing")
    assert done.code == 2
    assert "torch compiles nothing inside of a checkpoint" in done.err


def test_layers_without_a_list_of_them(monkeypatch):
    compiled, said = [], []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    keys = {"model": "llama", "use_regional_compilation": True}
    model = nn.Linear(2, 2)
    loading._compile(model, load_config(flags={**keys, "torch_compile": False}), said.append)
    assert not compiled
    assert said == ["use_regional_compilation does nothing without torch_compile"]
    # Left open, it is said too.
    for given in (keys, {"model": "llama"}):
        config = load_config(flags={**given, "torch_compile": True})
        loading._compile(model, config, said.append)
        assert "no list of layers found" in said[-2]
        assert "the model as one graph" in said[-1]
    assert compiled == [model, model]


def test_compiled_run_resumes_and_is_evaluated(train, run_dir, quick_compiler):
    words = (*ONE_LENGTH, "--torch-compile", "--eval-fraction", 0.2)
    words += ("--max-steps", 4, "--save-steps", 2)
    done = train(*words, "--json")
    assert done.code == 0, done.err
    losses = metrics(run_dir, "loss")
    (run_dir / "report.json").unlink()
    again = train(*words, "--json", "--resume", run_dir / "checkpoint-2")
    assert again.code == 0, again.err
    assert metrics(run_dir, "loss") == [pytest.approx(loss, rel=1e-5) for loss in losses]
    assert again.json()["eval"]["loss"] == pytest.approx(done.json()["eval"]["loss"], rel=1e-5)
