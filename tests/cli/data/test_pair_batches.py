"""Batches of pairs: padded, laid end to end and packed hold the same answers."""

from __future__ import annotations

import random

import pytest
import torch
from data_rows import load, write

from liger_cli.commands.train.announce import padding_lines
from liger_cli.config import RunConfig
from liger_cli.data.batches import BatchPlan, count_labels, count_tokens, load_windows
from liger_cli.data.collate import Collator
from liger_cli.data.feed import identity
from liger_cli.data.packing import PackedRows, row_lengths
from liger_cli.data.padding import packed_share, padding_share
from liger_cli.data.pair_batches import PairCollator
from liger_cli.training.inputs import load_inputs
from liger_cli.training.memory.limits import RunMemory

FIGURES = ("margin", "ref_chosen_logps", "ref_rejected_logps")
LAYOUTS = {
    "padded": {},
    "multiple": {"pad_to_multiple_of": 16},
    "padding-free": {"padding_free": True},
    "lengths": {"padding_free": True, "flatten": True, "has_lengths": True},
}


def pairs(tmp_path, seed: int, num_pairs: int, max_length: int = 40):
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(draw.choice("ab ") for _ in range(draw.randint(1, longest)))

    rows = [
        {
            "prompt": text(25),
            "chosen": f"x{text(30)}",
            "rejected": f"y{text(30)}",
            "margin": draw.random(),
            "ref_chosen_logps": -draw.random(),
            "ref_rejected_logps": -draw.random(),
        }
        for _ in range(num_pairs)
    ]
    path = write(tmp_path / "pairs.jsonl", *rows)
    return load(path, row_options={"pairs": True}, max_length=max_length).examples


def read(batch) -> list[tuple]:
    """Each pair of a batch: ids and labels of both answers, and its figures; positions checked."""
    found: dict[int, list] = {}
    names = ("input_ids", "labels", "answer_ids")
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    for ids, labels, numbers, places in zip(
        *(batch[name].tolist() for name in names), positions.tolist(), strict=True
    ):
        for token, label, number, place in zip(ids, labels, numbers, places, strict=True):
            if number < 0:
                assert label == -100
                continue
            assert place == len(found.setdefault(number, []))
            found[number].append((token, label))
    assert sorted(found) == list(range(2 * int(batch["num_pairs"])))
    figures = [batch[name].tolist() for name in FIGURES]
    assert all(batch[name].dtype == torch.float64 for name in FIGURES)
    return [
        (found[2 * i], found[2 * i + 1], *(values[i] for values in figures))
        for i in range(int(batch["num_pairs"]))
    ]


def as_pair(row) -> tuple:
    answers = (
        list(zip(row[f"{which}_input_ids"], row[f"{which}_labels"], strict=True))
        for which in ("chosen", "rejected")
    )
    return (*answers, *(row[name] for name in FIGURES))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_pairs(tmp_path, layout, seed):
    rows = pairs(tmp_path, seed, 3 + 2 * seed)
    wanted = [as_pair(row) for row in rows]
    collator = PairCollator(Collator(**LAYOUTS[layout]))
    batch = collator(list(rows))
    assert read(batch) == wanted
    num_labels = sum(label != -100 for pair in wanted for answer in pair[:2] for _, label in answer)
    num_tokens = sum(len(answer) for pair in wanted for answer in pair[:2])
    assert (count_labels(batch), count_tokens(batch)) == (num_labels, num_tokens)
    for strategy in ("bfd", "sequential"):
        packed = PackedRows.of(rows, 40, strategy)
        assert all(len(packed[i]["input_ids"]) <= 80 for i in range(len(packed)))
        batch = collator([packed[i] for i in range(len(packed))])
        assert sorted(read(batch)) == sorted(wanted)
        assert (count_labels(batch), count_tokens(batch)) == (num_labels, num_tokens)
        # Every label is predicted from the token before it in the same answer.
        same = batch["answer_ids"][:, 1:] == batch["answer_ids"][:, :-1]
        assert same[batch["labels"][:, 1:] != -100].all()


def test_a_packed_row_holds_the_longest_pair(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "q", "chosen": "a" * 99, "rejected": "b" * 99})
    rows = load(path, row_options={"pairs": True}, max_length=40).examples
    packed = PackedRows.of(rows, 40, "bfd")
    assert packed[0]["input_ids"] == [*rows[0]["chosen_input_ids"], *rows[0]["rejected_input_ids"]]
    assert len(packed[0]["input_ids"]) == 80


@pytest.mark.parametrize("is_packed", [False, True])
def test_processes_share_the_pairs_and_one_may_have_none(tmp_path, is_packed):
    rows = pairs(tmp_path, 5, 5)
    examples = PackedRows.of(rows, 40, "bfd") if is_packed else rows
    seen, num_batches = [], set()
    for rank in range(2):
        plan = BatchPlan(len(examples), 2, 2, seed=0, rank=rank, num_processes=2)
        windows = plan.windows(1, plan.steps_per_epoch)
        found = [
            batch
            for window in load_windows(examples, windows, PairCollator(Collator()))
            for batch in window
        ]
        num_batches.add(len(found))
        seen += [pair for batch in found for pair in read(batch)]
        assert all((count_tokens(batch) > 0) == (int(batch["num_pairs"]) > 0) for batch in found)
    assert len(num_batches) == 1
    assert sorted(seen) == sorted(map(as_pair, rows))


def test_lengths_are_those_of_answers(tmp_path):
    rows = pairs(tmp_path, 7, 12)
    lengths = row_lengths(rows)
    wanted = [[len(answer) for answer in as_pair(row)[:2]] for row in rows]
    assert lengths.tolist() == wanted
    collator = PairCollator(Collator())
    batches = [collator([rows[i], rows[i + 1]]) for i in range(0, 12, 2)]
    fed = sum(batch["input_ids"].numel() for batch in batches)
    assert padding_share(lengths, 2, seed=None) == pytest.approx(1 - lengths.sum() / fed)
    num_rows, share = packed_share(lengths, 40, "bfd")
    assert num_rows == len(PackedRows.of(rows, 40, "bfd"))
    assert share == pytest.approx(1 - lengths.sum() / (num_rows * 80))


def test_other_pairs_have_another_identity(tmp_path):
    rows = pairs(tmp_path, 7, 4)
    names = ["chosen_input_ids", "rejected_labels", "margin"]
    found = {identity(rows)["sha256"]}
    for name in names:
        values = rows.to_dict()
        values[name][2] = values[name][1]
        found.add(identity(type(rows).from_dict(values, features=rows.features))["sha256"])
    assert len(found) == 1 + len(names)


@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"padding_free": "true"}])
def test_a_run_of_pairs_reads_and_collates_them(tmp_path, layout):
    path = write(
        tmp_path / "d.jsonl", *({"chosen": f"a b{i}", "rejected": "a c"} for i in range(6))
    )
    config = RunConfig(
        model="llama", dataset=str(path), objective="dpo", max_length=32, use_cpu=True, **layout
    )
    inputs = load_inputs(config)
    num_rows = len(inputs.train)
    assert num_rows < 6 if layout.get("packing") else num_rows == 6
    batch = inputs.collator([inputs.train[i] for i in range(num_rows)])
    assert int(batch["num_pairs"]) == 6
    assert inputs.lengths.shape == (6, 2)
    # The step that memory is estimated for has as many sequences, as long as the longest.
    step = RunMemory.of(config, inputs, torch.device("cpu")).batch
    is_packed = "packing" in layout
    assert step.size == config.per_device_train_batch_size * (1 if is_packed else 2)
    longest = max(len(inputs.train[0]["input_ids"]), 0) if is_packed else inputs.lengths.max()
    assert step.length == longest
    assert len(padding_lines(config, inputs)) == 1
