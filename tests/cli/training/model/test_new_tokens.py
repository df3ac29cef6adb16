"""New tokens: their ids, the rows they start with, and that everything after keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from liger_cli.config import load_config
from liger_cli.errors import ConfigError
from liger_cli.training.memory.build import meta_model_of
from liger_cli.training.model.adapters import attach_adapter, new_adapter
from liger_cli.training.model.extended import extend_source, load_preprocessing
from liger_cli.training.model.new_tokens import extend_embeddings, read_tokens
from liger_cli.training.model.presets import NewTokens
from liger_cli.training.model.source import build_meta_model, load_model, resolve_model

# One whose head is the embedding, and one whose head is another matrix.
TIED, UNTIED = "qwen3", "mistral"
NUM_BYTES = 264


@pytest.fixture
def biased(tmp_path) -> str:
    """A model whose head has a bias."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "vocab_size": NUM_BYTES}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi", **sizes}))
    return str(tmp_path / "config.json")


def configuration(model: str = TIED, **keys: Any):
    return load_config(None, {"model": model, **keys})


def loaded(model: str = TIED, **keys: Any):
    """The tokenizer, the source and the lines of a configuration."""
    lines: list[str] = []
    config = configuration(model, **keys)
    found, source = load_preprocessing(config, resolve_model(model), notify=lines.append)
    return found.tokenizer, source, lines


def test_ids_lines_and_roles():
    tokenizer, source, lines = loaded(
        add_tokens="look,  find",
        add_special_tokens="<act>",
        eos_token="<act>",
        pad_token="<|pad|>",
        resize_to_multiple_of=16,
    )
    ids = tokenizer("look<act>finder", add_special_tokens=False)["input_ids"]
    assert ids[:3] == [264, 266, 265]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "lookfinder"
    assert source.tokens == NewTokens(
        272, 264, 264, {"look": 264, "find": 265, "<act>": 266}, 266, 0
    )
    assert lines == [
        "tokens: 3 added: 'look' 264, 'find' 265, '<act>' 266",
        "eos_token: '<act>', token 266; before: '<|im_end|>'",
        "pad_token: '<|pad|>', token 0; before: '<|pad|>'",
        "embeddings: from 264 to 272 rows; new ones start as the mean of the first 264, in the "
        "input embedding and in the head",
    ]


def test_rows_that_are_there_are_taken_first(tmp_path):
    """A special token that takes another part keeps what it does with spaces."""
    from tokenizers import AddedToken

    from liger_cli.training.model.new_tokens import add_tokens
    from liger_cli.training.model.tokenizers import byte_tokenizer

    tokenizer, lines = byte_tokenizer(), []
    tokenizer.add_tokens([AddedToken("<e>", rstrip=True, special=True)], special_tokens=True)
    config = configuration(add_tokens="look", eos_token="<e>", pad_token="a")
    tokens = add_tokens(config, tokenizer, resolve_model(TIED), 300, notify=lines.append)
    assert tokens == NewTokens(300, 300, 265, {"look": 265}, 264, tokenizer.get_vocab()["a"])
    assert lines[-1].startswith("embeddings: 300 rows, as before; those of new tokens start as")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos_token, again.pad_token) == ("<e>", "a")
    assert again.decode(again("x<e>   y", add_special_tokens=False)["input_ids"]) == "x<e>y"


def test_nothing_is_said_and_done_without_a_key():
    tokenizer, source, lines = loaded()
    assert (len(tokenizer), source.tokens, lines) == (NUM_BYTES, None, [])


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({"add_tokens": "a"}, "'a' is token .* of this model already", "Leave out"),
        ({"add_special_tokens": "<|im_end|>"}, "is token 2 of this model already", "Leave out"),
        ({"add_tokens": "aa,bb,aa"}, "'aa' is named twice", None),
        ({"add_tokens": "aa", "add_special_tokens": "aa"}, "'aa' is named twice", None),
        ({"eos_token": "<end>"}, "eos_token '<end>' is not one token .* but 5", "--add-special"),
        ({"pad_token": "pad"}, "pad_token 'pad' is not one token of this model but 3", "--add-sp"),
    ],
)
def test_tokens_that_cannot_be_added(keys, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(**keys)
    assert hint is None or hint in caught.value.hint


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a,,b", "should name tokens, separated by single commas"),
        ("", "should name tokens"),
        (["a,b"], "without commas and without white space"),
        ([" a"], "without commas and without white space"),
        ([""], "without commas and without white space"),
        ([1], "without commas and without white space"),
        (["a\nb"], "no control characters"),
    ],
)
def test_lists_that_name_no_tokens(value, message):
    with pytest.raises(ConfigError, match=message):
        configuration(add_tokens=value)
    assert configuration(add_tokens=["<a>", "b c"]).new_tokens == ["<a>", "b c"]


@pytest.mark.parametrize("kind", [TIED, UNTIED, "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_of_the_old(kind, dtype, biased):
    model = biased if kind == "biased" else kind
    before = load_model(resolve_model(model), dtype=dtype)
    _, source, _ = loaded(model, add_tokens="look,find", resize_to_multiple_of=16)
    after = load_model(source, dtype=dtype)
    assert after.config.get_text_config().vocab_size == 272
    pairs = [
        (before.get_input_embeddings().weight, after.get_input_embeddings().weight),
        (before.get_output_embeddings().weight, after.get_output_embeddings().weight),
    ]
    if (bias := before.get_output_embeddings().bias) is not None:
        # All zero at first, which is any mean of it.
        bias.data.normal_()
        before.config.eos_token_id = 2
        extend_embeddings(before, NewTokens(272, 264, 264, {"look": 264}), "m")
        assert torch.equal(bias_of(before)[264:], bias_of(before)[:264].mean(0).expand(8))
        return
    for old, new in pairs:
        assert len(new) == 272
        assert torch.equal(new[:264], old)
        assert torch.equal(new[264:], old.float().mean(0).to(dtype).expand_as(new[264:]))
    is_tied = after.get_input_embeddings().weight is after.get_output_embeddings().weight
    assert is_tied == (kind == TIED)
    # The model without weights has the same sizes, for plans and estimates.
    meta = build_meta_model(source)
    assert [p.shape for p in meta.parameters()] == [p.shape for p in after.parameters()]


def bias_of(model: Any) -> torch.Tensor:
    return model.get_output_embeddings().bias.detach()


def test_rows_without_a_token_are_left_as_they_are():
    """Many models have more rows than tokens: a new token takes the first free one."""
    model = load_model(resolve_model(TIED))
    old = model.get_input_embeddings().weight.detach().clone()
    extend_embeddings(model, NewTokens(264, 264, 250, {"look": 250}), TIED)
    new = model.get_input_embeddings().weight
    assert torch.equal(new[250], old[:250].mean(0))
    assert torch.equal(new[251:], old[251:])
    assert torch.equal(new[:250], old[:250])


def test_ids_of_the_configuration_and_of_generation():
    model = load_model(resolve_model(TIED))
    model.generation_config.eos_token_id = [2, 7]
    extend_embeddings(model, NewTokens(264, 264, 264, {}, 5, 3), TIED)
    assert model.config.eos_token_id == 5
    assert model.generation_config.eos_token_id == [5, 2, 7]
    assert model.generation_config.pad_token_id == 3
    # An embedding that is built with it would not train the row of this token.
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id != 3


@pytest.mark.parametrize("part", ["input", "output"])
def test_quantised_embeddings_are_refused(part):
    model = load_model(resolve_model(UNTIED))
    module = getattr(model, f"get_{part}_embeddings")()
    module.weight = nn.Parameter(module.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="the embeddings of m cannot be resized: one is a"):
        extend_embeddings(model, NewTokens(272, 264, 264, {"look": 264}), "m")


def test_model_that_refuses_to_be_resized_is_named(monkeypatch):
    model = load_model(resolve_model(TIED))

    def refuse(*args: Any, **options: Any) -> None:
        raise NotImplementedError("no resizing here")

    monkeypatch.setattr(model, "resize_token_embeddings", refuse)
    with pytest.raises(ConfigError, match="of m cannot be resized: no resizing here"):
        extend_embeddings(model, NewTokens(272, 264, 264, {"look": 264}), "m")


# Beside an adapter.


def adapted(model: str, **keys: Any):
    config = configuration(model, adapter="lora", lora_r=2, add_tokens="look,find", **keys)
    source = extend_source(config, resolve_model(model))
    base = load_model(source)
    return attach_adapter(base, new_adapter(config, base, source.tokens), base="")


@pytest.mark.parametrize("model", [TIED, UNTIED])
def test_adapter_trains_the_new_rows_alone(model):
    found = adapted(model)
    trained = {n: p.shape for n, p in found.named_parameters() if p.requires_grad}
    rows = [shape for name, shape in trained.items() if "lora" not in name]
    assert [shape[0] for shape in rows] == ([2] if model == TIED else [2, 2])


def test_head_with_a_bias_is_trained_whole(biased):
    """peft would leave the bias out."""
    found = adapted(biased)
    trained = [n for n, p in found.named_parameters() if p.requires_grad and "lora" not in n]
    assert [name.rpartition("model.")[2] for name in trained] == [
        "embed_tokens.token_adapter.trainable_tokens_delta.default",
        "lm_head.modules_to_save.default.weight",
        "lm_head.modules_to_save.default.bias",
    ]


def test_modules_that_the_user_names():
    found = adapted(UNTIED, lora_modules_to_save="embed_tokens,lm_head")
    trained = [n for n, p in found.named_parameters() if p.requires_grad and "lora" not in n]
    assert len(trained) == 2
    assert all("modules_to_save" in name for name in trained)
    for name in ("embed_tokens", "lm_head"):
        tied = adapted(TIED, lora_modules_to_save=name).named_parameters()
        trained = [n for n, p in tied if p.requires_grad and "lora" not in n]
        assert trained
        assert all("modules_to_save" in name for name in trained)
    with pytest.raises(
        ConfigError, match="lora_target_modules names lm_head, and the rows"
    ) as error:
        adapted(UNTIED, lora_target_modules="q_proj,lm_head")
    assert "--lora-modules-to-save lm_head" in error.value.hint


def test_release_of_peft_that_forgets_a_scale_is_refused(monkeypatch):
    """Gemma's embedding scales its output; a release that does not know it trains another model."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    adapted("gemma3-text")
    monkeypatch.setattr(TrainableTokensLayer, "_get_embed_scale", lambda self: None)
    with pytest.raises(
        ConfigError, match="this release of peft computes something else than the Gem"
    ):
        adapted("gemma3-text")


def test_sizes_of_an_estimate_are_those_with_the_new_rows(liger):
    words = [
        "estimate",
        "--model",
        UNTIED,
        "--use-cpu",
        "--batch-size",
        1,
        "--seq-len",
        64,
        "--json",
    ]
    plain, more = (
        liger(*words, *extra).json() for extra in ([], ["--resize-to-multiple-of", 1024])
    )
    weights = [{p["name"]: p["size"] for p in found["parts"]}["weights"] for found in (plain, more)]
    width = build_meta_model(resolve_model(UNTIED)).config.hidden_size
    assert weights[1] - weights[0] == 2 * 4 * width * (1024 - NUM_BYTES)
    config = configuration(UNTIED, adapter="lora", add_tokens="look")
    model = meta_model_of(config, extend_source(config, resolve_model(UNTIED)))
    assert sum(p.numel() for n, p in model.named_parameters() if "tokens_delta" in n) == 2 * width


# Whole runs.

ROWS = ["look at <act> it", "find <act>", "look", "<act> find it and look", "it"]


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{row} {i}"}) + "\n" for i, row in enumerate(ROWS))
    )
    return path


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def new_rows(checkpoint: Path) -> list[torch.Tensor]:
    """The rows of the three new tokens in the input embedding and the head."""
    model = load_model(resolve_model(str(checkpoint)))
    parts = []
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        adapter = part._modules.get("token_adapter")
        weight = part.weight if adapter is None else adapter.get_merged_weights(["default"])
        parts.append(weight[264:267].detach())
    return parts


@pytest.mark.parametrize(("adapter", "model"), [("none", UNTIED), ("lora", TIED), ("lora", UNTIED)])
def test_run_keeps_its_tokens(tmp_path, liger, texts, adapter, model):
    words = ["train", "--model", model, "--dataset", texts, "--use-cpu", "--max-length", 32]
    words += ["--per-device-train-batch-size", 2, "--adapter", adapter, "--learning-rate", 0.01]
    words += ["--add-tokens", "look,find", "--add-special-tokens", "<act>", "--eos-token", "<act>"]
    words += ["--pad-token", "<act>", "--resize-to-multiple-of", 8, "--eval-dataset", texts]
    words += ["--lr-scheduler-type", "constant"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = liger(*words, "--output-dir", whole, "--max-steps", 4)
    assert first.code == 0, first.err
    assert "tokens: 3 added: 'look' 264, 'find' 265, '<act>' 266" in first.err
    assert "embeddings: from 264 to 272 rows" in first.err
    assert ("and the rows of 3 new tokens" in first.err) == (adapter == "lora")
    # A resumed run is the unbroken one, to the bit.
    assert liger(*words, "--output-dir", broken, "--max-steps", 2).code == 0
    done = liger(*words, "--output-dir", broken, "--max-steps", 4, "--resume", "auto")
    assert done.code == 0, done.err
    assert losses(broken) == losses(whole)
    trained, start = new_rows(whole / "checkpoint-4"), new_rows(broken / "checkpoint-2")
    assert all(map(torch.equal, trained, new_rows(broken / "checkpoint-4")))
    # Every new row is trained, as input and as output.
    assert all((a != b).any(1).all() for a, b in zip(trained, start, strict=True))
    tokenizer = AutoTokenizer.from_pretrained(whole / "checkpoint-4")
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<act>", "<act>", 267)
    # An evaluation of the checkpoint, with the keys of the run or without, is the run's own.
    wanted = json.loads((whole / "report.json").read_text())["eval"]["loss"]
    plain = ["--model", whole, "--dataset", texts, "--use-cpu", "--max-length", 32, "--json"]
    for more in ([], ["--config", whole / "config.yaml"]):
        found = liger("eval", *plain, *more)
        assert found.code == 0, found.err
        assert found.json()["eval"]["loss"] == pytest.approx(wanted, rel=1e-6)
    assert liger("inspect", "--model", whole, "--json").code == 0
    generated = liger("generate", "--model", whole, "--prompt", "look", "--use-cpu", "--json")
    assert generated.json()["answers"][0]["prompt_tokens"] == 1
    again = liger(*words, "--model", whole, "--output-dir", tmp_path / "again", "--max-steps", 1)
    assert again.code == 2
    assert "of this model already" in again.err
    if adapter == "lora":
        check_merged(tmp_path, liger, whole, trained)


def check_merged(tmp_path: Path, liger: Any, run: Path, trained: list[torch.Tensor]) -> None:
    done = liger("merge", run, "-o", tmp_path / "merged", "--dtype", "float32")
    assert done.code == 0, done.err
    assert all(map(torch.equal, trained, new_rows(tmp_path / "merged")))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (272, 266)
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["pad_token_id"] == 266
    ids = torch.arange(250, 272).view(2, 11)
    with torch.no_grad():
        models = [load_model(resolve_model(str(place))) for place in (run, tmp_path / "merged")]
        before, after = (model(input_ids=ids).logits for model in models)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    assert read_tokens(tmp_path / "merged") is None
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert not any("token_adapter" in name for name in weights)


def test_tokens_on_top_of_an_adapter_are_refused(tmp_path, liger, texts):
    words = ["train", "--dataset", texts, "--use-cpu", "--max-length", 32, "--max-steps", 1]
    lora = [*words, "--model", TIED, "--adapter", "lora", "--output-dir", tmp_path / "run"]
    assert liger(*lora).code == 0
    more = ["--model", tmp_path / "run", "--add-tokens", "look", "--output-dir", tmp_path / "b"]
    done = liger(*words, *more)
    assert done.code == 2
    assert "is an adapter, which has the rows of the tokens" in done.err
    assert "liger merge makes a model of it" in done.err


@pytest.mark.parametrize("text", ["{", "[]", '{"num_rows": 3}', '{"rows": 1}'])
def test_file_of_an_adapter_that_is_damaged(tmp_path, text):
    (tmp_path / "new_tokens.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a file that liger wrote"):
        read_tokens(tmp_path)
