"""Fine-tune SmolLM2-135M on the sample conversations: LoRA and all weights, eager and patched.

python scripts/finetune_smollm2.py --output runs/smollm2
python scripts/finetune_smollm2.py --output runs/smollm2 --max-steps 3     # the same on a CPU

Each of the four runs is a `liger train` with its run directory under the output: lora-eager,
lora-patched, full-eager, full-patched. Before them the model is evaluated as it is, after them as
it has become, on the conversations that nobody trains on. summary.json holds the figures; `liger
compare` shows the runs side by side. Needs the packages of the demo and lora extras.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
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
    """Runs a command with these keys and returns its report; its progress goes to stderr."""
    given = [word for key, value in keys.items() for word in ("--set", f"{key}={value}".lower())]
    done = subprocess.run(
        [sys.executable, "-m", "liger_cli", command, *given, *words, "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--max-steps", type=int, default=200, help="steps of each run")
    options = parser.parse_args()
    summary: dict[str, Any] = {}
    for kind, keys in KINDS.items():
        precision = {**COMMON, **PRECISION[kind]}
        before = liger("eval", precision)["eval"]
        for side, ops in SIDES.items():
            name = f"{kind}-{side}"
            print(f"{name}:", file=sys.stderr)
            run = {**precision, **TRAINING, **keys, "ops": ops, "max_steps": options.max_steps}
            report = liger("train", run, "--output-dir", str(options.output / name))
            summary[name] = {"before": before, "after": report["eval"], "train": report["train"]}
            summary[name]["device"] = report["environment"]["devices"]
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, found in summary.items():
        train = found["train"]
        print(
            f"{name:13} loss {train['first_loss']:.3f} -> {train['final_loss']:.3f}  "
            f"perplexity {found['before']['perplexity']:.2f} -> {found['after']['perplexity']:.2f}"
            f"  {train['tokens_per_s']:,.0f} tokens/s  {train['peak_memory_bytes'] / 1e9:.1f} GB"
        )


if __name__ == "__main__":
    main()
