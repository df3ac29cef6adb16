"""A preference that is learned offline, and runs that are killed on the way."""

from __future__ import annotations

import functools
import json
import random

import pytest
import torch
from forked_runs import start, words_of
from objective_pairs import collated, objective_of, tiny_classifier, tiny_model
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
CASES["reward"] = ("reward", {})


@pytest.mark.parametrize("case", CASES)
def test_a_preference_is_learned_offline(case):
    name, keys = CASES[case]
    model = tiny_classifier() if name == "reward" else tiny_model()
    apply_liger_kernel(model)
    objective = objective_of(name, model, **keys)
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


KILLED = {
    "precompute": (1, 4, 7, 12, 22),
    "model": (1, 7, 9, 12, 22),
    "adapter_off": (1, 7, 12, 15, 22),
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """For a reference the words of a run, by its directory, and one that nothing stops."""
    data = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    drawn = random.Random(0)
    rows = [
        {"prompt": f"{i} ", "chosen": "yes " * drawn.randint(1, 4), "rejected": "no no"}
        for i in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @functools.cache
    def run(reference):
        more = ("--objective", "dpo", "--reference", reference)
        more += ("--adapter", "lora") if reference == "adapter_off" else ()

        def words(run_dir, *last):
            return words_of(data, run_dir, *more, *last)

        whole = data.parent / reference
        return words, whole, start(*words(whole))

    return run


@pytest.mark.parametrize(
    ("reference", "dies_at"),
    [(reference, time) for reference, times in KILLED.items() for time in times],
)
def test_a_killed_run_ends_with_the_same_weights(whole_run, tmp_path, reference, dies_at):
    words, whole, process = whole_run(reference)
    run_dir = tmp_path / "killed"
    killed = start(*words(run_dir), dies_at=dies_at)
    for one in (process, killed):
        one.join()
    assert [process.exitcode, killed.exitcode] == [0, -9]
    again = start(*words(run_dir, "--resume", "auto"))
    again.join()
    assert again.exitcode == 0
    assert_same(whole, run_dir)
