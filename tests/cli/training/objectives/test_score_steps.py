"""Losses of reward and classify in fp64: those of TRL and transformers, the same in any split."""

from __future__ import annotations

import types
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from objective_pairs import VOCABULARY, make_pairs, objective_of, tiny_classifier

from liger_cli.data.batches import placeholder
from liger_cli.data.class_batches import ClassCollator
from liger_cli.data.class_maker import scored_at_end
from liger_cli.data.collate import Collator
from liger_cli.data.packing import join_rows
from liger_cli.data.pair_batches import PairCollator
from liger_cli.training.model.classifiers import MULTI_LABEL, SINGLE_LABEL
from liger_cli.training.objectives.objective import Totals
from liger_kernels.transformers import apply_liger_kernel

PAD = 0


def classifier(num_labels=3, problem_type=SINGLE_LABEL):
    problem_type = None if num_labels == 1 else problem_type
    return tiny_classifier(num_labels, problem_type).double()


def rows_of(targets, first=3):
    """Rows of 1 to 9 tokens, from the token `first` on."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for target in targets:
        length = int(torch.randint(1, 10, (), generator=generator))
        ids = torch.randint(first, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": scored_at_end(length), "targets": target})
    return rows


def step(objective, model, batches):
    """Return the loss of a step, every gradient, and the metrics."""
    model.zero_grad()
    totals = sum(map(objective.count, batches), Totals())
    loss, metrics = 0.0, 0.0
    for batch in batches:
        part = objective.part(model, batch, totals)
        part.loss.backward()
        loss, metrics = loss + part.loss.item(), metrics + part.metrics
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}, metrics


def assert_same(one, other, tolerance=1e-10):
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() <= tolerance * (1 + gradient.norm()), name
    assert torch.allclose(one[2], other[2], rtol=tolerance)


ONE = [[float(i % 3)] for i in range(8)]
SEVERAL = [[float(i & 1), float(i & 2 > 0), float(i & 4 > 0)] for i in range(8)]


def splits(rows, collator):
    """Yield the rows uneven, one by one, end to end, packed, and with a process without rows."""
    yield [collator(rows[:3]), collator(rows[3:])]
    yield [collator([row]) for row in rows]
    free = collator.with_layout(padding_free=True)
    yield [free(rows[:5]), free(rows[5:])]
    yield [collator([join_rows(rows[:4]), join_rows(rows[4:])])]
    yield [collator(rows), collator([placeholder(rows[0])])]


@pytest.mark.parametrize("ops", ["none", "auto"])
@pytest.mark.parametrize("kind", ["one", "weighted", "several", "reward"])
def test_a_scored_step_is_the_same_in_any_split(kind, ops):
    keys = {"class_weights": "1,0.2,3"} if kind == "weighted" else {}
    if kind == "reward":
        model, name, rows = classifier(1), "reward", make_pairs(8)
        collator = PairCollator(Collator(PAD))
        keys = {"center_rewards_coefficient": 0.3}
    else:
        model = classifier(problem_type=MULTI_LABEL if kind == "several" else SINGLE_LABEL)
        name, rows = "classify", rows_of(SEVERAL if kind == "several" else ONE)
        collator = ClassCollator(Collator(PAD))
    objective = objective_of(name, model, **keys)
    whole = step(objective, model, [collator(rows)])
    assert whole[1]["score.weight"].abs().max() > 1e-3
    apply_liger_kernel(model, ops)
    for batches in splits(rows, collator):
        assert_same(whole, step(objective, model, batches))


@pytest.mark.parametrize("several", [False, True])
def test_classify_is_the_loss_of_transformers(several):
    model = classifier(problem_type=MULTI_LABEL if several else SINGLE_LABEL)
    batch = ClassCollator(Collator(PAD))(rows_of(SEVERAL if several else ONE))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    targets = batch["targets"]
    wanted = targets.double() if several else targets.squeeze(-1).long()
    loss = model(**inputs, labels=wanted).loss
    loss.backward()
    theirs = loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}, torch.zeros(1)
    found = step(objective_of("classify", model), model, [batch])
    assert_same((*found[:2], torch.zeros(1)), theirs)


@pytest.mark.parametrize("several", [False, True])
def test_class_weights_are_those_of_torch(several):
    model = classifier(problem_type=MULTI_LABEL if several else SINGLE_LABEL)
    objective = objective_of("classify", model, class_weights="1,0.2,3")
    batch = ClassCollator(Collator(PAD))(rows_of(SEVERAL if several else ONE))
    scores, weights = objective.scores(model, batch), torch.tensor([1, 0.2, 3]).double()
    targets = batch["targets"]
    if several:
        wanted = F.binary_cross_entropy_with_logits(scores, targets.double(), pos_weight=weights)
    else:
        wanted = F.cross_entropy(scores, targets.squeeze(-1).long(), weight=weights)
    assert step(objective, model, [batch])[0] == pytest.approx(wanted.item(), rel=1e-7)


def test_the_last_token_is_known_by_its_place():
    """A text may hold the token of padding, and end in it."""
    model = classifier()
    rows = rows_of(ONE)
    for row in rows[::2]:
        row["input_ids"][-1] = PAD
    objective = objective_of("classify", model)
    collator = ClassCollator(Collator(PAD))
    together = objective.scores(model, collator(rows))
    # Of one row alone, without padding, transformers scores the token that is not PAD.
    hidden = model.model(torch.tensor([rows[0]["input_ids"]])).last_hidden_state
    assert torch.allclose(together[0], model.score(hidden[0, -1]), rtol=1e-10)
    theirs = model(**{k: v for k, v in collator(rows).items() if k != "targets" and k != "labels"})
    assert (theirs.logits[0] - together[0]).abs().max() > 1e-3


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.01])
def test_reward_is_the_loss_of_trl(margin, center):
    """TRL's RewardTrainer.compute_loss, of the same model and pairs in fp64."""
    reward_trainer = pytest.importorskip("trl.trainer.reward_trainer")
    model, pairs = classifier(1), make_pairs(6)
    examples = [
        {"chosen_ids": p["chosen_input_ids"], "rejected_ids": p["rejected_input_ids"]}
        for p in pairs
    ]
    for i, (pair, example) in enumerate(zip(pairs, examples, strict=True)):
        if margin:
            # Exact in float32, which TRL holds them in.
            pair["margin"] = example["margin"] = i / 4
    inputs = reward_trainer.DataCollatorForPreference(PAD)(examples)
    trainer = types.SimpleNamespace(
        model=model,
        args=types.SimpleNamespace(center_rewards_coefficient=center),
        accelerator=types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = reward_trainer.RewardTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    theirs = loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}
    keys = {} if center is None else {"center_rewards_coefficient": center}
    objective = objective_of("reward", model, **keys)
    found = step(objective, model, [PairCollator(Collator(PAD))(pairs)])
    assert_same((*found[:2], torch.zeros(1)), (*theirs, torch.zeros(1)), 1e-6)
    means = dict(zip(objective.metrics, found[2].tolist(), strict=True))
    [accuracy], [apart] = (trainer._metrics["train"][name] for name in ("accuracy", "margin"))
    assert means["rewards/accuracies"] == pytest.approx(accuracy)
    assert means["rewards/margins"] == pytest.approx(apart, rel=1e-6)


def test_evaluation_counts_classes():
    """Against the definitions, whatever the batches."""
    model = classifier()
    objective = objective_of("classify", model, class_weights="1,0.2,3")
    rows, collator = rows_of(ONE), ClassCollator(Collator(PAD))
    evaluation = objective.evaluation(model)
    with torch.no_grad():
        sums = evaluation.sums(collator(rows[:3])) + evaluation.sums(collator(rows[3:]))
        scores = objective.scores(model, collator(rows))
    found = evaluation.result(sums)
    wanted = torch.tensor(ONE).squeeze(-1).long()
    best = scores.argmax(-1)
    table = [[int(((wanted == i) & (best == j)).sum()) for j in range(3)] for i in range(3)]
    assert found.confusion == table
    assert found.rows == 8
    assert found.means["accuracy"] == pytest.approx(float((wanted == best).double().mean()))
    f1 = []
    for i in range(3):
        said, has = sum(row[i] for row in table), sum(table[i])
        f1.append(2 * table[i][i] / (said + has) if said + has else float("nan"))
        assert found.means[f"f1/LABEL_{i}"] == pytest.approx(f1[-1], nan_ok=True)
    known = [value for value in f1 if value == value]
    assert found.means["f1"] == pytest.approx(sum(known) / len(known))
    loss = F.cross_entropy(scores, wanted, weight=torch.tensor([1, 0.2, 3]).double())
    assert found.loss == pytest.approx(loss.item(), rel=1e-7)
    logged = found.logged()
    assert type(found).from_names(logged) == found


def test_evaluation_of_several_labels_counts_rows_with_all_right():
    model = classifier(problem_type=MULTI_LABEL)
    objective = objective_of("classify", model)
    batch = ClassCollator(Collator(PAD))(rows_of(SEVERAL))
    evaluation = objective.evaluation(model)
    with torch.no_grad():
        found = evaluation.result(evaluation.sums(batch))
        said = objective.scores(model, batch) > 0
    has = torch.tensor(SEVERAL) > 0.5
    assert found.means["accuracy"] == pytest.approx(float((said == has).all(-1).double().mean()))
    for i in range(3):
        total = float(said[:, i].sum() + has[:, i].sum())
        wanted = 2 * float((said & has)[:, i].sum()) / total
        assert found.means[f"f1/LABEL_{i}"] == pytest.approx(wanted)
    assert found.confusion is None
    assert type(found).from_names(found.logged()) == found
