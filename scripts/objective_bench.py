"""Time a step of DPO, ORPO, SimPO or distillation beside TRL's trainers and liger-kernel's layers.

python scripts/objective_bench.py --peer-path FOLDER --output preferences.json       one CUDA GPU
python scripts/objective_bench.py --objectives distill --output distill.json    llama-3b teaches 1b
python scripts/objective_bench.py --toy                                  a tiny model on a CPU

Each side is a separate process over the same weights and rows of 1024 tokens with a prompt of 256:
4 pairs a step, or 8 rows of distillation. A reference is computed before the first step.
Milliseconds are the median of the steps after the first, from the end of one to the end of the
next; the peak is that of the steps. TRL is imported as it is installed, liger-kernel from
--peer-path.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from train_runs import trained_steps

from liger_cli.common.environment import environment

PAIRS, STEPS, PROMPT, LENGTH = 4, 8, 256, 1024
SIDES = ("ours", "trl", "trl+liger-kernel")
ROWS = 2 * PAIRS
BETA = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "distill": 0.5}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def write_model(folder: Path, preset: str, toy: bool) -> int:
    """Write a preset with random weights and a tokenizer of a word a token; return its words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from liger_cli.training.model.source import resolve_model

    sizes = dict(resolve_model(preset).config or {})
    if toy:
        sizes |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"vocab_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2}
        sizes |= {"head_dim": 32}
    size = sizes["vocab_size"]
    words = {f"w{i}": i for i in range(size - 3)} | {"<pad>": size - 3, "<eos>": size - 2}
    tokenizer = Tokenizer(models.WordLevel(words | {"<unk>": size - 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    sizes |= {"pad_token_id": size - 3, "eos_token_id": size - 2, "bos_token_id": None}
    torch.manual_seed(0)
    settings = LlamaConfig(**{k: v for k, v in sizes.items() if k != "model_type"})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return size - 3


def write_inputs(folder: Path, objectives: list[str], toy: bool) -> None:
    """Write the models, and the rows of pairs and of distillation."""
    num_words = write_model(folder, "llama-1b", toy)
    if "distill" in objectives:
        write_model(folder / "teacher", "llama-3b", toy)
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(num_words)}" for _ in range(count))

    prompt, length = (PROMPT, LENGTH) if not toy else (16, 64)
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(PAIRS * STEPS):
            answers = {key: f" {text(length - prompt - 1)}" for key in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": text(prompt), **answers}) + "\n")
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(ROWS * STEPS):
            row = {"prompt": text(prompt), "completion": f" {text(length - prompt - 1)}"}
            file.write(json.dumps(row) + "\n")


def run_ours(one: dict[str, Any]) -> dict[str, Any]:
    """Run `liger train` and read its metrics."""
    folder, objective = Path(one["folder"]), one["objective"]
    keys: dict[str, Any] = {
        "model": folder,
        "dataset": folder / "pairs.jsonl",
        "objective": objective,
        "beta": BETA[objective],
        "max_length": LENGTH,
        "max_steps": STEPS,
        "per_device_train_batch_size": PAIRS,
        "learning_rate": 1e-6,
        "dtype": "bfloat16",
        "adapter": "lora" if one["adapter"] else "none",
        "lora_r": LORA["r"],
        "lora_alpha": LORA["lora_alpha"],
        "logging_steps": 1,
        "save_steps": 0,
        "packing": False,
        "use_cpu": one["toy"],
    }
    if objective == "dpo":
        keys["reference"] = "precompute"
    if objective == "distill":
        keys |= {"dataset": folder / "rows.jsonl", "teacher_model_name_or_path": folder / "teacher"}
        keys |= {"per_device_train_batch_size": ROWS}
    steps = trained_steps(keys)
    return {
        "step_ms": statistics.median(line["step_ms"] for line in steps[1:]),
        "peak_bytes": max(line["peak_memory_bytes"] for line in steps),
        "losses": [line["loss"] for line in steps],
    }


class Clock:
    """Note when each step ends, the loss of each, and the peak of memory from the first on."""

    def __init__(self, cpu: bool) -> None:
        import torch
        from transformers import TrainerCallback

        self.ends: list[float] = []
        self.losses: list[float] = []
        clock = self

        class Callback(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                if not clock.ends and not cpu:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                if not cpu:
                    torch.cuda.synchronize()
                clock.ends.append(time.perf_counter())

            def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if "loss" in (kwargs["logs"] or {}):
                    clock.losses.append(float(kwargs["logs"]["loss"]))

        self.callback = Callback()


def trl_trainer(objective: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return the trainer of an objective, its settings' class, and what it sets."""
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return {
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {"precompute_ref_log_probs": True}),
        "orpo": (ORPOTrainer, ORPOConfig, {}),
        "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
        # Answers of the data, as ours; at temperature 1.
        "distill": (GKDTrainer, GKDConfig, {"lmbda": 0.0, "temperature": 1.0}),
    }[objective]


def trl_model(folder: Path, *, has_layers: bool) -> Any:
    """Load a model as TRL's side has it, with liger-kernel's layers or without."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if has_layers:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        # These losses read logits, which its fused loss does not make.
        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)
    return model


def encoded(row: dict[str, str], tokenizer: Any) -> dict[str, Any]:
    """Return the tokens of a row of distillation, as GKDTrainer's collator reads them."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    mask = [0] * len(prompt) + [1] * len(answer)
    return {
        "prompt": row["prompt"],
        "input_ids": prompt + answer,
        "attention_mask": [1] * len(mask),
        "completion_mask": mask,
    }


def run_trl(one: dict[str, Any]) -> dict[str, Any]:
    """Run a trainer of TRL over the same rows."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    folder, cpu, distills = Path(one["folder"]), one["toy"], one["objective"] == "distill"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (folder / ("rows.jsonl" if distills else "pairs.jsonl")).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    has_layers = "liger-kernel" in one["side"]
    more: dict[str, Any] = {}
    if distills:
        rows = [encoded(row, tokenizer) for row in rows]
        more["teacher_model"] = trl_model(folder / "teacher", has_layers=has_layers)
    trainer_class, config_class, options = trl_trainer(one["objective"])
    settings = config_class(
        output_dir=tempfile.mkdtemp(),
        beta=BETA[one["objective"]],
        max_length=LENGTH,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS if distills else PAIRS,
        learning_rate=1e-6,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=cpu,
        optim="adamw_torch_fused",
        **options,
    )
    clock = Clock(cpu)
    trainer = trainer_class(
        trl_model(folder, has_layers=has_layers),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if one["adapter"] else None,
        callbacks=[clock.callback],
        **more,
    )
    trainer.train()
    steps = [b - a for a, b in itertools.pairwise(clock.ends)]
    return {
        "step_ms": statistics.median(steps) * 1e3,
        "peak_bytes": None if cpu else torch.cuda.max_memory_allocated(),
        "losses": clock.losses,
    }


def measure(one: dict[str, Any], peer: Path | None) -> dict[str, Any]:
    """Run a side in a separate process."""
    began = time.perf_counter()
    paths = [os.environ.get("PYTHONPATH", ""), *([str(peer)] if peer else [])]
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(one)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(lines[-1][7:]) if lines else {"error": done.stdout[-1500:]}
    seconds = round(time.perf_counter() - began, 1)
    return {key: one[key] for key in ("objective", "adapter", "side")} | found | {"s": seconds}


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each side beside ours: times the speed, share of the memory."""
    lines = []
    for row in rows:
        kind = row["objective"], row["adapter"]
        ours = next(r for r in rows if (r["objective"], r["adapter"]) == kind)
        name = f"{row['objective']} {'lora' if row['adapter'] else 'full'} {row['side']}"
        if "error" in row:
            lines.append(f"{name}: {row['error'].strip().splitlines()[-1:]}")
            continue
        line = f"{name}: {row['step_ms']:.1f} ms"
        if row["peak_bytes"]:
            line += f", {row['peak_bytes'] / 1e9:.1f} GB"
        if row is not ours and "error" not in ours:
            line += f"; ours {row['step_ms'] / ours['step_ms']:.2f}x"
            if row["peak_bytes"]:
                line += f", {ours['peak_bytes'] / row['peak_bytes']:.2f} of its peak"
        lines.append(line)
    return lines


def main() -> None:
    """Run the sides in turn and write one JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peer-path", type=Path)
    parser.add_argument("--objectives", default="dpo,orpo,simpo")
    parser.add_argument("--adapters", default="lora,none")
    parser.add_argument("--budget", type=float, default=500, help="seconds; no side starts after")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one = json.loads(given.one)
        found = run_ours(one) if one["side"] == "ours" else run_trl(one)
        print("RESULT", json.dumps(found))
        return
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        objectives = given.objectives.split(",")
        write_inputs(Path(folder), objectives, given.toy)
        adapters = [a == "lora" for a in given.adapters.split(",")]
        for objective, adapter, side in itertools.product(objectives, adapters, SIDES):
            if "liger-kernel" in side and not given.peer_path:
                continue
            if time.perf_counter() - began > given.budget:
                continue
            one = {"objective": objective, "adapter": adapter, "side": side}
            rows.append(measure({**one, "folder": folder, "toy": given.toy}, given.peer_path))
            print("\n".join(compared(rows)[-1:]), flush=True)
    report = {"environment": environment(), "pairs": PAIRS, "length": LENGTH, "sides": rows}
    if given.output:
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(compared(rows)))


if __name__ == "__main__":
    main()
