"""Draw the picture of the README: step time and peak memory of a training step, side by side.

python scripts/readme_picture.py    reads docs/results/bench-llama-1b-h200.json, writes the PNG

Needs matplotlib, which the plots extra installs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs" / "results" / "bench-llama-1b-h200.json"
PICTURE = ROOT / "docs" / "images" / "llama-1b-step.png"

# Arms of the report from the lowest bar to the highest, and their labels.
SIDES = {
    "eager": "transformers",
    "compile": "torch.compile, by layer",
    "liger-kernel": "liger-kernel {note}",
    "patched": "liger",
}
GREY, GREEN = "#b8c0c8", "#1a7f5a"


def title(report: dict[str, Any]) -> str:
    """Describe what ran: model, batch, precision, card, versions and date."""
    config, machine = report["config"], report["environment"]
    return (
        f"Llama 3.2 1B, full fine-tuning, {config['per_device_train_batch_size']} x "
        f"{config['max_length']} tokens, bf16, one {machine['devices'][0]['name']}\n"
        f"torch {machine['torch']}, transformers {machine['transformers']}, {machine['date']}"
    )


def draw_bars(axes: Any, labels: list[str], values: list[float], unit: str, digits: int) -> None:
    """Draw one bar a side with its value at the end, ours in green."""
    colors = [GREEN if label == SIDES["patched"] else GREY for label in labels]
    bars = axes.barh(labels, values, color=colors, height=0.62)
    axes.bar_label(bars, [f"{value:.{digits}f} {unit}" for value in values], padding=4, fontsize=9)
    axes.set_xlim(0, max(values) * 1.25)
    axes.set_xticks([])
    axes.tick_params(left=False, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    report = json.loads(SOURCE.read_text(encoding="utf-8"))
    arms = {arm["name"]: arm for arm in report["arms"]}
    labels = [label.format(note=arms[name]["note"] or "") for name, label in SIDES.items()]
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 2.4), sharey=True)
    draw_bars(time, labels, [arms[name]["step_ms"] for name in SIDES], "ms", 0)
    draw_bars(memory, labels, [arms[name]["peak_memory_bytes"] / 1e9 for name in SIDES], "GB", 1)
    time.set_title("step time", fontsize=10, loc="left")
    memory.set_title("peak memory", fontsize=10, loc="left")
    figure.suptitle(title(report), fontsize=9, x=0.01, ha="left", color="#444444")
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(PICTURE, dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    main()
