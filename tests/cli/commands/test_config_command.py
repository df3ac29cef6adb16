"""liger config: files to start from, the check of files, values with their sources, the schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from liger_cli.commands.config.templates import template_names
from liger_cli.config import ALIASES, RunConfig, load_config

CONFIGS = Path(__file__).parents[3] / "configs" / "train"


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_init_writes_sft_by_default(liger):
    done = liger("config", "init")
    assert done.code == 0
    assert done.out == "wrote train.yaml (template sft); run it: liger train -c train.yaml\n"
    assert Path("train.yaml").read_bytes() == (CONFIGS / "sft.yaml").read_bytes()


@pytest.mark.parametrize("name", template_names())
def test_init_writes_each_template(liger, name):
    done = liger("config", "init", "mine.yaml", "--template", name)
    assert done.code == 0
    assert "liger eval -c" in done.out if name == "eval" else "liger train -c" in done.out
    text = Path("mine.yaml").read_text()
    assert text.startswith("# ")
    assert text == (CONFIGS / f"{name}.yaml").read_text()
    assert liger("config", "validate", "mine.yaml").code == 0


def test_init_overwrites_only_by_force(liger):
    Path("train.yaml").write_text("mine")
    done = liger("config", "init")
    assert done.code == 2
    assert done.err == "error: train.yaml exists\n--force overwrites it.\n"
    assert Path("train.yaml").read_text() == "mine"
    assert liger("config", "init", "--force").code == 0
    assert load_config(Path("train.yaml")).model == "llama"


def test_init_names_the_nearest_template(liger):
    done = liger("config", "init", "--template", "pretrian")
    assert done.code == 2
    assert "unknown template 'pretrian'; did you mean 'pretrain'? (classify, cpo, ddp, " in done.err
    assert not Path("train.yaml").exists()


def test_show_is_a_file_that_loads(liger):
    done = liger("config", "show", "--model", "qwen3", "--set", "seed=4", "--learning-rate", 3e-5)
    assert done.code == 0
    Path("shown.yaml").write_text(done.out)
    assert load_config(Path("shown.yaml")) == load_config(
        None, {"model": "qwen3", "seed": 4, "learning_rate": 3e-5}
    )


def test_show_sources(liger):
    Path("run.yaml").write_text("model: a\n\nseed: 1\nbf16: true\nlearning_rate: 1e-4\n")
    words = ("config", "show", "-c", "run.yaml", "--set", "seed=2", "--no-bf16", "--max_steps", 3)
    done = liger(*words, "--sources")
    assert done.code == 0
    comments = dict(line.split(":", 1) for line in done.out.splitlines())
    comments = {key: text.split("# ")[1] for key, text in comments.items()}
    assert list(comments) == list(RunConfig.model_fields)
    given = {key: text for key, text in comments.items() if text != "default"}
    assert given == {
        "model": "run.yaml:1",
        "learning_rate": "run.yaml:5",
        "max_steps": "--max-steps",
        "seed": "--set seed=2 (over run.yaml:3)",
        "bf16": "--no-bf16 (over run.yaml:4)",
    }
    assert yaml.safe_load(done.out)["seed"] == 2
    done = liger(*words, "--json")
    keys = done.json()["keys"]
    assert keys["bf16"] == {"value": False, "source": "--no-bf16", "overridden": ["run.yaml:4"]}
    assert keys["weight_decay"] == {"value": 0.0, "source": "default", "overridden": []}


def test_show_refuses_what_train_refuses(liger):
    done = liger("config", "show", "--set", "sed=3")
    assert done.code == 2
    assert done.err == (
        "error: --set sed=3: unknown key 'sed'; did you mean 'seed'?\n"
        "`liger config show` lists every key.\n"
    )


def test_case_99_unknown_keys_are_ignored_with_a_warning(liger):
    Path("run.yaml").write_text("model: a\nlearning_rat: 1\nseed: 3\n")
    done = liger("config", "show", "-c", "run.yaml", "--ignore-unknown-keys")
    assert done.code == 0
    assert done.err == (
        "warning: run.yaml:2:1: unknown key 'learning_rat'; did you mean 'learning_rate'?; "
        "it is ignored\n"
    )
    assert yaml.safe_load(done.out)["seed"] == 3


def test_case_99_validate_names_every_problem(liger):
    Path("good.yaml").write_text("model: a\n")
    Path("flags.yaml").write_text("seed: 3\n")
    Path("bad.yaml").write_text("model: a\nsed: 1\nbf16: 1\n")
    Path("worse.yaml").write_text("model: [a\n")
    files = ("good.yaml", "bad.yaml", "worse.yaml", "flags.yaml", "nowhere.yaml")
    done = liger("config", "validate", *files)
    assert done.code == 2
    assert done.out == "good.yaml: ok\nflags.yaml: ok\n"
    assert done.err.splitlines() == [
        "error: bad.yaml:2:1: unknown key 'sed'; did you mean 'seed'?",
        "bad.yaml:3:7: bf16 should be a valid boolean, got 1; allowed: true or false",
        "worse.yaml:2:1: not valid YAML: expected ',' or ']', but got '<stream end>'",
        "the configuration nowhere.yaml cannot be read: No such file or directory",
    ]
    done = liger("config", "validate", *files, "--json")
    assert done.code == 2
    problems = done.json()["problems"]
    assert list(problems) == list(files)
    assert [len(problems[file]) for file in files] == [0, 2, 1, 0, 1]


def test_schema_accepts_the_shipped_files(liger):
    done = liger("config", "schema")
    assert done.code == 0
    schema = json.loads(done.out)
    assert set(schema["properties"]) == {*RunConfig.model_fields, *ALIASES}
    for path in CONFIGS.glob("*.yaml"):
        assert yaml.safe_load(path.read_text()).keys() <= schema["properties"].keys()


# Those of other objectives want other rows, and run in the tests of these.
NEXT_TOKEN = [
    name for name in template_names() if load_config(CONFIGS / f"{name}.yaml").objective == "sft"
]


@pytest.mark.parametrize("name", NEXT_TOKEN)
def test_shipped_configuration_runs(liger, data, name):
    """With a tiny model and a few rows; the other keys are the file's, but for those of a GPU."""
    command = "eval" if name == "eval" else "train"
    words = ("-m", "qwen3", "-d", data, "--use-cpu", "--max-steps", 2, "-o", "run")
    if name.startswith("qlora"):
        # What takes real weights and a GPU is left out.
        words += ("--no-load-in-4bit", "--optim", "adamw_torch_fused")
    done = liger(command, "-c", CONFIGS / f"{name}.yaml", *words, "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert report["eval"]["tokens"] > 0 if command == "eval" else report["train"]["steps"] == 2
    assert report["config"]["ops"] == load_config(CONFIGS / f"{name}.yaml").ops


def test_saved_configuration_repeats_the_run(train, liger, run_dir):
    """config.yaml is enough: seeds, order, optimizer and lengths all come from it."""
    words = ("--max-steps", 2, "--seed", 7, "--data-seed", 8, "--learning-rate", 1e-3)
    assert train(*words, "--weight-decay", 0.1, "--set", "adam_beta2=0.95").code == 0
    done = liger("train", "-c", run_dir / "config.yaml", "--output-dir", "again")
    assert done.code == 0, done.err
    first, again = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_dir, Path("again"))
    )
    assert len(first) == 2
    for key in ("loss", "grad_norm", "learning_rate", "tokens", "trained_tokens"):
        assert [row[key] for row in again] == [row[key] for row in first], key
    saved = [load_config(folder / "config.yaml") for folder in (run_dir, Path("again"))]
    assert saved[1] == saved[0].model_copy(update={"output_dir": Path("again")})
    assert saved[0].model_fields_set == RunConfig.model_fields.keys()
