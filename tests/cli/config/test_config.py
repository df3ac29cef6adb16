"""The configuration: sources and their order, errors with file and line, one flag for every key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from typer.testing import CliRunner

from liger_cli.config import ALIASES, RunConfig, config_flags, load_config, resolve_config
from liger_cli.config.describe import json_schema, nearest_key
from liger_cli.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_later_sources_win(tmp_path):
    path = write(tmp_path, "model: a\nmax_steps: 1\nlearning_rate: 1e-3\nseed: 1\n")
    config = load_config(path, {"seed": 3, "bf16": None}, ["max_steps=2", "seed=2"])
    assert (config.model, config.learning_rate) == ("a", 1e-3)
    assert (config.max_steps, config.seed) == (2, 3)
    assert config.weight_decay == 0.0
    assert config.model_fields_set == {"model", "max_steps", "learning_rate", "seed"}


def test_trainer_names_are_aliases(tmp_path):
    path = write(tmp_path, "model_name_or_path: a\ndataset_name: b.jsonl\n")
    config = load_config(path)
    assert (config.model, config.dataset) == ("a", "b.jsonl")


def test_saved_configuration_loads_again(tmp_path):
    config = load_config(
        None,
        {"model": "a", "adam_epsilon": 1e-8, "learning_rate": 3e-5, "output_dir": Path("runs/x")},
        ["ops=[rope, flce]", "save_total_limit=2"],
    )
    assert config.ops == "rope,flce"
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: a\nlearning_rat: 1\n",
            "run.yaml:2:1: unknown key 'learning_rat'; did you mean 'le",
        ),
        (
            "model: a\nnum-train-epochs: 1\n",
            ":2:1: unknown key 'num-train-epochs'; did you mean 'num",
        ),
        ("model: a\n\nmax_steps: many\n", "run.yaml:3:12: max_steps should be a valid integer"),
        (
            "model: a\nbf16: 1\n",
            "run.yaml:2:7: bf16 should be a valid boolean, got 1; allowed: true or false",
        ),
        (
            "model: a\nlearning_rate: .nan\n",
            "run.yaml:2:16: learning_rate should be a finite number",
        ),
        ("model: a\nlearning_rate: -1\n", "learning_rate should be greater than or equal to 0"),
        ("model: a\nmax_steps: 0\n", "run.yaml:2:12: max_steps should be -1 or at least 1, got 0"),
        ("model: a\noptim: sdg\n", "run.yaml:2:8: optim should be 'adamw_torch', "),
        ("model: a\nseed: 1\nseed: 2\n", "run.yaml:3:1: 'seed' is set twice, first at "),
        ("model: a\nmodel_name_or_path: b\n", "run.yaml:2:1: 'model_name_or_path' is set twice"),
        ("model: a\n  seed: 1\n", "run.yaml:2:7: not valid YAML: there is a second ':'"),
        ("model: [a\n", "not valid YAML"),
        ("- model\n", "run.yaml:1:1: the configuration is no mapping"),
        ("", "run.yaml:1:1: the configuration is empty"),
        (
            "lora:\n  model: a\n",
            "run.yaml:1:1: unknown key 'lora'; a configuration has no sections: write model at",
        ),
        ("seed: 1\n", "model is missing: give --model"),
        ("model: a\nbf16: true\nfp16: true\n", "bf16 and fp16 exclude each other"),
        ("model: ''\n", "run.yaml:1:8: model should have at least 1 character, got ''"),
        ("model: a\noutput_dir: 5\n", "run.yaml:2:13: output_dir is not a valid path"),
        ("? [a, b]\n: 3\n", "run.yaml:1:3: a key must be a name, found a sequence"),
        ("model: \0\n", "run.yaml:1:8: not valid YAML: the character '\\x00' is not allowed"),
        (
            "model: a\nops: rope,rmsnrm\n",
            "run.yaml:2:6: unknown op 'rmsnrm'; did you mean 'rmsnorm'?",
        ),
        ("model: a\nops: [ce, flce]\n", "run.yaml:2:6: ops asks for cross_entropy and"),
        ("model: a\n\tseed: 1\n", "run.yaml:2:1: not valid YAML: there is a tab"),
        ("model: a\n seed: 1\n", "run.yaml:2:6: not valid YAML: there is a second ':'"),
        ("  model: a\nseed: 1\n", "run.yaml:2:1: not valid YAML: "),
        ("model: a\n---\nmodel: b\n", "run.yaml:2:1: not valid YAML: '---' starts a second"),
        ("model: a\nseed\n", "run.yaml:3:1: not valid YAML: a key without ': VALUE'"),
        ("model: !!str 5\n", "run.yaml:1:8: not valid YAML: tags such as 'tag:yaml.org,2002:str'"),
        ("model: a\n<<: {seed: 1}\n", "run.yaml:2:1: unknown key '<<'"),
        ("model: a\nseed: 010\n", "run.yaml:2:7: seed should be a valid integer, got '010'"),
        ("model: a\nseed:\n", "seed should be a valid integer, got null; allowed: integer >= 0, <"),
        ("model: a\nmax_length: 1_000_000_000_000\n", "max_length should be at most 2147483647"),
        ("model: a\nlr_scheduler_type: Cosin\n", "got 'Cosin'; did you mean 'cosine'?"),
        ("model: a\nmodel.seed: 1\n", "unknown key 'model.seed'; did you mean 'seed'?"),
        ("model: a\nmicro_batch_size: 1\n", "did you mean 'per_device_train_batch_size'?"),
        (
            "training: {sed: 1, lr: 2}\n",
            "no sections: write seed, learning_rate at the left margin",
        ),
        ('model: "a\\tb"\n', "model should have no control characters"),
        ('model: "\\ud800"\n', "run.yaml:1:8: model should be a valid string, unable to"),
        (
            'model: a\noutput_dir: "\\ud800"\n',
            "no control characters and be valid Unicode, got '\\ud800'",
        ),
        ("model: {a: {b: {c: {d: 1}}}}\n", "run.yaml:1:8: model should be a valid string, got {'a"),
        (
            "model: a\nwarmup_steps: 2\nwarmup_ratio: 0.1\n",
            "run.yaml:3:15: warmup_steps and warmup_ratio exclude each other",
        ),
    ],
)
def test_case_99_bad_file(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert message in caught.value.message


def test_case_99_all_problems_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "modell: a\nseeds: 1\n"), {}, ["ops_=x"])
    lines = caught.value.message.splitlines()
    assert len(lines) == 3
    assert "--set ops_=x: unknown key 'ops_'; did you mean 'ops'?" in lines


@pytest.mark.parametrize("text", ["seed", "seed=[1", "sed=1", "seed=x"])
def test_case_99_bad_set(text):
    with pytest.raises(ConfigError, match=r"--set"):
        load_config(None, {"model": "a"}, [text])


def test_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read: No such file"):
        load_config(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: a\n# é\n".encode("latin-1"), "run.yaml:2: the configuration is not UTF-8 text"),
        ("model: a\n".encode("utf-16"), "run.yaml:1: the configuration is not UTF-8 text"),
        (b"model: a\n" + b"# \n" * 90_000, "cannot be read: it has more than 256 kB"),
        (b"[" * 100_000, "run.yaml:1:1: nested too deep"),
    ],
    ids=["latin-1", "utf-16", "large", "deep"],
)
def test_case_99_not_a_configuration(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in caught.value.message


def test_a_device_without_end_is_refused():
    with pytest.raises(ConfigError, match="/dev/zero cannot be read: it has more than"):
        load_config(Path("/dev/zero"))


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfmodel: a\r\nseed: 3\r\n", b"model: a\rseed: 3", b"{model: a, seed: 3}"],
    ids=["bom-crlf", "cr", "flow"],
)
def test_files_of_other_editors(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    config = load_config(path)
    assert (config.model, config.seed) == ("a", 3)
    path.write_bytes(content.replace(b"seed", b"sed"))
    with pytest.raises(ConfigError, match=r"run\.yaml:\d:\d+: unknown key 'sed'"):
        load_config(path)


@pytest.mark.parametrize(
    "text", ["1e-4", "1e5", "010", "1:30", "no", "~x", "2024-01-01", "a: b", "# c", "[a]", "Größe"]
)
def test_text_stays_text_in_the_saved_configuration(tmp_path, text):
    config = load_config(None, {"model": text, "dataset": text, "output_dir": Path(text)})
    saved = config.to_yaml()
    assert load_config(write(tmp_path, saved)) == config
    # Other readers find the same.
    assert yaml.safe_load(saved) == config.model_dump(mode="json")


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    sets = ["output_dir=~/runs", "dataset=~/a.jsonl", "model=~somebody-else/m"]
    config = load_config(None, {}, sets)
    assert config.output_dir == Path("/home/somebody/runs")
    assert config.dataset == "/home/somebody/a.jsonl"
    assert config.model == "~somebody-else/m"


def test_case_99_every_kind_of_problem_at_once_and_in_order(tmp_path):
    """Unknown keys, wrong values and conflicts do not hide one another."""
    text = "bf16: true\nseed: x\nfp16: true\nmodell: a\nops: ropes\nseed: 3\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), {"max_length": 0}, ["data_seed=-1", "x"])
    found = caught.value.message.replace(f"{tmp_path}/", "").splitlines()
    assert [line.split(": ")[0] for line in found] == [
        "run.yaml:2:7",
        "run.yaml:1:7, run.yaml:3:7",
        "run.yaml:4:1",
        "run.yaml:5:6",
        "run.yaml:6:1",
        "--set x",
        "--max-length",
    ]
    assert caught.value.hint == "`liger config show` lists every key."


def test_case_99_an_invalid_value_is_no_conflict(tmp_path):
    """streaming needs max_steps; one of the wrong type is there all the same."""
    path = write(tmp_path, "model: a\nstreaming: true\nmax_steps: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.message.startswith(f"{path}:3:12: max_steps should be a valid integer")
    assert "\n" not in caught.value.message
    with pytest.raises(ConfigError, match=r"run\.yaml:2:12: streaming needs max_steps"):
        load_config(write(tmp_path, "model: a\nstreaming: true\n"))


def test_case_99_unknown_keys_are_ignored_on_demand(tmp_path):
    warnings = []
    path = write(tmp_path, "model: a\nlearning_rat: 1\nlora: {r: 8}\nseed: 3\n")
    config = load_config(path, sets=["nothing=1"], warn_unknown=warnings.append)
    assert (config.seed, config.learning_rate) == (3, 5e-5)
    assert [warning.split(": ")[1] for warning in warnings] == [
        "unknown key 'learning_rat'; did you mean 'learning_rate'?",
        "unknown key 'lora'; a configuration has no sections",
        "unknown key 'nothing'",
    ]
    with pytest.raises(ConfigError, match="seed should be"):
        load_config(path, {"seed": -1}, warn_unknown=warnings.append)


def test_sources_of_every_key(tmp_path):
    path = write(tmp_path, "max_steps: 1\nseed: 1\nbf16: true\n")
    resolved = resolve_config(path, {"seed": 3, "bf16": False}, ["max_steps=2", "seed=2"])
    assert list(resolved.values) == list(RunConfig.model_fields)
    assert resolved.values["model"] is None
    assert resolved.source("model") == "not set: give --model"
    assert resolved.source("weight_decay") == "default"
    keys = resolved.describe()
    assert keys["max_steps"] == {
        "value": 2,
        "source": "--set max_steps=2",
        "overridden": [f"{path}:1"],
    }
    assert keys["bf16"] == {"value": False, "source": "--no-bf16", "overridden": [f"{path}:3"]}
    assert keys["seed"]["overridden"] == ["--set seed=2", f"{path}:2"]
    commented = resolved.to_yaml(with_sources=True)
    assert f"# --seed (over --set seed=2, {path}:2)\n" in commented
    assert yaml.safe_load(commented) == yaml.safe_load(resolved.to_yaml())


def test_schema_says_what_the_loader_checks():
    schema = json_schema()
    assert set(schema["properties"]) == {*RunConfig.model_fields, *ALIASES}
    assert schema["additionalProperties"] is False
    for name, entry in schema["properties"].items():
        assert entry["description"], name
    assert schema["properties"]["max_length"] == {
        "default": 1024,
        "description": RunConfig.model_fields["max_length"].description,
        "minimum": 2,
        "type": "integer",
    }
    assert schema["properties"]["packing_strategy"]["enum"] == ["bfd", "sequential"]
    assert {"type": "array", "items": {"type": "string"}} in schema["properties"]["ops"]["anyOf"]


def test_keys_of_other_programs_lead_to_ours():
    for name in ("base_model", "cutoff_len", "lr", "epochs", "Num-Train-Epochs", "training.seed"):
        assert nearest_key(name) in {*RunConfig.model_fields}, name
    assert nearest_key("entirely_different_thing") is None
    assert nearest_key("") is None


def test_every_key_has_group_description_and_documented_type():
    for name, field in RunConfig.model_fields.items():
        assert field.description, name
        assert field.json_schema_extra["group"], name
    assert set(ALIASES.values()) <= set(RunConfig.model_fields)


@pytest.fixture
def app():
    seen = []

    @config_flags
    def command(
        config: RunConfig,
        as_json: Annotated[bool, typer.Option("--json", help="One document.")] = False,
    ) -> None:
        """Do it."""
        seen.append((config, as_json))

    folded = {"token_normalize_func": lambda token: token.replace("_", "-")}
    app = typer.Typer(context_settings=folded)
    app.command()(command)
    return app, seen


def test_flags_of_every_key_in_both_spellings(app, tmp_path):
    app, seen = app
    path = write(tmp_path, "model: a\nbf16: true\n")
    words = ["-c", path, "--per_device_train_batch_size", "2", "--learning-rate", "1e-4"]
    words += ["--no-bf16", "--gradient-checkpointing", "--set", "seed=5", "--seed", "6", "--json"]
    words += ["--lr-scheduler-type", "cosine", "--dataset-name", "d.jsonl", "-o", "out"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    [(config, as_json)] = seen
    assert as_json
    assert yaml.safe_load(config.to_yaml()) | {
        "model": "a",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "bf16": False,
        "gradient_checkpointing": True,
        "seed": 6,
        "lr_scheduler_type": "cosine",
        "dataset": "d.jsonl",
        "output_dir": "out",
    } == yaml.safe_load(config.to_yaml())


def test_help_lists_every_key_in_groups(app):
    output = CliRunner().invoke(app[0], ["--help"], env={"COLUMNS": "80"}).output
    # No name is cut short, in the width that a terminal has at least.
    for name, field in RunConfig.model_fields.items():
        assert "--" + name.replace("_", "-") in output
        assert field.json_schema_extra["group"] in output


def test_case_99_unknown_flag_names_the_nearest(app):
    result = CliRunner().invoke(app[0], ["--model", "a", "--learning-rte", "1"])
    assert result.exit_code == 2
    assert "--learning-rate" in result.output
    assert not app[1]
