"""`liger report` and `bench --html`: pages in a real browser, markdown, pictures, what is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, open_browser

from liger_cli.report import (
    AgainstPart,
    Arm,
    AssertPart,
    EvalPart,
    FitPart,
    GainPart,
    ParityPart,
    RatiosPart,
    RunReport,
    SweepPoint,
    TrainPart,
    show_report,
)
from liger_cli.report.charts import Curves, arm_charts, loss_charts, step_charts
from liger_cli.report.html import html
from liger_cli.report.markdown import markdown
from liger_cli.report.summary import SavedReport, settings, summarize
from liger_cli.report.svg import curves_svg

OLD_REPORT = Path(__file__).with_name("old_bench.json")
# Closes whatever it might stand in, text or attribute.
EVIL = "\"'></title><script>console.error('ran')</script><img src=x onerror=alert(1)>"

LAYERS = [
    *(f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn", "mlp")),
    "lm_head",
]
OPS = {"self_attn": "rope", "mlp": "swiglu", "lm_head": "fused_linear_cross_entropy"}


def _modules(num_skipped: int = 0) -> list[dict[str, str | None]]:
    return [
        {
            "name": name,
            "class": "Module",
            "op": OPS[name.rpartition(".")[2]],
            "status": "skipped" if i < num_skipped else "patched",
            "backend": None if i < num_skipped else "triton",
            "reason": "its numbers are not those of the op" if i < num_skipped else None,
        }
        for i, name in enumerate(LAYERS)
    ]


def _bench(name: str = "llama-1b", **changes: Any) -> RunReport:
    parity = ParityPart(
        steps=3,
        max_loss_difference=0.001,
        max_relative_difference=0.0005,
        tolerance=0.02,
        max_grad_norm_difference=0.01,
        grad_norm_tolerance=0.1,
        equal=True,
    )
    ratios = RatiosPart(speed=1.39, memory=0.47)
    part = AgainstPart(ratios=ratios, parity=parity, verdict="patched against eager: 1.39x faster")
    arms = [
        Arm(
            name=name,
            tokens_per_s=tokens_per_s,
            step_ms=step_ms,
            step_p20_ms=step_ms - 5,
            step_p80_ms=step_ms + 9,
            peak_memory_bytes=peak,
            losses=[5.0, 4.5, 4.0],
            grad_norms=[1.0, 1.5, 1.25],
        )
        for name, tokens_per_s, step_ms, peak in (
            ("eager", 45728.0, 358.3, 61_500_000_000),
            ("patched", 63784.0, 256.9, 29_200_000_000),
        )
    ]
    arms.append(Arm(name="compile", error="out of memory"))
    values: dict[str, Any] = {
        "command": "bench",
        "config": {"model": name, "max_length": 2048, "per_device_train_batch_size": 8},
        "environment": {"torch": "2.13.0", "devices": [{"type": "cuda", "name": "H100"}]},
        "coverage": {
            "rope": {"patched": 10, "candidates": 12},
            "swiglu": {"patched": 12, "candidates": 12},
            "fused_linear_cross_entropy": {"patched": 1, "candidates": 1},
        },
        "modules": _modules(num_skipped=4),
        "arms": arms,
        "ratios": ratios,
        "parity": parity,
        "against": {"eager": part},
        "ablation": {"rope": part},
        "asserted": [AssertPart(bound="speed>=2", where="8 x 2048", found=1.39, met=False)],
    }
    return RunReport(**{**values, **changes})


def _swept() -> RunReport:
    report = _bench()
    points = [
        SweepPoint(
            batch_size=8,
            sequence_length=length,
            arms=report.arms or [],
            against=report.against or {},
        )
        for length in (512, 1024, 2048)
    ]
    fit = FitPart(
        arm="patched", largest_batch_size=8, longest_sequence=2048, by_sequence={512: 8, 2048: 8}
    )
    return report.model_copy(update={"sweep": points, "fits": [fit]})


def _steps(num_steps: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss": 5.0 / step + (step % 7) * 0.01,
            "learning_rate": 1e-3 / step,
            "grad_norm": None if step == 2 else 1.0 + step % 3,
            "tokens_per_s": 1000.0 + step,
            "peak_memory_bytes": 5_000_000_000,
        }
        for step in range(1, num_steps + 1)
    ]


def _trained(num_steps: int = 400, model: str = "llama") -> SavedReport:
    report = RunReport(
        command="train",
        config={"model": model, "learning_rate": 1e-3, "max_length": 1024, "run_name": "a" * 200},
        coverage={"rope": {"patched": 12, "candidates": 12}},
        modules=_modules(),
        train=TrainPart(
            steps=num_steps,
            tokens=1000,
            trained_tokens=500,
            first_loss=5.0,
            final_loss=2.5,
            tokens_per_s=1200.0,
            step_ms=80.0,
            peak_memory_bytes=5_000_000_000,
        ),
        gain=GainPart(source="measured", speed=1.31, memory=0.43),
        eval=EvalPart(loss=2.4, perplexity=11.0, token_accuracy=0.4, tokens=900),
    )
    evaluations = [
        {"step": step, "eval_loss": 5.0 / step, "eval_token_accuracy": step / num_steps}
        for step in (num_steps // 2, num_steps)
    ]
    return SavedReport(report, _steps(num_steps), evaluations)


PAGES = {
    "bench": SavedReport(_bench()),
    "sweep": SavedReport(_swept()),
    "train": _trained(),
    "older": SavedReport(RunReport.from_json(OLD_REPORT.read_text(encoding="utf-8"))),
    "escaped": SavedReport(
        _bench(
            EVIL,
            model={"name": EVIL},
            arms=[Arm(name=EVIL, losses=[1.0, 2.0], step_ms=1.0, note=EVIL), Arm(name="patched")],
            modules=[{**row, "name": EVIL, "class": EVIL, "reason": EVIL} for row in _modules()],
            environment={EVIL: EVIL, "devices": [{"name": EVIL}]},
        )
    ),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with open_browser() as opened:
        yield opened


@pytest.fixture
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"{request.param}.html"
    path.write_text(html(PAGES[request.param]), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES, indirect=True)
def test_page_fits_without_errors_or_requests(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.show(page, width=width, scheme=scheme)
    # What is folded away must fit too.
    browser.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("innerWidth") == width
    assert browser.run("document.querySelectorAll('svg[role=img]').length") >= 2
    assert browser.errors == []
    assert browser.requests == []


@pytest.mark.parametrize("page", ["bench"], indirect=True)
def test_page_filters_modules(browser: Browser, page: Path) -> None:
    browser.show(page, width=1280)

    def shown(key: str, value: str) -> list[str]:
        browser.run(
            f"document.forms.filter.elements.{key}.value = {json.dumps(value)};"
            "document.forms.filter.dispatchEvent(new Event('input'))"
        )
        return browser.run(
            "[...document.querySelectorAll('#modules tbody tr')]"
            ".filter((row) => row.offsetHeight).map((row) => row.cells[0].textContent)"
        )

    skipped = ["model.layers.0-1.self_attn", "model.layers.0-1.mlp"]
    assert shown("text", "") == [
        *skipped,
        "model.layers.2-11.self_attn",
        "model.layers.2-11.mlp",
        "lm_head",
    ]
    assert shown("status", "skipped") == skipped
    assert shown("op", "rope") == skipped[:1]
    assert browser.run("document.getElementById('filter-count').textContent") == "1 of 5 rows"
    assert shown("text", "no such") == []
    assert shown("text", "ATTN module") == skipped[:1]


@pytest.mark.parametrize("page", ["train"], indirect=True)
def test_page_is_dark_or_light_as_the_user_says(browser: Browser, page: Path) -> None:
    def is_dark() -> bool:
        ink = browser.run("getComputedStyle(document.body).color")
        return min(map(int, re.findall(r"\d+", ink)[:3])) > 127

    browser.show(page, width=1280, scheme="dark")
    assert is_dark()
    browser.run("document.getElementById('theme').click()")
    assert not is_dark()
    browser.scheme("light")
    assert not is_dark()
    browser.run("document.getElementById('theme').click()")
    assert is_dark()


_CONTRASTS = """
(() => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const isLine = element.matches("path.line, rect.bar");
    const isText = own && !element.matches("title, option");
    if (!element.checkVisibility() || !(isText || isLine)) continue;
    const style = getComputedStyle(element);
    const isSvg = element instanceof SVGElement;
    const color = element.matches("path") ? style.stroke : isSvg ? style.fill : style.color;
    const pair = [luminance(color), luminance(behind(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    const least = isLine ? 3 : 4.5;
    if (ratio < least) found[`${element.tagName}.${element.getAttribute("class")}`] = ratio;
  }
  return found;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["bench", "train"], indirect=True)
def test_page_has_the_contrast_of_wcag_aa(browser: Browser, page: Path, scheme: str) -> None:
    browser.show(page, width=1280, scheme=scheme)
    assert browser.run(_CONTRASTS) == {}


@pytest.mark.parametrize("page", ["bench", "sweep", "train"], indirect=True)
def test_page_is_told_to_those_who_cannot_see_it(browser: Browser, page: Path) -> None:
    browser.show(page, width=1280)
    assert browser.run("document.documentElement.lang") == "en"
    assert browser.run("document.querySelectorAll('h1').length") == 1
    levels = browser.run(
        "[...document.querySelectorAll('h1, h2, h3')].map((title) => Number(title.tagName[1]))"
    )
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    unnamed = "[...document.querySelectorAll('svg[role=img]')].filter((chart) => !chart.ariaLabel)"
    assert browser.run(f"{unnamed}.length") == 0
    without = (
        "[...document.querySelectorAll('table')].filter((table) => !table.querySelector('th'))"
    )
    assert browser.run(f"{without}.length") == 0


@pytest.mark.parametrize("name", PAGES)
def test_page_names_no_address(name: str) -> None:
    text = html(PAGES[name])
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:)?//""", text)
    assert not re.search(r"@import|url\(", text)


def test_page_and_markdown_escape_names() -> None:
    # The one script is ours, which the policy of the page knows by its hash.
    assert html(PAGES["escaped"]).count("<script") == 1
    assert "<img" not in html(PAGES["escaped"])
    assert not re.search("<(script|img)", markdown(PAGES["escaped"]))


def test_page_leaves_out_what_a_report_lacks() -> None:
    text = html(SavedReport(RunReport(command="inspect", coverage={}, modules=[])))
    assert re.findall("<section id=.(\\w+)", text) == ["verdict"]
    assert re.findall("<section id=.(\\w+)", html(PAGES["train"])) == [
        *("verdict", "steps", "evaluation", "coverage", "settings")
    ]


@pytest.mark.parametrize(
    ("ratios", "headline"),
    [
        (
            RatiosPart(speed=1.39, memory=0.47),
            "Patched is 1.39x faster than eager, with 53% less peak memory; the losses agree.",
        ),
        (
            RatiosPart(speed=0.8, memory=1.2),
            "Patched is 1.25x slower than eager, with 20% more peak memory; the losses agree.",
        ),
        (
            RatiosPart(speed=1.05, memory=1.0, noise=0.06),
            "Patched is as fast as eager, with the same peak memory; the losses agree.",
        ),
        (
            RatiosPart(speed=1.05, memory=0.5, noise=None, memory_noise=None),
            "Patched ran at 1.05x the speed of eager once, with 50% less peak memory; "
            "the losses agree.",
        ),
    ],
    ids=["faster", "case_104_slower", "noise", "once"],
)
def test_headline_of_a_bench(ratios: RatiosPart, headline: str) -> None:
    report = _bench()
    part = (report.against or {})["eager"].model_copy(update={"ratios": ratios})
    saved = SavedReport(report.model_copy(update={"against": {"eager": part}}))
    assert summarize(saved).headline == headline
    assert headline in html(saved)
    assert headline in markdown(saved)


def test_headline_says_that_results_differ() -> None:
    report = _bench()
    part = (report.against or {})["eager"]
    wrong = part.model_copy(update={"parity": part.parity.model_copy(update={"equal": False})})
    summary = summarize(SavedReport(report.model_copy(update={"against": {"eager": wrong}})))
    assert summary.headline.endswith("THE RESULTS DIFFER.")
    assert summary.tone == "bad"


def test_headline_of_training_has_the_gain() -> None:
    assert summarize(_trained()).headline == (
        "The loss fell from 5.0000 to 2.5000 in 400 steps; "
        "against eager: 1.31x speed, 0.43x memory (measured)."
    )


def test_arms_of_one_op_alone_have_charts_of_their_own() -> None:
    alone = Arm(name="eager+rope", step_ms=300.0)
    report = _bench()
    report = report.model_copy(update={"arms": [*(report.arms or []), alone]})
    time = arm_charts(report)[0]
    assert [(bar.name, bar.text, bar.low, bar.high) for bar in time.bars] == [
        ("eager", "358.3 ms", 353.3, 367.3),
        ("patched", "256.9 ms", 251.89999999999998, 265.9),
        ("compile", "out of memory", None, None),
    ]


def test_loss_charts_show_both_arms_and_what_lies_between() -> None:
    losses, difference, norms = loss_charts(_bench())
    assert list(losses.lines) == list(norms.lines) == ["eager", "patched"]
    assert difference.lines["allowed"] == {1: 2.0, 2: 2.0, 3: 2.0}
    assert difference.lines["patched against eager"] == {1: 0.0, 2: 0.0, 3: 0.0}
    assert losses.alternative == (
        "Loss of each step, loss, nats a token: eager from 5 at step 1 to 4 at 3, between 4 and 5; "
        "patched from 5 at step 1 to 4 at 3, between 4 and 5"
    )


@pytest.mark.parametrize(
    ("sets", "names"),
    [
        ((), ["evaluation"]),
        (("a",), ["evaluation of a"]),
        (("a", "b.c"), ["evaluation of a", "evaluation of b.c", "evaluation of all sets"]),
    ],
)
def test_step_charts_have_a_curve_of_each_evaluation_set(sets, names) -> None:
    figures = ("loss", "perplexity", "token_accuracy", "entropy", "tokens")
    rows = [
        {"step": step}
        | {f"eval_{key}": 0.5 + step for key in figures}
        | {f"eval_{name}_{key}": step for name in sets for key in figures}
        for step in (2, 4)
    ]
    steps = [{"step": step, "loss": 5.0} for step in range(1, 5)]
    loss, accuracy = step_charts(steps, rows)
    assert list(loss.lines) == ["each step", *names]
    assert list(accuracy.lines) == names
    for name in names:
        one = name.removeprefix("evaluation").removeprefix(" of ")
        expected = {2: 2, 4: 4} if one in sets else {2: 2.5, 4: 4.5}
        assert loss.lines[name] == expected
        assert accuracy.lines[name] == {step: 100 * value for step, value in expected.items()}


def test_step_charts_leave_gaps_and_add_a_mean_where_steps_are_many() -> None:
    saved = _trained(100)
    loss, _, norms, *_ = step_charts(saved.steps, saved.evaluations)
    assert list(loss.lines) == ["each step", "mean of 10 steps", "evaluation"]
    assert loss.lines["mean of 10 steps"][100] == pytest.approx(
        sum(row["loss"] for row in saved.steps[-10:]) / 10
    )
    assert 2 not in norms.lines["Gradient"]
    assert step_charts(saved.steps[:1], ()) == []


def test_long_curves_keep_their_extremes() -> None:
    points = dict.fromkeys(range(1, 100_001), 1.0) | {5000: 9.0}
    svg = curves_svg(Curves("step", "loss", {"loss": points}, title="Loss"))
    assert len(svg) < 30_000
    (band,) = re.findall('class="band s1" d="M([^"]*)"', svg)
    heights = {float(point.split()[1]) for point in band.split("L")}
    assert len(heights) == 2


@pytest.mark.parametrize("values", [{1: 0.0, 2: 0.0}, {7: 3.0}, {1: -2.0, 2: 1e6}, {1: 1e-9}])
def test_curves_of_any_range_have_axes(values: dict[int, float]) -> None:
    svg = curves_svg(Curves("step", "loss", {"loss": values}, title="Loss"))
    assert svg.count('class="tick"') >= 3
    assert "nan" not in svg
    numbers = [float(y) for y in re.findall(r'cy="([-\d.]+)"', svg)]
    assert all(0 <= y <= 240 for y in numbers)


def test_steps_are_counted_in_whole_numbers() -> None:
    losses = {1: 2.0, 2: 1.5, 3: 1.25}
    svg = curves_svg(Curves("step", "loss", {"loss": losses}, title="Loss"), width=1040)
    assert re.findall(r'text-anchor="middle">([^<]*)<', svg) == ["1", "2", "3"]


def test_settings_begin_with_those_that_were_changed() -> None:
    found = settings({"max_length": 1024, "learning_rate": 0.001, "model": "x", "repeats": 2})
    assert [(s.key, s.value, s.default, s.is_default) for s in found] == [
        ("learning_rate", "0.001", "5e-05", False),
        ("model", "x", None, False),
        ("repeats", "2", None, False),
        ("max_length", "1024", "1024", True),
    ]
    assert found[0].meaning


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as training leaves it."""
    saved = _trained(5)
    saved.report.write(tmp_path / "run/report.json")
    for name, rows in (("metrics", saved.steps), ("eval", saved.evaluations)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"run/{name}.jsonl").write_text(lines)
    return tmp_path / "run"


def test_report_of_a_run(liger: Any, run: Path) -> None:
    plain = liger("report", run)
    assert (plain.code, plain.err) == (0, "")
    assert plain.out.endswith("against eager: 1.31x speed, 0.43x memory (measured)\n")
    assert not (run / "report.html").exists()

    assert liger("report", run, "--html").code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Over the steps" in page

    named = liger("report", run / "report.json", "--html", run / "x/page.html", "--markdown")
    assert (run / "x/page.html").read_text(encoding="utf-8") == page
    assert named.out.startswith("## Training of llama\n")
    assert "| learning_rate | 0.001 | 5e-05 |" in named.out
    assert named.err == f"wrote {run / 'x/page.html'}\n"

    liger("report", "--markdown", run / "pull.md", run)
    assert (run / "pull.md").read_text(encoding="utf-8") + "\n" == named.out


def test_report_of_a_run_that_is_not_finished(liger: Any, run: Path) -> None:
    (run / "report.json").unlink()
    (run / "eval.jsonl").unlink()
    rows = [{**row, "tokens": 10, "trained_tokens": 5, "step_ms": 8.0} for row in _steps(5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text("model: llama\n")
    out = liger("report", run, "--markdown").out
    assert "**Not finished. The loss fell from 5.0100 to 1.0500 in 5 steps.**" in out


def test_a_command_writes_its_page_beside_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_report(_bench(), as_json=True, html=tmp_path / "new/bench.html")
    assert json.loads(capsys.readouterr().out)["command"] == "bench"
    assert (tmp_path / "new/bench.html").read_text(encoding="utf-8") == html(PAGES["bench"])


def test_report_draws_pictures(liger: Any, run: Path) -> None:
    pytest.importorskip("matplotlib")
    out = liger("report", run, "--png", run / "pictures")
    assert out.code == 0
    names = {path.name for path in (run / "pictures").iterdir()}
    assert {"loss.png", "learning-rate.png", "peak-memory.png"} <= names
    bench = run / "bench.json"
    bench.write_text(_bench().to_json())
    assert liger("report", bench, "--png", run / "one.png").code == 0
    assert (run / "one.png").read_bytes().startswith(b"\x89PNG")


def test_report_reads_the_older_bench(liger: Any) -> None:
    out = liger("report", OLD_REPORT, "--markdown").out
    assert out.startswith("## llama-1b: patched against eager\n")
    assert "**Patched is 1.39x faster than eager, with 53% less peak memory;" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no report: it is not JSON"),
        ("[]", "is no report: report: schema_version is None, expected 1"),
        ('{"schema_version": 2}', "schema_version is 2, expected 1"),
        (
            '{"schema_version": 1, "command": "bench", "later": 1}',
            "is no report that this version reads: later:",
        ),
        ('{"command": "bench ops"}', "its --markdown FILE writes the tables"),
        (
            '{"schema_version": 1, "command": "estimate"}',
            "liger estimate writes JSON of another kind",
        ),
        (None, "cannot be read: No such file or directory"),
    ],
    ids=["not_json", "no_report", "newer", "unknown_part", "bench_ops", "estimate", "missing"],
)
def test_report_refuses_what_it_cannot_read(
    liger: Any, tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    out = liger("report", path)
    assert out.code == 2
    assert message in out.err
