"""Rows that eval_fraction keeps for evaluation are never trained on."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
from datasets import Dataset

from liger_cli.config import load_config
from liger_cli.data.collate import Collator
from liger_cli.data.feed import make_feed, plan_batches
from liger_cli.errors import ConfigError
from liger_cli.training import inputs
from liger_cli.training.inputs import load_inputs

PROCESS = SimpleNamespace(process_index=0, num_processes=1)


@pytest.fixture
def sources(tmp_path):
    """Two files of rows with a text each that no other row has."""
    paths = []
    for name, size in (("a", 17), ("b", 6)):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name}{i} ", "completion": "w" * (1 + i % 7)} for i in range(size)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
    return paths


def documents(batch) -> list[tuple[int, ...]]:
    """The documents of a collated batch, packed or not, without padding."""
    found = []
    for number, ids in enumerate(batch["input_ids"].tolist()):
        if "position_ids" in batch:
            positions = batch["position_ids"][number].tolist()
            starts = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
            labels = batch["labels"][number].tolist()
            for start, end in pairwise(starts):
                # Padding has no label, and a document has one.
                if any(label != -100 for label in labels[start:end]):
                    found.append(tuple(ids[start:end]))
        else:
            mask = batch["attention_mask"][number].tolist()
            found.append(tuple(token for token, is_one in zip(ids, mask, strict=True) if is_one))
    return found


def fed(config, inputs, epochs: int) -> Counter[tuple[int, ...]]:
    """How often each row is trained on in so many epochs."""
    plan = plan_batches(config, inputs.train, PROCESS)
    feed = make_feed(inputs.train, plan, inputs.collator)
    windows = feed.windows(1, epochs * plan.steps_per_epoch)
    return Counter(row for window in windows for batch in window for row in documents(batch))


WAYS = {
    "rows": {},
    "packed": {"packing": True},
    "packed in order": {"packing": True, "packing_strategy": "sequential"},
    "accumulated": {"gradient_accumulation_steps": 3},
    "cut": {"max_length": 6},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.9])
def test_case_269_held_out_rows_are_never_trained_on(sources, way, fraction):
    for seed in (1, 42):
        for names in (str(sources[0]), ",".join(map(str, sources))):
            flags = {
                **{"model": "qwen3", "dataset": names, "eval_fraction": fraction, "seed": seed},
                **{"max_length": 64, "per_device_train_batch_size": 2, **WAYS[way]},
            }
            config = load_config(flags=flags)
            inputs = load_inputs(config)
            held_out = {tuple(row["input_ids"]) for row in inputs.eval[""]}
            trained = fed(config, inputs, epochs=3)
            size = 17 if names == str(sources[0]) else 23
            assert len(held_out) == math.ceil(fraction * size)
            assert not held_out & trained.keys()
            assert len(trained) == size - len(held_out)
            assert set(trained.values()) == {3}


def test_case_269_every_process_sees_none_of_them(sources):
    flags = {"model": "qwen3", "dataset": str(sources[0]), "eval_fraction": 0.3, "max_length": 64}
    config = load_config(flags={**flags, "per_device_train_batch_size": 2})
    found = []
    for rank in range(3):
        inputs = load_inputs(config)
        process = SimpleNamespace(process_index=rank, num_processes=3)
        plan = plan_batches(config, inputs.train, process)
        windows = make_feed(inputs.train, plan, inputs.collator).windows(
            1, 2 * plan.steps_per_epoch
        )
        held_out = {tuple(row["input_ids"]) for row in inputs.eval[""]}
        found += [row for window in windows for batch in window for row in documents(batch)]
    # A process without a row takes the first two tokens of one, without a label.
    assert not held_out & set(found)
    assert len({row for row in found if len(row) > 2}) == 17 - len(held_out)


def test_case_269_what_a_run_trains_on(train, data, monkeypatch):
    """All that is collated in a run without evaluations: 23 rows but for 5."""
    seen = []
    collate = Collator.__call__

    def note(self, rows):
        seen.extend(tuple(row["input_ids"]) for row in rows)
        return collate(self, rows)

    words = ("--eval-fraction", 0.2, "--ops", "none", "--max-steps", -1, "--num-train-epochs", 2)
    config = load_config(
        flags={"model": "qwen3", "dataset": str(data), "max_length": 64, "eval_fraction": 0.2}
    )
    held_out = {tuple(row["input_ids"]) for row in load_inputs(config).eval[""]}
    monkeypatch.setattr(Collator, "__call__", note)
    done = train(*words, "--eval-strategy", "no")
    assert done.code == 0, done.err
    assert len(held_out) == 5
    assert not held_out & set(seen)
    assert len(set(seen)) == 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streaming": True, "max_steps": 3}, "streaming and eval_fraction exclude each other"),
        ({"dataset": "{a}:0.5,{b}:0.5"}, "the weights of dataset repeat rows"),
        ({"dataset": "{a},{a}"}, "names .*a.jsonl twice"),
    ],
)
def test_case_269_what_would_train_on_them_is_refused(sources, change, message):
    flags = {"model": "qwen3", "dataset": str(sources[0]), "eval_fraction": 0.2, **change}
    flags["dataset"] = flags["dataset"].format(a=sources[0], b=sources[1])
    with pytest.raises(ConfigError, match=message):
        load_inputs(load_config(flags=flags))


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, 32),
        ({"max_eval_samples": 40}, 100),
        ({"objective": "dpo"}, 16),
        ({"objective": "kto"}, 16),
        ({"objective": "kto", "loss_type": "apo_zero_unpaired"}, 32),
    ],
    ids=["sft", "asked", "dpo", "kto", "no-kl"],
)
def test_so_many_answers_of_the_sample_end_a_run_unasked(keys, wanted):
    """A pair has two, and the KL of kto takes another beside each; max_eval_samples cuts later."""
    rows = Dataset.from_dict({"number": range(100)})
    config = load_config(None, {"model": "qwen3", "dataset": "chitchat", **keys})
    reader = SimpleNamespace(config=config, load=lambda split: SimpleNamespace(examples=rows))
    assert len(inputs._eval_rows(reader)[""]) == wanted
