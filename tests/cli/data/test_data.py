"""Rows of token ids: what is trained, what is refused, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_rows import CONVERSATION, SAID, check_labels, load, make_tokenizer, write

from liger_cli.data.encode import IGNORED
from liger_cli.errors import ConfigError, DataError
from liger_cli.training.model.tokenizers import byte_tokenizer

CHATML = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}\
{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


GENERATION = """\
{%- for message in messages -%}\
{{ '<|im_start|>' + message['role'] + '\\n' }}\
{%- if message['role'] == 'assistant' -%}\
{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}\
{%- else -%}{{ message['content'] + '<|im_end|>' }}{%- endif -%}{{ '\\n' }}\
{%- endfor -%}"""


LLAMA3 = """\
{% for message in messages %}{% if loop.first %}{{ '<|begin_of_text|>' }}{% endif %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\
{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""


# The system message goes into the last user message, as with Mistral: no rendering of the first
# messages is the beginning of the rendering of all.
MOVES_SYSTEM = """\
{%- if messages[0]['role'] == 'system' -%}\
{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}\
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}\
{%- set last = (turns | selectattr('role', 'equalto', 'user') | list)[-1] -%}\
{{- '<s>' -}}{%- for message in turns -%}{%- if message['role'] == 'user' -%}\
{{- '[INST] ' -}}{%- if message == last and system -%}{{- system + '\\n\\n' -}}{%- endif -%}\
{{- message['content'] + ' [/INST]' -}}\
{%- else -%}{{- ' ' + message['content'] | trim + '</s>' -}}{%- endif -%}{%- endfor -%}"""


# Drops the system message, and closes the last turn with one more mark, as Phi-3 does.
DROPS_SYSTEM = """\
{% for message in messages %}{% if message['role'] != 'system' %}\
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '</s>' }}{% endif %}"""


# Marks that are ordinary text to the tokenizer.
PLAIN = """\
{% for message in messages %}\
{{ '## ' + message['role'] + '\\n' + message['content'] + '\\n[end]\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '## assistant\\n' }}{% endif %}"""


TOOLS = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% for call in message.tool_calls or [] %}\
{{ '<tool_call>' + call.function.name + '(' + call.function.arguments | tojson + ')</tool_call>' }}\
{% endfor %}{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


# Lays out thinking, and only of the last turn, as Qwen3 does.
THINKING = """\
{% for message in messages %}{% set content = message['content'] %}\
{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['role'] == 'assistant' %}\
{% set thought = '' %}{% if '</think>' in content %}\
{% set thought = content.split('</think>')[0].split('<think>')[-1] %}{% endif %}\
{% set content = content.split('</think>')[-1].lstrip('\\n') %}\
{% if loop.last %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}\
{{ content }}{% else %}{{ content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


# Descriptions of tools go into a system message, results of tools into one turn of the user, and a
# call stands behind what is said, as with Qwen2.5 and Hermes.
HERMES = """\
{%- if tools -%}{{ '<|im_start|>system\\n<tools>' }}\
{%- for tool in tools -%}{{ '\\n' + tool | tojson }}{%- endfor -%}{{ '\\n</tools><|im_end|>\\n' }}\
{%- endif -%}\
{%- for message in messages -%}\
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) -%}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
{%- elif message.role == 'assistant' -%}{{ '<|im_start|>assistant' }}\
{%- if message.content -%}{{ '\\n' + message.content }}{%- endif -%}\
{%- for call in message.tool_calls -%}{%- set call = call.function or call -%}\
{{ '\\n<tool_call>\\n' + call.name + call.arguments | tojson + '\\n</tool_call>' }}{%- endfor -%}\
{{ '<|im_end|>\\n' }}\
{%- elif message.role == 'tool' -%}\
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}\
{%- endif -%}{{ '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}\
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}\
{%- endif -%}{%- endfor -%}\
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


STRICT = """\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{{ message['content'] + '</s>' }}{% endfor %}"""


def trained(tokenizer, row) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


# Formats.


def test_case_100_text(tmp_path):
    tokenizer = make_tokenizer(begin=True)
    path = write(tmp_path / "d.jsonl", {"text": "hello there", "id": 1}, {"text": "yes </s>"})
    examples = load(path, tokenizer)
    texts = [tokenizer.decode(row["input_ids"]) for row in examples.examples]
    assert texts == ["<s>hello there</s>", "<s>yes </s>"]
    for row in examples.examples:
        check_labels(row)
        assert row["labels"][1:] == row["input_ids"][1:]
    assert examples.stats.columns == ("text",)
    assert len(examples) == examples.stats.rows == 2


@pytest.mark.parametrize("metaspace", [False, True], ids=["bytes", "metaspace"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("What is it?", " hello there"),
        # The joint tokens would be " yes" and "\n\n", each across the border.
        ("the answer is ", "yes."),
        ("assistant\n", "\nuser"),
        ("hel", "lo there"),
        ("", "hello"),
    ],
)
def test_case_96_completion_only_and_exact_border(tmp_path, prompt, completion, metaspace):
    tokenizer = make_tokenizer(metaspace=metaspace)
    path = write(tmp_path / "d.jsonl", {"prompt": prompt, "completion": completion})
    (row,) = load(path, tokenizer).examples
    check_labels(row)
    num_prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert row["labels"][num_prompt + (num_prompt == 0) :] == row["input_ids"][num_prompt or 1 :]
    assert all(label == IGNORED for label in row["labels"][:num_prompt])
    # Decoding drops the leading space of a metaspace token.
    shown = tokenizer.decode(row["input_ids"][num_prompt:])
    assert shown.lstrip(" ") == (completion + "</s>").lstrip(" ")
    # A prompt has the tokens that it has when a model is asked to go on.
    assert row["input_ids"][:num_prompt] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_case_100_conversations_are_messages(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    turns = [("system", "Be brief"), ("human", "What is it?"), ("gpt", "yes")]
    path = write(
        tmp_path / "a.jsonl",
        {"conversations": [{"from": who, "value": text} for who, text in turns]},
    )
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    other = write(
        tmp_path / "b.jsonl",
        {"messages": [{"role": roles[who], "content": text} for who, text in turns]},
    )
    assert load(path, tokenizer).examples[0] == load(other, tokenizer).examples[0]
    assert trained(tokenizer, load(path, tokenizer).examples[0]) == "yes<|im_end|>"


def test_case_100_empty_completion_is_dropped_and_counted(tmp_path):
    good = {"prompt": "a", "completion": "b"}
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "completion": ""}, good)
    stats = load(path).stats
    assert (stats.rows, stats.dropped_rows, stats.trained_tokens) == (1, 1, 2)
    with pytest.raises(DataError, match="none of the 1 rows .* has a token to train on"):
        load(write(tmp_path / "e.jsonl", {"prompt": "a", "completion": ""}))


def test_json_list_and_lines_are_the_same(tmp_path):
    rows = [{"text": "a"}, {"text": "b\u00e9"}]
    path = tmp_path / "d.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    lines = write(tmp_path / "d.jsonl", *rows)
    lines.write_text(lines.read_text().replace("\n", "\r\n\r\n"))
    assert load(path).examples[:] == load(lines).examples[:]
    write(path, *rows)
    assert load(path).examples[:] == load(lines).examples[:]


# The token of "\n\n" that begins the first answer has the end of the prompt in it, and the space
# before an answer is of its first token.
@pytest.mark.parametrize(
    ("template", "end", "strips", "leads"),
    [
        pytest.param(CHATML, "<|im_end|>", False, ("\n", "", ""), id="chatml"),
        pytest.param(GENERATION, "<|im_end|>", False, ("\n", "", ""), id="generation"),
        pytest.param(LLAMA3, "<|eot_id|>", True, ("", "", ""), id="llama3"),
        pytest.param(MOVES_SYSTEM, "</s>", True, (" ", " ", " "), id="moves_system"),
        pytest.param(DROPS_SYSTEM, "<|end|>", False, ("\n", "", ""), id="drops_system"),
        pytest.param(PLAIN, "\n[end]", False, ("\n", "", ""), id="plain"),
    ],
)
@pytest.mark.parametrize("system", [True, False], ids=["system", "no_system"])
def test_case_96_assistant_only(tmp_path, template, end, strips, leads, system):
    tokenizer = make_tokenizer(template)
    messages = CONVERSATION if system else CONVERSATION[1:]
    (row,) = load(write(tmp_path / "d.jsonl", {"messages": messages}), tokenizer).examples
    check_labels(row)
    said = [text.strip() if strips else text for text in SAID]
    wanted = "".join(lead + text + end for lead, text in zip(leads, said, strict=True))
    assert trained(tokenizer, row) == wanted
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_byte_tokenizer_marks_the_assistant(tmp_path):
    tokenizer = byte_tokenizer()
    path = write(tmp_path / "d.jsonl", {"messages": CONVERSATION})
    (row,) = load(path, tokenizer).examples
    assert trained(tokenizer, row) == "".join(text + "<|im_end|>" for text in SAID)
    ended = tokenizer.decode(row["input_ids"])
    prompt = tokenizer.apply_chat_template(
        CONVERSATION[:-1], tokenize=False, add_generation_prompt=True
    )
    assert ended == prompt + "What is it?<|im_end|>\n"


@pytest.mark.parametrize(
    "content", ["", "  ", "<|im_end|>", "a<|im_end|>\n<|im_start|>assistant\nb", "system", "\ue000"]
)
@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_contents_that_look_like_marks(tmp_path, template, content):
    tokenizer = make_tokenizer(template)
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": content},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "yes"},
    ]
    (row,) = load(write(tmp_path / "d.jsonl", {"messages": messages}), tokenizer).examples
    end = "<|im_end|>" if template is CHATML else "<|eot_id|>"
    shown = content if template is CHATML else content.strip()
    assert trained(tokenizer, row) == shown + end + "yes" + end


def test_tool_calls_are_trained_and_results_are_not(tmp_path):
    tokenizer = make_tokenizer(TOOLS)
    call = {"function": {"name": "look", "arguments": {"at": "it"}}}
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "the answer", "name": "look"},
        {"role": "assistant", "content": "yes", "tool_calls": None},
    ]
    (row,) = load(write(tmp_path / "d.jsonl", {"messages": messages}), tokenizer).examples
    said = '<tool_call>look({"at": "it"})</tool_call><|im_end|>yes<|im_end|>'
    assert trained(tokenizer, row) == said


@pytest.mark.parametrize("template", [PLAIN, GENERATION], ids=["plain", "generation"])
def test_tool_calls_that_are_not_shown_are_refused(tmp_path, template):
    """The turn would be trained as if it ended where it calls."""
    call = {"function": {"name": "look", "arguments": {}}}
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    with pytest.raises(DataError, match="d.jsonl:1: the chat template does not show tool_calls"):
        load(write(tmp_path / "d.jsonl", {"messages": messages}), make_tokenizer(template))


def test_case_96_calls_and_results_of_several_tools(tmp_path):
    tokenizer = make_tokenizer(HERMES)
    calls = [{"function": {"name": name, "arguments": {"at": "it"}}} for name in ("look", "ask")]
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "hello", "tool_calls": calls},
        {"role": "tool", "content": "the answer"},
        {"role": "tool", "content": "is yes"},
        {"role": "assistant", "content": None, "tool_calls": calls[:1]},
        {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "there"},
        {"role": "assistant", "content": "hello there"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    path = write(tmp_path / "d.jsonl", {"messages": messages, "tools": tools})
    (row,) = load(path, tokenizer, max_length=2000).examples
    check_labels(row)
    first, second = (
        f'\n<tool_call>\n{name}{{"at": "it"}}\n</tool_call>' for name in ("look", "ask")
    )
    said = [f"hello{first}{second}", first.lstrip("\n"), "yes", "hello there"]
    assert trained(tokenizer, row) == "".join(f"{text}<|im_end|>" for text in said)
    assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>system\n<tools>\n{")


def test_thinking_is_trained_where_the_template_shows_it(tmp_path):
    tokenizer = make_tokenizer(THINKING)
    thought = {"role": "assistant", "content": "<think>\nit is\n</think>\n\nyes"}
    user = {"role": "user", "content": "What is it?"}
    plain = [user, {"role": "assistant", "content": "no"}]
    path = write(
        tmp_path / "d.jsonl", {"messages": [*plain, user, thought]}, {"messages": plain * 2}
    )
    rows = load(path, tokenizer).examples
    assert trained(tokenizer, rows[0]) == ("no<|im_end|><think>\nit is\n</think>\n\nyes<|im_end|>")
    # Behind the generation prompt the model has to write an empty thought too.
    assert trained(tokenizer, rows[1]) == "no<|im_end|><think>\n\n</think>\n\nno<|im_end|>"


def test_tool_call_in_a_turn_that_is_written_otherwise_when_last(tmp_path):
    template = THINKING.replace(
        "{{ content }}{% else %}",
        "{{ content }}{% for call in message.tool_calls or [] %}{{ '[' + call.name + ']' }}"
        "{% endfor %}{% else %}",
    )
    tokenizer = make_tokenizer(template)
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "the answer"},
        {"role": "assistant", "content": "yes"},
    ]
    (row,) = load(write(tmp_path / "d.jsonl", {"messages": messages}), tokenizer).examples
    last = "<think>\n\n</think>\n\nyes<|im_end|>"
    assert trained(tokenizer, row) == "[look]<|im_end|>" + last


@pytest.mark.parametrize("key", ["reasoning", "note"])
def test_other_keys_of_a_message_count_where_they_are_shown(tmp_path, key):
    template = CHATML.replace(
        "message['content']",
        "('<think>' + message.reasoning + '</think>' if message.reasoning else '') "
        "+ message['content']",
    )
    tokenizer = make_tokenizer(template)
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "yes", key: "hello"},
        {"role": "user", "content": "there"},
        {"role": "assistant", "content": "is it"},
    ]
    (row,) = load(write(tmp_path / "d.jsonl", {"messages": messages}), tokenizer).examples
    shown = "<think>hello</think>" if key == "reasoning" else ""
    assert trained(tokenizer, row) == shown + "yes<|im_end|>is it<|im_end|>"


def test_thinking_that_the_template_drops_is_not_there_to_train(tmp_path):
    tokenizer = make_tokenizer(THINKING)
    thought = {"role": "assistant", "content": "<think>\nit is\n</think>\n\nyes"}
    user = {"role": "user", "content": "What is it?"}
    path = write(tmp_path / "d.jsonl", {"messages": [user, thought, user, thought]})
    (row,) = load(path, tokenizer).examples
    assert trained(tokenizer, row) == "yes<|im_end|><think>\nit is\n</think>\n\nyes<|im_end|>"


def test_assistant_without_a_sure_place_is_refused(tmp_path):
    # Neither is the content in the rendering, nor is a prompt the beginning of it.
    template = MOVES_SYSTEM.replace("message['content'] | trim", "message['content'] | upper")
    path = write(tmp_path / "d.jsonl", {"messages": CONVERSATION})
    with pytest.raises(DataError, match=r"d\.jsonl:1: the chat template changes .* message 2"):
        load(path, make_tokenizer(template))


def test_template_refuses_a_conversation(tmp_path):
    user = {"role": "user", "content": "a"}
    path = write(tmp_path / "d.jsonl", {"messages": [user, user]})
    with pytest.raises(DataError, match=r"d\.jsonl:1: .* roles must alternate"):
        load(path, make_tokenizer(STRICT))


def test_tokenizer_without_template(tmp_path):
    path = write(tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(DataError, match="no chat template"):
        load(path, make_tokenizer())


def test_conversation_without_assistant_is_dropped(tmp_path):
    user, assistant = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    path = write(tmp_path / "d.jsonl", {"messages": [user]}, {"messages": [user, assistant]})
    for template in (CHATML, GENERATION):
        stats = load(path, make_tokenizer(template)).stats
        assert (stats.rows, stats.dropped_rows) == (1, 1)


# Refused data.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "", "d.jsonl holds no rows"),
        ("d.jsonl", "\n\n", "d.jsonl holds no rows"),
        ("d.json", "[]", "d.json holds no rows"),
        ("d.jsonl", '{"text": "a"}\n{"text": ', r"d.jsonl:2: not JSON: .* \(column 9\)"),
        ("d.json", '[\n{"text": "a"},\n{"text": }\n]', "d.json:3: not JSON: Expecting value"),
        ("d.json", '[\n{"text": "a"}\n{"text": "b"}\n]', "d.json:3: not JSON: expected a comma"),
        ("d.json", '[{"text": "a"},\n]', "d.json:2: not JSON: Expecting value"),
        ("d.json", '[{"text": "a"}', "d.json:1: not JSON: expected a comma or the end"),
        ("d.json", '[{"text": "a"}]\n]', "d.json:2: not JSON: text after the end"),
        ("d.jsonl", '{"text": "a"}\n[1]', "d.jsonl:2: a row must be an object, found a list"),
        ("d.jsonl", '{"text": 5}', "d.jsonl:1: text must be a string, found a number"),
        ("d.jsonl", '{"text": null}', "d.jsonl:1: text must be a string, found null"),
        ("d.jsonl", '{"text": "\\ud800"}', "d.jsonl:1: text holds half of a surrogate"),
        ("d.jsonl", '{"a": 1, "b": 2}', "d.jsonl:1: found the columns a, b; wanted text; or prom"),
        ("d.jsonl", '{"prompt": "a"}', "d.jsonl:1: found the columns prompt; wanted text; or prom"),
        (
            "d.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}',
            "d.jsonl:2: the column completion is missing; found prompt",
        ),
        (
            "d.jsonl",
            '{"text": "a"}\n\n{"prompt": "a", "completion": "b"}',
            r"d.jsonl:3: found the columns prompt, completion, but the data start with text \(",
        ),
        ("d.jsonl", '{"messages": "a"}', "d.jsonl:1: messages must be a list, found a string"),
        ("d.jsonl", '{"messages": []}', "d.jsonl:1: messages is empty"),
        ("d.jsonl", '{"messages": ["a"]}', r"messages\[0\] must be an object, found a string"),
        ("d.jsonl", '{"messages": [{"role": "user"}]}', r"must have role and content, found role"),
        (
            "d.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "d.jsonl:1: 1 image parts, but 0 images",
        ),
        (
            "d.jsonl",
            '{"conversations": [{"from": "bing", "value": "a"}]}',
            r"conversations\[0\].from is 'bing'; allowed are human",
        ),
        ("d.jsonl", '{"conversations": [{"role": "a"}]}', "must have role and content, found role"),
        (
            "d.jsonl",
            '{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}',
            r"messages\[0\].content\[0\] has the type 'image'; allowed are text$",
        ),
        (
            "d.jsonl",
            '{"messages": [{"role": "user", "content": "a"}], "tools": ["look"]}',
            r"d.jsonl:1: tools\[0\] must be an object, found a string",
        ),
        ("d.md", "text\na\n", "d.md is not a data file: wanted .jsonl, .json, .parquet"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "d.jsonl:2: not UTF-8"),
        ("d.json", b'[\n{"text": "\xff"}]', "d.json:2: not UTF-8"),
    ],
)
def test_case_100_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="there is no data file"):
        load(tmp_path / "no.jsonl")
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "dir.jsonl")


def test_unknown_name():
    with pytest.raises(ConfigError, match=r"did you mean chitchat\?"):
        load(Path("chitcat"))


def test_arguments_out_of_range(tmp_path):
    path = write(tmp_path / "d.jsonl", {"text": "a"})
    with pytest.raises(ConfigError, match="max_length is 1"):
        load(path, max_length=1)


def test_token_outside_the_vocabulary(tmp_path):
    # The tokenizer of bytes has the letters of ASCII before all other bytes.
    path = write(tmp_path / "d.jsonl", {"text": "abc"}, {"text": "\u00e9"})
    with pytest.raises(DataError, match=r"d\.jsonl:2: token \d+ .* vocabulary of 97"):
        load(path, vocab_size=97)
