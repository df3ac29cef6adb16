"""Several evaluation sets with names: how they are written, what is kept and shown of each."""

from __future__ import annotations

import json
import math
import sys

import pytest
from accelerate import tracking

from liger_cli.config import load_config
from liger_cli.config.eval_sets import metric_names, read_sets
from liger_cli.errors import ConfigError
from liger_cli.training.eval_result import EvalResult

FIGURES = ("loss", "perplexity", "token_accuracy", "entropy")


@pytest.fixture
def sets(tmp_path):
    """Two files of other words and lengths, as --eval-dataset takes them."""
    paths = {}
    for name, word, rows in (("short", "yes ", 9), ("long", "zebra ", 5)):
        paths[name] = tmp_path / f"{name}.jsonl"
        lines = [{"prompt": f"{i} ", "completion": word * (1 + i % 4)} for i in range(rows)]
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


@pytest.fixture
def named(sets):
    return ",".join(f"{name}={path}" for name, path in sets.items())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_flag_and_a_mapping_are_the_same(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: a\neval_dataset:\n  short: s.jsonl\n  long: ./l=1.jsonl\n")
    from_file = load_config(path)
    from_flag = load_config(None, {"model": "a", "eval_dataset": "short=s.jsonl, long=./l=1.jsonl"})
    assert from_file.eval_sets == from_flag.eval_sets
    assert from_file.eval_sets == {"short": "s.jsonl", "long": "./l=1.jsonl"}
    path.write_text(from_file.to_yaml())
    assert load_config(path) == from_file


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        (None, {}),
        ("d.jsonl", {"": "d.jsonl"}),
        ("d.jsonl:2,e.jsonl:1", {"": "d.jsonl:2,e.jsonl:1"}),
        ("./k=1.jsonl", {"": "./k=1.jsonl"}),
        ("a-b.c=d.jsonl", {"a-b.c": "d.jsonl"}),
    ],
)
def test_sets_of_a_text(text, sets):
    assert read_sets(text) == sets


@pytest.mark.parametrize("text", ["a=x,y", "a=x,a=y", "a=,b=y", "a=x,b=", "a="])
def test_every_set_has_a_name_of_its_own(text):
    with pytest.raises(ConfigError, match="--eval-dataset: eval_dataset should give every set"):
        load_config(None, {"model": "a", "eval_dataset": text})


@pytest.mark.parametrize(
    "value", ["{}", "{a: [x]}", "{a: null}", "{1: x}", "{'a b': x}", "{a: 'x,y'}"]
)
def test_a_mapping_that_is_none(value):
    with pytest.raises(ConfigError, match="eval_dataset should (map|name)"):
        load_config(None, {"model": "a"}, [f"eval_dataset={value}"])


ENTRIES = """
eval_dataset:
- {name: short, path: s.jsonl, columns: {prompt: question}}
- {name: long, path: l.jsonl, max_samples: 3}
"""


def test_entries_have_names_and_what_entries_of_dataset_have(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: a" + ENTRIES)
    config = load_config(path)
    assert config.eval_sets == {
        "short": [{"path": "s.jsonl", "columns": {"prompt": "question"}}],
        "long": [{"path": "l.jsonl", "max_samples": 3}],
    }
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_entries_without_names_are_one_set():
    value = ["a.jsonl", {"path": "b.jsonl", "split": "test"}]
    assert load_config(None, {"model": "a", "eval_dataset": value}).eval_sets == {
        "": [{"path": "a.jsonl"}, {"path": "b.jsonl", "split": "test"}]
    }


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[]", "should name a set"),
        ("[{name: a, path: x}, {path: y}]", "every entry a different name, or none a name"),
        ("[{name: a, path: x}, {name: a, path: y}]", "every entry a different name"),
        ("[{name: 'a b', path: x}]", "name should consist of letters, digits"),
        ("[{name: a, path: x, weight: 2}]", "'a'.: weight is a share among datasets"),
        ("[{name: a, path: x, colums: {}}]", "unknown key 'colums'; did you mean columns"),
        ("[{name: a}]", "a name, or a mapping with path"),
    ],
)
def test_entries_that_are_none(entries, message):
    with pytest.raises(ConfigError, match=f"eval_dataset.*{message}"):
        load_config(None, {"model": "a"}, [f"eval_dataset={entries}"])


def test_entries_are_read_by_their_own_columns(liger, sets, tmp_path):
    """Two files of other columns, which one mapping of all data cannot read."""
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"q": "hi ", "a": "yes yes"}\n{"q": "hi ", "a": "no"}\n')
    path = tmp_path / "run.yaml"
    entries = [
        {"name": "asked", "path": str(asked), "columns": {"prompt": "q", "completion": "a"}},
        {"name": "short", "path": str(sets["short"]), "max_samples": 3},
    ]
    path.write_text(json.dumps({"model": "qwen3", "eval_dataset": entries}))
    done = liger("eval", "-c", path, "--use-cpu", "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert list(report["eval_sets"]) == ["asked", "short"]
    assert report["data"]["rows"] == 5


def test_training_keeps_every_set_apart(train, run_dir, named):
    done = train("--eval-dataset", named, "--eval-steps", 2, "--json")
    assert done.code == 0, done.err
    report, rows = done.json(), lines(run_dir / "eval.jsonl")
    assert [row["step"] for row in rows] == [2, 3]
    prefixes = ("eval_", "eval_short_", "eval_long_")
    assert set(rows[0]) == {"step"} | {f"{p}{f}" for p in prefixes for f in (*FIGURES, "tokens")}
    # All sets together are one: each token counts alike.
    for row in rows:
        tokens = [row[f"eval_{name}_tokens"] for name in ("short", "long")]
        assert row["eval_tokens"] == sum(tokens)
        for figure in ("loss", "token_accuracy", "entropy"):
            parts = [row[f"eval_{name}_{figure}"] for name in ("short", "long")]
            mean = sum(n * part for n, part in zip(tokens, parts, strict=True)) / sum(tokens)
            assert row[f"eval_{figure}"] == pytest.approx(mean)
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
    assert report["eval"]["loss"] == rows[-1]["eval_loss"]
    assert list(report["eval_sets"]) == ["short", "long"]
    assert report["eval_sets"]["long"]["loss"] == rows[-1]["eval_long_loss"]
    for name in ("short", "long", "all sets"):
        assert f"eval 2/3  {name}  loss " in done.err
        assert f"\n{name} " in done.err.partition("\nevaluation ")[2]
    assert "20 rows" not in done.err
    assert "9 rows for evaluation of short; 5 rows for evaluation of long" in done.err


def test_trackers_get_every_set(train, named, monkeypatch):
    logged = []

    class Recorder:
        def __init__(self, **options): ...
        def start(self): ...
        def store_init_configuration(self, values): ...
        def finish(self): ...
        def log(self, values, step=None):
            logged.append((step, values))

    monkeypatch.setitem(sys.modules, "wandb", sys)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    assert train("--eval-dataset", named, "--report-to", "wandb").code == 0
    [values] = [values for step, values in logged if step == 3 and "eval/loss" in values]
    assert {f"eval/{prefix}{f}" for prefix in ("", "short_", "long_") for f in FIGURES} <= {*values}


def test_alone_each_set_is_as_by_itself(liger, sets, named):
    words = ("eval", "-m", "gemma2", "--use-cpu", "--json", "--per-device-eval-batch-size", 4)
    together = liger(*words, "--eval-dataset", named).json()
    for name, path in sets.items():
        alone = liger(*words, "--eval-dataset", path).json()
        assert "eval_sets" not in alone
        assert together["eval_sets"][name] == pytest.approx(alone["eval"], rel=1e-6)
    cut = liger(*words, "--eval-dataset", named, "--max-eval-samples", 2).json()
    assert cut["data"]["eval_rows"] == 4


def test_one_set_with_a_name_is_not_shown_twice(liger, sets):
    done = liger("eval", "-m", "qwen3", "--use-cpu", "--eval-dataset", f"short={sets['short']}")
    assert done.code == 0, done.err
    assert "\nshort " in done.out
    assert "all sets" not in done.out
    assert "short_loss" not in done.out


def test_a_missing_file_is_named(liger, sets):
    done = liger("eval", "-m", "qwen3", "--eval-dataset", f"a={sets['short']},b=nowhere.jsonl")
    assert done.code == 4
    assert "nowhere.jsonl" in done.err


def test_resume_keeps_the_sets_of_the_past(train, run_dir, named):
    words = ("--eval-dataset", named, "--eval-steps", 1, "--save-steps", 2)
    whole = train(*words, "--json").json()
    past = (run_dir / "eval.jsonl").read_text()
    (run_dir / "report.json").unlink()
    done = train(*words, "--resume", run_dir / "checkpoint-3", "--json")
    assert done.code == 0, done.err
    assert (run_dir / "eval.jsonl").read_text() == past
    assert done.json()["eval_sets"] == whole["eval_sets"]


def test_a_result_comes_back_from_its_names():
    part = EvalResult(2.0, math.inf, None, None, 3)
    result = EvalResult(1.0, math.e, 0.5, 0.25, 9, {"a": part, "a_loss": part})
    assert EvalResult.from_names(result.by_name()) == result
    unknown = {**result.by_name(), "loss": None, "perplexity": None}
    assert math.isnan(EvalResult.from_names(unknown).loss)


def test_metric_names():
    assert metric_names([]) == list(FIGURES)
    assert metric_names(["a"]) == [*FIGURES, *(f"a_{figure}" for figure in FIGURES)]
