"""Logits that are read after optimizer.step(): kept by cross_entropy, refused by the fused loss."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import transformers
from lazy_models import FUSED, make, make_inputs

from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.lazy_logits.head import install_head

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")

PLAIN = "cross_entropy"


def accuracy(logits: Any, labels: Any) -> float:
    guesses, labels = logits.argmax(-1)[:, :-1], labels[:, 1:]
    return float((guesses == labels)[labels != -100].float().mean())


def training(tmp_path: Any) -> Any:
    """Return arguments of three steps on a CPU."""
    return transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_of_the_plain_loss_are_those_of_the_forward(family, dtype):
    model, inputs = make(family).to(dtype), make_inputs()
    stock = model(**inputs).logits.detach().clone()
    install_head(model, PLAIN)
    out = model(**inputs)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert torch.equal(out.logits.detach(), stock)
    assert torch.equal(out.logits.argmax(-1), stock.argmax(-1))
    assert not torch.equal(model(**inputs, skip_logits=False).logits, stock)


def test_logits_of_the_plain_loss_get_their_gradient_without_a_warning():
    model, inputs = make(), make_inputs()
    stock = model(**inputs)
    stock.logits.retain_grad()
    stock.loss.backward()
    install_head(model, PLAIN)
    out, hooked = model(**inputs), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out.logits.retain_grad()
        out.logits.register_hook(hooked.append)
        out.loss.backward()
    torch.testing.assert_close(out.logits.grad, stock.logits.grad)
    torch.testing.assert_close(hooked, [stock.logits.grad])


class ReadsLater(transformers.TrainerCallback):
    """Log the accuracy of each batch, after its step."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.seen: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        out, labels = self.batch
        self.seen.append(accuracy(out.logits, labels))


class KeepsOutputs(transformers.Trainer):
    """A Trainer whose callback sees the outputs of its last batch."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kw: Any) -> Any:
        out = model(**inputs)
        self.reader.batch = out, inputs["labels"]
        return (out.loss, out) if return_outputs else out.loss


def accuracies_after_steps(model: Any, tmp_path: Any) -> list[float]:
    inputs = make_inputs()
    rows = [{name: value[i % 2] for name, value in inputs.items()} for i in range(6)]
    trainer = KeepsOutputs(model, training(tmp_path), train_dataset=rows)
    trainer.reader = ReadsLater()
    trainer.add_callback(trainer.reader)
    trainer.train()
    return trainer.reader.seen


@pytest.mark.filterwarnings("ignore")
def test_a_callback_that_reads_after_the_step_is_given_the_switch(tmp_path):
    stock = accuracies_after_steps(make(), tmp_path)
    assert len(stock) == 3
    model = make()
    record = apply_liger_kernel(model)
    with pytest.raises(RuntimeError, match=r"can no longer be made.*ops='[^']+'") as refused:
        accuracies_after_steps(model, tmp_path)
    record.undo()
    (ops,) = re.findall(r"ops='([^']+)'", str(refused.value))
    model = make()
    apply_liger_kernel(model, ops)
    assert accuracies_after_steps(model, tmp_path) == stock


@pytest.mark.parametrize("op", [FUSED, PLAIN])
def test_a_loop_of_accelerate_reads_after_the_step(op, accelerate):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, inputs = make(), make_inputs()
    install_head(model, op)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    out = model(**inputs)
    accelerator.backward(out.loss)
    before = model(**inputs, skip_logits=False).logits.detach()
    optimizer.step()
    if op == PLAIN:
        gathered = accelerator.gather_for_metrics(out.logits.detach())
        assert torch.equal(gathered.float(), before.float())
        return
    with pytest.raises(RuntimeError, match="cross_entropy in place of fused_linear_cross_entropy"):
        accelerator.gather_for_metrics(out.logits.argmax(-1))


OPTIMIZERS = [
    pytest.param(cls, {kind: True}, id=f"{cls.__name__}-{kind}")
    for cls in (torch.optim.AdamW, torch.optim.SGD)
    for kind in ("fused", "foreach")
]


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_every_optimizer_that_wrote_the_weights_is_seen(cls, options):
    model, other = make(), make()
    install_head(model, FUSED)
    install_head(other, FUSED)
    out, outputs = model(**make_inputs()), other(**make_inputs())
    outputs.loss.backward()
    cls(other.parameters(), lr=0.5, **options).step()
    with pytest.raises(RuntimeError, match="the head's weights have changed"):
        outputs.logits.argmax(-1)
    # Steps of another model, and of one whose head is frozen, change nothing.
    stock = model(**make_inputs(), skip_logits=False).logits.argmax(-1)
    out.loss.backward()
    rest = [p for p in model.parameters() if p is not model.lm_head.weight]
    cls(rest, lr=0.5, **options).step()
    assert torch.equal(out.logits.argmax(-1), stock)
