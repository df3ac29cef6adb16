"""Write docs/performance.md from the measurements in docs/results.

python scripts/performance_page.py            writes the page
python scripts/performance_page.py --check    says whether it is up to date, exit 1 if not

ops-*.json are reports of `liger bench ops`, bench-*.json those of `liger bench`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from liger_cli.report import RunReport, format_bytes, format_count, verdict
from liger_cli.report_ops import OpsReport, Table, markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "performance.md"

_HEAD = """# Performance

Made from the measurements in `docs/results` by `python scripts/performance_page.py`; do not edit.

`make bench` repeats all of it on the machine it runs on, and on one with a GPU writes the
measurements and this page. With `PEER_PATH=DIR`, a folder made by
`pip install --no-deps --target DIR liger-kernel`, or `PEER_PYTHON=FILE`, a Python that has it,
liger-kernel takes its turn in every round.

How to read the tables:

- An op is compared with its fp64 reference (fp32 where that does not fit the card) on the very
  shape that is timed: every output and every gradient, ours and eager. An op that is worse than
  twice eager plus half an ulp gets no figures.
- The sides take turns, round by round. Times are medians with the 20th and 80th percentile, the L2
  cache flushed before each call. "full" is forward and backward as a stream sees it: where the host
  is slower than the card, that counts. "GPU" is the same without the host.
- "share" is the least work of the op over its GPU time and the limit of the hardware, measured in
  the same run: bytes over the rate of a copy, or FLOPs over the rate of a matrix product. A loss of
  given logits is counted as one read and one write, since its gradient is made in forward.
- "transient" is what a forward and its backward add to the allocated memory at most, gradients
  included. Ours never writes into its inputs; a side that does says so.
- Cards and hosts differ by 10 to 15 %. Compare figures of one run, and look at ratios.
"""

_NO_OPS = """
## Ops

No run of `liger bench ops` on a GPU is recorded yet.
"""

_STEP_COLUMNS = ("side", "tokens/s", "step ms", "peak", "speed", "memory")


def page(results: Path = RESULTS) -> str:
    """Return the text of docs/performance.md."""
    parts = [_HEAD]
    for path in sorted(results.glob("ops-*.json")):
        report = OpsReport.from_json(path.read_text())
        parts.append("\n" + markdown(report, heading=f"Ops on {report.device}"))
    if len(parts) == 1:
        parts.append(_NO_OPS)
    steps = sorted(results.glob("bench-*.json"))
    if steps:
        parts.append("\n## Whole training steps\n")
    for path in steps:
        parts.append("\n" + _step(RunReport.from_json(path.read_text())))
    return "".join(parts).rstrip() + "\n"


def _step(report: RunReport) -> str:
    """Return one comparison of `liger bench`: every side, against the first, which is eager."""
    config, where, arms = report.config or {}, report.environment or {}, report.arms or []
    versions = [f"{name} {where.get(name)}" for name in ("torch", "triton", "transformers")]
    device = where["devices"][0]["name"]
    size = f"{config['per_device_train_batch_size']} x {config['max_length']}"
    lines = [
        f"    {', '.join([device, *versions])}",
        f"    $ liger bench --model {config['model']}",
    ]
    base = arms[0]
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        rows.append(
            (
                arm.name,
                "" if arm.tokens_per_s is None else format_count(arm.tokens_per_s),
                "" if arm.step_ms is None else f"{arm.step_ms:.1f}",
                "" if arm.peak_memory_bytes is None else format_bytes(arm.peak_memory_bytes),
                _times(arm.tokens_per_s, base.tokens_per_s),
                _times(arm.peak_memory_bytes, base.peak_memory_bytes),
            )
        )
    table = Table(f"{config['model']}, {size} tokens a step", _STEP_COLUMNS, rows)
    title, _, rest = table.markdown().partition("\n")
    text = "\n".join([title, "", *lines, rest])
    if report.ratios is not None and report.parity is not None:
        text += f"\n{verdict(report.ratios, report.parity)}.\n"
    return text


def _times(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value is not None and base else ""


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
