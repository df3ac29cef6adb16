"""Any cross entropy on deferred logits is fused, and any other use of them is stock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from lazy_models import FUSED, VOCAB, OwnLoss, assert_loss_is_stock, make, make_inputs
from torch import Tensor, nn

from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers.lazy_logits import loss as head_loss
from liger_kernels.transformers.lazy_logits.head import install_head, num_fused

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")


_CLASS_WEIGHT = torch.rand(VOCAB, generator=torch.Generator().manual_seed(8)) + 0.5


@pytest.mark.parametrize("chunked", [False, True], ids=["fused", "chunked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"ignore_index": 9},
        {"weight": _CLASS_WEIGHT},
        {"weight": _CLASS_WEIGHT, "label_smoothing": 0.2, "ignore_index": 9},
        {"weight": _CLASS_WEIGHT, "label_smoothing": 0.2, "reduction": "none"},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_cross_entropy_options(
    options: dict[str, Any], chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(head_loss, "linear_of", lambda pending: None)
        monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 7 * VOCAB)
    ignored = options.get("ignore_index", -100)
    assert_loss_is_stock(
        lambda logits, labels: F.cross_entropy(
            logits.view(-1, VOCAB),
            labels.reshape(-1).masked_fill(labels.reshape(-1) < 0, ignored),
            **options,
        )  # fmt: skip
    )


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda x, y: F.cross_entropy(input=x.flatten(0, 1), target=y.flatten()),
        lambda x, y: F.cross_entropy(x.reshape(-1, x.size(-1)), y.reshape(-1), None, None, -100),
        lambda x, y: nn.CrossEntropyLoss(reduction="sum")(x.float().view(-1, VOCAB), y.view(-1)),
        lambda x, y: F.cross_entropy(x.view(x.shape[0] * x.shape[1], -1) / 2.0, y.view(-1)),
        lambda x, y: F.cross_entropy(3 * x[..., 2:, :].flatten(0, -2), y[:, 2:].flatten()),
        lambda x, y: F.cross_entropy(x[y != -100], y[y != -100]),
        lambda x, y: F.cross_entropy(x[0], y[0]),
        lambda x, y: F.cross_entropy(x[:, 1:-1].reshape((-1, VOCAB)), y[:, 1:-1].reshape(-1)),
        # Not one scale and one cap: chunked.
        lambda x, y: F.cross_entropy((torch.tanh(x) * 2).tanh().view(-1, VOCAB), y.view(-1)),
    ],
)  # fmt: skip
def test_recorded_operations(loss_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 7 * VOCAB)
    assert_loss_is_stock(loss_of)


def _selective(x: Tensor, y: Tensor) -> Tensor:
    """The log-probability of each label, row by row."""
    rows = [F.log_softmax(row, dim=-1).gather(-1, ids[:, None])[:, 0] for row, ids in zip(x, y)]  # noqa: B905
    return torch.stack(rows)


def _by_parts(x: Tensor, y: Tensor) -> Tensor:
    """The same as a logit less the logarithm of the sum of all."""
    chosen = torch.gather(x, dim=-1, index=y.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(x, dim=-1)


_AT = {"dim": -1}
# Other people's losses: how many fused losses each is.
PATTERNS: dict[str, tuple[Any, int]] = {
    "nll": (lambda x, y: F.nll_loss(x.log_softmax(-1).view(-1, VOCAB), y.view(-1)), 1),
    "nll-sum": (
        lambda x, y: nn.NLLLoss(reduction="sum")(F.log_softmax(x[0], dim=1), y[0]),
        1,
    ),
    "nll-none": (
        lambda x, y: F.nll_loss(
            F.log_softmax(x.view(-1, VOCAB), -1, dtype=torch.float32), y.view(-1), reduction="none"
        ),
        1,
    ),
    "gather": (
        lambda x, y: x.log_softmax(-1).gather(-1, y.clamp(0)[..., None]).squeeze(-1) * (y >= 0),
        1,
    ),
    "gather-scaled": (
        lambda x, y: torch.log_softmax(x[:, :-1].float() / 0.7, **_AT).gather(
            2, y[:, :-1].clamp(0).unsqueeze(2)
        ),
        1,
    ),
    "module": (lambda x, y: torch.gather(nn.LogSoftmax(-1)(x), -1, y.clamp(0)[..., None]), 1),
    "rows": (lambda x, y: _selective(x, y.clamp(0)), 2),
    "parts": (lambda x, y: _by_parts(x, y.clamp(0)), 1),
    "parts-reversed": (
        lambda x, y: x.logsumexp(-1, keepdim=True) - x.gather(-1, y.clamp(0)[..., None]),
        2,
    ),
    "logsumexp": (lambda x, y: torch.logsumexp(2.0 * x, -1).square(), 1),
    "mean": (lambda x, y: x.mean(), 1),
    "mean-of-rows": (lambda x, y: x[y >= 0].float().mean(), 1),
    "mean-of-each": (lambda x, y: (x * 0.5).mean(-1), 1),
    "loss-and-metric": (
        lambda x, y: -_by_parts(x, y.clamp(0)).sum() + x.detach().mean(),
        2,
    ),
}


@pytest.mark.parametrize("head", ["fused", "chunked", "linear"])
@pytest.mark.parametrize("name", PATTERNS)
def test_losses_of_other_people_make_no_logits(
    name: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if head == "chunked":
        monkeypatch.setattr(head_loss, "linear_of", lambda deferred: None)
        monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 7 * VOCAB)
    loss_of, num_losses = PATTERNS[name]
    family = "granite" if head == "linear" else "gemma2"
    assert_loss_is_stock(loss_of, num_losses=num_losses, family=family)


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
        lambda x, y: F.cross_entropy(x[0], F.one_hot(y[0].clamp(0), VOCAB).float()),
        lambda x, y: F.cross_entropy(x.view(-1, VOCAB), y.view(-1), size_average=False),
        lambda x, y: F.cross_entropy(x.view(-1, VOCAB) + torch.arange(VOCAB), y.view(-1)),
        lambda x, y: F.cross_entropy(torch.cat([x[:1], x[1:]]).view(-1, VOCAB), y.view(-1)),
        lambda x, y: F.nll_loss(x.log_softmax(1).view(-1, VOCAB), y.view(-1)),
        lambda x, y: F.nll_loss(2.0 * x.view(-1, VOCAB).log_softmax(-1), y.view(-1)),
        lambda x, y: F.nll_loss(x.view(-1, VOCAB), y.view(-1)),
        lambda x, y: F.cross_entropy(2.0 * x.view(-1, VOCAB).log_softmax(-1), y.view(-1)),
        lambda x, y: x.gather(-1, y.clamp(0)[..., None].expand(-1, -1, 2)),
        lambda x, y: x.gather(1, y.clamp(0, 1)[..., None]),
        lambda x, y: x.log_softmax(-1)[..., 3],
        lambda x, y: x.mean(1),
        lambda x, y: x.mean(-1, dtype=torch.float64),
        lambda x, y: x.logsumexp((0, 2)),
        lambda x, y: (x.log_softmax(-1).exp() * x.log_softmax(-1)).sum(-1),
        lambda x, y: F.cross_entropy(x.mul_(2.0).view(-1, VOCAB), y.view(-1)),
        lambda x, y: OwnLoss.apply(x.view(-1, VOCAB), y.reshape(-1).clamp(0)),
        lambda x, y: OwnLoss.apply(x.flatten(0, 1)[3:], y.reshape(-1).clamp(0)[3:]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:size_average")
def test_anything_else_is_stock(loss_of: Any) -> None:
    assert_loss_is_stock(loss_of, is_lazy=False)


def test_changes_in_place_are_seen() -> None:
    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        rows = logits.view(-1, VOCAB)
        logits[..., :3] = -50.0
        return F.cross_entropy(rows, labels.reshape(-1))

    assert_loss_is_stock(loss_of, is_lazy=False)


def test_detached_logits_have_no_gradient() -> None:
    model = make()
    install_head(model, FUSED)
    out = model(**make_inputs())
    rows = out.logits.detach().view(-1, VOCAB)
    assert not rows.requires_grad
    assert not F.cross_entropy(rows, rows.argmax(-1)).requires_grad
    with torch.no_grad():
        scaled = out.logits * 2
    assert not scaled.requires_grad
    assert not (scaled + 0).requires_grad
    assert (out.logits + 0).requires_grad


def test_more_labels_after_the_forward() -> None:
    # The count of labels started in the forward must not bound a loss on others.
    model = make()
    inputs = make_inputs()
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][:, 2:] = -100
    install_head(model, FUSED)
    out = model(**inputs)
    target = inputs["input_ids"].reshape(-1)
    ours = F.cross_entropy(out.logits.view(-1, VOCAB), target)
    stock = F.cross_entropy(out.logits.view(-1, VOCAB) + 0, target)
    torch.testing.assert_close(ours, stock)


def test_label_count_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    op = head_loss.fused_linear_cross_entropy
    monkeypatch.setattr(
        head_loss,
        FUSED,
        lambda *a, **k: counts.append(k.get("label_count")) or op(*a, **k),
    )
    model = make()
    inputs = make_inputs()
    install_head(model, FUSED)
    model(**inputs)
    assert counts[0].wait() == (inputs["labels"] != -100).sum()


def test_trainers_label_smoothing_is_stock() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    model = make()
    inputs = make_inputs()
    labels = inputs.pop("labels")
    install_head(model, FUSED)
    smoother = LabelSmoother(epsilon=0.1)
    out = model(**inputs)
    assert type(out.logits) is Tensor
    stock = smoother(out, labels, shift_labels=True)
    # A trainer that leaves labels in gets lazy logits, and the same loss.
    torch.testing.assert_close(smoother(model(**inputs, labels=labels), labels, True), stock)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(smoothing: float, tmp_path: Any, accelerate: Any) -> None:
    inputs = make_inputs()
    rows = [{k: v[i].tolist() for k, v in inputs.items()} for i in (0, 1, 1, 0, 0, 1)]
    results = []
    for is_patched in (False, True):
        model = make()
        if is_patched:
            install_head(model, FUSED)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            label_smoothing_factor=smoothing,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append([*losses, trainer.evaluate()["eval_loss"]])
        # Two steps of three micro-batches; the label smoother takes the labels away.
        if is_patched:
            assert num_fused(model.lm_head) == (0 if smoothing else 6)
    assert len(results[0]) == 3
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, out: m.lm_head.weight.data.add_(1.0), None),
        (lambda m, out: setattr(m.lm_head.weight, "data", m.lm_head.weight * 2), "weights"),
        (lambda m, out: m.to(torch.bfloat16), "weights"),
        (lambda m, out: out.hidden_states[-1].mul_(0.0), "input was written to"),
    ],
    ids=["through data", "data", "dtype", "hidden state"],
)
def test_what_logits_are_made_from_has_changed(change, words):
    model = make()
    install_head(model, FUSED)
    out = model(**make_inputs(), output_hidden_states=True)
    with torch.no_grad():
        change(model, out)
    if words is None:
        # Documented: nothing tells of it.
        assert torch.isfinite(out.logits.sum())
        return
    with pytest.raises(RuntimeError, match=f"can no longer be made: the head's {words}"):
        out.logits.sum()


def test_other_weights_of_a_functional_call_are_not_the_models():
    model = make()
    install_head(model, FUSED)
    values = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, values, (), make_inputs())
    with pytest.raises(RuntimeError, match="the head's weights have changed"):
        out.logits.sum()


def test_functional_transforms_have_the_stock_gradients():
    from liger_kernels.transformers import apply_liger_kernel

    model = make()
    patched = copy.deepcopy(model)
    apply_liger_kernel(patched)

    def gradients(module):
        values = {name: p.detach() for name, p in module.named_parameters()}

        def loss(values):
            return torch.func.functional_call(module, values, (), make_inputs()).loss

        return torch.func.grad(loss)(values)

    expected, found = gradients(model), gradients(patched)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
