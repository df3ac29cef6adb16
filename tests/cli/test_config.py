"""The configuration: sources and their order, errors with file and line, one flag for every key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from typer.testing import CliRunner

from liger_cli.config import ALIASES, RunConfig, config_flags, load_config
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
        ("model: a\nlearning_rat: 1\n", "run.yaml:2: unknown key 'learning_rat'; did you mean 'le"),
        (
            "model: a\nnum-train-epochs: 1\n",
            ":2: unknown key 'num-train-epochs'; did you mean 'num",
        ),
        ("model: a\n\nmax_steps: many\n", "run.yaml:3: max_steps should be a valid integer"),
        ("model: a\nbf16: 1\n", "run.yaml:2: bf16 should be a valid boolean"),
        ("model: a\nlearning_rate: .nan\n", "run.yaml:2: learning_rate should be a finite number"),
        ("model: a\nlearning_rate: -1\n", "learning_rate should be greater than or equal to 0"),
        ("model: a\nmax_steps: 0\n", "run.yaml:2: max_steps should be -1 or at least 1, got 0"),
        ("model: a\noptim: sgd\n", "run.yaml:2: optim should be 'adamw', got 'sgd'"),
        ("model: a\nseed: 1\nseed: 2\n", "run.yaml:3: 'seed' is set twice, first at "),
        ("model: a\nmodel_name_or_path: b\n", "run.yaml:2: 'model_name_or_path' is set twice"),
        ("model: a\n  seed: 1\n", "run.yaml:2: not valid YAML"),
        ("model: [a\n", "not valid YAML"),
        ("- model\n", "run.yaml:1: the configuration is no mapping"),
        ("", "run.yaml:1: the configuration is empty"),
        ("lora:\n  model: a\n", "run.yaml:1: unknown key 'lora'"),
        ("seed: 1\n", "model is missing: give --model"),
        ("model: a\nbf16: true\nfp16: true\n", "bf16 and fp16 exclude each other"),
        ("model: ''\n", "run.yaml:1: model should have at least 1 character, got ''"),
        ("model: a\noutput_dir: 5\n", "run.yaml:2: output_dir is not a valid path"),
        ("? [a, b]\n: 3\n", "run.yaml:1: a key must be a name, found a sequence"),
        ("model: \0\n", "run.yaml cannot be read: special characters are not allowed"),
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
