"""Runs on pairs: the first step, references, metrics, resume and what is refused."""

from __future__ import annotations

import json
import math
import random

import pytest
from forked_runs import start
from objective_pairs import free_port
from run_files import assert_same, metrics, stopped_copy, weights

METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)


@pytest.fixture
def pairs(tmp_path):
    """Twelve pairs of different lengths, whose chosen answers are about one word."""
    drawn = random.Random(0)
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"say {i}: ",
            "chosen": "yes " * drawn.randint(1, 5),
            "rejected": "no " * drawn.randint(1, 5),
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prefer(train, pairs):
    def run(*words, objective="dpo"):
        return train(
            *("--dataset", pairs, "--objective", objective, "--learning-rate", 1e-3),
            *("--per-device-train-batch-size", 2, *words),
        )

    return run


REFERENCES = {
    "adapter_off": ("--adapter", "lora"),
    "model": ("--reference", "model"),
    "precompute": (),
    "synced": ("--sync-ref-model", "--ref-model-sync-steps", 2),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_run_starts_at_its_reference_and_resumes_exactly(prefer, run_dir, tmp_path, kind):
    words = ("--max-steps", 6, "--save-steps", 2, *REFERENCES[kind])
    done = prefer(*words)
    assert done.code == 0, done.err
    first, *_, last = (json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines())
    exact = {"rel": 1e-5, "abs": 1e-5} if kind == "precompute" else {"rel": 0, "abs": 0}
    # Padded to other lengths, precomputed values differ by rounding.
    assert first["rewards/margins"] == pytest.approx(0.0, **exact)
    assert first["loss"] == pytest.approx(float_of(math.log(2)), **exact)
    assert last["loss"] < 0.69
    other = stopped_copy(run_dir, tmp_path / "other", 4)
    again = prefer(*words, "--output-dir", other, "--resume", "auto")
    assert again.code == 0, again.err
    assert metrics(other, "step", "loss", "grad_norm", *METRICS) == metrics(
        run_dir, "step", "loss", "grad_norm", *METRICS
    )
    assert_same(run_dir, other)


def test_a_mixture_says_how_its_balance_counts(prefer, run_dir):
    done = prefer("--model", "mixtral", "--reference", "model", "--max-steps", 1)
    assert done.code == 0, done.err
    assert "reference model, 0.02 x aux_loss, the balance of experts" in done.err
    [(loss, balance)] = metrics(run_dir, "loss", "aux_loss")
    assert loss == pytest.approx(math.log(2) + 0.02 * balance, rel=1e-6)
    assert balance > 1


def float_of(value: float) -> float:
    import torch

    return torch.tensor(value).item()


def test_precomputed_values_are_found_again(prefer, run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = prefer("--max-steps", 6)
    assert "reference: log-probabilities of 12 rows" in first.err
    second = prefer("--max-steps", 6, "--output-dir", tmp_path / "second")
    assert "reference: log-probabilities" not in second.err
    assert_same(run_dir, tmp_path / "second")
    # Of other weights or data they are others.
    third = prefer("--max-steps", 6, "--seed", 1, "--output-dir", tmp_path / "third")
    assert "reference: log-probabilities of 12 rows" in third.err


def test_the_same_weights_in_another_formula_have_other_values(
    prefer, run_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert prefer("--max-steps", 1).code == 0
    model = run_dir / "checkpoint-1"
    words = ("--model", model, "--max-steps", 1, "--output-dir")
    assert "reference: log-probabilities" in prefer(*words, tmp_path / "first").err
    assert "reference: log-probabilities" not in prefer(*words, tmp_path / "second").err
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.1}))
    assert "reference: log-probabilities" in prefer(*words, tmp_path / "third").err
    [(margin,)] = metrics(tmp_path / "third", "rewards/margins")
    assert margin == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["precompute", "model"])
def test_a_run_from_a_trained_model_starts_at_its_reference(prefer, run_dir, tmp_path, kind):
    assert prefer("--max-steps", 2).code == 0
    model = run_dir / "checkpoint-2"
    other = tmp_path / "other"
    words = ("--model", model, "--reference", kind, "--max-steps", 1, "--output-dir", other)
    assert prefer(*words, "--packing").code == 0
    [(margin, loss)] = metrics(other, "rewards/margins", "loss")
    assert margin == pytest.approx(0.0, abs=1e-5)
    assert loss == pytest.approx(math.log(2), abs=1e-5)


def test_an_adapter_trained_on_is_its_own_reference(prefer, run_dir, tmp_path):
    assert prefer("--adapter", "lora", "--max-steps", 3).code == 0
    before = run_dir / "checkpoint-3"
    other = tmp_path / "other"
    words = ("--model", before, "--output-dir", other)
    assert prefer(*words, "--max-steps", 3, "--save-steps", 1).code == 0
    margins = [row[0] for row in metrics(other, "rewards/margins")]
    assert margins[0] == 0.0
    assert margins[1] != 0.0
    mixed = prefer(
        *("--model", before, "--output-dir", tmp_path / "mixed"),
        *("--sync-ref-model", "--ref-model-mixup-alpha", 0.5),
    )
    assert mixed.code == 2
    assert "ref_model_mixup_alpha 1, got 0.5" in mixed.err
    stopped = stopped_copy(other, tmp_path / "stopped", 1)
    done = prefer("--model", before, "--max-steps", 3, "--output-dir", stopped, "--resume", "auto")
    assert done.code == 0, done.err
    assert_same(other, stopped)


def test_another_model_is_a_reference(prefer, run_dir, tmp_path):
    assert prefer("--max-steps", 2).code == 0
    words = ("--reference", run_dir / "checkpoint-2", "--max-steps", 1)
    assert prefer(*words, "--output-dir", tmp_path / "other").code == 0
    [(margin,)] = metrics(tmp_path / "other", "rewards/margins")
    # The reference has learned what the model has not.
    assert margin < -1e-4
    # Found before weights are loaded.
    wrong = prefer("--reference", "gemma2", "--dry-run", "--output-dir", tmp_path / "wrong")
    assert wrong.code == 2
    assert "another architecture: its model_type is gemma2, the model's qwen3" in wrong.err


def test_evaluation_and_early_stopping_by_margins(prefer, run_dir):
    words = ("--eval-fraction", 0.4, "--eval-steps", 1, "--max-steps", 4, "--json")
    words += ("--metric-for-best-model", "rewards/margins", "--early-stopping-patience", 1)
    done = prefer(*words, "--early-stopping-threshold", 100)
    report = done.json()
    rows = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    # The first evaluation is better than none, the second not by 100.
    assert [row["step"] for row in rows] == [1, 2]
    assert report["stop"] == {"step": 2, "evaluations": 1}
    assert report["best"]["metric"] == "rewards/margins"
    assert report["eval"]["pairs"] == 5
    assert set(METRICS) <= report["eval"].keys() & rows[0].keys()
    assert "perplexity" not in report["eval"]
    assert report["best"]["value"] == max(row["rewards/margins"] for row in rows)


@pytest.mark.parametrize("objective", ["orpo", "cpo", "simpo", "ipo"])
def test_every_objective_has_its_metrics(prefer, run_dir, objective):
    done = prefer("--max-steps", 1, "--padding-free", objective=objective)
    assert done.code == 0, done.err
    [row] = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    wanted = {*METRICS} if objective == "ipo" else {*METRICS, "nll_loss"}
    assert wanted <= row.keys()
    assert row["rewards/margins"] == pytest.approx(
        row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5
    )
    assert f"rewards/margins {row['rewards/margins']:.4g}  " in done.err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--objective", "grpo"), 2, "use TRL's trainer"),
        (("--objective", "gkd"), 2, "use TRL's trainer"),
        (("--beta", 0), 2, "beta is above 0"),
        (("--reference", "adapter_off"), 2, "there is none"),
        (("--reference", "precomputed"), 2, "reference is one of adapter_off, auto, model, none"),
        (("--objective", "orpo", "--reference", "model"), 2, "the objectives dpo, ipo"),
        (("--loss-type", "sigmoid,sft", "--loss-weights", "1"), 2, "a weight for each"),
        (("--loss-weights", "0"), 2, "no loss to learn from"),
        (("--loss-type", "simpo"), 2, "the losses of objective dpo"),
        (("--loss-type", "aot", "--use-weighting"), 2, "use_weighting weighs pairs"),
        (("--loss-type", "aot", "--f-divergence-type", "forward_kl"), 2, "f_divergence_type"),
        (("--adapter", "lora", "--lora-dropout", 0.1), 2, "disable_dropout"),
        (("--objective", "sft", "--beta", 0.2), 2, "beta is read by the objectives"),
        (("--metric-for-best-model", "perplexity"), 2, "rewards/accuracies"),
        (("--streaming", "--max-steps", 2, "--reference", "precompute"), 2, "a stream has not"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused(prefer, words, code, text):
    done = prefer(*words)
    assert done.code == code
    assert text in done.err


def test_a_model_that_is_not_patched_says_in_a_line_that_it_makes_logits(prefer):
    done = prefer("--objective", "orpo", "--ops", "none", "--max-steps", 2)
    assert done.code == 0, done.err
    lines = [line for line in done.err.splitlines() if "makes all logits" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: token_logprobs makes all logits: the model's head is not")
    assert "UserWarning" not in done.err


@pytest.mark.parametrize("words", [(), ("--loss-type", "aot,sft")], ids=["sigmoid", "aot"])
def test_two_processes_train_the_weights_of_one(pairs, tmp_path, words):
    def launch(count, run_dir, accumulation):
        port = free_port()
        more = ("train", "-m", "qwen3", "-d", pairs, "-o", run_dir, "--use-cpu", "--max-length", 64)
        more += ("--objective", "dpo", "--reference", "model", "--max-steps", 2, *words)
        more += ("--optim", "sgd", "--learning-rate", 0.1, "--max-grad-norm", 0)
        more += ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", accumulation)
        ranks = [start(*more, rank=i, num_processes=count, port=port) for i in range(count)]
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0] * count

    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, one, 4)
    launch(2, two, 2)
    for of_two, of_one in zip(
        metrics(two, "loss", "grad_norm", *METRICS),
        metrics(one, "loss", "grad_norm", *METRICS),
        strict=True,
    ):
        assert of_two == pytest.approx(of_one, rel=1e-5, abs=1e-6)
    final, other = (weights(path / "checkpoint-2") for path in (one, two))
    assert all((final[name] - other[name]).abs().max() <= 1e-6 for name in final)


def with_figures(path, **figures):
    """The pairs of a file with more columns, in a file beside it."""
    rows = [{**json.loads(line), **figures} for line in path.read_text().splitlines()]
    other = path.with_name("figures.jsonl")
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return other


STREAM = ("--streaming", "--max-steps", 1)


@pytest.mark.parametrize("layout", [(), STREAM], ids=["rows", "stream"])
def test_values_of_a_reference_in_the_data_are_read(prefer, pairs, run_dir, layout):
    data = with_figures(pairs, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0)
    done = prefer("--dataset", data, "--max-steps", 1, *layout)
    assert done.code == 0, done.err
    assert "are not read" not in done.err
    [(reward, chosen)] = metrics(run_dir, "rewards/chosen", "logps/chosen")
    assert reward == pytest.approx(0.1 * (chosen + 1.0), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--eval-dataset",), "some sets of the data have none"),
        (("--reference", "model"), "reference is model"),
        (("--reference", "model", *STREAM), "reference is model"),
        (("--objective", "orpo"), "objective orpo has no reference"),
    ],
    ids=["eval", "model", "stream", "orpo"],
)
def test_values_of_a_reference_that_are_not_read_are_said(prefer, pairs, words, reason):
    data = with_figures(pairs, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0)
    more = (pairs,) if words[-1] == "--eval-dataset" else ()
    done = prefer("--dataset", data, "--max-steps", 1, *words, *more)
    assert done.code == 0, done.err
    assert f"ref_chosen_logps are not read: {reason}" in done.err


@pytest.mark.parametrize(
    "words",
    [("--loss-type", "ipo"), ("--loss-type", "apo_zero,sigmoid"), ("--loss-type", "ipo", *STREAM)],
)
def test_a_margin_that_no_loss_reads_is_refused(prefer, pairs, words):
    words = (*words, "--dataset", with_figures(pairs, margin=1.0))
    done = prefer(*words)
    assert done.code == 4
    assert "the data have a margin" in done.err


def test_eval_compares_an_adapter_with_the_model_below_it(prefer, liger, pairs, run_dir):
    assert prefer("--adapter", "lora", "--max-steps", 4).code == 0
    words = ("eval", "--objective", "dpo", "-d", pairs, "--use-cpu", "--max-length", 64, "--json")
    done = liger(*words, "-m", run_dir / "checkpoint-4")
    assert done.code == 0, done.err
    found = done.json()["eval"]
    assert found["pairs"] == 12
    # It has learned to prefer the chosen answers.
    assert found["rewards/margins"] > 0
    unknown = liger(*words, "-m", "qwen3")
    assert unknown.code == 2
    assert "--reference PATH" in unknown.err
