"""Fine-tune SmolLM2-135M on the sample conversations: LoRA and all weights, eager and patched.

python scripts/finetune_smollm2.py --output runs/smollm2
python scripts/finetune_smollm2.py --output runs/smollm2 --max-steps 3     # the same on a CPU
python scripts/finetune_smollm2.py --output runs/smollm2 --jobs 4          # all runs at once

Each of the four runs is a `liger train` with its run directory under the output: lora-eager,
lora-patched, full-eager, full-patched. Before them the model is evaluated as it is, after them as
it has become, on the conversations that nobody trains on. summary.json holds the figures; `liger
compare` shows the runs side by side. Runs that share a machine say nothing about speed: with --jobs
none is printed. Needs the packages of the demo and lora extras.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

COMMON = {
    "model": "llama",
    "dataset": "chitchat",
    "max_length": 256,
    "max_eval_samples": 64,
    "seed": 42,
}
TRAINING = {
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "save_steps": 0,
}
# An adapter's own matrices are float32 beside a model in bfloat16; all weights are float32.
PRECISION: dict[str, dict[str, Any]] = {
    "lora": {"dtype": "bfloat16"},
    "full": {"dtype": "float32", "bf16": True},
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "lora_r": 16, "learning_rate": 2e-4},
    "full": {"learning_rate": 5e-5},
}
SIDES = {"eager": "none", "patched": "auto"}


def liger(command: str, keys: dict[str, Any], *words: str) -> dict[str, Any]:
    """Run a command with these keys and return its report; its progress goes to stderr."""
    given = [word for key, value in keys.items() for word in ("--set", f"{key}={value}".lower())]
    done = subprocess.run(
        [sys.executable, "-m", "liger_cli", command, *given, *words, "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return dict(json.loads(done.stdout))


def finetune(kind: str, side: str, output: Path, max_steps: int) -> dict[str, Any]:
    """Train one run and return its figures."""
    name = f"{kind}-{side}"
    print(f"{name}:", file=sys.stderr)
    keys = {**COMMON, **PRECISION[kind], **TRAINING, **KINDS[kind]}
    keys |= {"ops": SIDES[side], "max_steps": max_steps}
    report = liger("train", keys, "--output-dir", str(output / name))
    lines = (output / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "after": report["eval"],
        "train": report["train"],
        "losses": [json.loads(line)["loss"] for line in lines],
        "environment": report["environment"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--max-steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        before = {kind: pool.submit(liger, "eval", {**COMMON, **PRECISION[kind]}) for kind in KINDS}
        after = {
            (kind, side): pool.submit(finetune, kind, side, options.output, options.max_steps)
            for kind in KINDS
            for side in SIDES
        }
    summary: dict[str, Any] = {}
    for (kind, side), run in after.items():
        found = {"before": before[kind].result()["eval"], **run.result()}
        summary[f"{kind}-{side}"] = found
        train = found["train"]
        line = (
            f"{kind}-{side:8} loss {train['first_loss']:.3f} -> {train['final_loss']:.3f}  "
            f"perplexity {found['before']['perplexity']:.2f} -> {found['after']['perplexity']:.2f}"
            f"  {train['peak_memory_bytes'] / 1e9:.1f} GB"
        )
        if options.jobs == 1:
            line += f"  {train['tokens_per_s']:,.0f} tokens/s"
        print(line)
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
