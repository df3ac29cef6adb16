"""The chat templates that come with liger: exact text and labels, thoughts, and a user's file.

shipped_templates.txt has the rendering of each conversation by each template, read and checked by
hand, with the trained tokens between angular brackets.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from chat_templates import chat_tokenizer
from test_conversations import CONVERSATIONS, NoOffsets, labels_of, read_marks, said, sides, user

from liger_cli.data.chat import ChatRenderer
from liger_cli.data.encode import IGNORED, Encoder
from liger_cli.data.rows import make_row
from liger_cli.data.shipped_templates import read_template, template_names
from liger_cli.data.shown import THOUGHTS
from liger_cli.data.thoughts import REMOVED
from liger_cli.errors import ConfigError, DataError
from liger_cli.training.model.source import resolve_model
from liger_cli.training.model.template_facts import template_facts

SPECIAL = [
    *("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
]
TOOLS = {"tools": [{"name": "look"}]}


def tokenizer_of(name: str, **options: bool):
    from tokenizers import AddedToken

    tokenizer = chat_tokenizer(read_template(name), **options)
    added = [AddedToken(word, normalized=False, special=True) for word in SPECIAL]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def without_offsets(name: str):
    fast = tokenizer_of(name)
    return NoOffsets(
        tokenizer_object=fast.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=fast.chat_template,
    )


def encoded(tokenizer, messages: list[dict], columns: dict | None = None, **settings: object):
    row = make_row("messages", {"messages": messages, **(columns or {})}, "d.jsonl:1")
    return Encoder(tokenizer).encode([row], ChatRenderer(tokenizer, **settings))[0]


def shown(tokenizer, messages: list[dict], **settings: object) -> str:
    """The text of a row with what is trained between angular brackets."""
    row = encoded(tokenizer, messages, **settings)
    text, is_open = "", False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if (label != IGNORED) != is_open:
            text += "⟧" if is_open else "⟦"
            is_open = not is_open
        text += tokenizer.decode([token])
    return text + ("⟧" if is_open else "")


@cache
def cases() -> dict[tuple[str, str], tuple[str, int]]:
    text = (Path(__file__).parent / "shipped_templates.txt").read_text("utf-8")
    found = {}
    for case in text.removeprefix("=== ").removesuffix("\n").split("\n=== "):
        head, _, body = case.partition("\n")
        name, conversation, *note = head.split(" / ")
        found[name, conversation] = (body, int(note[0].split()[0]) if note else 0)
    return found


def test_case_224_every_shipped_template_and_conversation_is_in_the_table():
    wanted = {(name, talk) for name in template_names() for talk in CONVERSATIONS}
    assert set(cases()) == wanted


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", template_names())
def test_case_224_text_and_trained_tokens_of_shipped_templates(name, conversation):
    marked, num_without = cases()[name, conversation]
    messages = CONVERSATIONS[conversation]
    columns = TOOLS if conversation == "tools" else {}
    tokenizer = tokenizer_of(name)
    if marked.startswith("refused: "):
        with pytest.raises(DataError) as caught:
            encoded(tokenizer, messages, columns)
        assert caught.value.message == f"d.jsonl:1: {marked.removeprefix('refused: ')}"
        return
    text, spans = read_marks(marked)
    if conversation != "tools":
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    for other in (tokenizer, tokenizer_of(name, trim_offsets=True), without_offsets(name)):
        row = encoded(other, messages, columns)
        assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row.labels == labels_of(tokenizer, text, spans)
    places = {side for pair in sides(tokenizer, row.input_ids) for side in pair}
    assert all(len(text[:place].encode()) in places for span in spans for place in span)
    assert row.left_out.get(THOUGHTS, 0) == num_without


@pytest.mark.parametrize("name", template_names())
def test_generation_prompt_is_what_an_answer_follows(name):
    """A model is asked with the text that its answers followed in training."""
    tokenizer = tokenizer_of(name)
    renderer = ChatRenderer(tokenizer)
    talk = [*CONVERSATIONS["several"][:3]]
    asked = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    chat = renderer.conversation([*talk, said("hello", reasoning_content="hm")], [], "d")
    begin, _ = chat.trained[-1]
    # The space before an answer is a part of its first token.
    assert chat.text[:begin].rstrip(" ") == asked.rstrip(" ")


@pytest.mark.parametrize("name", [n for n in template_names() if "qwen" in n or "r1" in n])
def test_empty_thought_is_of_the_prompt_where_thinking_is_off(name):
    tokenizer = tokenizer_of(name)
    talk = CONVERSATIONS["single"]
    on, off = (shown(tokenizer, talk, enable_thinking=value) for value in (None, False))
    assert on.replace("⟦", "").replace("⟧", "") == off.replace("⟦", "").replace("⟧", "")
    assert "</think>\n\n⟦yes" in off
    assert "</think>\n\nyes" in on.partition("⟦")[2]
    assert shown(tokenizer, talk, enable_thinking=True) == on
    # In training with it off, no thought is trained, and a thought of a row stays one.
    thought = [user("a"), said("yes", reasoning_content="it is")]
    assert "it is" in shown(tokenizer, thought, enable_thinking=False).partition("⟦")[2]


TALK = [
    *(user("one"), said("<think>\nA\n</think>\n\nyes"), user("two")),
    *(said("", reasoning_content="B", tool_calls=[{"function": {"name": "look"}}]),),
    *({"role": "tool", "content": "out"}, said("B2</think>no")),
]


@pytest.mark.parametrize("name", ["qwen3-keep", "deepseek-r1-keep"])
@pytest.mark.parametrize(
    ("reasoning", "kept", "num_removed"),
    [(None, "A B B2", 0), ("keep", "A B B2", 0), ("last", "B B2", 1), ("drop", "", 3)],
)
def test_reasoning_chooses_the_thoughts(name, reasoning, kept, num_removed):
    tokenizer = tokenizer_of(name)
    row = encoded(tokenizer, TALK, TOOLS, reasoning=reasoning)
    text = tokenizer.decode([label for label in row.labels if label != IGNORED])
    assert [word for word in ("A", "B2", "B") if f"{word}\n</think>" in text] == [
        word for word in ("A", "B2", "B") if word in kept.split()
    ]
    assert "yes" in text
    assert "no" in text
    assert row.left_out.get(REMOVED, 0) == num_removed


def test_reasoning_that_the_template_does_not_show_is_refused():
    tokenizer = tokenizer_of("qwen3")
    with pytest.raises(DataError, match="d.jsonl:1: the chat template does not show the thoughts"):
        encoded(tokenizer, TALK, TOOLS, reasoning="keep")
    assert encoded(tokenizer, TALK, TOOLS, reasoning="last").left_out == {REMOVED: 1}
    fields = CONVERSATIONS["thoughts_field"]
    for reasoning in ("keep", "last"):
        with pytest.raises(DataError, match="reasoning is"):
            encoded(tokenizer_of("chatml"), fields, reasoning=reasoning)
    assert encoded(tokenizer_of("chatml"), fields, reasoning="drop").left_out == {REMOVED: 2}


def test_thought_without_an_end_cannot_be_left_out():
    talk = [user("a"), said("<think>it is")]
    with pytest.raises(DataError, match="d.jsonl:1: assistant message 1 opens a <think>"):
        encoded(tokenizer_of("qwen3"), talk, reasoning="drop")
    assert "it is" in shown(tokenizer_of("qwen3"), talk)


def test_marked_answers_whose_thoughts_are_dropped():
    """The place of an answer is found by its text, which is another without the thought."""
    talk = [*CONVERSATIONS["thoughts_content"]]
    talk[1] = {**talk[1], "train": False}
    text = shown(tokenizer_of("qwen3-keep"), talk, reasoning="drop")
    assert text.count("⟦") == 1
    assert text.index("yes") < text.index("⟦") < text.index("no")


# A user's file.


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "never reads the variable messages, so it is no chat template"),
        (
            '{"chat_template": "{% for m in messages %}{% endfor %}"}',
            "is JSON, and a chat template",
        ),
        ("{% for m in messages %}\n\n{% endfo %}", r"t\.jinja:3: not valid Jinja: Encountered"),
        ("{% for m in messages", r"t\.jinja:1: not valid Jinja"),
        ("", "never reads the variable messages"),
        ("{{ messages | no_filter }}", r"t\.jinja:1: not valid Jinja: No filter named"),
    ],
)
def test_file_that_is_no_template(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_template(str(write(tmp_path / "t.jinja", text)))


def test_name_or_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="'chat_ml' is neither .*did you mean chatml") as caught:
        read_template("chat_ml")
    assert ", ".join(template_names()) in caught.value.hint
    with pytest.raises(ConfigError, match="is a directory"):
        read_template(str(tmp_path))
    (tmp_path / "latin").write_bytes(b"{{ messages }}\xe9")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        read_template(str(tmp_path / "latin"))


def test_name_goes_before_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chatml", "{{ messages }}")
    assert read_template("chatml").startswith("{#- ChatML")
    assert read_template("./chatml") == "{{ messages }}"


def test_facts_warn_of_a_model_that_would_not_stop():
    source = resolve_model("qwen3")
    facts = template_facts(tokenizer_of("zephyr"), source, "zephyr")
    assert facts.line == (
        "chat template: zephyr, which comes with liger; answers begin after '<|assistant|>\\n'; "
        "answers end with '</s>'"
    )
    assert facts.warnings == ()
    [warning] = template_facts(tokenizer_of("chatml"), source, "chatml").warnings
    assert warning.startswith("answers end with '<|im_end|>', and generation ends at the eos_token")
    tokenizer = chat_tokenizer(read_template("deepseek-r1"))
    several, *_ = template_facts(tokenizer, source, "deepseek-r1").warnings
    assert several.startswith("<｜Assistant｜>, <think>: several tokens each")


# The commands.


@pytest.fixture
def chats(tmp_path) -> Path:
    rows = [CONVERSATIONS["single"], CONVERSATIONS["several"], CONVERSATIONS["system"]]
    text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    return write(tmp_path / "chats.jsonl", text)


@pytest.fixture
def base(tmp_path) -> Path:
    """A model without a chat template."""
    from liger_cli.training.model.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    write(tmp_path / "base" / "config.json", json.dumps(resolve_model("qwen3").config))
    return tmp_path / "base" / "config.json"


def test_template_of_a_run_is_saved_and_used_by_what_follows(tmp_path, liger, chats, base):
    words = ["--dataset", chats, "--use-cpu", "--max-length", 128]
    done = liger("train", "--model", base, *words, "--max-steps", 1)
    assert done.code == 4
    assert "no chat template" in done.err
    assert "--chat-template FILE, or one of the names chatml, deepseek-r1" in done.err
    run = tmp_path / "run"
    words += ["--eval-dataset", chats]
    given = ["--chat-template", "zephyr", "--reasoning", "keep"]
    train = ["train", "--model", base, *words, "--output-dir", run, "--max-steps", 2]
    train += ["--adapter", "lora", "--lora-r", 2]
    done = liger(*train, *given)
    assert done.code == 0, done.err
    assert "chat template: zephyr, which comes with liger; answers begin after" in done.err
    text = read_template("zephyr")
    assert (run / "checkpoint-2" / "chat_template.jinja").read_text("utf-8") == text
    # A resumed run has the same template, or is refused.
    more = [*train, "--resume", "auto", "--max-steps", 3]
    refused = liger(*more)
    assert refused.code == 2
    assert "chat_template is None, but" in refused.err
    assert liger(*more, *given).code == 0
    # The commands that follow take it from the checkpoint.
    done = liger("eval", "--model", run, *words, "--json")
    assert done.code == 0, done.err
    preview = liger("data", "preview", "--model", run, *words, "--json").json()
    assert preview["template"]["text"] == text
    assert (
        preview["rows"][0]["pieces"][0]["text"]
        == "<|user|>\nWhat is it?<|im_end|>\n<|assistant|>\n"
    )
    done = liger("merge", run / "checkpoint-3", "-o", tmp_path / "merged")
    assert done.code == 0, done.err
    assert (tmp_path / "merged" / "chat_template.jinja").read_text("utf-8") == text
    other = liger(
        *("merge", run / "checkpoint-3", "-o", tmp_path / "other", "--chat-template", "chatml")
    )
    assert other.code == 0, other.err
    saved = (tmp_path / "other" / "chat_template.jinja").read_text("utf-8")
    assert saved == read_template("chatml")


def test_file_that_has_changed_since_the_checkpoint_is_refused(tmp_path, liger, chats, base):
    file = write(tmp_path / "t.jinja", read_template("chatml"))
    words = ["train", "--model", base, "--dataset", chats, "--use-cpu", "--max-length", 128]
    words += ["--output-dir", tmp_path / "run", "--chat-template", file]
    assert liger(*words, "--max-steps", 1).code == 0
    write(file, read_template("zephyr"))
    done = liger(*words, "--max-steps", 2, "--resume", "auto")
    assert done.code == 2
    assert "has another content than when" in done.err
    write(file, read_template("chatml"))
    assert liger(*words, "--max-steps", 2, "--resume", "auto").code == 0


def test_generate_with_a_template(liger, base):
    words = ["generate", "--model", base, "--use-cpu", "--max-new-tokens", 2, "--prompt", "hi"]
    done = liger(*words, "--chat")
    assert done.code == 2
    assert "has no chat template" in done.err
    assert "or one of the names chatml" in done.err
    done = liger(*words, "--chat-template", "chatml")
    assert done.code == 2
    assert "--chat-template writes the turns of a chat: add --chat" in done.err
    plain, thinks = (
        liger(*words, "--chat", "--chat-template", "qwen3", *more, "--json").json()
        for more in ([], ["--no-enable-thinking"])
    )
    numbers = [found["answers"][0]["prompt_tokens"] for found in (plain, thinks)]
    # One byte a token: the empty thought.
    assert numbers[1] - numbers[0] == len("<think>\n\n</think>\n\n")
