"""Results of evaluations, as a table of the sets and as lines."""

from __future__ import annotations

from collections.abc import Mapping

from liger_cli.common.numbers import format_count
from liger_cli.report.bench import loss_text
from liger_cli.report.tables import Table
from liger_cli.report.values import EvalPart, RunReport

__all__ = ["classes_table", "eval_lines", "eval_table", "eval_texts", "parts_by_name"]

_FIGURES = ("loss", "perplexity", "token accuracy", "entropy", "tokens")


def eval_table(report: RunReport) -> Table | None:
    """Return the figures of each evaluation set, and of all together; None without named sets."""
    if not report.eval_sets:
        return None
    words = {name: _words(part) for name, part in parts_by_name(report).items()}
    more = [key for one in words.values() for key in one if key not in _FIGURES]
    keys = list(dict.fromkeys((*_FIGURES[:-1], *more, _FIGURES[-1])))
    rows = [(name, *(one.get(key, "") for key in keys)) for name, one in words.items()]
    return Table.with_used_columns("Evaluation", ("evaluation", *keys), rows)


def eval_lines(report: RunReport) -> list[str]:
    """Return the result of data without names, the best evaluation and an early stop."""
    lines = [] if report.eval_sets else eval_texts(report)
    if report.stop is not None:
        lines.append(
            f"stopped after step {report.stop.step}: {report.stop.evaluations} evaluations in turn "
            "were no better"
        )
    if (best := report.best) is not None:
        place = f": {best.checkpoint}" if best.checkpoint else ", which was not saved"
        lines.append(f"best {best.metric} {best.value:.4f} after step {best.step}{place}")
    return lines


def eval_texts(report: RunReport) -> list[str]:
    """Return the figures of each evaluation set, and of all together, in a line each."""
    lines = []
    for name, part in parts_by_name(report).items():
        *figures, (what, count) = _words(part).items()
        words = [name] if name else []
        words += [f"{key} {text}" for key, text in figures]
        lines.append("  ".join([*words, f"{count} {what}"]))
    return lines


def classes_table(report: RunReport) -> Table | None:
    """Return the F1 of each class, and what its rows were taken for; None without classes."""
    if report.eval is None:
        return None
    f1 = {k.removeprefix("f1/"): v for k, v in report.eval.means.items() if k.startswith("f1/")}
    if not f1:
        return None
    counts = report.eval.confusion or [[] for _ in f1]
    heads = [f"as {name}" for name in f1] if report.eval.confusion else []
    rows = [
        (name, _figure(value), *map(format_count, row))
        for (name, value), row in zip(f1.items(), counts, strict=True)
    ]
    return Table("Classes", ("class", "f1", *heads), rows)


def parts_by_name(report: RunReport) -> Mapping[str, EvalPart]:
    """Return the results of each set and of all together; data without a name have ""."""
    if report.eval is None:
        return {}
    if not report.eval_sets:
        return {"": report.eval}
    # Of one set with a name, all together would say the same again.
    is_one = len(report.eval_sets) == 1
    return report.eval_sets if is_one else {**report.eval_sets, "all sets": report.eval}


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _words(part: EvalPart) -> dict[str, str]:
    words = {"loss": loss_text([part.loss])}
    if part.perplexity is not None:
        words["perplexity"] = f"{part.perplexity:.2f}"
    if part.token_accuracy is not None:
        words["token accuracy"] = f"{part.token_accuracy:.1%}"
    if part.entropy is not None:
        words["entropy"] = f"{part.entropy:.2f}"
    for key, value in part.means.items():
        # Those of each class are in a table.
        if not key.startswith("f1/"):
            words[key] = _figure(value)
    if part.pairs is not None:
        words["pairs"] = format_count(part.pairs)
    if part.answers is not None:
        words["answers"] = format_count(part.answers)
    if part.rows is not None:
        words["rows"] = format_count(part.rows)
    if part.tokens is not None:
        words["tokens"] = format_count(part.tokens)
    return words
