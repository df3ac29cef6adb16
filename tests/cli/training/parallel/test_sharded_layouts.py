"""Any layout of ranks trains what one process trains: DDP, FSDP2 and HSDP, with every kind of key.

A step has twelve rows of unlike lengths in three micro-batches; the last step of an epoch has
eleven. The runs of a number of ranks are trained one after the other in processes that stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_ranks import train_cases
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from liger_cli.training.model.tokenizers import byte_tokenizer
from liger_kernels.ops.backend import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    # All on one worker of xdist: the ranks run once for the whole file.
    pytest.mark.xdist_group("layouts"),
]

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    # Four ranks do not share its rows evenly.
    "uneven": {
        "model_type": "qwen2",
        "hidden_size": 36,
        "intermediate_size": 50,
        "head_dim": 10,
        "vocab_size": 265,
    },
    "scored": {"model_type": "llama", "num_labels": 3},
}


def words(i: int) -> str:
    return "word " * (1 + 3 * (i % 5) + i % 2)


# Rows by number.
DATA: dict[str, Any] = {
    "rows": lambda i: {"prompt": f"say {i} ", "completion": words(i)},
    "texts": lambda i: {"text": f"say {i} {words(i)}", "label": i % 3},
    "answers": lambda i: {"prompt": f"say {i} ", "completion": words(i), "label": i % 3 > 0},
    "pairs": lambda i: {"prompt": f"say {i} ", "chosen": words(i), "rejected": words(i + 2)},
}
# An optimizer that feels a factor in the gradient, which Adam would hide.
BASE: dict[str, Any] = {
    "data": "rows",
    "model": "tied",
    "max_length": 64,
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "linear",
    "max_steps": 3,
    "gradient_accumulation_steps": 3,
}
ADAM = {"max_grad_norm": 1.0, "learning_rate": 1e-3}
LONG_ROWS = {"gradient_checkpointing": True, "activation_offloading": True, "tile_tokens": 64}
OPTIONS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"model": "untied"},
    "uneven": {"model": "uneven"},
    "random": {"model": "random"},
    # Its experts are stacked as they load.
    "moe": {"model": "moe"},
    "packing": {"packing": True, "model": "untied"},
    "padding-free": {"padding_free": "true"},
    "stream": {"streaming": True, "shuffle_buffer_size": 5},
    "checkpointing": {"gradient_checkpointing": True, "model": "untied"},
    "long-rows": {**LONG_ROWS, "model": "untied"},
    "long-rows-moe": {**LONG_ROWS, "model": "moe"},
    "long-rows-lora": {**LONG_ROWS, "adapter": "lora", "lora_r": 4},
    "lora": {"adapter": "lora", "lora_r": 4},
    "eval": {"eval_fraction": 0.3, "model": "untied"},
    "dora": {"adapter": "dora", "lora_r": 4},
    "lora-head": {"adapter": "lora", "lora_modules_to_save": "lm_head", "model": "untied"},
    "momentum": {"optim_args": "momentum=0.9,nesterov=true"},
    "adamw": {"optim": "adamw_torch", **ADAM},
    "adamw-fused": {"optim": "adamw_torch_fused", "weight_decay": 0.1, **ADAM},
    "adafactor": {"optim": "adafactor", "model": "uneven", **ADAM},
    "muon": {"optim": "muon", **ADAM},
    "master": {"dtype": "bfloat16", "master_weights": True},
    "bf16": {"bf16": True},
    # Their head is new, or that of the files.
    "classify": {"objective": "classify", "data": "texts"},
    "classify-lora": {"objective": "classify", "data": "texts", "adapter": "lora", "lora_r": 4},
    "classify-again": {"objective": "classify", "data": "texts", "model": "scored"},
    "reward": {"objective": "reward", "data": "pairs", "model": "untied", "packing": True},
    "kto-lora": {"objective": "kto", "data": "answers", "adapter": "lora", "lora_r": 4},
    "distill": {"objective": "distill", "teacher_model_name_or_path": "untied"},
    "reward-lora": {"objective": "reward", "data": "pairs", "adapter": "lora", "lora_r": 4},
}
# Layouts by their number of ranks.
SHARDED = {"dp_shard_size": -1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp-2": (2, {"dp_replicate_size": 2}),
    "fsdp-2": (2, SHARDED),
    "keep-2": (2, {**SHARDED, "reshard_after_forward": False}),
    "offload-2": (2, {**SHARDED, "cpu_offload": True}),
    "ddp-4": (4, {}),
    "fsdp-4": (4, SHARDED),
    "hsdp-4": (4, {**SHARDED, "dp_replicate_size": 2}),
}
FAST = [
    ("tied", "ddp-2"),
    *((option, "fsdp-2") for option in ("tied", "untied", "packing", "lora", "eval", "classify")),
    ("untied", "hsdp-4"),
]
SLOW = [
    (option, layout) for option in OPTIONS for layout in LAYOUTS if (option, layout) not in FAST
]
# Products in bfloat16 of other batches are rounded otherwise; those of muon are, too.
ROUGH = {"master": 2e-2, "bf16": 2e-2, "muon": 1e-3}


def save_model(name: str, directory: Path) -> None:
    """Save a model with random weights in files of 40 kB, and a tokenizer of bytes."""
    values = {**SHAPE, **MODELS[name]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    scored = "num_labels" in MODELS[name]
    kind = AutoModelForSequenceClassification if scored else AutoModelForCausalLM
    model = kind.from_config(config)
    model.save_pretrained(directory, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(directory)


class Runs:
    """Trains the runs of a table once, when the first of them is asked for."""

    def __init__(self, directory: Path, table: list[tuple[str, str]]) -> None:
        self.directory, self.table, self.count = directory, table, 0
        self.found: dict[int, dict[str, Any]] = {}
        for name, row_of in DATA.items():
            lines = [json.dumps(row_of(i)) + "\n" for i in range(23)]
            (directory / f"{name}.jsonl").write_text("".join(lines))
        for name in MODELS:
            save_model(name, directory / name)
        (directory / "random").mkdir()
        random = {**SHAPE, **MODELS["untied"]}
        (directory / "random" / "config.json").write_text(json.dumps(random))

    def keys(self, option: str, layout: str | None, num_ranks: int) -> dict[str, Any]:
        keys = {**BASE, **OPTIONS[option], **(LAYOUTS[layout][1] if layout else {})}
        is_random = keys["model"] == "random"
        if (teacher := keys.get("teacher_model_name_or_path")) is not None:
            keys["teacher_model_name_or_path"] = str(self.directory / teacher)
        keys["model"] = str(self.directory / keys["model"] / ("config.json" if is_random else ""))
        keys["per_device_train_batch_size"] = 4 // num_ranks
        self.count += 1
        run_dir = self.directory / f"run{self.count}"
        data = self.directory / f"{keys.pop('data')}.jsonl"
        return {**keys, "dataset": str(data), "output_dir": run_dir}

    def of(self, option: str, layout: str | None) -> dict[str, Any]:
        """Return what one run left; None is one process."""
        num_ranks = 1 if layout is None else LAYOUTS[layout][0]
        if num_ranks not in self.found:
            cases = {
                f"{option} {layout}": self.keys(option, layout, num_ranks)
                for option, layout in self.runs_on(num_ranks)
            }
            out = self.directory / f"{num_ranks}.pt"
            self.found[num_ranks] = train_cases(num_ranks, cases, out)
        return dict(self.found[num_ranks][f"{option} {layout}"])

    def runs_on(self, num_ranks: int) -> list[tuple[str, str | None]]:
        if num_ranks == 1:
            return [(option, None) for option in dict(self.table)]
        return [run for run in self.table if LAYOUTS[run[1]][0] == num_ranks]


@pytest.fixture(scope="module")
def fast(tmp_path_factory: Any) -> Runs:
    return Runs(tmp_path_factory.mktemp("fast"), FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: Any) -> Runs:
    return Runs(tmp_path_factory.mktemp("slow"), SLOW)


def check(runs: Runs, option: str, layout: str) -> None:
    alone, shared = runs.of(option, None), runs.of(option, layout)
    rough = ROUGH.get(option, 1e-5)
    assert "error" not in shared, shared["error"]
    assert len(alone["steps"]) == 3
    for found, wanted in zip(shared["steps"], alone["steps"], strict=True):
        assert found == pytest.approx(wanted, rel=rough)
    assert shared["weights"].keys() == alone["weights"].keys()
    for name, wanted in alone["weights"].items():
        found = shared["weights"][name]
        assert found.dtype == wanted.dtype
        scale = max(float(wanted.abs().max()), 1e-2)
        assert float((found - wanted).abs().max()) <= rough * scale, name


@pytest.mark.parametrize(("option", "layout"), FAST)
def test_case_85_87_a_layout_trains_what_one_process_does(option, layout, fast):
    check(fast, option, layout)


@pytest.mark.parametrize("option", ["tied", "untied", "lora"])
def test_case_84_the_head_is_gathered_once_a_micro_batch(option, fast):
    """With the embedding, where they are one matrix."""
    assert fast.of(option, "fsdp-2")["head_gathers"] == 9


def test_a_rank_reads_its_half_of_the_weights(fast):
    whole = sum(file.stat().st_size for file in (fast.directory / "untied").glob("*.safetensors"))
    read = fast.of("untied", "fsdp-2")["bytes_read"]
    assert 0.4 * whole <= read <= 0.5 * whole


def test_case_89_two_ranks_evaluate_as_one(fast):
    """Seven rows: with batches of one, the second rank has a batch less."""
    alone, shared = (fast.of("eval", layout)["evals"] for layout in (None, "fsdp-2"))
    for size in (1, 8):
        assert shared[size] == pytest.approx(alone[1], rel=1e-5)
        assert shared[size][2] == alone[8][2] > 0


@pytest.mark.slow  # Some hundred trainings.
@pytest.mark.parametrize(("option", "layout"), SLOW)
def test_every_layout_trains_what_one_process_does(option, layout, slow):
    check(slow, option, layout)
