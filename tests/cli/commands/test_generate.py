"""Generating: the text is the model's, the same for a seed, and ends quietly however it ends."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import pytest
import torch

from liger_cli.training.model.source import load_model, load_tokenizer, resolve_model

CPU = ("--use-cpu", "--max-new-tokens", 12)


@pytest.fixture
def model(tmp_path):
    """A directory of a model that has its preferences, so that sampling is not mere chance."""
    path = tmp_path / "model"
    source = resolve_model("mistral")
    made = load_model(source, dtype=torch.float32, seed=7)
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(10)
    made.save_pretrained(path)
    load_tokenizer(source).save_pretrained(path)
    return path


@pytest.fixture
def generate(liger, model):
    def run(*words: object):
        return liger("generate", "--model", model, *CPU, *words)

    return run


@pytest.fixture
def stdin(monkeypatch):
    def say(text: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))

    return say


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_greedy_text_is_what_the_logits_say(generate, model):
    """Token by token, without a cache, by the model alone."""
    done = generate("--prompt", "say 3 ", "--temperature", 0, "--json")
    assert done.code == 0, done.err
    [answer] = done.json()["answers"]
    source = resolve_model(str(model))
    loaded, tokenizer = load_model(source, dtype=torch.float32), load_tokenizer(source)
    ids = list(tokenizer("say 3 ")["input_ids"])
    assert answer["prompt_tokens"] == len(ids)
    new: list[int] = []
    while len(new) < 12 and tokenizer.eos_token_id not in new:
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor([ids + new]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    assert answer["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert answer["new_tokens"] == len(new)
    assert len(set(new)) > 2


def test_text_on_stdout_is_that_of_the_document(generate):
    words = ("--prompt", "say 3 ", "--seed", 5)
    shown = generate(*words)
    [answer] = generate(*words, "--json").json()["answers"]
    assert shown.out == answer["text"] + "\n"
    assert f"{answer['new_tokens']} tokens, " in shown.err
    assert shown.err.rstrip().endswith("cut at --max-new-tokens")


def test_text_is_shown_as_it_comes(generate, monkeypatch):
    """The first words are written before the last are made."""
    from liger_cli.commands.generate import conversation

    pieces = []
    monkeypatch.setattr(conversation, "_write", pieces.append)
    assert generate("--prompt", "a b c", "--max-new-tokens", 200, "--seed", 7).code == 0
    assert len([piece for piece in pieces if piece.strip()]) > 3


def test_seed_and_sampling(generate):
    def text(*words):
        done = generate("--prompt", "say", "--max-new-tokens", 24, *words, "--json")
        assert done.code == 0, done.err
        return done.json()["answers"][0]["text"]

    wide = ("--temperature", 1.5, "--top-p", 1)
    assert text(*wide, "--seed", 1) == text(*wide, "--seed", 1)
    assert text(*wide, "--seed", 1) != text(*wide, "--seed", 2)
    greedy = text("--temperature", 0)
    # So little probability, or so low a temperature, leaves the likeliest token alone.
    assert text(*wide, "--top-p", 0.001, "--seed", 2) == greedy
    assert text("--temperature", 0.001, "--seed", 2) == greedy
    assert text(*wide, "--seed", 2) != greedy


def test_what_the_model_says_of_sampling_does_not_mix_with_the_flags(generate, model):
    greedy = ("--prompt", "say", "--temperature", 0)
    wide = ("--prompt", "say", "--temperature", 1.5, "--top-p", 1)
    before = [generate(*words).out for words in (greedy, wide)]
    change(model / "generation_config.json", temperature=0.01, top_k=1, top_p=0.1, do_sample=True)
    done = [generate(*words) for words in (greedy, wide)]
    assert [each.out for each in done] == before
    assert "may be ignored" not in "".join(each.err for each in done)


def test_model_ends_its_answer(generate, model):
    [free] = generate("--prompt", "say", "--temperature", 0, "--json").json()["answers"]
    assert free["stop"] == "length"
    tokenizer = load_tokenizer(resolve_model(str(model)))
    end = tokenizer(free["text"])["input_ids"][3]
    change(model / "generation_config.json", eos_token_id=[end])
    [ended] = generate("--prompt", "say", "--temperature", 0, "--json").json()["answers"]
    assert ended["stop"] == "end"
    assert ended["new_tokens"] <= 4
    assert free["text"].startswith(ended["text"])


def test_chat_uses_the_template_and_remembers(generate, model, stdin):
    stdin(b"one\n\n  two  \n")
    done = generate("--chat", "--system", "be brief", "--json")
    assert done.code == 0, done.err
    first, second = done.json()["answers"]
    assert [first["prompt"], second["prompt"]] == ["one", "two"]
    tokenizer = load_tokenizer(resolve_model(str(model)))
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "two"},
    ]

    def length(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text)["input_ids"])

    assert first["prompt_tokens"] == length(messages[:2])
    assert second["prompt_tokens"] == length(messages)
    one = generate("--chat", "--system", "be brief", "--prompt", "one", "--json").json()
    assert one["answers"][0]["text"] == first["text"]


def test_chat_without_a_turn(generate, stdin):
    stdin(b"")
    done = generate("--chat", "--json")
    assert done.code == 0
    assert done.json()["answers"] == []


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_run_and_merged_model_say_the_same(train, liger, model, tmp_path, kind):
    words = ("--adapter", kind, "--learning-rate", 0.05)
    assert train("-m", model, *words).code == 0
    assert liger("merge", tmp_path / "run", "-o", tmp_path / "merged").code == 0

    def text(path):
        done = liger("generate", "-m", path, *CPU, "--prompt", "say", "--temperature", 0)
        assert done.code == 0, done.err
        return done.out, done.err

    adapted, told = text(tmp_path / "run")
    assert "taking checkpoint-3, the last" in told
    assert text(tmp_path / "run" / "checkpoint-3")[0] == adapted
    assert text(tmp_path / "merged")[0] == adapted
    assert text(model)[0] != adapted


def test_preset_with_random_weights_says_so(liger):
    done = liger("generate", "-m", "qwen3", *CPU, "-p", "say")
    assert done.code == 0, done.err
    assert "qwen3 has random weights: its text means nothing" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --prompt TEXT, or --chat to talk"),
        (("--prompt", "a", "--system", "b"), "--system is the first message of a chat"),
        (("--prompt", " "), "--prompt is empty"),
        (("--prompt", "a\udcff"), "the prompt is not text in UTF-8"),
        (("--prompt", "a", "--max-new-tokens", 5000), "the prompt has 1 tokens and max_new_tokens"),
        (("--prompt", "a", "--top-p", 1.5), "--top-p"),
        (("--prompt", "a", "--temperature", -1), "--temperature"),
        (("--prompt", "a", "--temperature", "nan"), "--temperature"),
        (("--prompt", "a", "--max-new-tokens", 0), "--max-new-tokens"),
        (("--prompt", "a", "--sead", 1), "--seed"),
    ],
)
def test_wrong_input(generate, words, message):
    done = generate(*words)
    assert done.code == 2, done.err
    assert message in done.err
    assert not done.out


def test_text_that_is_none_on_stdin(generate, stdin):
    stdin(b"\xff\xfe\n")
    done = generate("--chat")
    assert done.code == 2
    assert "stdin is not text in UTF-8" in done.err


def test_model_without_a_chat_template(generate, model):
    (model / "chat_template.jinja").unlink()
    done = generate("--chat", "--prompt", "hello")
    assert done.code == 2
    assert f"the tokenizer of {model} has no chat template" in done.err
    assert "--prompt without --chat" in done.err
    assert generate("--prompt", "hello").code == 0


def test_template_that_refuses_a_system_message(generate, model):
    (model / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    done = generate("--chat", "--prompt", "hello", "--system", "x")
    assert done.code == 2
    assert "the model's chat template: no system role" in done.err


def test_tokenizer_of_another_model(generate, model):
    change(model / "tokenizer.json")
    tokens = json.loads((model / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["a"] = 9999
    (model / "tokenizer.json").write_text(json.dumps(tokens))
    done = generate("--prompt", "a")
    assert done.code == 2
    assert "token 9999 is outside the model's vocabulary" in done.err


def test_weights_that_are_not_finite(generate, model):
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    save_file(
        {name: value * float("nan") for name, value in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    done = generate("--prompt", "a")
    assert done.code == 1
    assert "nothing can be drawn" in done.err


def start(model, *words):
    command = [sys.executable, "-u", "-m", "liger_cli", "generate", "--model", model, "--use-cpu"]
    return subprocess.Popen(
        [*map(str, command), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )


LONG = ("--prompt", "a b c", "--max-new-tokens", 4000, "--top-p", 1, "--temperature", 2)


def test_interrupt_ends_with_130_and_no_traceback(model):
    process = start(model, *LONG)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert b"error: interrupted" in err
    assert b"Traceback" not in err


def test_broken_pipe_ends_quietly(model):
    process = start(model, *LONG)
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    assert process.returncode == 0
    assert b"Traceback" not in err
