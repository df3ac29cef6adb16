"""Runs of reward and classify: what is saved, evaluated, merged, resumed and refused."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from forked_runs import start
from objective_pairs import free_port
from run_files import assert_same, metrics, stopped_copy, weights

from liger_cli.training.model.presets import configs_directory

WORDS = {"good": "positive", "bad": "negative", "so so": "neutral"}
FAST = ("--learning-rate", 3e-3, "--per-device-train-batch-size", 4)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path):
    """30 texts of different lengths, whose class is that of their word."""
    drawn = random.Random(0)
    words = [drawn.choice(list(WORDS)) for _ in range(30)]
    rows = [{"text": f"{w} " * drawn.randint(1, 6), "label": WORDS[w]} for w in words]
    return write(tmp_path / "texts.jsonl", rows)


@pytest.fixture
def pairs(tmp_path):
    drawn = random.Random(0)
    rows = [
        {
            "prompt": f"say {i}: ",
            "chosen": "yes " * drawn.randint(1, 5),
            "rejected": "no " * drawn.randint(1, 5),
            "margin": 0.25 * (i % 3),
        }
        for i in range(12)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def classify(train, texts):
    return lambda *words: train("--objective", "classify", "--dataset", texts, *FAST, *words)


def evaluated(liger, texts, model):
    done = liger(
        *("eval", "--model", model, "--objective", "classify", "--dataset", texts, "--use-cpu"),
        *("--max-length", 64, "--json"),
    )
    assert done.code == 0, done.err
    return done.json()["eval"]


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_classifier_is_saved_loaded_and_merged_with_its_labels(
    classify, liger, texts, run_dir, tmp_path, adapter
):
    done = classify("--max-steps", 12, "--eval-dataset", texts, "--adapter", adapter)
    assert done.code == 0, done.err
    labels = [json.loads(line)["label"] for line in texts.read_text().splitlines()]
    counts = {name: labels.count(name) for name in sorted(set(labels))}
    assert f"classes: {', '.join(f'{name} {n}' for name, n in counts.items())};" in done.err
    checkpoint = run_dir / "checkpoint-12"
    saved = config_of(checkpoint)
    assert saved["id2label"] == {"0": "negative", "1": "neutral", "2": "positive"}
    assert saved["problem_type"] == "single_label_classification"
    report = json.loads((run_dir / "report.json").read_text())["eval"]
    assert report["accuracy"] > 0.9
    assert [sum(row) for row in report["confusion"]] == list(counts.values())
    assert evaluated(liger, texts, run_dir) == report
    assert any("score" in name for name in weights(checkpoint))
    if adapter == "lora":
        merged = tmp_path / "merged"
        done = liger("merge", checkpoint, "--output", merged)
        assert done.code == 0, done.err
        checkpoint = merged
        again = evaluated(liger, texts, merged)
        assert again.pop("loss") == pytest.approx(report.pop("loss"), rel=1e-4)
        assert again == report
    loads_in_transformers(checkpoint, texts)


def loads_in_transformers(directory, texts):
    """transformers' own pipeline gives the classes of the texts."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    right = 0
    for row in rows:
        scores = model(**tokenizer(row["text"], return_tensors="pt")).logits
        right += model.config.id2label[int(scores.argmax())] == row["label"]
    assert right / len(rows) > 0.9


def test_a_classifier_is_no_language_model(classify, liger, pairs, run_dir, tmp_path):
    """Nor one that another model is trained by."""
    assert classify("--max-steps", 1).code == 0
    new = ("train", "-m", "qwen3", "--dataset", pairs, "--use-cpu", "--max-length", 64)
    new += ("--max-steps", 1, "-o", tmp_path / "new", "--objective")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three"}\n')
    for words in (
        ("generate", "--model", run_dir, "--prompt", "good", "--use-cpu"),
        (*new, "dpo", "--reference", run_dir),
        (*new, "distill", "--dataset", text, "--teacher-model", run_dir),
        ("verify", "-m", "qwen3", "--objective", "distill", "--teacher-model", run_dir),
    ):
        done = liger(*words)
        assert done.code == 2, words
        assert "is a model of sequence classification, which writes no text" in done.err
        assert "3 classes: negative, neutral, positive" in done.err
    done = liger("verify", "--model", run_dir, "--objective", "reward", "--use-cpu")
    assert done.code == 2
    assert "a reward is one score" in done.err
    done = liger("estimate", "--model", run_dir)
    assert done.code == 2
    assert "--objective classify" in done.err
    done = liger("train", "--model", run_dir, "--dataset", "synthetic", "--use-cpu")
    assert done.code == 2
    assert "--objective classify" in done.err


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"problem_type": "regression"}, "has the problem_type 'regression'"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "has 2 classes of the name 'a'"),
    ],
    ids=["regression", "names"],
)
def test_a_head_of_no_classes_is_refused(classify, run_dir, tmp_path, change, text):
    assert classify("--max-steps", 1).code == 0
    other = shutil.copytree(run_dir / "checkpoint-1", tmp_path / "other")
    (other / "config.json").write_text(json.dumps({**config_of(other), **change}))
    done = classify("--model", other, "--output-dir", tmp_path / "again")
    assert done.code == 2
    assert text in done.err


@pytest.mark.parametrize("kind", ["classify", "reward"])
def test_a_scored_run_resumes_exactly(train, texts, pairs, run_dir, tmp_path, kind):
    data = texts if kind == "classify" else pairs
    words = ("--objective", kind, "--dataset", data, "--eval-dataset", data, "--eval-steps", 2)
    words += ("--max-steps", 6, "--save-steps", 2, *FAST, "--adapter", "lora")
    done = train(*words)
    assert done.code == 0, done.err
    other = stopped_copy(run_dir, tmp_path / "other", 4)
    again = train(*words, "--output-dir", other, "--resume", "auto")
    assert again.code == 0, again.err
    assert_same(run_dir, other)
    assert (run_dir / "eval.jsonl").read_text() == (other / "eval.jsonl").read_text()


def test_a_run_stops_by_the_accuracy_of_its_classes(classify, texts, run_dir):
    done = classify(
        *("--eval-dataset", texts, "--eval-steps", 4, "--metric-for-best-model", "accuracy"),
        *("--early-stopping-patience", 2, "--max-steps", 60, "--load-best-model-at-end"),
    )
    assert done.code == 0, done.err
    report = json.loads((run_dir / "report.json").read_text())
    assert report["best"]["metric"] == "accuracy"
    assert report["best"]["value"] == 1.0
    assert report["stop"]["step"] < 60
    assert "stopped after step" in done.out


def test_rows_with_several_labels(train, liger, tmp_path, run_dir):
    rows = [
        {"text": " ".join(words), "labels": [WORDS[word] for word in words]}
        for words in (["good"], ["bad"], ["good", "bad"], ["so so"], [], ["bad", "so so"])
    ]
    rows[4]["text"] = "nothing"
    data = write(tmp_path / "several.jsonl", rows * 4)
    words = ("--objective", "classify", "--dataset", data, "--eval-dataset", data, *FAST)
    done = train(*words, "--max-steps", 30, "--packing")
    assert done.code == 0, done.err
    report = json.loads((run_dir / "report.json").read_text())["eval"]
    assert report["accuracy"] == 1.0
    assert config_of(run_dir / "checkpoint-30")["problem_type"] == "multi_label_classification"


def test_a_reward_model_orders_pairs_and_is_loaded_again(train, liger, pairs, run_dir):
    words = ("--objective", "reward", "--dataset", pairs, "--eval-dataset", pairs, *FAST)
    done = train(*words, "--max-steps", 10, "--center-rewards-coefficient", 0.01)
    assert done.code == 0, done.err
    report = json.loads((run_dir / "report.json").read_text())["eval"]
    assert report["rewards/accuracies"] == 1.0
    saved = config_of(run_dir / "checkpoint-10")
    assert saved["architectures"] == ["Qwen3ForSequenceClassification"]
    assert len(saved["id2label"]) == 1
    again = liger(
        *("eval", "--model", run_dir, "--objective", "reward", "--dataset", pairs, "--use-cpu"),
        *("--center-rewards-coefficient", 0.01, "--max-length", 64, "--json"),
    )
    assert again.json()["eval"] == report
    shown = liger("generate", "--model", run_dir, "--prompt", "yes", "--use-cpu")
    assert shown.code == 2
    assert "a reward" in shown.err


def test_messages_and_columns_of_other_names_are_classified(train, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": word}], "category": i}
        for i, word in enumerate(WORDS)
    ]
    data = write(tmp_path / "messages.jsonl", rows * 4)
    words = ("--objective", "classify", "--dataset", data, "--max-steps", 1)
    done = train(*words, "--columns", "label=category", "--num-labels", 4)
    assert done.code == 0, done.err
    assert "LABEL_2 4; of LABEL_3 there is no row" in done.err


GOOD = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
BAD_ROWS = {
    "float": ({"text": "c", "label": 0.5}, "regression"),
    "nan": ({"text": "c", "label": float("nan")}, "label is"),
    "null": ({"text": "c", "label": None}, "every row has a label"),
    "negative": ({"text": "c", "label": -1}, "from 0 on"),
    "mixed": ({"text": "c", "label": "x"}, "numbers and names"),
    "list": ({"text": "c", "label": [0]}, "one label as in all rows"),
    "weight": ({"text": "c", "label": 0, "weight": 0.5}, "class_weights"),
    "column": ({"text": "c", "clas": 0}, "every row has a label"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_label_is_an_error_with_its_place(train, tmp_path, kind):
    row, text = BAD_ROWS[kind]
    data = write(tmp_path / "bad.jsonl", [*GOOD, row])
    done = train("--objective", "classify", "--dataset", data)
    assert done.code == 4
    assert text in done.err
    assert f"{data}:3" in done.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--label-names", "a,b,c", "--num-labels", 2), "number of label_names"),
        (("--label-names", "a,a"), "each of them once"),
        (("--class-weights", "1,2"), "class_weights has 2 weights, and there are 3 classes"),
        (("--class-weights", "0,0,0"), "not all 0"),
        (("--class-weights", "1,nan,1"), "class_weights should be finite numbers"),
        (("--class-weights", "1,a,1"), "'a' is none"),
        (("--class-weights", "-1,1,1"), "class_weights should be numbers of at least 0"),
        (("--streaming", "--max-steps", 1), "streaming"),
        (("--train-on", "all"), "leave train_on out"),
        (("--text-mode", "stream"), "learn every token"),
        (("--model", "granite"), "no model of sequence classification"),
        (("--dp-shard-size", 1, "--beta", 0.2), "beta is read by"),
        (("--objective", "reward", "--num-labels", 3), "num_labels is read by"),
        (("--metric-for-best-model", "perplexity"), "accuracy, f1"),
    ],
    ids=lambda value: "".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_keys_that_do_not_fit_classes_are_refused(classify, words, text):
    done = classify(*words)
    assert done.code == 2
    assert text in done.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--num-labels", 2), "num_labels is 2, and the data have 3 labels"),
        (("--label-names", "positive,negative"), "'neutral' is none of the 2 classes"),
    ],
    ids=["number", "name"],
)
def test_labels_that_are_not_those_of_the_keys_are_refused(classify, words, text):
    done = classify(*words)
    assert done.code == 4
    assert text in done.err


def test_empty_texts_are_left_out_and_counted(train, tmp_path):
    data = write(tmp_path / "empty.jsonl", [*GOOD, {"text": " ", "label": 0}])
    done = train("--objective", "classify", "--dataset", data, "--dry-run")
    assert done.code == 0, done.err
    assert "1 rows left out: the text is empty" in done.err
    write(data, [{"text": " ", "label": i} for i in range(2)])
    done = train("--objective", "classify", "--dataset", data)
    assert done.code == 4
    assert "none of the 2 rows of" in done.err
    assert "; 2 rows left out: the text is empty" in done.err


def test_a_language_model_is_not_evaluated_by_its_classes(liger, texts):
    done = liger("eval", "-m", "qwen3", "--objective", "classify", "--dataset", texts, "--use-cpu")
    assert done.code == 2
    assert "liger train --objective classify" in done.err


def test_an_adapter_of_a_language_model_keeps_the_head_and_the_labels(
    classify, liger, texts, run_dir
):
    """Its base has neither: the adapter's score and config.json do."""
    assert classify("--max-steps", 12, "--adapter", "lora", "--eval-dataset", texts).code == 0
    report = json.loads((run_dir / "report.json").read_text())["eval"]
    adapter = run_dir / "checkpoint-12"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"
    # Of this seed the weights of the preset are those of the run.
    settings["base_model_name_or_path"] = "qwen3"
    other = shutil.copytree(adapter, run_dir / "adapter")
    (other / "adapter_config.json").write_text(json.dumps(settings))
    assert evaluated(liger, texts, other) == report
    (other / "config.json").unlink()
    done = liger("inspect", "--model", other)
    assert done.code == 2
    assert "names of the classes" in done.err


@pytest.mark.parametrize("name", ["classify", "reward"])
def test_a_template_of_scores_trains_on_the_sample(liger, tmp_path, name):
    path = configs_directory() / "train" / f"{name}.yaml"
    words = ("-m", "qwen3", "--use-cpu", "--max-length", 64, "--max-steps", 1, "--eval-steps", 0)
    words += ("--no-load-best-model-at-end",) if name == "classify" else ()
    words += ("--set", "dataset=[{path: chitchat, max_samples: 30}]")
    done = liger("train", "-c", path, *words, "-o", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    if name == "classify":
        assert "classes: chitchat 15, code 15" in done.err


def test_a_classifier_of_the_sample_is_right_in_99_of_100(liger, tmp_path):
    done = liger(
        *("train", "-m", "qwen3", "--objective", "classify", "--dataset", "chitchat", "--use-cpu"),
        *("--max-length", 48, "--per-device-train-batch-size", 16, "--max-steps", 150),
        *("--learning-rate", 4e-3, "--lr-scheduler-type", "cosine", "--max-eval-samples", 300),
        *("-o", tmp_path / "run", "--json"),
    )
    assert done.code == 0, done.err
    found = done.json()["eval"]
    assert found["rows"] == 300
    assert found["accuracy"] >= 0.99


def test_the_memory_of_a_step_with_scores_is_estimated(liger):
    words = ("estimate", "-m", "llama-1b", "--max-length", 512, "--json", "--objective")
    scored, plain = (liger(*words, name).json() for name in ("classify", "sft"))
    sizes = [{p["name"]: p["size"] for p in found["parts"]} for found in (scored, plain)]
    # Two rows of 2048 in bf16 in place of nothing: the head of the language model is its embedding.
    assert sizes[0]["weights"] - sizes[1]["weights"] == 2 * 2 * 2048
    assert scored["peak"] <= plain["peak"]


def test_the_preview_shows_labels(liger, texts):
    words = ("data", "preview", "-m", "qwen3", "--objective", "classify", "--dataset", texts)
    shown = liger(*words, "--rows", 1, "--json").json()["rows"]
    assert shown[0]["labels"] == [json.loads(texts.read_text().splitlines()[0])["label"]]
    assert "label " in liger(*words, "--rows", 1).out


@pytest.mark.parametrize("words", [(), ("--adapter", "lora")], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["classify", "reward"])
def test_two_processes_train_the_scores_of_one(texts, pairs, tmp_path, kind, words):
    data = texts if kind == "classify" else pairs

    def launch(count, run_dir, accumulation):
        port = free_port()
        more = ("train", "-m", "qwen3", "-d", data, "-o", run_dir, "--use-cpu", "--max-length", 64)
        more += ("--objective", kind, "--max-steps", 2, *words)
        more += ("--optim", "sgd", "--learning-rate", 0.1, "--max-grad-norm", 0)
        more += ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", accumulation)
        ranks = [start(*more, rank=i, num_processes=count, port=port) for i in range(count)]
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0] * count

    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, one, 4)
    launch(2, two, 2)
    names = ("loss", "grad_norm", "accuracy" if kind == "classify" else "rewards/margins")
    for of_two, of_one in zip(metrics(two, *names), metrics(one, *names), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-5, abs=1e-6)
    final, other = (weights(path / "checkpoint-2") for path in (one, two))
    assert all((final[name] - other[name]).abs().max() <= 1e-6 for name in final)
