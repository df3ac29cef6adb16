"""The scripts of docs/examples run as they are, on a tiny model and on one that is named."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from liger_kernels.ops.backend import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
NOTEBOOK = FOLDER / "one_gpu.ipynb"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "tiny")


def run_example(name: str, arguments: tuple[str, ...], monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        sys.modules.pop("tiny", None)


def losses_in(text: str) -> list[float]:
    """Return the losses of a loop's lines or of a trainer's logs."""
    found = [float(value) for value in re.findall(r"^step \d+  loss ([\d.]+)", text, re.M)]
    logs = [ast.literal_eval(each) for each in re.findall(r"\{'loss.*?\}", text)]
    return found + [float(log["loss"]) for log in logs]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore")
def test_example(name, tmp_path, monkeypatch, capsys):
    if name.startswith("trl"):
        pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    monkeypatch.chdir(tmp_path)
    run_example(name, (), monkeypatch)
    text = capsys.readouterr().out
    assert "rope 2/2  rms_norm 5/5  swiglu 2/2  fused_linear_cross_entropy 1/1" in text
    losses = losses_in(text)
    assert len(losses) == 3
    # The mean of GRPO's advantages is zero.
    low, high = (-1.0, 1.0) if name == "trl_grpo" else (0.5, 4.0)
    assert all(low < loss < high for loss in losses)
    if name != "custom_loop":
        assert list(tmp_path.glob("runs/*/model.safetensors"))


def test_an_example_trains_a_model_and_rows_that_are_named(tmp_path, monkeypatch, capsys):
    example = runpy.run_path(str(FOLDER / "tiny.py"))
    _, tokenizer = example["load"](example["TINY"])
    tokenizer.save_pretrained(tmp_path)
    zoo.build("qwen3").save_pretrained(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"a b c d {i}"}) + "\n" for i in range(4)))
    arguments = ("--model", str(tmp_path), "--data", str(data), "--steps", "5")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run_example("custom_loop", arguments, monkeypatch)
    losses = losses_in(capsys.readouterr().out)
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_examples_are_short_and_named_in_the_pages():
    assert set(SCRIPTS) == {"custom_loop", "hf_trainer", "trl_dpo", "trl_grpo", "trl_sft"}
    pages = [(FOLDER.parent / page).read_text() for page in ("library.md", "trl.md")]
    assert all(f"(examples/{NOTEBOOK.name})" in page for page in pages)
    for name in SCRIPTS:
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60
        assert all(f"(examples/{name}.py)" in page for page in pages), name


def printed(notebook: Any) -> list[str]:
    """Return what each cell of code printed, with # for each number."""
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    texts = [
        "".join(out["text"] for out in each if out.get("name") == "stdout") for each in outputs
    ]
    return [re.sub(r"\d[\d.,]*", "#", text) for text in texts]


def cells_of_code() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize(
    ("has_gpu", "has_bf16", "values"),
    [
        (False, False, ("cpu", "tiny", torch.float32, 4, 1e-2)),
        (True, True, ("cuda", "Qwen/Qwen3-0.6B", torch.bfloat16, 8, 1e-3)),
        # A card on which torch computes bf16 by way of fp32.
        (True, False, ("cuda", "Qwen/Qwen3-0.6B", torch.float32, 8, 1e-3)),
    ],
)
def test_the_first_cell_of_the_notebook_chooses_for_the_machine(
    has_gpu, has_bf16, values, monkeypatch
):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: has_gpu and (has_bf16 or including_emulation),
    )
    choose, *rest = cells_of_code()
    chosen: dict[str, Any] = {}
    exec(choose, chosen)
    sys.modules.pop("tiny")
    names = ("device", "name", "dtype", "batch_size", "learning_rate")
    assert tuple(chosen[name] for name in names) == values
    # The rest is one code for all machines.
    assert not re.search(r"cuda|cpu|has_", "".join(rest))


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_with_the_values_of_a_gpu(monkeypatch, capsys):
    """With its dtype and rows a step, on this machine's device and the tiny model."""
    pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.syspath_prepend(FOLDER)
    choose, *rest = cells_of_code()
    values: dict[str, Any] = {}
    exec(choose, values)
    values |= {"name": "tiny", "dtype": torch.bfloat16, "batch_size": 8}
    try:
        for cell in rest:
            exec(cell, values)
    finally:
        sys.modules.pop("tiny", None)
    assert {p.dtype for p in values["merged"].parameters()} == {torch.bfloat16}
    found = capsys.readouterr().out
    assert "gradients agree: True" in found
    assert "the trained text is the likelier one: True" in found
    assert "all weights equal: True" in found


def test_the_notebook_runs_and_prints_what_it_shows():
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    pytest.importorskip("peft", reason="peft is not installed")
    notebook = importlib.import_module("nbformat").read(NOTEBOOK, as_version=4)
    shown = printed(notebook)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    assert printed(notebook) == shown
