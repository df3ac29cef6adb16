"""Tables and chart of a comparison of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from liger_cli.commands.compare.runs import Comparison, LossDifference
from liger_cli.common.numbers import format_bytes, format_count
from liger_cli.common.text import shorten
from liger_cli.report.console import make_console, print_line, show_json
from liger_cli.report.evaluation import parts_by_name
from liger_cli.report.plots import Chart
from liger_cli.report.run_files import Run
from liger_cli.report.tables import Table

__all__ = ["loss_chart", "show_comparison"]


def show_comparison(comparison: Comparison, *, as_json: bool) -> None:
    """Print the comparison: the JSON alone to stdout, or the tables."""
    if as_json:
        show_json(comparison.to_dict())
        return
    console = make_console(stderr=False)
    tables = [_figures_table(comparison.runs), _settings_table(comparison)]
    for table in tables:
        if table.rows:
            console.print(table)
            console.print()
    base = comparison.runs[0]
    for run, difference in zip(comparison.runs[1:], comparison.differences, strict=True):
        print_line(console, f"{run.name} against {base.name}: {_verdict(base, run, difference)}")


def loss_chart(comparison: Comparison) -> Chart:
    """Return the losses of training as lines, and those of evaluations as marks on them."""
    return Chart(
        "step",
        "loss",
        lines={run.name: run.losses for run in comparison.runs},
        marks={run.name: run.eval_losses for run in comparison.runs},
        marks_label="evaluation",
    )


def _figures_table(runs: list[Run]) -> Table:
    figures = [_figures(run) for run in runs]
    names = dict.fromkeys(name for column in figures for name in column)
    rows = [(name, *(column.get(name, "-") for column in figures)) for name in names]
    return Table("runs", ("", *(run.name for run in runs)), rows)


def _figures(run: Run) -> dict[str, str]:
    """Return the figures of a run by name, in the order of the table."""
    report = run.report
    figures = {"state": _state(run)}
    if (train := report.train) is not None:
        figures |= {
            "first loss": _number(train.first_loss),
            "final loss": _number(train.final_loss),
        }
    for name, part in parts_by_name(report).items():
        label = f"eval {name}".strip()
        figures[f"{label} loss"] = _number(part.loss)
        if part.tokens is not None and part.pairs is None and part.answers is None:
            figures[f"{label} perplexity"] = _number(part.perplexity, digits=2)
        figures |= {f"{label} {key}": _number(value) for key, value in part.means.items()}
        if part.token_accuracy is not None:
            figures[f"{label} token accuracy"] = f"{part.token_accuracy:.1%}"
    if (best := report.best) is not None:
        figures[f"best {best.metric}"] = f"{best.value:.4f} after step {best.step}"
    if train is not None:
        figures |= {
            "tokens/s": "-" if train.tokens_per_s is None else format_count(train.tokens_per_s),
            "step ms": _number(train.step_ms, digits=1),
            "peak memory": format_bytes(train.peak_memory_bytes or 0),
        }
    for op, counts in (report.coverage or {}).items():
        figures[op] = f"{counts['patched']}/{counts['candidates']}"
    devices = (report.environment or {}).get("devices") or []
    if devices:
        figures["device"] = ", ".join(str(device.get("name")) for device in devices)
    return figures


def _state(run: Run) -> str:
    steps = len(run.losses)
    if run.report.stop is not None:
        return f"stopped early, {steps} steps"
    return f"{'finished' if run.is_finished else 'not finished'}, {steps} steps"


def _settings_table(comparison: Comparison) -> Table:
    rows = [
        (key, *(shorten(_yaml_word(value), 40) for value in values))
        for key, values in comparison.settings.items()
    ]
    return Table("settings", ("setting", *(run.name for run in comparison.runs)), rows)


def _yaml_word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _verdict(base: Run, run: Run, difference: LossDifference) -> str:
    return "; ".join([*_ratios(base, run), _loss_words(difference)])


def _ratios(base: Run, run: Run) -> Iterator[str]:
    ours, theirs = run.report.train, base.report.train
    if ours is None or theirs is None:
        return
    if ours.tokens_per_s and theirs.tokens_per_s:
        yield f"{ours.tokens_per_s / theirs.tokens_per_s:.2f}x speed"
    if ours.peak_memory_bytes and theirs.peak_memory_bytes:
        yield f"{ours.peak_memory_bytes / theirs.peak_memory_bytes:.2f}x memory"


def _loss_words(difference: LossDifference) -> str:
    if difference.max is None or difference.mean is None:
        return "no step in common"
    if difference.first_step is None:
        return f"losses equal to the bit at all {difference.steps} common steps"
    return (
        f"losses first differ at step {difference.first_step}; over {difference.steps} common "
        f"steps by {difference.mean:.2g} on average and {difference.max:.2g} at most, "
        f"at step {difference.max_step}"
    )


def _number(value: float | None, *, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
