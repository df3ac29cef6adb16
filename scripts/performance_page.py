"""Write docs/performance.md from the measurements in docs/results.

python scripts/performance_page.py            writes the page
python scripts/performance_page.py --check    says whether it is up to date, exit 1 if not

ops-*.json are reports of `liger bench ops`, bench-*.json those of `liger bench`, and packed-*.json
those of scripts/packed_bench.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from liger_cli.commands.bench.ops.tables import OpsReport, Table, markdown
from liger_cli.report import AgainstPart, RunReport, verdict
from liger_cli.report.bench import ARM_COLUMNS, arm_cells
from liger_cli.training.runtime.peer_patch import PEER

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "performance.md"

_HEAD = """# Performance

Made from the measurements in `docs/results` by `python scripts/performance_page.py`; do not edit.
"""

_METHOD = """
`make bench` repeats all of it on the machine it runs on, and on one with a GPU writes the
measurements and this page. With `PEER_PATH=DIR`, a folder made by
`pip install --no-deps --target DIR liger-kernel`, or `PEER_PYTHON=FILE`, a Python that has it,
liger-kernel takes its turn in every round.

## How to read the tables

- An op is compared with its fp64 reference (fp32 where that does not fit the card) on the very
  shape that is timed: every output and every gradient, ours and eager. An op that is worse than
  twice eager plus half an ulp gets no figures.
- The sides take turns, round by round. Times are medians with the 20th and 80th percentile, the L2
  cache flushed before each call. "full" is forward and backward as a stream sees it: where the host
  is slower than the card, that counts. "GPU" is the same without the host.
- "share" is the least work of the op over its GPU time and the limit of the hardware, measured in
  the same run: bytes over the rate of a copy, or FLOPs over the rate of a matrix product. That
  product takes its turn in every round of such an op ("of TFLOP/s"), since a card at its power
  limit slows down within seconds. A loss of given logits is counted as one read and one write,
  since its gradient is made in forward.
- "transient" is what a forward and its backward add to the allocated memory at most, gradients
  included. Ours never writes into its inputs; a side that does says so.
- Cards and hosts differ by 10 to 15 %. Compare figures of one run, and look at ratios.

## Missed targets

The targets are for an H100, and the launch tables were measured on one. The figures of the H100 are
from 2026-11-25; launches cost the host less since, which the H200's have. What bounds the
targets that are missed:

- Norms and RoPE, times of torch, torch.compile or liger-kernel: the kernels need 0.09 to 0.25 ms,
  the host 0.2 to 0.5 ms to start them (an autograd function in Python, the hop to the thread of
  backward, two launches), and these ratios are of wall time. In GPU time ours take 0.25 to 0.62 of
  torch's norms at these shapes, whose host part is C++. In a model the host runs ahead of the card
  and this time is hidden, unless all of its steps are small, as in gemma3-1b below.
- Norms, GeGLU and the loss of given logits, shares on an H200: its memory is 1.4 times as fast, and
  tiles that keep an H100's memory busy leave a part of that unused. `scripts/tune_norms.py` and
  `scripts/tune_losses.py` measure the tables again.
- The fused loss, share of the matrix rate: the card is at its power limit, where the products of a
  chunk alone, without our kernels, stay below the 8192^3 product that is the limit.
- The fused loss, times of liger-kernel's: as the share. On an H200 faster memory helps the side
  that moves more of it.
- The fused loss with 40 % of labels: what is left are smaller products, and the weight and its
  gradient, which are the same for any number of labels.
- The fused loss, memory beside torch.compile: the gradient of the weight is half of what
  torch.compile takes where the batch is small, and it is an output.
- Whole steps of llama-1b and llama-3b: most of the time is products, attention and the optimizer,
  which are the same for all sides. The peak of llama-3b is weights, gradients and moments (25.7 GB)
  and one layer's activations.
- Whole steps, torch.compile: the targets were made for a model compiled as one graph, in which
  transformers gives attention a mask. On the H200 it is compiled by its layers, which keeps the
  flash kernel, and leaves head and loss as they are, which takes more memory. patched+compile is
  then as fast as patched alone and, where the host is the bottleneck, the fastest side.
- gemma3-1b waits for the host in every form but the compiled ones, and the H200's host was slower:
  eager's small layer_norm took it 1086 us there and 837 us on the H100's.
- LoRA: the products with frozen weights and attention are most of the step and the same for all
  sides. Every side computes adapters in the dtype of the frozen layers, as `liger train` does;
  under autocast, as in HF's Trainer, peft casts each activation to float32 and back, and the others
  lose more. What the adapters still cost are passes over activations that products of rank 16 make.
- fused_linear_divergence, share of the matrix rate with a student half as wide as the teacher: the
  kernel reads both logits three times whatever the widths (6 ms of 38), and the products are fewer.
- fused_add_rms_norm at a width of 65536, on the H100, has no target: a row is more than one program
  keeps on the chip, and torch.compile is faster. The H200's run has the widths of real models.
"""

_NO_OPS = """
## Ops

No run of `liger bench ops` on a GPU is recorded yet.
"""

# A table of more than six rows.
_LONG_TABLE = re.compile(r"(?:^\|[^\n]*\n){9,}", re.MULTILINE)
_STEP_COLUMNS = ("side", "tokens/s", "step ms", "p20 - p80", "peak", "speed", "memory", "note")
_TARGET_COLUMNS = ("patched against", "figure", "target (on an H100)", "found", "")


@dataclass(frozen=True)
class StepTarget:
    """A bound on the patched side against another: speed at least, memory at most."""

    against: str
    figure: Literal["speed", "memory"]
    limit: float

    def row(self, part: AgainstPart | None) -> tuple[str, ...]:
        """Return the line of the table, with whether the target is met."""
        found = None if part is None else getattr(part.ratios, self.figure)
        is_floor = self.figure == "speed"
        bound = f"{'>=' if is_floor else '<='} {self.limit:.2f}x"
        if found is None:
            return self.against, self.figure, bound, "not measured", ""
        met = found >= self.limit if is_floor else found <= self.limit
        return self.against, self.figure, bound, f"{found:.2f}x", "met" if met else "MISSED"


_LORA_TARGETS = (StepTarget(PEER, "speed", 1 / 0.75), StepTarget(PEER, "memory", 0.70))

# By model, batch size, sequence length, gradient checkpointing and adapter.
STEP_TARGETS = {
    ("llama-8b", 4, 2048, False, "lora of rank 16"): _LORA_TARGETS,
    ("llama-8b", 4, 2048, False, "lora of rank 64"): _LORA_TARGETS,
    ("qwen3-4b", 8, 1024, False, "lora of rank 16"): _LORA_TARGETS,
    ("llama-8b", 4, 2048, True, "lora of rank 16"): (
        StepTarget(PEER, "speed", 1 / 0.75),
        StepTarget(PEER, "memory", 1.00),
    ),
    ("llama-8b", 4, 2048, False, "lora of rank 16 in 4 bits"): (StepTarget("eager", "speed", 1.3),),
    ("llama-1b", 8, 2048, False, ""): (
        StepTarget(PEER, "speed", 1.10),
        StepTarget("compile", "speed", 1.20),
        StepTarget(PEER, "memory", 0.80),
    ),
    ("llama-3b", 4, 4096, True, ""): (
        StepTarget(PEER, "speed", 1.08),
        StepTarget(PEER, "memory", 0.95),
    ),
}


def page(results: Path = RESULTS) -> str:
    """Return the text of docs/performance.md."""
    ops = [OpsReport.from_json(path.read_text()) for path in sorted(results.glob("ops-*.json"))]
    steps = [RunReport.from_json(path.read_text()) for path in sorted(results.glob("bench-*.json"))]
    parts = [_HEAD, _summary(ops, steps), _METHOD]
    for report in ops:
        heading = f"{_chosen(report) or 'Ops'} on {report.device}"
        parts.append("\n" + fold(markdown(report, heading=heading)))
    if not ops:
        parts.append(_NO_OPS)
    if steps:
        parts.append("\n## Whole training steps\n")
    for step in steps:
        parts.append("\n" + _step(step))
    for path in sorted(results.glob("packed-*.json")):
        parts.append("\n" + _packed(json.loads(path.read_text())))
    return "".join(parts).rstrip() + "\n"


def _summary(ops: list[OpsReport], steps: list[RunReport]) -> str:
    """Return the first lines of the page: a line a comparison, and the targets of the ops."""
    lines = []
    if steps:
        lines += [
            "",
            "Speed and peak memory of the patched model as multiples of each side's, in whole "
            "training steps: 1.20x, 0.50x is a fifth faster in half the memory.",
            "",
            "| model | card | eager | torch.compile | liger-kernel |",
            "| --- | --- | --- | --- | --- |",
            *map(_summary_line, steps),
        ]
    lines += [""] * bool(ops)
    for report in ops:
        met = [target.met for row in report.rows for target in row.targets]
        lines.append(
            f"- {report.device}: {met.count(True)} of {len(met)} targets of "
            f"{_chosen(report) or 'single ops'} are met, {met.count(False)} missed."
        )
    return "\n".join([*lines, ""])


def _chosen(report: OpsReport) -> str:
    """Return the ops of a report that was asked for some by name; all are no name."""
    names = dict.fromkeys(row.op for row in report.rows)
    return ", ".join(names) if "--ops" in report.arguments else ""


def _summary_line(report: RunReport) -> str:
    config, where = report.config or {}, report.environment or {}
    against = report.against or {}
    cells = []
    for side in ("eager", "compile", PEER):
        ratios = against[side].ratios if side in against else None
        if ratios is None and side == "eager":
            ratios = report.ratios
        known = (ratios.speed, ratios.memory) if ratios else ()
        cells.append(", ".join(f"{ratio:.2f}x" for ratio in known if ratio is not None))
    batch, length = config["per_device_train_batch_size"], config["max_length"]
    model = f"{_model_of(config)}, {batch} x {length}"
    if adapter := _adapter_of(config):
        model += f", {adapter}"
    if adapter and config.get("gradient_checkpointing"):
        model += ", checkpointing"
    card = where["devices"][0]["name"].removeprefix("NVIDIA ")
    return f"| {' | '.join([model, card, *cells])} |"


def fold(text: str) -> str:
    """Return markdown in which each long table is folded under a line with its number of rows."""
    return _LONG_TABLE.sub(_folded, text)


def _folded(table: re.Match[str]) -> str:
    rows = table[0].rstrip("\n").split("\n")[2:]
    words = f"{len(rows)} rows"
    met, missed = (sum(row.endswith(f"| {word} |") for row in rows) for word in ("met", "MISSED"))
    if met or missed:
        words += f": {met} met, {missed} missed"
    return f"<details><summary>{words}</summary>\n\n{table[0]}\n</details>\n"


def _model_of(config: Mapping[str, Any]) -> str:
    # Random weights that were written to be quantised are in a folder named as the preset.
    return Path(config["model"]).name.removesuffix(".json")


def _adapter_of(config: Mapping[str, Any]) -> str:
    """Return in words which adapter a comparison trains: "lora of rank 16 in 4 bits", or ""."""
    if config.get("adapter", "none") == "none":
        return ""
    bits = " in 4 bits" if config.get("load_in_4bit") else ""
    bits = " in 8 bits" if config.get("load_in_8bit") else bits
    return f"{config['adapter']} of rank {config['lora_r']}{bits}"


def _adapter_flags(config: Mapping[str, Any]) -> list[str]:
    if config.get("adapter", "none") == "none":
        return []
    words = ["--adapter", config["adapter"], "--lora-r", str(config["lora_r"])]
    keys = ("load_in_4bit", "load_in_8bit")
    return words + [f"--{key.replace('_', '-')}" for key in keys if config.get(key)]


def _step(report: RunReport) -> str:
    """Return one comparison of `liger bench`: every side against the first, then the targets."""
    config, where, arms = report.config or {}, report.environment or {}, report.arms or []
    versions = [f"{name} {where.get(name)}" for name in ("torch", "triton", "transformers")]
    device = where["devices"][0]["name"]
    batch, length = config["per_device_train_batch_size"], config["max_length"]
    checkpoints = bool(config.get("gradient_checkpointing"))
    against = report.against or {}
    model, adapter = _model_of(config), _adapter_of(config)
    words = ["liger", "bench", "--model", model]
    # One that failed or was cut off is compared with nothing, but was asked for.
    others = [arm.name for arm in arms if arm.name != "patched"]
    words += ["--against", ",".join(others)] if against else []
    words += ["--steps", str(config["max_steps"])]
    words += ["--repeats", str(max(arm.runs for arm in arms))]
    words += ["--per-device-train-batch-size", str(batch)] if batch != 8 else []
    words += ["--max-length", str(length)] if length != 2048 else []
    words += _adapter_flags(config)
    words += ["--gradient-checkpointing"] * checkpoints
    # Reports from before the key was there compiled the model as one, which False says now.
    by_layers = config.get("use_regional_compilation", False)
    words += ["--no-use-regional-compilation"] * (by_layers is False and "compile" in against)
    words += ["--peer-path", "DIR"] * (PEER in against)
    dates = [where["date"]] if "date" in where else []
    lines = [f"    {', '.join([device, *versions, *dates])}", f"    $ {' '.join(words)}"]
    rows = [_step_row(arm_cells(arm, arms[0])) for arm in arms]
    title = f"{model}, {batch} x {length} tokens a step"
    title += f", {adapter}" * bool(adapter)
    title += ", with gradient checkpointing" if checkpoints else ""
    used = [i for i in range(len(_STEP_COLUMNS)) if any(row[i] for row in rows)]
    columns = tuple(_STEP_COLUMNS[i] for i in used)
    shown = [tuple(row[i] for i in used) for row in rows]
    heading, _, rest = Table(title, columns, shown).markdown().partition("\n")
    text = "\n".join([heading, "", *lines, rest])
    targets = STEP_TARGETS.get((model, batch, length, checkpoints, adapter), ())
    # Reports from before there were several sides say nothing of the targets.
    if targets and against:
        target_rows = [target.row(against.get(target.against)) for target in targets]
        table = Table("", _TARGET_COLUMNS, target_rows).markdown().partition("\n")[2]
        text += table.rstrip("\n") + "\n"
    if "compile" in against:
        parts = "as one graph" if by_layers is False or checkpoints else "by its layers, one by one"
        text += f"\nSides with compile: torch.compile of the model {parts}.\n"
    verdicts = [part.verdict for part in against.values()]
    if not verdicts and report.ratios is not None and report.parity is not None:
        verdicts = [verdict(report.ratios, report.parity)]
    if verdicts:
        text += "\n<details><summary>in words, with the losses</summary>\n"
        text += "".join(f"\n{words}.\n" for words in verdicts) + "\n</details>\n"
    return text


def _packed(found: Mapping[str, Any]) -> str:
    """Return the section on packed and padding-free rows."""
    where = found["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "transformers", "peft"))
    rows = [
        f"| {key} | {side['ms']:.1f} | {side['trained_tokens_per_s']:,} | {side['peak_gb']:.1f} "
        f"| {side['attention_ms']:.1f} |".replace(",", " ")
        for key, side in found["sides"].items()
        if "ms" in side
    ]
    return "\n".join(
        [
            f"## Packed and padding-free rows on {where['devices'][0]['name']}",
            "",
            f"{where['date']}, {versions}; `{found['command']}`. Each side in a separate process; "
            "documents of lognormal lengths, median 300 tokens (32 rows: 200). Attention: the time "
            "of its kernels in a step.",
            "",
            "| side | step ms | trained tokens/s | peak GB | attention ms |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "```",
            *(line for line in found["lines"] if " nan " not in line),
            "```",
            "",
        ]
    )


def _step_row(cells: tuple[str, ...]) -> tuple[str, ...]:
    """Return the cells of an arm that the page shows."""
    shown = dict(zip(ARM_COLUMNS, cells, strict=True))
    return tuple(shown["arm" if column == "side" else column] for column in _STEP_COLUMNS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif not PAGE.is_file() or PAGE.read_text() != page():
        print(f"{PAGE} is out of date: run python scripts/performance_page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
