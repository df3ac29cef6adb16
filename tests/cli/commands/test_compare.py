"""liger compare: what is read of finished and unfinished runs, and what is said of them."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

CONFIG = {"model": "qwen3", "ops": "auto", "learning_rate": 1e-3, "bf16": False}
EVAL = {"loss": 2.0, "perplexity": 7.4, "token_accuracy": 0.5, "entropy": 1.0, "tokens": 10}


def metrics(step, loss):
    return {
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": None,
        "tokens": 100,
        "trained_tokens": 90,
        "step_ms": 10.0 * step,
        "tokens_per_s": 1000.0 * step,
        "peak_memory_bytes": 2_000_000_000,
    }


def report(config, **parts):
    train = {
        "steps": 3,
        "tokens": 300,
        "trained_tokens": 270,
        "first_loss": 3.0,
        "final_loss": 1.0,
        "tokens_per_s": 5000.0,
        "step_ms": 20.0,
        "peak_memory_bytes": 1_000_000_000,
    }
    values = {"schema_version": 1, "command": "train", "config": config, "train": train, **parts}
    return json.dumps(values)


@pytest.fixture
def make_run(tmp_path):
    """Writes the directory of a run: losses from step 1 on, other settings, parts of a report."""

    def make(name, losses, *, evals=(), settings=None, finished=True, **parts):
        run, config = tmp_path / name, CONFIG | {"output_dir": name} | (settings or {})
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        rows = [metrics(step, loss) for step, loss in enumerate(losses, start=1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [
            {"step": step, **{f"eval_{k}": v for k, v in found.items()}} for step, found in evals
        ]
        if rows:
            (run / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            (run / "report.json").write_text(report(config, **parts))
        return run

    return make


def compare(liger, *words):
    done = liger("compare", *words, "--json")
    assert done.code == 0, done.err
    return done.json()


def test_losses_are_compared_at_the_steps_that_both_have(liger, make_run):
    base = make_run("base", [3.0, 2.0, 1.0])
    other = make_run("other", [3.0, 2.5, 0.0, 9.0])
    found = compare(liger, base, other, base)
    assert found["loss_differences"] == [
        {"run": str(other), "steps": 3, "max": 1.0, "max_step": 3, "mean": 0.5, "first_step": 2},
        {"run": str(base), "steps": 3, "max": 0.0, "max_step": 1, "mean": 0.0, "first_step": None},
    ]
    done = liger("compare", base, other)
    assert done.out.splitlines()[-1] == (
        "other against base: 1.00x speed; 1.00x memory; losses first differ at step 2; "
        "over 3 common steps by 0.5 on average and 1 at most, at step 3"
    )
    done = liger("compare", base, base)
    assert "losses equal to the bit at all 3 common steps" in done.out


def test_the_smallest_difference_is_one(liger, make_run):
    runs = make_run("a", [0.1 + 0.2]), make_run("b", [0.3])
    [difference] = compare(liger, *runs)["loss_differences"]
    assert difference["first_step"] == 1


def test_no_step_in_common(liger, make_run):
    runs = make_run("a", [1.0]), make_run("b", [], finished=False)
    found = compare(liger, *runs)
    assert found["loss_differences"][0] == {
        "run": "b",
        "steps": 0,
        **dict.fromkeys(("max", "max_step", "mean", "first_step")),
    }
    assert "b against a: no step in common" in liger("compare", *runs).out


def test_finished_runs_are_what_their_reports_say(liger, make_run):
    coverage = {"rope": {"patched": 2, "candidates": 2}}
    sets = {"short": EVAL, "long": EVAL | {"loss": 4.0, "token_accuracy": None}}
    cards = {"devices": [{"type": "cuda", "name": "H100", "memory_bytes": 1, "count": 1}]}
    best = {"step": 2, "metric": "short_loss", "value": 1.5, "checkpoint": None}
    stop = {"step": 3, "evaluations": 2}
    parts = {"coverage": coverage, "environment": cards, "eval": EVAL, "eval_sets": sets}
    one = make_run("one", [3.0, 2.0, 1.0], **parts, best=best, stop=stop)
    two = make_run("two", [3.0, 2.0, 1.0], eval=EVAL)
    found = compare(liger, one, two)
    assert [run["name"] for run in found["runs"]] == ["one", "two"]
    assert found["runs"][0]["train"]["tokens_per_s"] == 5000.0
    assert found["runs"][0]["eval_sets"] == sets
    assert found["runs"][1]["coverage"] is None
    table = {
        line[:28].strip(): line[28:].split() for line in liger("compare", one, two).out.splitlines()
    }
    assert table["eval short loss"] == ["2.0000", "-"]
    assert table["eval long loss"] == ["4.0000", "-"]
    assert table["eval loss"] == ["-", "2.0000"]
    assert table["rope"] == ["2/2", "-"]
    assert table["tokens/s"] == ["5", "000", "5", "000"]
    assert table["peak memory"] == ["1.0", "GB", "1.0", "GB"]
    assert table["step ms"] == ["20.0", "20.0"]
    assert table["best short_loss"] == ["1.5000", "after", "step", "2", "-"]
    assert table["device"] == ["H100", "-"]
    assert table["state"] == ["stopped", "early,", "3", "steps", "finished,", "3", "steps"]


def test_unfinished_runs_are_what_they_have_logged(liger, make_run):
    evals = [(2, EVAL | {"loss": 9.0}), (4, EVAL)]
    run = make_run("run", [3.0, 2.0, 1.0, 1.0], evals=evals, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        # As a run that is writing, or was killed, leaves it.
        file.write('{"step": 5, "lo')
    found = compare(liger, make_run("done", [3.0]), run)["runs"][1]
    assert not found["is_finished"]
    assert found["eval"] == EVAL
    # Medians without the first step, as a report has them.
    assert found["train"] == {
        "steps": 4,
        "tokens": 400,
        "trained_tokens": 360,
        "first_loss": 3.0,
        "final_loss": 1.0,
        "tokens_per_s": 3000.0,
        "step_ms": 30.0,
        "peak_memory_bytes": 2_000_000_000,
        "batch": None,
    }
    assert "not finished, 4 steps" in liger("compare", run, run).out


def test_settings_that_differ(liger, make_run):
    one = make_run("one", [1.0], settings={"bf16": True, "ops": None})
    two = make_run("two", [1.0], finished=False, settings={"new_key": "x" * 99})
    found = compare(liger, one, two, one)
    assert found["settings"] == {
        "ops": [None, "auto", None],
        "bf16": [True, False, True],
        "new_key": [None, "x" * 99, None],
    }
    out = liger("compare", one, two).out
    assert [line.split() for line in out.splitlines() if line.startswith("bf16")] == [
        ["bf16", "true", "false"]
    ]
    assert "learning_rate" not in out
    assert "output_dir" not in out
    assert "x" * 50 not in out


def test_runs_of_one_name_have_their_paths(liger, make_run):
    runs = make_run("x/run", [1.0]), make_run("y/run", [1.0])
    assert [run["name"] for run in compare(liger, *runs)["runs"]] == list(map(str, runs))


# What is no run.


def test_what_is_missing_is_said(liger, make_run, tmp_path):
    run, empty, file = make_run("run", [1.0]), tmp_path / "empty", tmp_path / "file"
    (run / "checkpoint-1").mkdir()
    empty.mkdir()
    file.touch()
    for place, message in (
        (tmp_path / "nowhere", "does not exist"),
        (empty, "is no run: it has no metrics.jsonl\nA run is the output_dir of `liger train`"),
        (file, "is no run: it is a file"),
        (run / "checkpoint-1", f"is no run: it has no metrics.jsonl\nIt belongs to the run {run}"),
    ):
        done = liger("compare", run, place)
        assert done.code == 2
        assert f"error: {place} {message}" in done.err
    done = liger("compare", run)
    assert done.code == 2
    assert f"compare takes two runs or more, got {run} alone" in done.err
    assert liger("compare").code == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("report.json", "{"),
        ("report.json", "[]"),
        ("report.json", '{"schema_version": 99}'),
        ("report.json", '{"schema_version": 1}'),
        ("metrics.jsonl", '{"epoch": 1}\n'),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n'),
        ("eval.jsonl", '{"step": 1}\n'),
        ("config.yaml", "a: [\n"),
        ("config.yaml", "- 1\n"),
        ("config.yaml", None),
    ],
)
def test_a_file_that_is_damaged(liger, make_run, name, text):
    run = make_run("run", [1.0], finished=name == "report.json")
    (run / name).unlink(missing_ok=True)
    if text is not None:
        (run / name).write_text(text)
    done = liger("compare", run, run)
    assert done.code == 2, done.out
    assert f"error: {run / name} cannot be read as that of a run: " in done.err


# The picture.


def test_plot(liger, make_run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn, plot = {}, Axes.plot

    def spy(self, x, y, *words, **options):
        drawn[options["label"]] = (list(x), list(y))
        return plot(self, x, y, *words, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    runs = make_run("one", [3.0, 2.0], evals=[(2, EVAL)]), make_run("two", [3.0, 2.5, 2.0])
    path = tmp_path / "new" / "losses.png"
    done = liger("compare", *runs, "--plot", path)
    assert done.code == 0, done.err
    assert path.read_bytes().startswith(b"\x89PNG")
    assert drawn == {
        "one": ([1, 2], [3.0, 2.0]),
        "one: evaluation": ([2], [2.0]),
        "two": ([1, 2, 3], [3.0, 2.5, 2.0]),
    }


def test_plot_without_matplotlib(liger, make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = make_run("run", [1.0])
    done = liger("compare", run, run, "--plot", tmp_path / "x.png")
    assert done.code == 3
    assert "--plot needs matplotlib" in done.err
    assert "pip install 'liger-kernels[plots]'" in done.err
    assert liger("compare", run, run).code == 0


def test_plot_that_is_no_picture(liger, make_run, tmp_path):
    run = make_run("run", [1.0])
    done = liger("compare", run, run, "--plot", tmp_path / "x.txt")
    assert done.code == 2
    assert "x.txt should end in .png, .svg, .pdf" in done.err


# Runs as they are written.


def test_eager_against_patched(liger, train, tmp_path):
    for name, ops in (("eager", "none"), ("patched", "all")):
        done = train("--ops", ops, "--eval-fraction", 0.2, "--output-dir", tmp_path / name)
        assert done.code == 0, done.err
    runs = tmp_path / "eager", tmp_path / "patched"
    found = compare(liger, *runs)
    assert found["settings"] == {"ops": ["none", "all"]}
    assert found["loss_differences"][0]["steps"] == 3
    assert found["loss_differences"][0]["max"] < 1e-4
    finished = found["runs"][1]
    for run in runs:
        (run / "report.json").unlink()
    unfinished = compare(liger, *runs)["runs"][1]
    # A log says nothing of the size of batches.
    assert finished["train"].pop("batch")
    assert unfinished["train"].pop("batch") is None
    for part in ("train", "eval"):
        assert unfinished[part] == pytest.approx(finished[part])
