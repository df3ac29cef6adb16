"""Merging: the written model computes what the adapted one did, without peft."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from liger_cli.training.model.source import load_model, load_tokenizer, resolve_model
from liger_cli.training.model.tokenizers import load_processor

LORA = ("--adapter", "lora", "--lora-r", 4, "--learning-rate", 1e-2)
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def base(tmp_path):
    """A model of a directory whose head is its embedding, with its tokenizer."""
    return save_base(tmp_path / "base-model", torch.float32)


def save_base(path, dtype, preset="qwen3"):
    source = resolve_model(preset)
    load_model(source, dtype=dtype, seed=7).save_pretrained(path)
    load_tokenizer(source).save_pretrained(path)
    return path


def stored(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


def adapted_logits(checkpoint) -> torch.Tensor:
    return logits(load_model(resolve_model(str(checkpoint)), dtype=torch.float32))


def merged_logits(directory, dtype=torch.float32) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval())


@pytest.mark.parametrize(
    "words",
    [
        LORA,
        (*LORA, "--use-rslora"),
        (*LORA, "--adapter", "dora"),
        (*LORA, "--lora-modules-to-save", "lm_head"),
        (*LORA, "--lora-target-modules", "q_proj,embed_tokens"),
        (*LORA, "--lora-target-modules", "q_proj,lm_head"),
    ],
    ids=["lora", "rslora", "dora", "head-saved", "embedding", "head"],
)
def test_plain_transformers_computes_what_the_adapter_did(train, liger, base, tmp_path, words):
    done = train("-m", base, *words)
    assert done.code == 0, done.err
    checkpoint, out = tmp_path / "run" / "checkpoint-3", tmp_path / "merged"
    done = liger("merge", checkpoint, "-o", out)
    assert done.code == 0, done.err
    expected = adapted_logits(checkpoint)
    torch.testing.assert_close(merged_logits(out), expected, atol=2e-5, rtol=0)
    assert (merged_logits(base) - expected).abs().max() > 1e-2
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert not list(out.glob("adapter*"))


def test_head_stays_tied_unless_the_adapter_is_of_one_of_the_two(train, liger, base, tmp_path):
    def merge(name, *words):
        run, out = tmp_path / f"run-{name}", tmp_path / f"merged-{name}"
        assert train("-m", base, *LORA, *words, "--output-dir", run).code == 0
        done = liger("merge", run, "-o", out)
        assert done.code == 0, done.err
        return stored(out), json.loads((out / "config.json").read_text())["tie_word_embeddings"]

    saved = ("--lora-modules-to-save", "lm_head")
    for weights, is_tied in (merge("plain"), merge("saved", *saved)):
        assert is_tied
        assert "lm_head.weight" not in weights
    weights, is_tied = merge("head", "--lora-target-modules", "lm_head")
    assert not is_tied
    assert torch.equal(
        weights["model.embed_tokens.weight"], stored(base)["model.embed_tokens.weight"]
    )


def test_change_that_bf16_cannot_hold_is_said(train, liger, tmp_path):
    base = save_base(tmp_path / "base-model", torch.bfloat16)
    words = ("--dtype", "bfloat16", "--learning-rate", 1e-5)
    assert train("-m", base, *LORA, *words).code == 0
    done = liger("merge", tmp_path / "run", "-o", tmp_path / "half")
    assert "of what the adapter changes; --dtype float32 keeps it" in done.err
    done = liger("merge", tmp_path / "run", "-o", tmp_path / "full", "--dtype", "float32")
    assert "rounding" not in done.err


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_bf16_is_rounded_once(train, liger, tmp_path, kind):
    """Every weight is the fp32 sum rounded, so the logits are as near as bfloat16 can be."""
    base = save_base(tmp_path / "base-model", torch.bfloat16)
    assert train("-m", base, *LORA, "--adapter", kind, "--dtype", "bfloat16").code == 0
    checkpoint = tmp_path / "run" / "checkpoint-3"
    done = liger("merge", checkpoint, "-o", tmp_path / "half", "--json")
    assert done.code == 0, done.err
    assert done.json()["dtype"] == "bfloat16"
    assert done.json()["num_merged"] == 14
    told = done.json()["rounding"]
    done = liger("merge", checkpoint, "-o", tmp_path / "full", "--dtype", "float32")
    assert done.code == 0, done.err
    half, full = stored(tmp_path / "half"), stored(tmp_path / "full")
    assert {value.dtype for value in full.values()} == {torch.float32}
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)
    before = {name: value.float() for name, value in stored(base).items()}
    change = sum(float((full[name] - before[name]).square().sum()) for name in full)
    lost = sum(float((full[name] - half[name].float()).square().sum()) for name in full)
    assert told == pytest.approx((lost / change) ** 0.5, rel=1e-3)
    expected = adapted_logits(checkpoint)
    torch.testing.assert_close(merged_logits(tmp_path / "full"), expected, atol=2e-5, rtol=0)
    # The weights' rounding is all there is: the base model's own moves its logits as much.
    error = (merged_logits(tmp_path / "half") - expected).abs().max()
    assert error < 0.02 * expected.abs().max()
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_run_is_its_best_checkpoint_else_its_last_whole_one(train, liger, base, tmp_path):
    words = ("-m", base, *LORA, "--max-steps", 4, "--save-steps", 2)
    assert train(*words).code == 0
    run = tmp_path / "run"

    def merge(name, taken):
        done = liger("merge", run, "-o", tmp_path / name)
        assert done.code == 0, done.err
        assert done.out.startswith(str(run / taken))
        torch.testing.assert_close(
            merged_logits(tmp_path / name), adapted_logits(run / taken), atol=2e-5, rtol=0
        )
        return done.err

    assert "taking checkpoint-4, the last" in merge("last", "checkpoint-4")
    (run / "best").symlink_to("checkpoint-2", target_is_directory=True)
    assert "taking checkpoint-2, the best of its evaluations" in merge("best", "checkpoint-2")
    (run / "best").unlink()
    with (run / "checkpoint-4" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1000)
    told = merge("whole", "checkpoint-2")
    assert "checkpoint-4 is damaged: adapter_model.safetensors has 1000 bytes" in told


def test_base_with_random_weights_is_found_in_the_run(train, liger, tmp_path):
    assert train(*LORA).code == 0
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    expected = adapted_logits(moved / "checkpoint-3")
    done = liger("merge", moved, "-o", tmp_path / "merged")
    assert done.code == 0, done.err
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, atol=2e-5, rtol=0)


def test_merged_model_is_a_model_for_every_command(train, liger, base, data, tmp_path):
    assert train("-m", base, *LORA).code == 0
    assert liger("merge", tmp_path / "run", "-o", tmp_path / "merged").code == 0
    common = ("-d", data, "--max-length", 64, "--use-cpu", "--json")
    found = [
        liger("eval", "-m", path, *common).json()["eval"]
        for path in (tmp_path / "run" / "checkpoint-3", tmp_path / "merged")
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    done = liger("merge", tmp_path / "merged", "-o", tmp_path / "again")
    assert done.code == 2
    assert "is not an adapter but a whole model: there is nothing to merge" in done.err


def test_image_text_model_keeps_its_processor(train, liger, tmp_path):
    import transformers

    name = "Gemma3ImageProcessor"
    # The one that needs no torchvision, whatever a release calls it.
    images = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    base = save_base(tmp_path / "base-model", torch.float32, "gemma3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        base,
        extra_special_tokens=dict.fromkeys(
            ("image_token", "boi_token", "eoi_token"), "<|reserved_0|>"
        ),
    )
    transformers.Gemma3Processor(images(), tokenizer, image_seq_length=5).save_pretrained(base)
    run, out = tmp_path / "run", tmp_path / "merged"
    assert train("-m", base, *LORA, "--lora-target-modules", "q_proj,v_proj").code == 0
    done = liger("merge", run, "-o", out)
    assert done.code == 0, done.err
    assert load_processor(resolve_model(str(out))).image_seq_length == 5
    trained = (run / "checkpoint-3" / "tokenizer.json").read_text()
    assert (out / "tokenizer.json").read_text() == trained
    weights, before = stored(out), stored(base)
    assert weights.keys() == before.keys()
    changed = {key for key in before if not torch.equal(weights[key], before[key])}
    assert changed
    assert all("q_proj" in key or "v_proj" in key for key in changed)


def test_wrong_input(train, liger, base, tmp_path):
    def refused(checkpoint, message, out=None, code=2):
        out = out or tmp_path / "out"
        before = sorted(tmp_path.rglob("*"))
        done = liger("merge", checkpoint, "-o", out)
        assert done.code == code, done.err
        assert message in " ".join(done.err.split())
        assert sorted(tmp_path.rglob("*")) == before

    refused(tmp_path / "nowhere", "is not a directory")
    refused(base, "is not an adapter but a whole model")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json")
    (tmp_path / "empty" / "config.yaml").touch()
    refused(tmp_path / "empty", "is the directory of a run that wrote no checkpoint")

    assert train("-m", base, *LORA).code == 0
    checkpoint = tmp_path / "run" / "checkpoint-3"
    best = tmp_path / "run" / "best"
    refused(best, "has no best, as no evaluation chose a best checkpoint; the checkpoints of this")
    best.symlink_to("checkpoint-2", target_is_directory=True)
    refused(best, "is a link to checkpoint-2, which is not there; the checkpoints of this run: ")
    gone = tmp_path / "run" / "checkpoint-1"
    refused(gone, "has no checkpoint-1; the checkpoints of this run: checkpoint-3")
    refused(checkpoint, "not an empty directory Take another --output", out=checkpoint)
    refused(checkpoint, "exists and is not an empty directory", out=base / "config.json")
    refused(checkpoint, "cannot be written", out=base / "config.json" / "out", code=3)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "quantization_config": {}}))
    refused(checkpoint, "is quantized")
    base.rename(tmp_path / "elsewhere")
    refused(checkpoint, f"the base model {base} is not there")
    (checkpoint / "adapter_model.safetensors").unlink()
    (tmp_path / "elsewhere").rename(base)
    (base / "config.json").write_text(json.dumps(settings))
    refused(checkpoint, "adapter_model.safetensors is missing")


def test_adapter_of_another_model_is_refused(train, liger, base, tmp_path):
    assert train("-m", base, *LORA).code == 0
    file = tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file({**weights, name: torch.zeros(3, 3)}, file)
    done = liger("merge", file.parent, "-o", tmp_path / "out")
    assert done.code == 2
    assert "cannot be loaded" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(train, liger, base, tmp_path, monkeypatch, error):
    from transformers import PreTrainedTokenizerFast

    assert train("-m", base, *LORA).code == 0

    def fail(self, directory):
        assert (directory / "model.safetensors").exists()
        raise error

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    before = sorted(tmp_path.rglob("*"))
    done = liger("merge", tmp_path / "run", "-o", tmp_path / "out")
    assert done.code == (130 if isinstance(error, KeyboardInterrupt) else 3), done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_output_may_be_the_current_directory(train, liger, base, tmp_path, monkeypatch):
    assert train("-m", base, *LORA).code == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = liger("merge", "../run", "-o", ".")
    assert done.code == 0, done.err
    assert (tmp_path / "here" / "model.safetensors").is_file()
