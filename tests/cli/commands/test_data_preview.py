"""liger data preview: rendered rows, figures, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from liger_cli.report import data as report_data
from liger_cli.report.data import Piece, RowPreview


@pytest.fixture
def preview(liger, data):
    words = ("data", "preview", "--model", "qwen3", "--dataset", data, "--max-length", 40)
    return lambda *more: liger(*words, *more)


def test_rows_are_rendered_with_what_is_trained(preview):
    done = preview("-n", 2, "--per-device-train-batch-size", 4)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "row 1: 12 tokens, 6 trained on (50.0%)"
    assert lines[1] == "say 0 [[word <|im_end|>]]"
    assert lines[4] == "say 1 [[word word word word word <|im_end|>]]"
    assert "row 3" not in done.out
    assert "cut to max_length 40: 13 rows (56.5%)" in lines
    assert "left out, nothing to train on: 0 rows (0.0%)" in lines
    assert any(line.startswith("packed, best fit") for line in lines)


def test_json(preview):
    done = preview("--json", "-n", 1, "--per-device-train-batch-size", 23)
    report = done.json()
    assert report["rows"] == [
        {
            "tokens": 12,
            "trained_tokens": 6,
            "pieces": [
                {"text": "say 0 ", "is_trained": False},
                {"text": "word <|im_end|>", "is_trained": True},
            ],
        }
    ]
    assert sum(bar["rows"] for bar in report["histogram"]) == report["stats"]["rows"] == 23
    assert report["histogram"][0]["first"] == report["lengths"]["min"] == 12
    assert report["histogram"][-1]["last"] == report["lengths"]["max"] == 40
    tokens = report["stats"]["tokens"]
    fills = {fill["how"]: fill for fill in report["fill"]}
    # One batch of all rows is as long as the longest.
    assert fills["unpacked"]["efficiency"] == pytest.approx(tokens / (23 * 40))
    for how in ("bfd", "sequential"):
        rows, efficiency = fills[how]["rows"], fills[how]["efficiency"]
        assert efficiency == pytest.approx(tokens / (rows * 40))
    assert fills["bfd"]["efficiency"] >= fills["sequential"]["efficiency"]
    assert 23 > fills["bfd"]["rows"] >= tokens / 40


def test_conversation_and_dropped_rows(liger, tmp_path):
    path = tmp_path / "d.jsonl"
    user, said = {"role": "user", "content": "a\x1b[2Jb"}, {"role": "assistant", "content": "c"}
    rows = [{"messages": [user, said]}, {"messages": [user]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = liger("data", "preview", "--model", "qwen3", "--dataset", path)
    assert "left out, nothing to train on: 1 rows (50.0%)" in done.out
    # What is in the data does not reach the terminal as a command.
    assert "<|im_start|>user\na\\x1b[2Jb<|im_end|>\n" in done.out
    assert "<|im_start|>assistant\n[[c<|im_end|>]]" in done.out


def test_stream_is_previewed_by_its_first_block(preview):
    done = preview("--streaming", "--max-steps", 1, "--shuffle-buffer-size", 6, "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert report["is_part"] is True
    assert sum(bar["rows"] for bar in report["histogram"]) == 6
    assert len(report["rows"]) == 3
    assert "first block of the stream" in preview("--streaming", "--max-steps", 1).out


def test_colour_replaces_brackets():
    row = RowPreview(2, 1, (Piece("a", False), Piece("b", True)))
    plain = report_data._text(row, in_colour=False)
    assert (plain.plain, plain.spans) == ("a[[b]]", [])
    coloured = report_data._text(row, in_colour=True)
    assert coloured.plain == "ab"
    assert [(span.start, span.end) for span in coloured.spans] == [(1, 2)]


def test_errors_have_the_exit_codes_of_training(liger, tmp_path):
    words = ("data", "preview", "--model", "qwen3", "--dataset")
    assert liger(*words, tmp_path / "no.jsonl").code == 4
    assert liger(*words, "chitcat").code == 2
    assert liger("data", "preview", "--rows", -1).code == 2
    assert "preview" in liger("data", "--help").out


def test_synthetic(liger: object, tmp_path: Path):
    done = liger("data", "preview", "--model", "qwen3", "--dataset", "synthetic", "--json")
    assert done.json()["lengths"]["min"] == 1024
    assert len(done.json()["histogram"]) == 1


PAIR = {"prompt": "say it ", "chosen": "yes", "rejected": "no", "margin": 1}


def test_both_answers_of_a_pair(liger, tmp_path):
    path = tmp_path / "pairs.jsonl"
    exchanged = {**PAIR, "chosen": "no", "rejected": "yes"}
    rows = [PAIR, exchanged, {**PAIR, "chosen": "maybe"}, exchanged, {**PAIR, "chosen": "no"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("data", "preview", "--model", "qwen3", "--dataset", path, "--objective", "dpo")
    lines = liger(*words, "-n", 1, "--max-length", 10).out.splitlines()
    assert lines[:5] == [
        "pair 1, chosen: 10 tokens, 3 scored (30.0%); margin 1",
        "say it [[yes]]",
        "",
        "pair 1, rejected: 10 tokens, 3 scored (30.0%); margin 1",
        "say it [[no<|im_end|>]]",
    ]
    assert "pair 2" not in "".join(lines)
    for line in (
        "4 pairs, 80 tokens, 24 scored (30.0%)",
        "cut to max_length 10: 4 pairs (100.0%)",
        "1 pairs left out: chosen and rejected are the same",
        "1 pairs are there twice",
        "warning: 3 pairs are there with chosen and rejected exchanged too: 1 and 2, 1 and 4",
    ):
        assert line in lines
    report = liger(*words, "--index", 3, "--json", "--ids").json()
    assert [row["answer"] for row in report["rows"]] == ["chosen", "rejected"]
    assert report["rows"][0]["figures"] == {"margin": 1.0}
    assert len(report["rows"][0]["listed"]) == report["rows"][0]["tokens"] == 13
    assert report["pairs"] == {
        "repeated": 1,
        "contradicting": 3,
        "places": [[1, 2], [1, 4]],
    }
    assert sum(bar["rows"] for bar in report["histogram"]) == 8
    # A stream's first block is compared as well.
    stream = (*words, "--streaming", "--max-steps", 1, "--json")
    assert liger(*stream).json()["pairs"]["contradicting"] == 3


def test_pairs_of_another_objective_are_refused(liger, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n")
    words = ("data", "preview", "--model", "qwen3", "--dataset")
    done = liger(*words, path)
    assert done.code == 4
    assert "--objective dpo" in done.err
    path.write_text(json.dumps({"text": "a"}) + "\n")
    done = liger(*words, path, "--objective", "orpo")
    assert done.code == 4
    assert "found the columns text; pairs are wanted: chosen and rejected" in done.err
