"""A preference that is learned offline, and runs that are killed on the way."""

from __future__ import annotations

import json
import random

import pytest
import torch
from forked_runs import start, words_of
from objective_pairs import collated, objective_of, tiny_model
from run_files import assert_same

from liger_cli.training.objectives.reference import WeightsReference, copied
from liger_kernels.transformers import apply_liger_kernel

GOOD, BAD = 5, 6


def preference(count: int, seed: int) -> list[dict]:
    """Answers that are alike up to their end, where the chosen one has GOOD, the other BAD."""
    drawn = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [drawn.randrange(8, 24) for _ in range(3)]
        answer = [drawn.randrange(8, 24) for _ in range(drawn.randint(1, 4))]
        row = {}
        for name, last in (("chosen", GOOD), ("rejected", BAD)):
            row[f"{name}_input_ids"] = [*prompt, *answer, last]
            row[f"{name}_labels"] = [-100, -100, -100, *answer, last]
        rows.append(row)
    return rows


DPO = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"]
DPO += ["aot", "aot_unpaired", "apo_zero", "apo_down", "sigmoid_norm"]
CASES = {f"dpo-{name}": ("dpo", {"loss_type": name}) for name in DPO}
CASES["dpo-exo_pair"][1]["label_smoothing"] = 1e-3
CASES |= {
    f"cpo-{name}": ("cpo", {"loss_type": name})
    for name in ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
}
CASES["cpo-hinge"][1]["beta"] = CASES["cpo-simpo"][1]["beta"] = 2.0
CASES |= {"orpo": ("orpo", {"beta": 1.0}), "simpo": ("simpo", {"beta": 2.0})}


@pytest.mark.parametrize("case", CASES)
def test_a_preference_is_learned_offline(case):
    name, keys = CASES[case]
    model = tiny_model()
    apply_liger_kernel(model)
    objective = objective_of(name, **keys)
    if name == "dpo":
        objective._reference = WeightsReference(model, copied(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    held_out = collated(preference(32, seed=1))
    batch = collated(preference(32, seed=0))
    totals = objective.count(batch)
    accuracy = 0.0
    for step in range(1, 51):
        objective.begin(model, [batch], totals)
        objective.part(model.train(), batch, totals).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and accuracy < 1.0:
            evaluation = objective.evaluation(model.eval())
            with torch.no_grad():
                found = evaluation.result(evaluation.sums(held_out))
            accuracy = found.means["rewards/accuracies"]
        if accuracy == 1.0:
            break
    assert accuracy == 1.0


@pytest.mark.parametrize(
    ("reference", "dies_at"),
    [("precompute", 4), ("model", 9), ("adapter_off", 15)]
    + [
        (reference, dies_at)
        for reference in ("precompute", "model", "adapter_off")
        for dies_at in (1, 7, 12, 22)
    ],
)
def test_a_killed_run_ends_with_the_same_weights(tmp_path, reference, dies_at):
    drawn = random.Random(0)
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{i} ", "chosen": "yes " * drawn.randint(1, 4), "rejected": "no no"}
        for i in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--objective", "dpo", "--reference", reference)
    more += ("--adapter", "lora") if reference == "adapter_off" else ()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    processes = [
        start(*words_of(data, whole, *more)),
        start(*words_of(data, killed, *more), dies_at=dies_at),
    ]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, -9]
    again = start(*words_of(data, killed, *more, "--resume", "auto"))
    again.join()
    assert again.exitcode == 0
    assert_same(whole, killed)
