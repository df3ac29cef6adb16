"""Write tests/cli/training/objectives/trl_values.json: losses and gradients by TRL's own code.

TRL is no dependency. Its trainers are run as they are, with a model that gives log-probabilities
in place of computing them:

    python -m venv trl && trl/bin/pip install trl==1.16.0 transformers datasets
    trl/bin/python scripts/trl_preference_values.py
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

OUT = Path(__file__).parents[1] / "tests/cli/training/objectives/trl_values.json"

# Tokens of the chosen answers, then of the rejected ones.
LENGTHS = [3, 6, 2, 5, 4, 1, 6, 5]
BETA = 0.1

DPO: list[dict[str, Any]] = [
    *({"loss_type": [name]} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "robust")),
    *({"loss_type": [name]} for name in ("bco_pair", "sppo_hard", "aot", "aot_unpaired")),
    *({"loss_type": [name]} for name in ("apo_zero", "apo_down", "discopop", "sft")),
    {"loss_type": ["sigmoid_norm"]},
    {"loss_type": ["discopop"], "discopop_tau": 0.3},
    {"loss_type": ["sigmoid"], "beta": 0.7},
    *(
        {"loss_type": [name], "label_smoothing": 0.2}
        for name in ("robust", "exo_pair", "aot", "aot_unpaired")
    ),
    {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    {"loss_type": ["sigmoid", "hinge"]},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    *(
        {"loss_type": [name], "f_divergence_type": divergence}
        for name in ("sigmoid", "hinge", "ipo", "robust", "discopop", "sigmoid_norm")
        for divergence in ("forward_kl", "js_divergence")
    ),
    {"loss_type": ["exo_pair"], "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
    *(
        {
            "loss_type": ["sigmoid"],
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": coef,
        }
        for coef in (0.3, 0.5, 1.0, 2.0)
    ),
    *({"loss_type": [name], "ld_alpha": 0.5} for name in ("sigmoid", "ipo", "sft", "aot")),
    {"loss_type": ["sigmoid"], "ld_alpha": 0.0},
    *({"loss_type": [name], "use_weighting": True} for name in ("sigmoid", "ipo", "apo_zero")),
    {"loss_type": ["sigmoid"], "use_weighting": True, "ld_alpha": 0.5},
]
CPO: list[dict[str, Any]] = [
    {"loss_type": name, "label_smoothing": smoothing, "alpha": alpha}
    for name in ("sigmoid", "hinge", "ipo", "simpo")
    for smoothing in (0.0, 0.2)
    for alpha in (0.0, 0.25)
    if not (smoothing and name in ("hinge", "ipo"))
]
# Labels of the answers; sign 1 or -1 exchanges model and reference of the mismatched ones.
KTO: list[dict[str, Any]] = [
    {"loss_type": name, "labels": labels, "sign": sign, **weights}
    for name in ("kto", "apo_zero_unpaired")
    for labels in ([1, 0, 0, 1, 1, 0, 1, 1], [1] * 8, [0] * 8)
    for sign in (1, -1)
    for weights in ({}, {"beta": 0.7, "desirable_weight": 1.5, "undesirable_weight": 0.4})
]


def tokens(lengths: list[int], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Draw log-probabilities of the model and the reference, and log sum p^2, (2N, T)."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    drawn = {
        name: (-scale * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, scale in (("model", 2.0), ("reference", 2.0), ("squares", 1.0))
    }
    return {name: value * mask for name, value in drawn.items()} | {"mask": mask}


def trainer(**options: Any) -> Any:
    """Return a DPOTrainer of a tiny model, or a KTOTrainer for its losses."""
    is_kto = options.get("loss_type") in ("kto", "apo_zero_unpaired")
    vocabulary = {word: i for i, word in enumerate(["a", "b", "c", "<pad>", "<eos>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    policy, reference = (
        LlamaForCausalLM(LlamaConfig(vocab_size=6, num_attention_heads=2, **sizes)) for _ in "ab"
    )
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
    if is_kto:
        rows = Dataset.from_list(
            [{"prompt": "a", "completion": " b", "label": bool(i)} for i in range(2)]
        )
    settings = (trl.KTOConfig if is_kto else trl.DPOConfig)(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_steps=1,
        **options,
    )
    return (trl.KTOTrainer if is_kto else trl.DPOTrainer)(
        policy, ref_model=reference, args=settings, train_dataset=rows, processing_class=fast
    )


def gives(answers: list[torch.Tensor], squares: torch.Tensor, mask: torch.Tensor) -> Any:
    """Return a forward that gives these log-probabilities, one after the other."""
    turns = itertools.cycle(answers)

    def forward(*_: Any, **__: Any) -> Any:
        logps = next(turns)
        zeros = torch.zeros_like(logps)
        return types.SimpleNamespace(
            log_probs=logps,
            log_sum_sq_probs=squares,
            label_mask=mask,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            loss=None,
            aux_loss=None,
        )

    return forward


def kto_loss(options: dict[str, Any], drawn: dict[str, Any], other: dict[str, Any]) -> Any:
    """Return the loss, its gradient in the model's log-probabilities, and the metrics."""
    options = dict(options)
    labels, sign = options.pop("labels"), options.pop("sign")
    model, mask = drawn["model"].clone().requires_grad_(), drawn["mask"]
    mismatched = [other["model"], other["reference"]][::sign]
    one = trainer(**options)
    # The mismatched answers come first.
    own = [model, drawn["reference"]]
    if options["loss_type"] == "kto":
        answers = [[one, two] for one, two in zip(mismatched, own, strict=True)]
    else:
        answers = [[logps] for logps in own]
    one.model.forward, one.ref_model.forward = (
        gives(logps, drawn["squares"], mask) for logps in answers
    )
    ones = torch.ones(len(mask), mask.shape[1] + 1, dtype=torch.int64)
    completion = torch.cat((torch.zeros(len(mask), 1, dtype=torch.int64), mask.long()), 1)
    batch = {"input_ids": ones, "attention_mask": ones, "completion_mask": completion}
    batch |= {f"KL_{name}": value for name, value in batch.items()}
    batch["label"] = torch.tensor(labels).bool()
    loss = one._compute_loss(one.model, batch, False)
    [gradient] = torch.autograd.grad(loss, model)
    metrics = {
        name: values[-1]
        for name, values in one._metrics["train"].items()
        if name == "kl" or name.startswith(("rewards/", "logps/"))
    }
    return {"loss": loss.item(), "gradient": (gradient * mask).tolist(), "metrics": metrics}


def dpo_loss(options: dict[str, Any], drawn: dict[str, torch.Tensor]) -> tuple[float, Any]:
    """Return the loss, and its gradient in the model's log-probabilities."""
    model, mask = drawn["model"].clone().requires_grad_(), drawn["mask"]
    one = trainer(**options)
    one.model.forward, one.ref_model.forward = (
        gives([logps], drawn["squares"], mask) for logps in (model, drawn["reference"])
    )
    ones = torch.ones(len(mask), mask.shape[1] + 1, dtype=torch.int64)
    completion = torch.cat((torch.zeros(len(mask), 1, dtype=torch.int64), mask.long()), 1)
    batch = {"input_ids": ones, "attention_mask": ones, "completion_mask": completion}
    loss = one._compute_loss(one.model, batch, False)
    [gradient] = torch.autograd.grad(loss, model)
    # TRL adds up whole rows: a model gives 0 where there is no token.
    return loss.item(), gradient * mask


def by_pair(call: Any, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, Any]:
    """Return the losses of pairs and their gradients."""
    leaves = [x.clone().requires_grad_() for x in (chosen, rejected)]
    losses = call(*leaves)
    gradients = torch.autograd.grad(losses.sum(), leaves)
    return {
        "losses": losses.tolist(),
        "chosen_gradient": gradients[0].tolist(),
        "rejected_gradient": gradients[1].tolist(),
    }


def dpo_cases() -> Iterator[dict[str, Any]]:
    for options in DPO:
        # TRL's alpha_divergence knows no float64.
        is_single = options.get("f_divergence_type") == "alpha_divergence"
        drawn = tokens(LENGTHS, 0, torch.float32 if is_single else torch.float64)
        loss, gradient = dpo_loss({"beta": BETA, **options}, drawn)
        yield {
            "options": {"beta": BETA, **options},
            "dtype": "float32" if is_single else "float64",
            "loss": loss,
            "gradient": gradient.tolist(),
        }


def main() -> None:
    """Write the file."""
    drawn = tokens(LENGTHS, 0, torch.float64)
    means = drawn["model"].sum(1) / drawn["mask"].sum(1)
    chosen, rejected = means.chunk(2)
    # The reference is less likely on average, so that the KL is above 0.
    other = tokens(LENGTHS, 2, torch.float64)

    def cpo(options: dict[str, Any]) -> Any:
        keys = {"beta": 0.3, "simpo_gamma": 0.5, "cpo_alpha": 1.0, **options}
        this = types.SimpleNamespace(**keys, accelerator=types.SimpleNamespace(device="cpu"))
        return lambda *logps: CPOTrainer.cpo_loss(this, *logps)[0]

    orpo = types.SimpleNamespace(beta=0.3, accelerator=types.SimpleNamespace(device="cpu"))
    long = [2048] * 8
    values = {
        "trl": trl.__version__,
        "lengths": LENGTHS,
        "tokens": {name: drawn[name].tolist() for name in ("model", "reference", "squares")},
        "means": means.tolist(),
        "dpo": list(dpo_cases()),
        "cpo": [{"options": one, **by_pair(cpo(one), chosen, rejected)} for one in CPO],
        "kto_tokens": {name: other[name].tolist() for name in ("model", "reference")},
        "kto": [{"options": one, **kto_loss(one, drawn, other)} for one in KTO],
        "orpo": by_pair(lambda *x: ORPOTrainer.odds_ratio_loss(orpo, *x)[0], chosen, rejected),
        # The same numbers rounded to float32, and as they were.
        "long": {
            "seed": 1,
            "lengths": long,
            "float32": dpo_loss({"beta": BETA}, tokens(long, 1, torch.float32))[0],
            "float64": dpo_loss(
                {"beta": BETA},
                {
                    name: value.double() if value.is_floating_point() else value
                    for name, value in tokens(long, 1, torch.float32).items()
                },
            )[0],
        },
    }
    OUT.write_text(json.dumps(values) + "\n")
    print(f"wrote {OUT} with TRL {trl.__version__}")


if __name__ == "__main__":
    main()
