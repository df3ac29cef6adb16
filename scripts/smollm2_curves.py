"""Train SmolLM2-135M in ways that must give the same losses, and plot them.

python scripts/smollm2_curves.py --output curves.json [--parts lora,distill]     one GPU
python scripts/smollm2_curves.py --plot curves.json --output curves.png              anywhere

packing  all weights on chitchat: rows packed, laid end to end (padding-free), and padded
lora     an adapter of rank 16, stock and patched, on packed rows and on padded ones
dpo      an adapter of rank 16 on 400 preference pairs, beside TRL's DPOTrainer on the same batches
distill  a copy with four layers: on the labels alone, and on a teacher that was trained before;
         losses are the cross-entropy of held-out conversations

A run is a `liger train`. Needs the packages of the demo, lora and plots
extras, and trl for the last part.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from train_runs import read_lines, train_into, trained_steps

from liger_cli.common.environment import environment

COMMON = {"model": "llama", "dataset": "chitchat", "max_length": 512, "seed": 42}
COMMON |= {
    "max_eval_samples": 1,
    "logging_steps": 1,
    "save_steps": 0,
    "lr_scheduler_type": "constant",
    "bf16": True,
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
ADAPTER = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "learning_rate": 2e-4}
PACKING = {
    "packed": {"packing": True, "per_device_train_batch_size": 4},
    "padding-free": {"padding_free": True, "per_device_train_batch_size": 16},
    "padded": {"padding_free": False, "per_device_train_batch_size": 16},
}
LORA_RUNS = {
    f"{rows} {side}": {**ADAPTER, **PACKING[rows], "ops": ops}
    for rows in ("packed", "padded")
    for side, ops in (("stock", "none"), ("patched", "auto"))
}
PAIRS, BATCH, BETA, RATE = 400, 8, 0.1, 5e-5
STUDENT_LAYERS, TEACHER_STEPS, EVAL_EVERY = (0, 9, 19, 29), 100, 20
STUDENTS = {
    "cross-entropy": {"objective": "sft"},
    "teacher": {"objective": "distill", "beta": 0.0},
    "teacher and cross-entropy": {"objective": "distill", "beta": 0.0, "ce_weight": 0.5},
}
COLUMNS = ("loss", "trained_tokens", "tokens_per_s", "rewards/accuracies", "rewards/margins")


def train(keys: dict[str, Any]) -> dict[str, list[float]]:
    """Run `liger train` and return the columns of its metrics."""
    steps = trained_steps(keys)
    return {name: [s[name] for s in steps] for name in COLUMNS if name in steps[0]}


def write_start(folder: Path) -> None:
    """Write SmolLM2 and a new adapter of it, from which both sides of dpo begin."""
    from peft import LoraConfig, get_peft_model

    from liger_cli.training.model.source import load_model, resolve_model
    from liger_cli.training.model.tokenizers import load_tokenizer

    source = resolve_model("llama")
    model = load_model(source, dtype=torch.float32, device="cpu")
    model.save_pretrained(folder / "model")
    model.name_or_path = str(folder / "model")
    for name in ("model", "adapter"):
        load_tokenizer(source).save_pretrained(folder / name)
    torch.manual_seed(42)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")


def dpo_keys(folder: Path, steps: int) -> dict[str, Any]:
    """Return the keys of `liger train` for dpo."""
    return {
        **COMMON,
        # Sums over an answer in bfloat16 are noise beside the margins of the first steps.
        "bf16": False,
        "dtype": "float32",
        "model": folder / "adapter",
        "objective": "dpo",
        "beta": BETA,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "max_steps": steps,
    }


def trl_batches(keys: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Return the pairs in the order of the steps, as token ids of prompt and answers."""
    from liger_cli.config import load_config
    from liger_cli.data.batches import BatchPlan
    from liger_cli.data.encode import IGNORED
    from liger_cli.data.packing import answers_of
    from liger_cli.training.inputs import load_inputs

    config = load_config(flags={key: str(value) if key == "model" else value
                                for key, value in keys.items()})  # fmt: skip
    inputs = load_inputs(config)
    plan = BatchPlan(len(inputs.train), BATCH, 1, config.order_seed)
    rows = []
    for [batch] in plan.windows(1, keys["max_steps"]):
        for number in batch:
            chosen, rejected = answers_of(inputs.train[number])
            start = sum(1 for _ in itertools.takewhile(lambda x: x == IGNORED, chosen["labels"]))
            answers = {"chosen_ids": chosen, "rejected_ids": rejected}
            prompt = {"prompt_ids": chosen["input_ids"][:start]}
            rows.append(prompt | {name: one["input_ids"][start:] for name, one in answers.items()})
    return rows


def train_trl(folder: Path, keys: dict[str, Any]) -> dict[str, list[float]]:
    """Run TRL's DPOTrainer over the same batches, from the same adapter."""
    import trl
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class InOrder(trl.DPOTrainer):  # type: ignore[name-defined,misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    settings = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        beta=BETA,
        max_length=COMMON["max_length"],
        max_steps=keys["max_steps"],
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = InOrder(
        PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True),
        args=settings,
        train_dataset=Dataset.from_list(trl_batches(keys)),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return {name: [line[name] for line in logs] for name in COLUMNS if name in logs[0]}


def train_dpo(side: str, steps: int) -> dict[str, list[float]]:
    """Run a side of dpo from the start that both share."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_start(folder)
        keys = dpo_keys(folder, min(steps, PAIRS // BATCH))
        return train(keys) if side == "liger" else train_trl(folder, keys)


def write_student(folder: Path) -> None:
    """Write a model that has four of SmolLM2's layers."""
    from liger_cli.training.model.source import load_model, resolve_model
    from liger_cli.training.model.tokenizers import load_tokenizer

    source = resolve_model("llama")
    model: Any = load_model(source, dtype=torch.float32, device="cpu")
    kept = torch.nn.ModuleList(model.model.layers[i] for i in STUDENT_LAYERS)
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = kept
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


@functools.cache
def trained_teacher() -> tempfile.TemporaryDirectory[str]:
    """Train SmolLM2 on the conversations that the student gets."""
    folder = tempfile.TemporaryDirectory()
    keys = {"learning_rate": 5e-5, "max_steps": TEACHER_STEPS}
    train_into(Path(folder.name), {**COMMON, **PACKING["packed"], **keys})
    return folder


def train_student(keys: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """Train the student, on a teacher or not, and return its losses on held-out rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_student(folder / "student")
        more = {"model": folder / "student", "learning_rate": 5e-4, "max_steps": steps}
        more |= {"eval_steps": EVAL_EVERY, "eval_on_start": True, "max_eval_samples": 100}
        if keys["objective"] == "distill":
            more["teacher_model_name_or_path"] = trained_teacher().name
        train_into(folder / "run", {**COMMON, **PACKING["packed"], **more, **keys})
        lines = read_lines(folder / "run" / "eval.jsonl")
    measure = "eval_loss" if keys["objective"] == "sft" else "eval_nll_loss"
    return {"step": [x["step"] for x in lines], "loss": [x[measure] for x in lines]}


def runs(parts: list[str], steps: int) -> dict[tuple[str, str], Callable[[], Any]]:
    """Return the runs of the parts, each a function without arguments."""
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    keys = {**COMMON, "max_steps": steps}
    if "packing" in parts:
        for name, one in PACKING.items():
            found["packing", name] = functools.partial(
                train, {**keys, "learning_rate": 5e-5, **one}
            )
    if "lora" in parts:
        for name, one in LORA_RUNS.items():
            found["lora", name] = functools.partial(train, {**keys, **one})
    if "dpo" in parts:
        for side in ("liger", "TRL"):
            found["dpo", side] = functools.partial(train_dpo, side, steps)
    if "distill" in parts:
        for name, one in STUDENTS.items():
            found["distill", name] = functools.partial(train_student, one, steps)
    return found


def summarize(found: dict[str, Any]) -> list[str]:
    """Return a line a run: first and last losses, and the largest distance to the run before it."""
    lines = []
    for part, runs in found.items():
        for name, one in runs.items():
            # Of held-out rows the last one says it all.
            tail = one["loss"][-1 if "step" in one else -20 :]
            last = sum(tail) / len(tail)
            lines.append(f"{part} {name}: loss {one['loss'][0]:.4f}, last {len(tail)} {last:.4f}")
        for (a, first), (b, second) in itertools.pairwise(runs.items()):
            apart = max(abs(x - y) for x, y in zip(first["loss"], second["loss"], strict=False))
            lines.append(f"{part} {a} and {b}: at most {apart:.4f} apart")
    return lines


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the losses, a picture a part, and the accuracies of the rewards beside dpo's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = [(part, "loss") for part in found]
    pictures += [(part, "rewards/accuracies") for part in found if part == "dpo"]
    figure, axes = plt.subplots(1, len(pictures), figsize=(5 * len(pictures), 4), squeeze=False)
    for axis, (part, column) in zip(axes[0], pictures, strict=True):
        for name, one in found[part].items():
            places = one.get("step", range(1, len(one[column]) + 1))
            axis.plot(places, one[column], label=name, linewidth=1)
        axis.set(title=f"SmolLM2-135M, {part}", xlabel="step", ylabel=column)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the parts, or plot a file of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", default="packing,lora,dpo")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; speeds then say nothing")
    parser.add_argument("--plot", type=Path, help="a file of --output to draw")
    given = parser.parse_args()
    if given.plot:
        plot(json.loads(given.plot.read_text())["parts"], given.output)
        return
    parts: dict[str, Any] = {}
    COMMON["max_length"] = given.max_length
    with ThreadPoolExecutor(given.jobs) as pool:
        wanted = runs(given.parts.split(","), given.max_steps)
        futures = {key: pool.submit(call) for key, call in wanted.items()}
        for (part, name), future in futures.items():
            parts.setdefault(part, {})[name] = future.result()
            report = {"environment": environment(), "settings": COMMON, "parts": parts}
            given.output.write_text(json.dumps({**report, "jobs": given.jobs}) + "\n")
    print("\n".join(summarize(parts)))


if __name__ == "__main__":
    main()
