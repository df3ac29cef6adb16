"""Runs of kto: references, resume, layouts, processes, evaluation and what is refused."""

from __future__ import annotations

import json
import random

import pytest
from forked_runs import start
from objective_pairs import free_port
from run_files import assert_same, metrics, stopped_copy, weights

METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"),
    "kl",
)


def rows_of(count: int) -> list[dict]:
    """Answers of different lengths, of which the good ones are about one word."""
    drawn = random.Random(0)
    return [
        {
            "prompt": f"say {i // 2}: ",
            "completion": ("no " if i % 2 else "yes ") * drawn.randint(1, 5),
            "label": not i % 2,
        }
        for i in range(count)
    ]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def answers(tmp_path):
    return written(tmp_path / "answers.jsonl", rows_of(16))


@pytest.fixture
def prefer(train, answers):
    def run(*words):
        return train(
            *("--dataset", answers, "--objective", "kto", "--learning-rate", 1e-3),
            *("--per-device-train-batch-size", 4, *words),
        )

    return run


REFERENCES = {
    "precompute": (),
    "adapter_off": ("--adapter", "lora"),
    "model": ("--reference", "model", "--packing", "--max-length", 32),
    "synced": ("--sync-ref-model", "--ref-model-sync-steps", 2),
    "stream": ("--streaming", "--shuffle-buffer-size", 8),
    "apo": ("--loss-type", "apo_zero_unpaired"),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_kto_starts_at_its_reference_and_resumes_exactly(prefer, run_dir, tmp_path, kind):
    words = ("--max-steps", 6, "--save-steps", 2, *REFERENCES[kind])
    done = prefer(*words)
    assert done.code == 0, done.err
    first, *rest = metrics(run_dir, "loss", "kl")
    # Padded to other lengths, precomputed values differ by rounding.
    error = 1e-5 if kind in ("precompute", "apo") else 0
    assert first[0] == pytest.approx(0.5, abs=error)
    assert first[1] == pytest.approx(0, abs=error)
    assert rest[-1][0] < 0.499
    if kind == "precompute":
        assert max(kl for _, kl in rest) > 0
    other = stopped_copy(run_dir, tmp_path / "other", 4)
    again = prefer(*words, "--output-dir", other, "--resume", "auto")
    assert again.code == 0, again.err
    names = ("step", "loss", "grad_norm", *METRICS)
    assert metrics(other, *names) == metrics(run_dir, *names)
    assert_same(run_dir, other)


def test_pairs_are_two_answers(train, run_dir, tmp_path):
    rows = [
        {"prompt": f"say {i}: ", "chosen": "yes " * (i + 1), "rejected": "no"} for i in range(6)
    ]
    words = ("--dataset", written(tmp_path / "pairs.jsonl", rows), "--objective", "kto")
    done = train(*words, "--per-device-train-batch-size", 12, "--max-steps", 1)
    assert done.code == 0, done.err
    assert "6 answers labelled true; 6 answers labelled false" in done.err
    [row] = metrics(run_dir, *METRICS)
    assert None not in row


def test_a_step_of_one_kind_has_no_margin(prefer, run_dir):
    done = prefer("--per-device-train-batch-size", 2, "--max-steps", 8, "--reference", "none")
    assert done.code == 0, done.err
    rows = metrics(run_dir, "rewards/chosen", "rewards/rejected", "rewards/margins")
    assert any(row[2] is None for row in rows)
    assert all((row[2] is None) == (None in row[:2]) for row in rows)
    assert "nan" not in done.err


def test_evaluation_and_early_stopping_by_margins(prefer, run_dir):
    words = ("--eval-fraction", 0.4, "--eval-steps", 1, "--max-steps", 4, "--json")
    words += ("--metric-for-best-model", "rewards/margins", "--early-stopping-patience", 1)
    done = prefer(*words, "--early-stopping-threshold", 100)
    assert done.code == 0, done.err
    report = done.json()
    rows = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert report["stop"] == {"step": 2, "evaluations": 1}
    assert report["eval"]["answers"] == 7
    assert set(METRICS) <= report["eval"].keys()
    assert {"eval_loss", "eval_kl", "rewards/margins"} <= rows[0].keys()
    assert "perplexity" not in report["eval"]
    assert report["best"]["value"] == max(row["rewards/margins"] for row in rows)


def test_eval_does_not_depend_on_its_batches(prefer, liger, answers, run_dir):
    assert prefer("--adapter", "lora", "--max-steps", 4).code == 0
    words = ("eval", "--objective", "kto", "-d", answers, "--use-cpu", "--max-length", 64, "--json")
    words += ("-m", run_dir / "checkpoint-4")
    found = []
    for more in (("--per-device-eval-batch-size", 3), ("--packing",)):
        done = liger(*words, *more)
        assert done.code == 0, done.err
        found.append(done.json()["eval"])
    assert found[0]["answers"] == 16
    assert found[0]["rewards/margins"] > 0
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


ONE_PROMPT = [{**row, "prompt": "say: "} for row in rows_of(4)]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--loss-type", "sigmoid"), 2, "the losses of objective kto are kto, apo_zero_unpaired"),
        (("--loss-type", "kto,apo_zero_unpaired"), 2, "objectives cpo and kto have one loss_type"),
        (("--per-device-train-batch-size", 1), 2, "a step has one"),
        (("--beta", 0), 2, "beta is above 0"),
        (("--desirable-weight", 0, "--undesirable-weight", 0), 2, "both weights at 0"),
        (("--desirable-weight", -1), 2, "desirable_weight"),
        (("--label-smoothing", 0.1), 2, "label_smoothing is read by the objectives dpo"),
        (("--train-on", "all"), 2, "objective kto scores completions alone"),
        (("--no-completion-only-loss",), 2, "leave completion_only_loss out"),
        (("--text-mode", "stream"), 2, "text_mode stream"),
        (("--metric-for-best-model", "rewards/accuracies"), 2, "rewards/margins"),
        (("--objective", "dpo", "--desirable-weight", 2), 2, "is read by the objectives kto"),
        (("--objective", "sft"), 4, "label is false: rows labelled false"),
        (("--objective", "dpo"), 4, "pairs are wanted"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused(prefer, words, code, text):
    done = prefer(*words)
    assert done.code == code, done.err
    assert text in " ".join(done.err.split())


def test_one_prompt_has_no_kl(prefer, run_dir, tmp_path):
    data = written(tmp_path / "one.jsonl", ONE_PROMPT)
    done = prefer("--dataset", data, "--max-steps", 1)
    assert done.code == 4
    assert "the training data: all 4 answers are to one prompt" in done.err
    assert prefer("--dataset", data, "--max-steps", 1, *REFERENCES["apo"]).code == 0


def test_uneven_kinds_are_said(prefer, tmp_path):
    rows = [row for i, row in enumerate(rows_of(16)) if i % 4 != 1]
    data = written(tmp_path / "uneven.jsonl", rows)
    done = prefer("--dataset", data, "--max-steps", 1)
    assert "kto: 8 good and 4 bad answers: with their weights 2 to 1" in done.err
    assert "desirable_weight 0.5 to 0.667" in done.err
    done = prefer("--dataset", data, "--max-steps", 1, "--desirable-weight", 0.6)
    assert "good and" not in done.err


@pytest.mark.parametrize("words", [(), ("--packing",)], ids=["rows", "packed"])
def test_two_processes_train_the_weights_of_one(answers, tmp_path, words):
    def launch(count, run_dir, accumulation):
        port = free_port()
        more = ("train", "-m", "qwen3", "-d", answers, "-o", run_dir, "--use-cpu")
        more += ("--max-length", 48, "--objective", "kto", "--reference", "model", *words)
        more += ("--max-steps", 2, "--optim", "sgd", "--learning-rate", 0.1, "--max-grad-norm", 0)
        more += ("--per-device-train-batch-size", 1, "--gradient-accumulation-steps", accumulation)
        ranks = [start(*more, rank=i, num_processes=count, port=port) for i in range(count)]
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0] * count

    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, one, 6)
    launch(2, two, 3)
    names = ("loss", "grad_norm", *METRICS)
    for of_two, of_one in zip(metrics(two, *names), metrics(one, *names), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-5, abs=1e-6)
    assert metrics(one, "kl")[-1][0] > 0
    final, other = (weights(path / "checkpoint-2") for path in (one, two))
    assert all((final[name] - other[name]).abs().max() <= 1e-6 for name in final)
