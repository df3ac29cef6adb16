"""A tiny model, pairs, labelled answers, and an objective over log-probabilities that are given."""

from __future__ import annotations

import socket
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from liger_cli.config import load_config
from liger_cli.data.collate import Collator
from liger_cli.data.pair_batches import PairCollator
from liger_cli.training.objectives import dpo, kto, pairs
from liger_cli.training.objectives.answers import Answers
from liger_cli.training.objectives.reference import NoReference
from liger_cli.training.objectives.table import make_objective
from liger_kernels.ops.fused_linear_logprobs import named_outputs

CPU = torch.device("cpu")
VOCABULARY = 24
SIZES: dict[str, int] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def tiny_experts(balances: bool) -> Any:
    """A mixture of experts, whose loss has their balance or not."""
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=balances,
        router_aux_loss_coef=0.5,
    )
    return MixtralForCausalLM(config)


def tiny_classifier(num_labels: int = 1, problem_type: str | None = None) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_labels=num_labels,
        problem_type=problem_type,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


def make_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of very different lengths, each after a prompt of 1 to 4 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for _ in range(count):
        prompt, row = ids(4), {}
        for name in ("chosen", "rejected"):
            answer = ids(9)
            row[f"{name}_input_ids"] = prompt + answer
            row[f"{name}_labels"] = [-100] * len(prompt) + answer
        rows.append(row)
    return rows


def collated(rows: list[dict[str, Any]], **layout: bool) -> dict[str, Any]:
    return PairCollator(Collator(0, **layout))(rows)


def make_answers(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Labelled answers of very different lengths to prompts of which some are alike."""
    rows = []
    for pair in make_pairs(count, seed):
        for is_good, name in ((1, "chosen"), (0, "rejected")):
            ids, labels = pair[f"{name}_input_ids"], pair[f"{name}_labels"]
            rows.append({"input_ids": ids, "labels": labels, "desirable": is_good})
    return rows[:count]


def objective_of(name: str, model: Any = None, **keys: Any) -> Any:
    """An objective without a reference, of a model that it does not call by itself."""
    config = load_config(None, {"model": "qwen3", "objective": name, **keys})
    made = make_objective(config, model or tiny_model(), CPU)
    if isinstance(made, dpo.Dpo | kto.Kto):
        made._reference = NoReference(CPU)
    return made


class Given:
    """Log-probabilities in place of a model's: (2N, T - 1), of answers in turn."""

    def __init__(self, monkeypatch: Any, model: torch.Tensor, squares: torch.Tensor) -> None:
        self.leaf = model.clone().requires_grad_()

        def values(
            model: Any, batch: Any, device: Any, *, temperature: float = 1.0, balances: bool = False
        ) -> Any:
            # log p at temperature 1/2 follows from log p and log sum p^2.
            logprob = self.leaf if temperature == 1.0 else 2 * self.leaf - squares
            return named_outputs(("logprob", "aux_loss"), (logprob, None))

        monkeypatch.setattr(pairs, "token_values", values)
        monkeypatch.setattr(dpo, "token_values", values)


class GivenReference:
    """A reference of given log-probabilities."""

    def __init__(self, tokens: torch.Tensor, ld_alpha: float | None) -> None:
        self._tokens, self._ld_alpha = tokens, ld_alpha

    def sums(self, score: Any, model: Any, batch: Any) -> torch.Tensor:
        return Answers.of(batch, CPU, self._ld_alpha).sums(self._tokens, weighted=True)


def batch_of(lengths: list[int]) -> dict[str, Any]:
    """A batch whose answers have so many scored tokens, chosen and rejected in turn."""
    mask = torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None] + 1
    labels = torch.where(mask, 5, -100)
    labels[:, 0] = -100
    numbers = torch.arange(len(lengths))[:, None].expand_as(mask)
    return {
        "input_ids": torch.ones_like(labels),
        "attention_mask": mask.long(),
        "labels": labels,
        "answer_ids": torch.where(mask, numbers, -1),
        "num_answers": torch.tensor(len(lengths)),
        "num_pairs": torch.tensor(len(lengths) // 2),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
