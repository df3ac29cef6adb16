"""The corpus runner on a few types, and the page that it wrote for all of them."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "coverage.md"


@pytest.fixture(scope="module")
def corpus() -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("coverage_corpus")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


# A row, a type without one, an encoder that has no rope, a gated norm, a type that takes images,
# one that takes nothing else, one that asks for more than images.
@pytest.mark.parametrize(
    ("model_type", "verdict", "source", "inputs", "ops"),
    [
        ("llama", "equal", "row", ["text"], ("rope", "rms_norm", "swiglu")),
        ("stablelm", "equal", "recognised", ["text"], ("rope", "layer_norm", "swiglu")),
        ("roberta", "equal", "recognised", ["text"], ("layer_norm", "fused_linear_cross_entropy")),
        ("mamba2", "equal", "recognised", ["text"], ("gated_rms_norm", "rms_norm")),
        ("qwen2_vl", "equal", "row", ["text", "image"], ("rope", "layer_norm", "swiglu")),
        ("blip", "equal", "recognised", ["image"], ("layer_norm",)),
        ("pi0", "not built", "", [], ()),
    ],
)
def test_type(corpus, model_type, verdict, source, inputs, ops):
    row = corpus.check(model_type)
    assert (row.verdict, row.source, row.inputs) == (verdict, source, inputs)
    assert set(ops) <= set(row.coverage)
    assert all(n["patched"] == n["candidates"] > 0 for n in row.coverage.values())
    assert not row.not_run
    assert row.detail == "" if verdict == "equal" else "'state'" in row.detail


def test_an_image_is_one_only_if_it_reaches_weights(corpus):
    tiny = corpus.tiny_models.build("qwen2_vl")
    reached = {
        kind: corpus.train_step(tiny.model, batch).grads for kind, batch in tiny.batches.items()
    }
    vision = {name for name in reached["image"] if ".visual." in name}
    assert vision
    assert not vision & reached["text"].keys()


def test_wrong_numbers_are_seen(corpus, monkeypatch):
    from liger_kernels.transformers.replacements import norms

    rms_norm = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", lambda *a, **k: 1.001 * rms_norm(*a, **k))
    row = corpus.check("llama")
    assert row.verdict == "different"
    assert "gradient" in row.detail


def _fork() -> Any:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    return multiprocessing.get_context("fork")


@pytest.mark.parametrize(
    ("fate", "detail"),
    [
        (lambda name: os._exit(3), "its process ended with code 3"),
        (lambda name: time.sleep(60), "no result after 1 seconds"),
    ],
    ids=["crash", "hang"],
)
def test_crash_and_hang_are_rows(corpus, monkeypatch, fate, detail):
    monkeypatch.setattr(corpus, "check", fate)
    row = corpus.run_type("llama", _fork(), timeout_s=1)
    assert (row.verdict, row.detail) == ("failed", detail)


def test_command(corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "run_types", lambda types, **_: [corpus.check(t) for t in types])
    page, rows = tmp_path / "page.md", tmp_path / "rows.json"
    arguments = ["--types", "llama,pi0", "--output", str(page), "--json", str(rows)]
    monkeypatch.setattr(sys, "argv", ["coverage_corpus.py", *arguments])
    assert corpus.main() == 0
    assert [row["verdict"] for row in json.loads(rows.read_text())["rows"]] == [
        "equal",
        "not built",
    ]
    text = page.read_text()
    ops = "rope 2/2, rms_norm 5/5, swiglu 2/2, "
    assert f"| llama | row | text | {ops}" in text
    assert "| 1 | built |" in text
    monkeypatch.setattr(sys, "argv", ["coverage_corpus.py", "--types", "lama"])
    with pytest.raises(SystemExit) as error:
        corpus.main()
    assert error.value.code == 2


def test_page_is_of_all_types(corpus):
    text = PAGE.read_text()
    assert "| type | found by | trained on | patched | skipped, and why | result |" in text
    assert "by `python scripts/coverage_corpus.py`" in text
    assert "transformers 5." in text
    built, missing = text.split("## Built")[1].split("## Not built")
    lines = [line.split(" | ") for line in built.splitlines() if line.startswith("| ")][1:]
    assert len(lines) >= 260
    assert sum("image" in line[2] for line in lines) >= 75
    # The result is the last cell; all are equal, or refused for reasons in the one before.
    results = {line[0].removeprefix("| "): line[-1].removesuffix(" |") for line in lines}
    assert set(results.values()) <= {"equal", "refused"}
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip("the page is of another transformers version, whose types are others")
    tiny_models = importlib.import_module("tiny_models")
    tried = {*results, *(line.split(" | ")[0].removeprefix("| ") for line in missing.splitlines())}
    assert set(tiny_models.MODEL_CLASSES) <= tried
