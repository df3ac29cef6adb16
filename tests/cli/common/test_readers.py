"""Hostile content in everything that is read: numbers, depth, names, YAML, weights, extensions."""

from __future__ import annotations

import json
import os
import pickle

import pytest

from liger_cli.common.readers import JsonError, expand_path, parse_json, read_json
from liger_cli.config.yaml_file import read_file, read_mapping, read_set, to_yaml
from liger_cli.data.mixture import row_counts
from liger_cli.errors import ConfigError, DataError, ExtensionPanic, panics_raised

DIGITS = "7" * 5000
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "n" * 5000


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{"a": 1,\n"b": ' + DIGITS + "}", 2, "a number of 5000 digits"),
        ('{"a": 1,\n"b": -' + DIGITS + "}", 2, "digits"),
        ('{"a":\n\n' + DEEP + "}", 3, "nested too deep"),
        ('{"a":\n' * 101 + "1" + "}" * 101, 101, "nested too deep"),
        ('{"a": 1,\n}', 2, "not JSON"),
        ('{"a": 1}\n{"a": 2}', 2, "extra data"),
        (b'{"a": 1,\n"b": "\xff"}', 2, "not UTF-8"),
        ("", 1, "not JSON"),
    ],
)
def test_case_238_json_that_cannot_be_used_is_one_error_with_its_line(text, line, reason):
    with pytest.raises(JsonError) as caught:
        parse_json(text, "file.json")
    assert caught.value.line == line
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"file.json:{line}: ")


def test_case_238_json_of_ordinary_size_is_read_as_python_reads_it():
    value = {"a": [1, -2.5, 10**299, None, True, "é\U0001f600"], "b": {"c": []}}
    deep = json.loads("[" * 100 + "]" * 100)
    many = [[index] for index in range(1000)]
    brackets = "[" * 1000
    for one in (value, deep, many, brackets):
        assert parse_json(json.dumps(one)) == one
        assert parse_json(b"\xef\xbb\xbf" + json.dumps(one).encode()) == one


@pytest.mark.parametrize("content", [DIGITS, DEEP], ids=["digits", "deep"])
@pytest.mark.parametrize(
    ("file", "code", "command"),
    [
        ("config.json", 2, "inspect"),
        ("adapter_config.json", 2, "inspect"),
        ("report.json", 2, "report"),
        ("metrics.jsonl", 2, "report"),
        ("row.jsonl", 4, "data"),
        ("rows.json", 4, "data"),
        ("tools.jsonl", 4, "data"),
    ],
)
def test_case_238_every_json_file_ends_in_its_code_with_its_name(
    liger, tmp_path, file, code, command, content
):
    path = tmp_path / file
    text = '{"model_type": "llama",\n"x": ' + content + "}"
    if file == "tools.jsonl":
        row = {"messages": [{"role": "user", "content": "a"}], "tools": content}
        text = json.dumps(row)
    elif file == "rows.json":
        text = f'[{{"text": "a"}},\n{{"text": {content}}}]'
    elif file.endswith(".jsonl"):
        text = text.replace("\n", "") + "\n"
    path.write_text(text)
    words = {
        "inspect": ["inspect", "--model", tmp_path],
        "report": ["report", path if file == "report.json" else tmp_path],
        "data": ["data", "preview", "--model", "qwen3", "--dataset", path],
    }[command]
    done = liger(*words)
    assert done.code == code, done.err
    assert file in done.err
    assert "not an error that liger expects" not in done.err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("inspect", "--model", "~nouser/x"), 2),
        (("inspect", "--model", LONG), 2),
        (("train", "-m", "qwen3", "-d", "~nouser/x.jsonl", "--use-cpu"), 4),
        (("train", "-m", "qwen3", "-d", f"{LONG}.jsonl", "--use-cpu"), 4),
        (("train", "-m", "qwen3", "-d", f"a.jsonl,{LONG}.jsonl", "--use-cpu"), 4),
        (("train", "-m", "qwen3", "--resume", "~nouser/x", "--use-cpu"), 2),
        (("train", "-m", "qwen3", "--resume", LONG, "--use-cpu"), 2),
        (("train", "-m", "qwen3", "-o", LONG, "--use-cpu"), 2),
        (("train", "-m", "qwen3", "-o", "~nouser/x", "--use-cpu"), 2),
        (("train", "--config", f"{LONG}.yaml"), 2),
        (("report", LONG), 2),
        (("compare", LONG, LONG), 2),
    ],
    ids=lambda value: " ".join(word[:12] for word in value) if isinstance(value, tuple) else None,
)
def test_case_238_names_that_no_file_system_has(liger, tmp_path, monkeypatch, words, code):
    monkeypatch.chdir(tmp_path)
    done = liger(*words)
    assert done.code == code, done.err
    assert len(done.err) < 2000
    assert "not an error that liger expects" not in done.err
    assert not list(tmp_path.iterdir())


def test_case_238_many_short_names_are_no_long_one(liger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index in range(40):
        (tmp_path / f"part-{index}.jsonl").write_text('{"text": "word"}\n')
    names = ",".join(f"part-{index}.jsonl" for index in range(40))
    assert len(names) > 255
    done = liger("data", "preview", "--model", "qwen3", "--dataset", names, "--json")
    assert done.code == 0, done.err


def test_case_238_a_name_in_a_file_is_checked_where_it_stands(tmp_path):
    with pytest.raises(DataError, match=r"d.jsonl:3: the image ~nouser/x: there is no user"):
        expand_path("~nouser/x", "d.jsonl:3: the image", DataError)
    assert expand_path("~/x", "model") == type(tmp_path)(os.path.expanduser("~/x"))


@pytest.mark.parametrize("weights", [(1e300, 1.0), (1e9, None), (1e-300, 1.0), (5e-324, 1e308)])
def test_case_238_weights_that_make_no_epoch(weights):
    with pytest.raises(ConfigError, match="weights"):
        row_counts([7, 9], weights)
    assert row_counts([7, 9], [3.0, 1.0]) == [27, 9]
    assert row_counts([10**9, 10**9], [None, 1.0]) == [10**9, 10**9]


class Panic(BaseException):
    """What an extension in Rust raises is of no module that can be imported."""


def test_case_238_only_panics_become_errors():
    with pytest.raises(ExtensionPanic, match="Panic: retry-limit"), panics_raised():
        raise Panic("retry-limit\nstack backtrace")
    for kind in (KeyboardInterrupt, SystemExit, GeneratorExit, ValueError):
        with pytest.raises(kind), panics_raised():
            raise kind("x")
    assert pickle.loads(pickle.dumps(ExtensionPanic("x"))).args == ("x",)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_case_238_a_tokenizer_that_explodes_names_the_row(liger, tmp_path, num_proc, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = exploding_model(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "b b"}\n{"text": "%s"}\n{"text": "b"}\n' % ("a" * 40 + "b"))
    words = ["train", "-m", model / "config.json", "-d", rows, "--use-cpu", "--dry-run"]
    done = liger(*words, "--set", f"dataset_num_proc={num_proc}", "-o", tmp_path / "run")
    assert done.code == 4, done.err
    assert f"{rows}:2: the tokenizer fails on this text" in done.err


def test_case_238_a_prompt_on_which_the_tokenizer_explodes(liger, tmp_path):
    model = exploding_model(tmp_path / "model")
    prompt = "a" * 40 + "b"
    done = liger("generate", "-m", model / "config.json", "--prompt", prompt, "--use-cpu")
    assert done.code == 2, done.err
    assert "tokenizer fails on the prompt" in done.err


def exploding_model(folder):
    from tokenizers import Regex, pre_tokenizers

    from liger_cli.training.model.source import resolve_model
    from liger_cli.training.model.tokenizers import byte_tokenizer

    folder.mkdir()
    source = resolve_model("qwen3")
    (folder / "config.json").write_text(json.dumps(source.config))
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(?:(a+)+)+$"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save_pretrained(folder)
    return folder


BILLION = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 8)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (BILLION, 1),
        ("model: qwen3\nseed: &s 1\nmax_steps: *s\n", 2),
        ("model: qwen3\nseed: *s\n", 2),
        ("model: &m qwen3\n", 1),
        ("model: qwen3\n&k seed: 1\n", 2),
        ("model: qwen3\n*k : 1\n", 2),
        ("base: &b {seed: 1}\n<<: *b\n", 1),
    ],
)
def test_case_234_anchors_and_aliases_are_refused_with_their_line(liger, tmp_path, text, line):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    done = liger("train", "--config", path)
    assert done.code == 2
    assert f"{path}:{line}:" in done.err
    assert "anchors and aliases" in done.err
    for name in ("config.yaml", "model.yaml"):
        other = path.with_name(name)
        other.write_text(text)
        with pytest.raises(ConfigError, match=f"{name}:{line}:"):
            read_mapping(other)


def test_case_234_a_value_on_the_command_line_has_none_either():
    with pytest.raises(ConfigError, match="anchors and aliases"):
        read_set("eval_dataset=[&a x, *a]")


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_case_234_depth_is_bounded_before_it_is_built(tmp_path, opening):
    path = tmp_path / "run.yaml"
    path.write_text("model: x\nseed:\n  " + opening * 5000)
    with pytest.raises(ConfigError, match=r"run.yaml:\d+:\d+: "):
        read_file(path)


def test_case_234_a_run_directory_and_a_preset_are_read_by_the_same_reader(
    liger, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(BILLION)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for words in (("inspect", "--model", run), ("report", run), ("compare", run, run)):
        done = liger(*words)
        assert done.code == 2, done.err
        assert f"{run / 'config.yaml'}:1" in done.err
    monkeypatch.setattr("liger_cli.training.model.presets.configs_directory", lambda: tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.yaml").write_text(BILLION)
    done = liger("inspect", "--model", "mine")
    assert done.code == 2
    assert "mine.yaml:1" in done.err


def test_case_234_what_is_written_has_no_aliases(tmp_path):
    shared = ["a"]
    path = tmp_path / "out.yaml"
    path.write_text(to_yaml({"x": shared, "y": shared}))
    assert read_mapping(path) == {"x": shared, "y": shared}


def test_case_238_a_file_of_json_is_regular_and_bounded(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="no regular file"):
        read_json(pipe)
    large = tmp_path / "large.json"
    large.write_text("[" + "1," * 100 + "1]")
    assert len(read_json(large)) == 101
    monkeypatch.setattr("liger_cli.common.readers.MAX_BYTES", 50)
    from liger_cli.common.readers import read_file_bytes

    with pytest.raises(OSError, match="more than 50 bytes"):
        read_file_bytes(large, max_bytes=50)
    with pytest.raises(OSError, match="directory"):
        read_json(tmp_path)
