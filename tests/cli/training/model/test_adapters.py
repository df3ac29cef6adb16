"""Adapters: what is trained, what a checkpoint holds, and that it goes on and is evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from liger_cli.config import load_config
from liger_cli.training.memory import Batch, estimate_memory
from liger_cli.training.model.dtypes import parameter_dtype
from liger_cli.training.model.source import build_meta_model, load_model, resolve_model

LORA = ("--adapter", "lora", "--lora-r", 4)


def metrics(run_dir: Path, *keys: str) -> list:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in keys) for row in rows]


def adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


@pytest.fixture
def base(tmp_path):
    """A model of a directory, with its tokenizer."""
    from liger_cli.training.model.source import load_tokenizer

    path = tmp_path / "base-model"
    source = resolve_model("qwen3")
    load_model(source, dtype=torch.float32, seed=7).save_pretrained(path)
    load_tokenizer(source).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_checkpoint_is_an_adapter_that_peft_loads(train, run_dir, base, kind):
    from peft import AutoPeftModelForCausalLM

    words = ("-m", base, "--adapter", kind, "--lora-r", 4, "--learning-rate", 1e-2)
    done = train(*words, "--eval-fraction", 0.2, "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert report["coverage"]["fused_linear_cross_entropy"] == {"patched": 1, "candidates": 1}
    assert report["model"]["class"] == "Qwen3ForCausalLM"
    assert f"parameters trained ({100 * trained_share(kind):.2f}%): {kind} of rank 4 on 14" in (
        done.err
    )
    checkpoint = run_dir / "checkpoint-3"
    assert not (checkpoint / "model.safetensors").exists()
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert settings["use_dora"] is (kind == "dora")
    assert any(value.abs().max() > 0 for key, value in adapter(checkpoint).items() if "_B" in key)

    loaded = AutoPeftModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    ours = load_model(resolve_model(str(checkpoint)), dtype=torch.float32)
    stock = load_model(resolve_model(str(base)), dtype=torch.float32)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (loaded, ours, stock)]
    torch.testing.assert_close(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() > 1e-3


def trained_share(kind: str) -> float:
    from peft import LoraConfig, get_peft_model

    model = build_meta_model(resolve_model("qwen3"))
    with torch.device("meta"):
        settings = LoraConfig(r=4, target_modules="all-linear", use_dora=kind == "dora")
        model = get_peft_model(model, settings)
    trained, total = model.get_nb_trainable_parameters()
    return trained / total


@pytest.mark.parametrize(
    "words",
    [
        ("--adapter", "lora", "--use-rslora"),
        ("--adapter", "dora"),
        ("--adapter", "lora", "--lora-modules-to-save", "lm_head"),
        ("--adapter", "lora", "--lora-target-modules", "q_proj,v_proj"),
        ("--adapter", "lora", "--gradient-checkpointing", "--gradient-accumulation-steps", 2),
    ],
    ids=["rslora", "dora", "head", "targets", "checkpointing"],
)
def test_patched_adapter_equals_unpatched(train, tmp_path, words):
    for name, ops in (("eager", "none"), ("patched", "all")):
        out = ("--output-dir", tmp_path / name, "--ops", ops, "--learning-rate", 1e-2)
        done = train(*words, *out)
        assert done.code == 0, done.err
    for key in ("loss", "grad_norm"):
        eager, patched = (metrics(tmp_path / name, key) for name in ("eager", "patched"))
        assert patched == [pytest.approx(value, rel=1e-3) for value in eager]
        assert len(set(eager)) == 3


def test_no_cache_of_keys_is_kept_beneath_an_adapter(train, monkeypatch):
    """An adapter's forward hides that of the model, which makes a cache unless told not to."""
    from transformers import DynamicCache

    made = []
    original = DynamicCache.__init__

    def note(self, *args, **options):
        made.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(DynamicCache, "__init__", note)
    assert train(*LORA).code == 0
    assert not made


@pytest.mark.parametrize(
    "words",
    [
        ("--lora-dropout", 0.3),
        ("--lora-modules-to-save", "lm_head", "--dtype", "bfloat16"),
        ("--adapter", "dora"),
    ],
    ids=["dropout", "bf16-head", "dora"],
)
def test_case_93_resume_of_an_adapter_is_exact(train, run_dir, tmp_path, words):
    words = (*LORA, *words, "--max-steps", 6, "--save-steps", 3, "--learning-rate", 1e-3)
    done = train(*words)
    assert done.code == 0, done.err
    stopped = tmp_path / "stopped"
    shutil.copytree(run_dir, stopped)
    shutil.rmtree(stopped / "checkpoint-6")
    done = train(*words, "--output-dir", stopped, "--resume", "auto")
    assert done.code == 0, done.err
    keys = ("step", "loss", "grad_norm", "learning_rate")
    assert metrics(stopped, *keys) == metrics(run_dir, *keys)
    one, two = (adapter(path / "checkpoint-6") for path in (run_dir, stopped))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert {value.dtype for value in one.values()} == {torch.float32}


def test_frozen_weights_have_their_dtype_and_trained_ones_float32(data):
    from liger_cli.training.model.loading import load_patched

    flags = {
        "model": "qwen3",
        "adapter": "lora",
        "dtype": "bfloat16",
        "lora_modules_to_save": "lm_head",
    }
    config = load_config(flags=flags)
    model, _ = load_patched(config, resolve_model("qwen3"), torch.device("cpu"), print)
    dtypes = {(p.dtype, p.requires_grad) for p in model.parameters()}
    assert dtypes == {(torch.bfloat16, False), (torch.float32, True)}


def test_dtype_of_the_frozen_model():
    def dtype(**flags):
        config = load_config(flags={"model": "qwen3", "adapter": "lora", **flags})
        return parameter_dtype(config, torch.device("cpu"), adapts=True)

    assert dtype() == torch.float32
    assert dtype(bf16=True, dtype="bfloat16") == torch.bfloat16


def test_head_and_embedding_stay_tied(train, run_dir):
    """The head of this model is its embedding; what is saved of it is loaded as both."""
    words = (*LORA, "--lora-modules-to-save", "lm_head", "--learning-rate", 1e-2)
    done = train(*words, "--eval-fraction", 0.2, "--json")
    assert done.code == 0, done.err
    head = done.json()["coverage"]["fused_linear_cross_entropy"]
    assert head == {"patched": 1, "candidates": 1}
    model = load_model(resolve_model(str(run_dir / "checkpoint-3")), dtype=torch.float32)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(table, head)


def test_adapter_directory_is_a_model(train, liger, run_dir, data, tmp_path):
    """Evaluated, inspected and trained on; its base has random weights, kept with the run."""
    words = (*LORA, "--eval-dataset", data, "--learning-rate", 1e-2, "--seed", 5)
    trained = train(*words, "--json")
    assert trained.code == 0, trained.err
    checkpoint = run_dir / "checkpoint-3"
    common = ("-d", data, "--max-length", 64, "--use-cpu", "--json")
    found = liger("eval", "-m", checkpoint, *common)
    assert found.code == 0, found.err
    assert found.json()["eval"] == pytest.approx(trained.json()["eval"], rel=1e-5)
    # The whole run in another place.
    moved = tmp_path / "moved"
    run_dir.rename(moved)
    again = liger("eval", "-m", moved / "checkpoint-3", *common)
    assert again.code == 0, again.err
    assert again.json()["eval"] == found.json()["eval"]
    seen = liger("inspect", "-m", moved / "checkpoint-3", "--json")
    assert seen.json()["coverage"]["swiglu"] == {"patched": 2, "candidates": 2}
    on = train("-m", moved / "checkpoint-3", "--output-dir", tmp_path / "on", "--learning-rate", 0)
    assert on.code == 0, on.err
    before, after = adapter(moved / "checkpoint-3"), adapter(tmp_path / "on" / "checkpoint-3")
    assert all(torch.equal(before[key], after[key]) for key in before)
    settings = json.loads((tmp_path / "on" / "checkpoint-3" / "adapter_config.json").read_text())
    assert Path(settings["base_model_name_or_path"]) == run_dir / "base"


def test_directory_with_the_configuration_of_its_base_is_an_adapter(train, base, run_dir):
    assert train("-m", base, *LORA).code == 0
    shutil.copy(base / "config.json", run_dir / "checkpoint-3")
    assert resolve_model(str(run_dir / "checkpoint-3")).adapter == run_dir / "checkpoint-3"


def test_dry_run_counts_what_an_adapter_trains(train, run_dir):
    done = train(*LORA, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert "lora of rank 4 on 14 modules" in done.err
    adapted, whole = done.json()["memory"], train("--dry-run", "--json").json()["memory"]
    assert adapted["gradients"] < whole["gradients"] / 5
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--lora-r", 8), 2, "lora_r is for an adapter; set adapter to lora or dora"),
        (("--adapter", "lorra"), 2, "did you mean 'lora'?"),
        (("--adapter", "lora", "--lora-r", 0), 2, "lora_r should be greater than or equal to 1"),
        (("--adapter", "lora", "--lora-dropout", 1), 2, "lora_dropout should be less than 1"),
        (("--adapter", "lora", "--lora-target-modules", "qqq_proj"), 2, "qqq_proj"),
        (("--adapter", "lora", "--lora-modules-to-save", ","), 2, "should name a module"),
        (("--load-in-4bit",), 2, "load_in_4bit holds a frozen model in 4 bits"),
        (("--adapter", "lora", "--load-in-4bit"), 2, "those of qwen3 are random"),
    ],
)
def test_case_99_wrong_input_of_adapters(train, run_dir, words, code, message):
    done = train(*words)
    assert done.code == code
    assert message in done.err
    assert not run_dir.exists()


def test_four_bits_without_a_gpu_say_what_is_missing(train, base):
    done = train("-m", base, *LORA, "--load-in-4bit")
    assert done.code == 3
    assert "load_in_4bit needs a CUDA GPU, and this run is on cpu" in done.err
    assert "pip install 'liger-kernels[quant]'" in done.err


@pytest.mark.gpu
def test_four_bits_train_resume_and_are_evaluated(train, liger, data, base, run_dir):
    pytest.importorskip("bitsandbytes")
    words = ("-m", base, *LORA, "--load-in-4bit", "--no-use-cpu", "--learning-rate", 1e-2)
    words += ("--max-steps", 8, "--save-steps", 4, "--eval-dataset", data, "--json")
    done = train(*words)
    assert done.code == 0, done.err
    assert done.json()["train"]["final_loss"] < done.json()["train"]["first_loss"]
    losses = metrics(run_dir, "loss")
    again = train(*words, "--resume", run_dir / "checkpoint-4")
    assert again.code == 0, again.err
    assert metrics(run_dir, "loss") == losses
    common = ("-d", data, "--max-length", 64, "--load-in-4bit", "--json")
    found = liger("eval", "-m", run_dir / "checkpoint-8", *common)
    assert found.json()["eval"]["loss"] == pytest.approx(done.json()["eval"]["loss"], rel=1e-2)


def test_four_bits_are_counted(base):
    source = resolve_model(str(base))
    flags = {"model": str(base), "adapter": "lora", "dtype": "bfloat16"}

    def weights(**more) -> int:
        return estimate_memory(load_config(flags={**flags, **more}), source, Batch(1, 8)).weights

    parameters = build_meta_model(source).named_parameters()
    num_packed = sum(parameter.numel() for name, parameter in parameters if "proj" in name)
    # Of 2 bytes a half is left, and a scale for every 64 values.
    saved = weights() - weights(load_in_4bit=True)
    assert saved == pytest.approx(num_packed * (2 - 0.516), rel=0.02)


def test_missing_peft_says_what_to_install(train, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    done = train(*LORA)
    assert done.code == 3
    assert "pip install 'liger-kernels[lora]'" in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as an adapter's"),
        ("{}", "base_model_name_or_path does not name the base model"),
        ('{"base_model_name_or_path": "/nowhere/model"}', "is not there"),
        ('{"base_model_name_or_path": "qwen3"}', "cannot be loaded"),
    ],
)
def test_broken_adapter_directory(train, tmp_path, content, message):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(content)
    done = train("-m", path)
    assert done.code == 2, done.err
    assert message in done.err


def test_adapter_of_an_adapter_is_refused(train, base, run_dir, tmp_path):
    assert train("-m", base, *LORA).code == 0
    checkpoint = run_dir / "checkpoint-3"
    done = train("-m", checkpoint, *LORA, "--output-dir", tmp_path / "other")
    assert done.code == 2
    assert "is an adapter already" in done.err
    file = checkpoint / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "base_model_name_or_path": str(checkpoint)}))
    done = train("-m", checkpoint, "--output-dir", tmp_path / "other")
    assert done.code == 2
    assert "is an adapter itself" in done.err
