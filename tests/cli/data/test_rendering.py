"""Chat templates under a limit of time and size, and models and checkpoints that would hang."""

from __future__ import annotations

import hashlib
import json
import os
import threading

import pytest

from liger_cli.data import rendering
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.rendering import RenderLimit, render_chat, render_marked
from liger_cli.errors import ConfigError, DataError
from liger_cli.training.checkpoints.files import find_damage, write_manifest
from liger_cli.training.model.source import build_meta_model, resolve_model
from liger_cli.training.model.tokenizers import byte_tokenizer

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]

DOUBLED = "{% set ns = namespace(x=['aaaa']) %}{% for i in range(60) %}{% set ns.x = "
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "loops over a text": "{% set r = 'a' * 99999 %}{% for a in r %}{% for b in r %}{% endfor %}"
    "{% endfor %}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a repeated text": "{{ 'a' * 2000000000 }}",
    "a repeated list": "{{ [1] * 2000000000 }}",
    "a large power": "{{ 7 ** (7 ** 20) }}",
    "a wide format": "{{ '%2000000000d' % 1 }}",
    "a width from a value": "{{ '%*d' % (2000000000, 1) }}",
    "a wide field": "{{ '{:2000000000}'.format(1) }}",
    "a padding filter": "{{ 'a'|center(2000000000) }}",
    "a padding method": "{{ 'a'.ljust(2000000000) }}",
    "doubled by ~": DOUBLED.replace("['aaaa']", "'aaaa'") + "ns.x ~ ns.x %}{% endfor %}",
    "doubled by +": DOUBLED + "ns.x + ns.x %}{% endfor %}",
    "shared lists shown": DOUBLED + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "shared lists as JSON": DOUBLED + "[ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "replaced by itself": "{% set s = 'a' * 999999 %}{{ s.replace('a', s) }}",
    "joined by itself": "{% set s = 'a' * 999999 %}{{ s.join(['a'] * 99999) }}",
    "written again and again": "{% set s = 'a' * 999999 %}{% for i in range(99999) %}{{ s }}"
    "{% endfor %}",
    "kept again and again": "{% set s = 'a' * 999999 %}{% set x %}{% for i in range(99999) %}"
    "{{ s }}{% endfor %}{% endset %}",
    "itself again": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "deep brackets": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "a huge template": "a" * 2_000_000,
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.2)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("render", [render_chat, render_marked])
def test_case_236_a_template_without_end_is_stopped(short, template, render):
    with pytest.raises((RenderLimit, RecursionError, OverflowError)):
        render(byte_tokenizer(), TALK, template)


@pytest.mark.parametrize("name", ["nested loops", "a repeated text"])
def test_case_236_a_limit_names_the_row_from_any_thread(short, name):
    found = []

    def render() -> None:
        renderer = ChatRenderer(byte_tokenizer(), HOSTILE[name])
        with pytest.raises(DataError) as caught:
            renderer.conversation(TALK, (), "d.jsonl:7")
        found.append(caught.value.message)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    render()
    assert len(found) == 2
    for message in found:
        assert message.startswith("d.jsonl:7: the chat template")
        assert "it ran for more than" in message or "it builds more than" in message


def test_case_236_a_template_of_a_model_ends_generate_with_code_2(liger, tmp_path, short):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = HOSTILE["a repeated text"]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(resolve_model("qwen3").config))
    words = ["generate", "-m", tmp_path / "config.json", "--chat", "--prompt", "a", "--use-cpu"]
    done = liger(*words)
    assert done.code == 2, done.err
    assert "the model's chat template: it builds more than" in done.err


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages|tojson(indent=2) }}{{ '{:>9}|{{}}'.format(3) }}{{ '%5.2f' % 1.5 }}",
        "{% for m in messages if m.content %}{{ loop.index0 * 3 + 1 }}{{ ' ' * 4 }}"
        "{{ m.content|trim|upper|replace('H', 'j')|indent(2) }}{{ 1700000000|string }}{% endfor %}",
        "{% set ns = namespace(n=123456789, t='') %}{% for m in messages %}"
        "{% set ns.t = ns.t ~ m['role'] + ',' %}{% endfor %}{{ ns.t.split(',')|join('-') }}"
        "{{ messages|map(attribute='content')|join(' ') }}{{ eos_token }}{{ 7 ** 9 }}",
    ],
)
def test_case_236_other_templates_render_as_transformers_renders_them(template):
    tokenizer = byte_tokenizer()
    for messages in (TALK, [{"role": "user", "content": "long " * 400_000}]):
        for prompt in (False, True):
            expected = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
            assert render_chat(tokenizer, messages, template, prompt=prompt) == expected


def test_case_236_marked_parts_are_those_of_transformers():
    text, spans = render_marked(byte_tokenizer(), TALK)
    assert [text[start:end] for start, end in spans] == ["yo<|im_end|>"]


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("qwen3", {"num_hidden_layers": 10**7}),
        ("qwen3", {"num_hidden_layers": 10**200}),
        ("mixtral", {"num_local_experts": 10**7}),
        ("qwen2-vl", {"vision_config": {"depth": 10**7}}),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "estimate"])
def test_case_236_more_layers_than_any_model_has(liger, tmp_path, model, changes, command):
    config = dict(resolve_model(model).config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, **changes}))
    done = liger(command, "--model", path)
    assert done.code == 2, done.err
    [key] = changes
    assert key in done.err
    assert "at most 10000" in done.err


def test_case_236_layers_times_experts_are_counted_while_they_are_built(monkeypatch):
    monkeypatch.setattr("liger_cli.training.model.build_limits._MAX_REGISTERED", 5)
    with pytest.raises(ConfigError, match="more than 5 modules"):
        build_meta_model(resolve_model("qwen3"))


def forge(checkpoint, name, size=0):
    """A manifest with a seal that holds, which names another file."""
    values = json.loads((checkpoint / "manifest.json").read_text())
    values.pop("sha256")
    values["files"] = {name: {"bytes": size, "sha256": "0" * 64}}
    seal = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps({**values, "sha256": seal}))


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint-1"
    path.mkdir()
    (path / "weights.bin").write_bytes(b"x")
    known = {"step": 1, "is_evaluated": False, "num_processes": 1, "device": "cpu"}
    write_manifest(path, {**known, "data": {}, "config": {}})
    assert find_damage(path) is None
    return path


@pytest.mark.parametrize("name", ["pipe", "folder", "/dev/zero", "../outside", "a/../../outside"])
def test_case_236_a_manifest_that_names_what_is_no_file_of_it(checkpoint, name):
    os.mkfifo(checkpoint / "pipe")
    (checkpoint / "folder").mkdir()
    (checkpoint.parent / "outside").write_text("")
    size = (checkpoint / name).stat().st_size if name == "folder" else 0
    forge(checkpoint, name, size)
    assert f"manifest.json names {name}, which is" in str(find_damage(checkpoint))


@pytest.mark.parametrize("value", [None, [], "x", 1, {"bytes": {}}, {"bytes": 1, "sha256": []}])
def test_case_233_a_manifest_of_other_types_is_damage(checkpoint, value):
    forge(checkpoint, "weights.bin")
    text = (checkpoint / "manifest.json").read_text()
    for key in ("files", "config", "data", "step"):
        values = json.loads(text)
        values.pop("sha256")
        values[key] = value if key != "step" else str(value)
        seal = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        (checkpoint / "manifest.json").write_text(json.dumps({**values, "sha256": seal}))
        assert find_damage(checkpoint)


def test_case_236_a_model_directory_with_a_pipe_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(resolve_model("qwen3").config))
    os.mkfifo(tmp_path / "tokenizer_config.json")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json is no regular file"):
        resolve_model(str(tmp_path))
