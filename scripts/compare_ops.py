"""Time training steps of whole models with two selections of ops, in turn, and write a JSON file.

python3 scripts/compare_ops.py --without fused_add_rms_norm --output docs/results/FILE.json

Each run trains in its own process: with `--ops auto` and with `--ops auto,-NAME`, `--repeats`
times in turn. The file holds, for each workload and selection, the median step in milliseconds
after warm-up, the peak memory in bytes and the losses of every run, beside the machine's versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from liger_cli.common.environment import environment
from liger_cli.config import RunConfig
from liger_cli.training.runtime.arms import ArmResult, run_arm

# Name, and what differs from the defaults of a run on random tokens.
WORKLOADS: dict[str, dict[str, Any]] = {
    "llama-1b full 8x2048": {"model": "llama-1b"},
    "qwen3-0.6b full 8x2048": {"model": "qwen3-0.6b"},
    "llama-8b lora r16 4x2048": {
        "model": "llama-8b",
        "adapter": "lora",
        "per_device_train_batch_size": 4,
    },
}


def measure(keys: dict[str, Any], ops: str, steps: int) -> ArmResult:
    """Train `steps` steps of a workload with these ops in a separate process."""
    defaults = {"dataset": "synthetic", "per_device_train_batch_size": 8, "max_length": 2048}
    config = RunConfig(**{**defaults, **keys})
    return run_arm(config, name=f"{config.model} {ops}", ops=ops, steps=steps)


def summarize(runs: list[ArmResult]) -> dict[str, Any]:
    """Reduce the runs of one selection to the figures of the file."""
    return {
        "step_ms": statistics.median(run.step_ms for run in runs),
        "step_ms_of_runs": [run.step_ms for run in runs],
        "peak_memory_bytes": max(run.peak_memory_bytes for run in runs),
        "losses": [run.losses for run in runs],
        "coverage": runs[0].coverage,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--without", required=True, help="the op that one side leaves out")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="workloads whose name holds this text")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    selections = {"with": "auto", "without": f"auto,-{options.without}"}
    found: dict[str, Any] = {}
    for name, keys in WORKLOADS.items():
        if options.only not in name:
            continue
        runs: dict[str, list[ArmResult]] = {side: [] for side in selections}
        for _ in range(options.repeats):
            for side, ops in selections.items():
                runs[side].append(measure(keys, ops, options.steps))
        found[name] = {side: summarize(made) for side, made in runs.items()}
        sides = found[name]
        time, memory = (
            sides["without"][key] / sides["with"][key] for key in ("step_ms", "peak_memory_bytes")
        )
        print(f"{name}: without {options.without} {time:.4f}x time, {memory:.4f}x memory")
        sys.stdout.flush()
        document = {
            "command": " ".join(["scripts/compare_ops.py", *sys.argv[1:]]),
            "environment": environment(),
            "ops": selections,
            "workloads": found,
        }
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
