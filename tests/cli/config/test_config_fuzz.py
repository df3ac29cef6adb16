"""case 99: whatever stands in a configuration, the answer is a configuration or a message.

A message names the file and line, --set or flag, and the key; nothing ends in another exception.
The cases are drawn from seeds, so a failure repeats.
"""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest
import yaml

from liger_cli.config import ALIASES, RunConfig, load_config
from liger_cli.config.describe import allowed, choices
from liger_cli.errors import ConfigError

KEY_OF_EACH_TYPE = sorted({allowed(key): key for key in RunConfig.model_fields}.values())
KEYS = [*RunConfig.model_fields, *ALIASES]
CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "train").glob("*.yaml"))

SCALARS = [
    *("null", "~", "", "true", "no", "On", "0", "-1", "1", "7", "010", "0x1f", "1_000", "1:30"),
    *(
        "1e-4",
        "1e400",
        "-1e400",
        "5e-324",
        ".inf",
        "-.inf",
        ".nan",
        "NaN",
        "9" * 30,
        "-" + "9" * 5000,
    ),
    *("9" * 5000 + ".5", "0." + "0" * 400 + "1", "2024-01-01", "2024-99-99", "=", "<<", "*x", "&x"),
    *(
        "!!int x",
        "!!float x",
        "!!bool x",
        "!!binary '*'",
        "!!timestamp x",
        "!!python/name:os.system",
    ),
    *(
        "!!python/object/apply:os.getcwd []",
        "!x {}",
        "[]",
        "{}",
        "[[]]",
        "{a: {b: {c: 1}}}",
        "{1: 2}",
    ),
    *("{r: 8}", "[a, 1, null]", "&x [*x]", "&x {a: *x}", "{[a]: 1}", "{{a: 1}: 2}", "? x", "- 1"),
    *(
        "'",
        '"',
        "|",
        ">",
        "|2\n    x",
        "%TAG",
        "@a",
        "`a`",
        "a: b",
        "a #b",
        "#",
        "\t",
        "a\tb",
        "🦎",
    ),
    *(
        "größe",
        "日本語",
        "\u202etxt",
        "\ufeff",
        "\u2028",
        "\x85",
        '"\\0"',
        '"\\ud800"',
        '"\\x07"',
        "~/x",
    ),
    *(
        "cosine",
        "Cosine",
        "adamw",
        "auto",
        "auto,-rope",
        "rope,nothing",
        ",",
        "../../x",
        "x" * 5000,
    ),
]
NAMES = [
    *(
        "lora",
        "training",
        "lora_r",
        "learning_rat",
        "num-epochs",
        "Seed",
        "model.seed",
        "1",
        "null",
    ),
    *(
        "true",
        "<<",
        "größe",
        "🦎",
        "'a b'",
        "'\\'",
        '"a\\nb"',
        '"\\0"',
        "__class__",
        "model_config",
    ),
    *(
        "model_fields",
        "to_yaml",
        "? [a]",
        "? {a: 1}",
        "&x y",
        "!!str z",
        "x" * 3000,
        "''",
        "-",
        "*x",
    ),
]


def check(path: Path | None, sets: list[str] = (), flags: dict[str, Any] | None = None) -> str:
    """The message, empty where there is a configuration, which then repeats itself."""
    try:
        config = load_config(path, flags, sets)
    except ConfigError as error:
        lines = error.message.split("\n")
        for line in lines:
            assert line.isprintable(), repr(line)
            assert len(line) < 600 + len(str(path)), "a value stands in the message at full length"
            named = (
                "--",
                f"{path}:",
                f"the configuration {path}",
                "model is missing: give --model",
            )
            assert line.startswith(named), line
        return error.message
    assert yaml.safe_load(config.to_yaml()) == config.model_dump(mode="json")
    return ""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.yaml"


# Keys that are read with others alone.
READ_WITH = {
    "f_alpha_divergence_coef": {"objective": "dpo", "f_divergence_type": "alpha_divergence"},
    "ref_model_mixup_alpha": {"objective": "dpo", "sync_ref_model": True},
}


@pytest.mark.parametrize("key", KEY_OF_EACH_TYPE)
def test_each_type_of_key_with_every_kind_of_value(path, key):
    base = {} if key == "model" else {"model": "a", **READ_WITH.get(key, {})}
    messages = []
    for value in (*SCALARS, *choices(key)):
        path.write_text(f"{key}: {value}\n", encoding="utf-8")
        messages.append(check(path, flags=base))
        check(None, [f"{key}={value}"], base)
    # Neither everything nor nothing is allowed, and what is wrong with a value names its key.
    assert "" in messages
    invalid = [message for message in messages if message and "not valid YAML" not in message]
    assert len(invalid) > len(SCALARS) / 8
    assert all(key in message or "op" in message for message in invalid)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_unknown_key(path, name):
    for value in ("1", "{r: 8}", "[a]", "null", "{model: {seed: {a: 1}}}"):
        path.write_text(f"model: a\nseed: 1\n{name}: {value}\n", encoding="utf-8")
        message = check(path)
        assert message.startswith(f"{path}:3:"), message
        assert check(None, [f"{name}={value}"], {"model": "a"}).startswith("--set ")


@pytest.mark.parametrize("seed", range(8))
def test_a_planted_mistake_is_named_with_its_line(path, seed):
    """Correct lines in any order and one wrong one among them: exactly that one is named."""
    draw = random.Random(seed)
    for _ in range(30):
        lines = ["model: a", "seed: 3", "bf16: true", "learning_rate: 1e-4", "# note", ""]
        lines += ["logging_steps: 7", "dataset: 'größe'", "output_dir: ~/x", "ops: auto,-rope"]
        draw.shuffle(lines)
        key = draw.choice(["gradient_checkpointing", "save_steps", "weight_decay", "eval_dataset"])
        wrong, words = draw.choice(
            [
                (f"{key}: {{a: [1, {{b: 2}}]}}", key),
                (f"{key}: [1]", key),
                (f"{key}{draw.choice(string.ascii_lowercase)}: 1", "did you mean"),
                (f"{key.upper()}: 1", f"did you mean '{key}'?"),
                (f"section: {{{key}: 1}}", f"write {key} at the left margin"),
                (f"{key}: !!int 3", "tags"),
                (f"{key}: 'x", "YAML"),
                (f"{key} 3", "YAML"),
                (f"\t{key}: 3", "tab"),
                ("max_length: 8\nmax_length: 9", "'max_length' is set twice"),
            ]
        )
        at = draw.randrange(len(lines))
        text = "\n".join([*lines[:at], wrong, *lines[at:]])
        path.write_text(text, encoding="utf-8", newline=draw.choice(["\n", "\r\n"]))
        message = check(path)
        assert words in message, (text, message)
        assert "\n" not in message, (text, message)
        if words not in ("YAML", "'max_length' is set twice"):
            # Where a quote or a colon is missing, YAML notices it on a later line.
            assert message.startswith(f"{path}:{at + 1}:"), (text, message)


@pytest.mark.parametrize("seed", range(6))
def test_damaged_files(path, seed):
    """Shipped files with characters lost, doubled, moved and replaced, and lines torn apart."""
    draw = random.Random(seed)
    sources = [source.read_text(encoding="utf-8") for source in CONFIGS]
    alphabet = " \t\n:#-[]{}!&*|>'\"%@`,?0aé🦎\x00\x07\ufeff\u2028"
    for _ in range(60):
        text = draw.choice(sources)
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(text))
            end = at + draw.choice([0, 0, 1, 1, 2, 9])
            text = text[:at] + draw.choice(alphabet) * draw.choice([0, 1, 1, 2]) + text[end:]
        path.write_text(text, encoding="utf-8", newline="")
        check(path)


def nested(draw: random.Random, depth: int) -> Any:
    if depth == 0 or draw.random() < 0.3:
        numbers = [0, -1, 2**70, 1e308, float("nan"), float("inf"), 0.1]
        return draw.choice([None, True, "text", "", *KEYS, *numbers])
    values = [nested(draw, depth - 1) for _ in range(draw.randint(0, 4))]
    if draw.random() < 0.5:
        return values
    return {draw.choice([*KEYS, "lora", "", 1, None, 0.5, True]): value for value in values}


@pytest.mark.parametrize("seed", range(4))
def test_random_nestings(path, seed):
    draw = random.Random(seed)
    for _ in range(40):
        value = nested(draw, draw.randint(0, 5))
        path.write_text(yaml.safe_dump(value, default_flow_style=draw.choice([True, False, None])))
        check(path)


@pytest.mark.parametrize("seed", range(4))
def test_junk_bytes(path, seed):
    draw = random.Random(seed)
    for _ in range(60):
        junk = bytes(draw.choices(range(draw.choice([128, 256])), k=draw.randint(0, 200)))
        path.write_bytes(draw.choice([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"model: a\n"]) + junk)
        check(path)
        check(None, [junk.decode("utf-8", "surrogateescape")])


_NINE_OF_EACH = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMBS = {
    "aliases": f"a: &a [x]\n{_NINE_OF_EACH}model: *i\n",
    "lists": "model: " + "[" * 20_000,
    "mappings": "model: " + "{a: " * 20_000,
    "blocks": "\n".join(" " * i + "a:" for i in range(500)),
    "dashes": "model:\n  " + "- " * 50_000,
    "line": "model: " + "x" * 200_000,
    "keys": "".join(f"key{i}: {i}\n" for i in range(1_000)),
    "anchors": "model: " + "&a " * 1000,
    "quotes": '"' * 50_001,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_files_made_to_hurt(path, text):
    path.write_text(text)
    message = check(path)
    assert message or text.startswith("model: xxx")


@pytest.mark.parametrize("command", ["train", "eval", "bench", "config show", "config validate"])
def test_the_program_answers_with_exit_code_2(liger, path, command):
    path.parent.mkdir(exist_ok=True)
    words = command.split() + ([] if command == "config validate" else ["-c"])
    for content in (
        b"",
        b"\x80\x81",
        b"- a",
        b"model: [",
        b"model: a\nseed: {b: \xf0\x9f\xa6\x8e}",
    ):
        path.write_bytes(content)
        done = liger(*words, path)
        assert done.code == 2, done.err
        assert done.err.startswith("error: ")
        assert str(path) in done.err
        assert "Traceback" not in done.err
    assert list(path.parent.iterdir()) == [path]
