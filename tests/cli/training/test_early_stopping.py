"""When a run evaluates, which evaluation is the best, and when more training is in vain."""

from __future__ import annotations

import json
import math

import pytest

from liger_cli.config import load_config
from liger_cli.errors import ConfigError
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.evaluations import Evaluations

STUCK = ("--learning-rate", 0, "--eval-fraction", 0.2, "--eval-steps", 1, "--save-steps", 0)


def configure(**keys):
    return load_config(None, {"model": "a", "eval_steps": 1, **keys})


def evaluations(run_dir, values, *, name="loss", first_step=1, **keys):
    """Evaluations with these values of a metric, at one step after the other."""
    evals = Evaluations(configure(**keys), run_dir, last_step=0, write=False)
    for step, value in enumerate(values, start=first_step):
        figures = {"loss": 1.0, "perplexity": 2.0, "token_accuracy": 0.5, "entropy": 1.0}
        evals.add(step, EvalResult(**{**figures, name: value}, tokens=3))
    return evals


def steps_of(run_dir, file="eval.jsonl"):
    return [json.loads(line)["step"] for line in (run_dir / file).read_text().splitlines()]


# Which one is the best.


@pytest.mark.parametrize(
    ("name", "keys", "best"),
    [
        ("loss", {}, 2),
        ("loss", {"metric_for_best_model": "eval_loss"}, 2),
        ("perplexity", {"metric_for_best_model": "perplexity"}, 2),
        ("token_accuracy", {"metric_for_best_model": "eval_token_accuracy"}, 3),
        ("entropy", {"metric_for_best_model": "entropy"}, 2),
        ("entropy", {"metric_for_best_model": "entropy", "greater_is_better": True}, 3),
        (
            "token_accuracy",
            {"metric_for_best_model": "token_accuracy", "greater_is_better": False},
            2,
        ),
    ],
)
def test_a_loss_falls_and_an_accuracy_rises(tmp_path, name, keys, best):
    found = evaluations(tmp_path, [0.5, 0.2, 0.7, 0.2, 0.7], name=name, **keys).best
    assert found.step == best
    assert found.metric == name
    assert found.checkpoint is None


def test_the_metric_of_a_set_decides(tmp_path):
    keys = {"eval_dataset": "a=x,b=y", "metric_for_best_model": "eval_b_loss"}
    evals = Evaluations(configure(**keys), tmp_path, last_step=0, write=False)
    for step, (a, b) in enumerate([(1.0, 3.0), (2.0, 2.0), (0.0, 4.0)], start=1):
        parts = {name: EvalResult(loss, 1.0, 0.0, 0.0, 5) for name, loss in (("a", a), ("b", b))}
        evals.add(step, EvalResult((a + b) / 2, 1.0, 0.0, 0.0, 10, parts))
    assert (evals.best.step, evals.best.value, evals.best.metric) == (2, 2.0, "b_loss")


@pytest.mark.parametrize(
    ("keys", "known"),
    [
        ({}, "loss, perplexity, token_accuracy, entropy"),
        (
            {"eval_dataset": "mine=x"},
            "loss, perplexity, token_accuracy, entropy, mine_loss, mine_perplexity, "
            "mine_token_accuracy, mine_entropy",
        ),
    ],
)
def test_a_metric_that_is_none_ends_with_those_there_are(keys, known):
    for metric in ("bleu", "other_loss", "eval_", "tokens", ""):
        with pytest.raises(ConfigError) as caught:
            configure(metric_for_best_model=metric, **keys)
        message = f"metric_for_best_model should be one of {known}, got '"
        assert message in caught.value.message


def test_a_metric_that_is_none_starts_nothing(train, run_dir):
    done = train("--metric-for-best-model", "eval_bleu")
    assert done.code == 2
    assert "should be one of loss, perplexity, token_accuracy, entropy, got 'eval_bleu'" in done.err
    assert not run_dir.exists()


def test_case_67_a_metric_the_model_does_not_give_is_an_error(tmp_path):
    """Its loss is not one cross-entropy of its tokens: nothing is taken for the accuracy."""
    evals = Evaluations(
        configure(metric_for_best_model="token_accuracy"), tmp_path, last_step=0, write=False
    )
    with pytest.raises(
        ConfigError, match="is token_accuracy, .* there are loss, perplexity, tokens"
    ):
        evals.add(1, EvalResult(1.0, math.e, None, None, 3))


@pytest.mark.parametrize("ops", ["auto", "none"])
def test_case_67_metrics_that_need_logits_are_there_with_the_fused_loss(train, run_dir, ops):
    words = ("--metric-for-best-model", "token_accuracy", "--eval-steps", 1, "--eval-fraction", 0.3)
    done = train(*words, "--ops", ops, "--learning-rate", 3e-2, "--json")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    accuracies = [row["eval_token_accuracy"] for row in rows]
    assert max(accuracies) > 0
    assert done.json()["best"]["value"] == max(accuracies)
    assert done.json()["best"]["step"] == 1 + accuracies.index(max(accuracies))


def test_best_is_linked_and_kept(train, run_dir):
    """The rate is so high that the loss only rises after the first step."""
    words = ("--learning-rate", 1, "--eval-fraction", 0.3, "--eval-steps", 1, "--max-steps", 4)
    words += ("--load-best-model-at-end", "--save-steps", 1, "--save-total-limit", 2)
    done = train(*words, "--optim", "sgd", "--max-grad-norm", 0)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["eval_loss"])["step"]
    assert (run_dir / "best").resolve() == (run_dir / f"checkpoint-{best}").resolve()
    assert f"after step {best}: {run_dir}/checkpoint-{best}" in done.out


# Early stopping.


def test_patience(tmp_path):
    evals = evaluations(tmp_path, [3.0, 2.0, 2.5], early_stopping_patience=2)
    assert not evals.should_stop
    assert evaluations(tmp_path, [3.0, 2.0, 2.5, 2.0], early_stopping_patience=2).should_stop
    assert not evaluations(tmp_path, [3.0, 2.0, 2.5, 1.9], early_stopping_patience=2).should_stop
    assert not evaluations(tmp_path, [3.0] * 9).should_stop


def test_threshold(tmp_path):
    values, keys = [3.0, 2.9, 2.8], {"early_stopping_patience": 2}
    assert not evaluations(tmp_path, values, **keys).should_stop
    small = evaluations(tmp_path, values, early_stopping_threshold=0.5, **keys)
    assert small.should_stop
    # The best is the best, by however little.
    assert small.best.step == 3


def test_a_loss_that_is_not_finite_is_no_gain(tmp_path):
    evals = evaluations(tmp_path, [math.nan, 2.0, math.nan, math.inf], early_stopping_patience=2)
    assert evals.best.step == 2
    assert evals.should_stop


def test_the_model_before_training_is_no_result_of_it(tmp_path):
    evals = evaluations(tmp_path, [1.0, 3.0, 2.0], first_step=0, early_stopping_patience=1)
    assert evals.best.step == 2
    assert not evals.should_stop


def test_a_run_that_stands_still_ends_early(train, run_dir):
    done = train(*STUCK, "--max-steps", 50, "--early-stopping-patience", 3, "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert report["stop"] == {"step": 4, "evaluations": 3}
    assert report["train"]["steps"] == 4
    assert report["best"]["step"] == 1
    assert "stopped after step 4: 3 evaluations in turn were no better" in done.err
    # It can be gone on with, by more patience.
    assert (run_dir / "checkpoint-4").is_dir()
    words = (*STUCK, "--max-steps", 50, "--early-stopping-patience", 5, "--resume", "auto")
    (run_dir / "report.json").unlink()
    assert train(*words, "--json").json()["stop"] == {"step": 6, "evaluations": 5}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"early_stopping_patience": 2, "eval_steps": 0}, "early_stopping_patience looks at"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold is for"),
        ({"early_stopping_patience": 0}, "early_stopping_patience should be greater"),
        ({"load_best_model_at_end": True, "eval_steps": 0}, "needs eval_steps, or eval_strategy"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_strategy steps needs eval_steps"),
        ({"eval_strategy": "epoch"}, "eval_steps is for eval_strategy steps"),
        ({"eval_strategy": "no"}, "eval_steps is for eval_strategy steps"),
        ({"eval_strategy": "no", "eval_steps": 0, "eval_on_start": True}, "exclude each other"),
        (
            {"eval_strategy": "epoch", "eval_steps": 0, "streaming": True, "max_steps": 5},
            "no epochs",
        ),
        ({"eval_strategy": "often"}, "'no', 'steps' or 'epoch'"),
    ],
)
def test_keys_that_do_not_go_together(keys, message):
    with pytest.raises(ConfigError, match=message):
        configure(**keys)


# When a run evaluates.


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ((), [5]),
        (("--eval-steps", 2), [2, 4, 5]),
        (("--eval-strategy", "steps", "--eval-steps", 2), [2, 4, 5]),
        (("--eval-on-start",), [0, 5]),
        # 20 rows are 5 steps of 4, and 2 of 10.
        (("--eval-strategy", "epoch", "--per-device-train-batch-size", 10), [2, 4, 5]),
    ],
)
def test_when_it_evaluates(train, run_dir, data, words, steps):
    done = train("--max-steps", 5, "--eval-fraction", 0.1, *words)
    assert done.code == 0, done.err
    assert steps_of(run_dir) == steps


def test_never(train, run_dir, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("eval_strategy: no\neval_fraction: 0.1\n")
    done = train("-c", path, "--json")
    assert done.code == 0, done.err
    assert "eval" not in done.json()
    assert "for evaluation" not in done.err
    assert not (run_dir / "eval.jsonl").exists()


@pytest.mark.parametrize(
    "words", [("--eval-steps", 1), ("--eval-strategy", "epoch"), ("--eval-on-start",)]
)
def test_without_data_nothing_starts(train, run_dir, words):
    done = train(*words)
    assert done.code == 2
    key = words[0][2:].replace("-", "_")
    assert f"error: {key} needs eval_dataset or eval_fraction" in done.err
    assert not run_dir.exists()


def test_a_resumed_run_does_not_start_again(train, run_dir):
    words = ("--eval-on-start", "--eval-fraction", 0.1, "--save-steps", 2)
    assert train(*words).code == 0
    whole = (run_dir / "eval.jsonl").read_text()
    (run_dir / "report.json").unlink()
    assert train(*words, "--resume", run_dir / "checkpoint-2").code == 0
    assert (run_dir / "eval.jsonl").read_text() == whole
    assert steps_of(run_dir) == [0, 3]
