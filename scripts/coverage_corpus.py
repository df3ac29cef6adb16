"""Build every causal-LM and image-text type of the installed transformers tiny, patch it, compare.

python scripts/coverage_corpus.py                              writes docs/coverage.md, minutes
python scripts/coverage_corpus.py --types llama,mixtral --output /dev/stdout
python scripts/coverage_corpus.py --rows-with xperts           again, the types whose rows say so

A type is patched with ops="all", by its row or by recognition, and a training step in fp32 on text
and one on images, where the type takes them, are compared with the stock model's: loss and every
gradient, with dropout and the same random numbers. Each type runs in a separate process, so that a
hang or a crash is a line of the result.
Exit code 7 if some patched model differs from stock or fails where stock runs.
"""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import json
import multiprocessing
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
import tiny_models
import torch
import transformers
from torch import nn

from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.patching.plan import PATCH_OPS

ROOT = Path(__file__).parents[1]
# Of the largest number of each gradient, or a hundredth of the model's largest: some gradients are
# zero but for rounding.
TOLERANCE = 1e-4
SMALL = 0.01
# Some stock gradients are only this good in fp32; ours may then be twice as far from fp64.
MOST_NOISE = 0.02
# Between what made the page and what made some of its rows.
_AGAIN = " Again since: "
HEADINGS = {
    "equal": "patched, loss and every gradient equal to stock",
    "refused": "built, nothing patched, every candidate refused with a reason",
    "different": "patched, and not equal to stock",
    "failed": "patched, and does not run though stock does; or no result in time",
    "not built": "no tiny model of the type that trains on text or on images",
}


@dataclass(frozen=True)
class Row:
    """The result of one model type."""

    model_type: str
    verdict: str
    # Why it was not built or failed, or where it differs.
    detail: str = ""
    source: str = ""
    coverage: dict[str, dict[str, int]] = field(default_factory=dict)
    # Inputs it was trained on: "text", "image".
    inputs: list[str] = field(default_factory=list)
    # Modules folded: [op or None, class, reason, count], and patched but not reached by a step.
    skips: list[list[Any]] = field(default_factory=list)
    not_run: list[list[Any]] = field(default_factory=list)
    loss_error: float = 0.0
    grad_error: float = 0.0
    seconds: float = 0.0


# One type -------------------------------------------------------------------------------------


@dataclass
class Step:
    """The loss and the gradients of one training step."""

    loss: float
    grads: dict[str, torch.Tensor]


def train_step(model: nn.Module, batch: dict[str, Any]) -> Step:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    loss = model(**batch).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(loss.item(), grads)


def difference(ours: Step, stock: Step) -> tuple[float, float, str]:
    """Return the relative error of the loss, the largest of a gradient, and that one's name."""
    loss_error = abs(ours.loss - stock.loss) / max(abs(stock.loss), 1e-30)
    if ours.grads.keys() != stock.grads.keys():
        return loss_error, float("inf"), min(ours.grads.keys() ^ stock.grads.keys())
    largest = max((g.abs().max().item() for g in stock.grads.values()), default=0.0)
    worst = (0.0, "")
    for name, wanted in stock.grads.items():
        scale = max(wanted.abs().max().item(), SMALL * largest, 1e-30)
        worst = max(worst, ((ours.grads[name] - wanted).abs().max().item() / scale, name))
    return loss_error, *worst


def is_noise(model: nn.Module, batch: dict[str, Any], ours: Step, stock: Step) -> bool:
    """Return whether the two differ by rounding alone, judged by the stock model in fp64."""
    try:
        truth = train_step(copy.deepcopy(model).double(), _double(batch))
    except RuntimeError:
        # Some stock models cast to fp32 inside.
        return False
    error, noise = (max(difference(step, truth)[:2]) for step in (ours, stock))
    return noise <= MOST_NOISE and error <= 2 * noise + TOLERANCE


def _double(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def check(model_type: str) -> Row:
    """Build a type, patch it and compare a training step on each input with stock; then undo."""
    try:
        tiny = tiny_models.build(model_type)
        model, batches = tiny.model, tiny.batches
        stock = {kind: train_step(model, batch) for kind, batch in batches.items()}
    except Exception as problem:
        return Row(model_type, "not built", f"{type(problem).__name__}: {problem}")
    noise = max(
        max(difference(train_step(model, batch), stock[kind])[:2])
        for kind, batch in batches.items()
    )
    if not noise <= TOLERANCE:
        return Row(model_type, "not built", f"stock differs from itself by {noise:.0e}")
    try:
        record = apply_liger_kernel(model, ops="all")
        with record.count_calls():
            ours = {kind: train_step(model, batch) for kind, batch in batches.items()}
        record.undo()
        undone = {kind: train_step(model, batch) for kind, batch in batches.items()}
    except Exception as problem:
        return Row(model_type, "failed", f"{type(problem).__name__}: {problem}")
    errors = {kind: difference(ours[kind], stock[kind]) for kind in batches}
    detail = ""
    for kind, (loss_error, grad_error, name) in errors.items():
        is_same = max(loss_error, grad_error) <= TOLERANCE
        if not is_same and not is_noise(model, batches[kind], ours[kind], stock[kind]):
            detail = f"{kind}: loss {loss_error:.0e}, gradient {grad_error:.0e} at {name}"
        elif not max(difference(undone[kind], stock[kind])[:2]) <= noise:
            detail = detail or "not as it was after undo()"
    return Row(
        model_type,
        "different" if detail else "equal" if record.patches else "refused",
        detail,
        record.plan.source,
        record.plan.coverage,
        list(batches),
        _fold((skip.op, skip.module_class, skip.reason) for skip in record.skipped),
        _fold(
            (patch.op, patch.module_class, "patched, not reached by these inputs")
            for patch in record.patches
            if patch.name in record.unused
        ),
        max(loss_error for loss_error, _, _ in errors.values()),
        max(grad_error for _, grad_error, _ in errors.values()),
    )


def _fold(entries: Iterable[tuple[str | None, str, str]]) -> list[list[Any]]:
    counts = collections.Counter(entries)
    return [[*entry, count] for entry, count in sorted(counts.items(), key=str)]


# All types ------------------------------------------------------------------------------------


def _work(connection: Connection, model_type: str) -> None:
    # Libraries print from C++ too; what counts goes through the pipe.
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        row = check(model_type)
    except Exception as problem:
        row = Row(model_type, "failed", f"{type(problem).__name__}: {problem}")
    connection.send(row)


def run_type(model_type: str, context: Any, timeout_s: float) -> Row:
    """Check a type in a separate process and return its row."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, model_type), daemon=True)
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout_s):
            row = receiver.recv()
        else:
            row = Row(model_type, "failed", f"no result after {timeout_s:.0f} seconds")
    except EOFError:
        process.join()
        row = Row(model_type, "failed", f"its process ended with code {process.exitcode}")
    process.kill()
    process.join()
    seconds = round(time.perf_counter() - start, 1)
    return Row(**{**asdict(row), "seconds": seconds})


def run_types(types: Iterable[str], *, num_jobs: int, timeout_s: float) -> list[Row]:
    # Forked from a process that has imported everything and run nothing: a tenth of a second each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["liger_kernels.transformers.api", "torch._dynamo", "transformers.generation"]
    )
    rows = []
    with ThreadPoolExecutor(num_jobs) as pool:
        for row in pool.map(lambda name: run_type(name, context, timeout_s), types):
            line = f"{row.model_type:32} {row.verdict:10} {_cell(row.detail)[:100]}"
            print(line.rstrip(), file=sys.stderr)
            rows.append(row)
    return rows


# The page -------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {
        "date": str(datetime.date.today()),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def render(rows: list[Row], facts: dict[str, str], seconds: float, command: str) -> str:
    """Return the page in markdown."""
    counts = collections.Counter(row.verdict for row in rows)
    built = [row for row in rows if row.verdict != "not built"]
    made = (
        f"Made on {facts['date']} by `{command}` in {seconds:.0f} seconds; do not edit. "
        f"transformers {facts['transformers']}, torch {facts['torch']}, Python {facts['python']}, "
        "on a CPU in fp32."
    )
    totals = [
        f"| {len(rows)} | tried | |",
        f"| {len(built)} | built | |",
        f"| {sum('image' in row.inputs for row in built)} | trained on images | |",
        *(f"| {counts[name]} | {name} | {meaning} |" for name, meaning in HEADINGS.items()),
    ]
    missing = [
        f"| {row.model_type} | {_cell(row.detail)} |" for row in rows if row.verdict == "not built"
    ]
    return layout(made, totals, list(map(_built_line, built)), missing)


def layout(made: str, totals: list[str], built: list[str], missing: list[str]) -> str:
    """Return the page from its lines: the totals first, each long table folded."""
    lines = [
        "# Model types tried",
        "",
        "| types | | |",
        "|---:|---|---|",
        *totals,
        "",
        made,
        "",
        "Each causal-LM and image-text type of transformers is built tiny with random weights and "
        'patched by `apply_liger_kernel(model, ops="all")`; a training step on text, and one on '
        "images where the type takes them, are compared with the stock model's. Equal means within "
        f"{TOLERANCE:.0e} of the largest number of each gradient or, where fp32 itself is no "
        "better, no more than twice as far from fp64.",
        "",
        "## Built",
        "",
        "Patched / candidates for each op. *row*: the type is listed in `families.py`; "
        "*recognised*: everything was found by what the modules compute. Skipped modules are "
        "left alone: candidates of an op with the op in brackets, the others of none. "
        "Not run: patched, and reached by none of the steps.",
        "",
        *_folded(
            f"{len(built)} types",
            "| type | found by | trained on | patched | skipped, and why | result |",
            "|---|---|---|---|---|---|",
            *built,
        ),
        "## Not built",
        "",
        *_folded(f"{len(missing)} types", "| type | why |", "|---|---|", *missing),
    ]
    return "\n".join(lines)


def types_with(page: str, text: str) -> list[str]:
    """Return the built types whose row of the page has a text, in the order of the page."""
    rows = (line for line in page.splitlines() if line.count(" | ") >= 5 and text in line)
    found = (row.split(" | ")[0].removeprefix("| ") for row in rows)
    return [name for name in found if name in tiny_models.MODEL_CLASSES]


def replace_rows(page: str, rows: list[Row], made: str) -> str:
    """Return the page with other rows of some types, which have the result that they had.

    Raises:
        ValueError: One has another result, so that the totals of the page would be wrong.
    """
    lines = page.splitlines()
    for row in rows:
        [at] = [i for i, line in enumerate(lines) if line.startswith(f"| {row.model_type} | ")]
        new = _built_line(row)
        if lines[at].rpartition(" | ")[2] != new.rpartition(" | ")[2]:
            raise ValueError(f"{row.model_type} has another result: {row.verdict} {row.detail}")
        lines[at] = new
    [at] = [i for i, line in enumerate(lines) if line.startswith("Made on ")]
    lines[at] = f"{lines[at].partition(_AGAIN)[0]}{_AGAIN}{made}."
    return "\n".join([*lines, ""])


def _folded(summary: str, *table: str) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *table, "", "</details>", ""]


def _built_line(row: Row) -> str:
    coverage = ", ".join(
        f"{op} {row.coverage[op]['patched']}/{row.coverage[op]['candidates']}"
        for op in PATCH_OPS
        if op in row.coverage
    )
    reasons = "<br>".join(
        f"{count} {cls}{f' ({op})' if op else ''}: {_cell(reason)}"
        for op, cls, reason, count in (*row.skips, *row.not_run)
    )
    counts = {
        "skipped": sum(count for *_, count in row.skips),
        "not run": sum(count for *_, count in row.not_run),
    }
    total = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    skipped = f"<details><summary>{total}</summary>{reasons}</details>" if total else "none"
    result = row.verdict if not row.detail else f"**{row.verdict}**: {_cell(row.detail)}"
    cells = (row.model_type, row.source, ", ".join(row.inputs), coverage or "none", skipped, result)
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= 200 else f"{line[:197]}..."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", help="model types, separated by commas; default: all")
    parser.add_argument("--rows-with", help="the types whose row of --output has this; replace it")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--json", type=Path, help="also write the rows as JSON")
    parser.add_argument("--jobs", type=int, default=1, help="types at a time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one type")
    options = parser.parse_args()
    types = options.types.split(",") if options.types else sorted(tiny_models.MODEL_CLASSES)
    if options.rows_with:
        types = types_with(options.output.read_text(), options.rows_with)
    unknown = [name for name in types if name not in tiny_models.MODEL_CLASSES]
    if unknown:
        parser.error(f"no causal-LM or image-text type: {', '.join(unknown)}")
    start = time.perf_counter()
    rows = run_types(types, num_jobs=options.jobs, timeout_s=options.timeout)
    command = "python scripts/coverage_corpus.py"
    if options.types:
        command += f" --types {options.types}"
    seconds, facts = time.perf_counter() - start, environment()
    if options.rows_with:
        versions = f"{facts['date']}, transformers {facts['transformers']}, torch {facts['torch']}"
        made = f"`{command} --rows-with {options.rows_with}`, {len(rows)} types, {versions}"
        page = replace_rows(options.output.read_text(), rows, made)
    else:
        page = render(rows, facts, seconds, command)
    options.output.write_text(page)
    if options.json:
        document = {"environment": environment(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1))
    return 7 if any(row.verdict in ("different", "failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
