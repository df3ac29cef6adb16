"""Names, numbers and texts of any file as they are shown: no formula, no escape, no NaN."""

from __future__ import annotations

import copy
import functools
import json
import random
import re
from pathlib import Path

import pytest

from liger_cli.commands.report.saved_report import read_saved
from liger_cli.common.text import printable
from liger_cli.errors import LigerError
from liger_cli.report import notify, show_json, show_lines, show_report, show_table
from liger_cli.report.console import TrainProgress
from liger_cli.report.html import html
from liger_cli.report.markdown import markdown
from liger_cli.report.values import RunReport
from liger_kernels.transformers.patching.render import fold_modules, module_tree, tree_text

NAMES = [
    "{}",
    "{0}.{x!r}",
    "model.layers.0.{y}",
    "}{",
    "a..b",
    ".",
    "layers.\u00b2",
    "layers.\u0663.mlp",
    "layers." + "9" * 5000,
    "x." * 3000 + "x",
    "[red]x[/]",
    ":smile:",
    "\x1b[31mred\x07",
]
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def row(name):
    parts = {"op": "rope", "status": "patched", "backend": "torch", "reason": "x", "source": None}
    return {"name": name, "class": "Norm", **parts}


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_case_239_any_name_of_a_module_is_text(name):
    [folded] = fold_modules([row(name)])
    assert folded.name == name
    assert folded.num_modules == 1
    assert module_tree([row(name), row(name + ".other")])
    assert name.split(".")[0] in tree_text([row(name)])


def test_case_239_layers_are_folded_as_before():
    names = [f"m.{i}.e.{j}" for i in range(3) for j in (0, 1, 4)]
    [folded] = fold_modules(map(row, names))
    assert (folded.name, folded.num_modules) == ("m.0-2.e.0-1,4", 9)
    assert module_tree(map(row, names))[0].label == "m.0-2.e.0-1,4"


@pytest.mark.parametrize("text", ["\x1b[31mred\x1b[0m", "a\rb", "\x9b31m", "\u202eabc", "\ud800"])
def test_case_239_no_control_character_reaches_the_terminal(capsys, text):
    notify(f"note {text}")
    show_lines(f"line {text}")
    show_table(("a", text), [("[red]x[/]", f":smile: {text}")])
    with TrainProgress(3) as progress:
        progress.note(text)
    found = capsys.readouterr()
    shown = found.out + found.err
    assert not CONTROL.search(shown)
    assert text not in shown
    assert shown.count(ascii(text)[1:-1]) == 5
    assert "[red]x[/]" in shown
    assert ":smile:" in shown


def test_case_239_text_without_controls_stays_as_it_is():
    text = "a\tb\nc é 漢字 \u00a0 👩\u200d🔧 [red] {x} \\x1b"
    assert printable(text) == text


@pytest.mark.parametrize("as_json", [False, True])
def test_case_239_errors_are_escaped(liger, tmp_path, as_json):
    name = tmp_path / "\x1b[31mred.json"
    words = ["--json"] if as_json else []
    for command in (["inspect", "--model", name], ["inspect", "--ops", "\x1b[31m", "-m", "qwen3"]):
        done = liger(*command, *words)
        assert done.code == 2
        assert "\x1b[31m" not in done.err + done.out
        assert "\\x1b[31m" in done.err


NUMBERS = (float("nan"), float("inf"), -float("inf"))


def test_case_239_no_json_document_has_nan(capsys):
    show_json({"a": NUMBERS, "b": {"c": [NUMBERS[0], 1.5]}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": [None, None, None],
        "b": {"c": [None, 1.5]},
    }
    report = RunReport(command="train", config={"x": NUMBERS[0], "y": [NUMBERS[1]], "z": "\ud800"})
    values = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert values["config"] == {"x": None, "y": [None], "z": "\ud800"}


def write_run(folder, *losses):
    folder.mkdir()
    (folder / "config.yaml").write_text("model: qwen3\n")
    row = {"learning_rate": 1e-3, "grad_norm": "text", "tokens": 4, "trained_tokens": 2}
    row |= {"step_ms": 1.0, "tokens_per_s": float("nan"), "peak_memory_bytes": 1}
    lines = [json.dumps({"step": i, "loss": x, **row}) for i, x in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "eval.jsonl").write_text("")
    return folder


def test_case_239_numbers_that_are_none_are_gaps(liger, tmp_path):
    one = write_run(tmp_path / "one", 3.0, float("nan"), 1e308, 2.0, 1.0)
    two = write_run(tmp_path / "two", 3.0, 2.0, float("inf"), None, float("nan"))
    done = liger("compare", one, two, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out, parse_constant=pytest.fail)
    assert found["loss_differences"][0]["steps"] == 1
    assert found["runs"][0]["train"]["tokens_per_s"] is None
    for words in (["report", one, "--markdown"], ["report", two, "--html", tmp_path / "x.html"]):
        assert liger(*words).code == 0
    page = (tmp_path / "x.html").read_text()
    assert "nan" not in page.partition("<svg")[2].partition("</svg>")[0]


BAD = [
    *(None, "text", float("nan"), float("inf"), -1, 0, 10**30, 1e308, -1e308, [], {}, True),
    *("{x} {0} {", "\x1b[31mred\x07\x9b", "[red]x[/]", "<b>&", "a..b.99999999999999.\u00b2"),
    *("\ud800", [[]], {"a": []}),
]


def places(value, place=()):
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for key, child in items if isinstance(value, dict | list) else ():
        if isinstance(child, dict | list):
            yield from places(child, (*place, key))
        else:
            yield (*place, key)


def put(document, place, value):
    if not place:
        return value
    changed = copy.deepcopy(document)
    *way, last = place
    functools.reduce(lambda part, key: part[key], way, changed)[last] = value
    return changed


@pytest.mark.parametrize("file", ["tests/cli/report/old_bench.json", "docs/results/demo-cpu.json"])
def test_case_239_any_value_anywhere_in_a_report_is_shown_or_refused(tmp_path, capsys, file):
    document = json.loads((Path(__file__).parents[3] / file).read_text())
    read_saved(Path(__file__).parents[3] / file)
    random.seed(239)
    every = list(places(document))
    path, num_shown, refused = tmp_path / "report.json", 0, []
    for _ in range(60):
        place, value = random.choice(every), random.choice(BAD)
        path.write_text(json.dumps(put(document, place, value)))
        try:
            saved = read_saved(path)
            show_report(saved.report, as_json=False, details=True)
            shown = capsys.readouterr().out + html(saved) + markdown(saved)
        except LigerError as error:
            refused.append(error.message)
            continue
        num_shown += 1
        assert not CONTROL.search(shown), (place, value)
        shown.encode()
        json.loads(saved.report.to_json(), parse_constant=pytest.fail)
    assert num_shown > 5
    assert all(str(path) in message for message in refused)


def test_case_239_names_on_a_page_are_escaped(tmp_path):
    saved = read_saved(Path(__file__).parents[3] / "docs/results/demo-cpu.json")
    saved.report.model["name"] = "<script>\x1b[31m{x}"
    page = html(saved)
    assert "<script>\x1b" not in page
    assert "&lt;script&gt;\\x1b[31m{x}" in page


def test_case_239_a_dollar_in_a_name_is_no_formula_of_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from liger_cli.report.plots import Chart, draw

    draw(Chart("step", "loss", {"a$\\frac{$b": {1: 1.0, 2: 2.0}}), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0
