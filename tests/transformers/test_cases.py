"""Cases of other projects' bugs that no other file tests under their number."""

from __future__ import annotations

import importlib
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from checks import assert_same, run, snapshot
from torch import Tensor, nn

from liger_cli.training.evaluate import evaluate
from liger_cli.training.objectives.sft import NextToken
from liger_kernels.ops import fused_linear_cross_entropy
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.lazy_logits import loss as head_loss_module
from liger_kernels.transformers.replacements.subclasses import is_patched

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")


# Only the patched instance changes, and what a class is called and is stays as it was.
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_other_models_keep_their_classes_case_51(family):
    patched, other = zoo.build(family), zoo.build(family)
    before, shown = snapshot(other), repr(other)
    classes = {name: type(module) for name, module in patched.named_modules()}
    stock_forwards = {cls: cls.forward for cls in set(classes.values())}
    record = apply_liger_kernel(patched, "all")
    assert snapshot(other) == before
    assert repr(other) == repr(patched) == shown
    assert {cls: cls.forward for cls in stock_forwards} == stock_forwards
    # A model that is built now is a stock one too.
    assert not any(is_patched(module) for module in zoo.build(family).modules())
    for name, module in patched.named_modules():
        assert type(module).__name__ == classes[name].__name__
        assert isinstance(module, classes[name])
    names = {patch.name for patch in record.patches}
    assert {n for n, m in patched.named_modules() if is_patched(m)} == names
    assert not any(
        isinstance(module, nn.LayerNorm) != issubclass(classes[name], nn.LayerNorm)
        for name, module in patched.named_modules()
    )


# The copies that PEFT trains are read and get the gradients; the originals get none.
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("order", ["patch-first", "adapter-first"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
@pytest.mark.filterwarnings("ignore")
def test_saved_head_and_embeddings_case_55(family, order, is_tied):
    peft = pytest.importorskip("peft")
    inputs = zoo.text_inputs()

    def wrap(model: Any) -> Any:
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
        )
        return peft.get_peft_model(model, config).train()

    def train_a_little(model: Any) -> None:
        # The copies leave their originals: who reads the wrong one has another loss.
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "modules_to_save" in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))

    stock = wrap(zoo.build(family, tie_word_embeddings=is_tied))
    before = run(stock, inputs).loss
    train_a_little(stock)
    reference = run(stock, inputs)
    assert abs(reference.loss - before) > 1e-3
    model = zoo.build(family, tie_word_embeddings=is_tied)
    record = apply_liger_kernel(model, "all") if order == "patch-first" else None
    wrapped = wrap(model)
    record = record or apply_liger_kernel(wrapped, "all")
    train_a_little(wrapped)
    with record.count_calls():
        ours = run(wrapped, inputs)
    assert_same(ours, reference)
    heads = [name for name in ours.grads if "lm_head" in name or "embed_tokens" in name]
    assert heads
    assert all("modules_to_save" in name for name in heads)
    assert all(ours.grads[name].abs().max() > 0 for name in heads)
    # One more batch through the fused loss after an optimizer step: still the trained weight.
    for each in (stock, wrapped):
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.5).step()
    assert_same(run(wrapped, inputs), run(stock, inputs), tolerance=1e-4)


# cross_entropy alone reaches the op in one step of every family, whatever its loss is called by.
@pytest.mark.parametrize("family", zoo.ALL)
def test_cross_entropy_is_called_case_57(family, monkeypatch):
    model = zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    stock = run(model, inputs)
    calls: list[Tensor] = []
    op = head_loss_module.cross_entropy

    def counted(logits: Tensor, target: Tensor, **options: Any) -> Any:
        calls.append(target)
        return op(logits, target, **options)

    monkeypatch.setattr(head_loss_module, "cross_entropy", counted)
    functions = importlib.import_module("liger_kernels.transformers.class_mode").FAMILY_FUNCTIONS
    record = functions[f"apply_liger_kernel_to_{family}"](
        model=model, cross_entropy=True, fused_linear_cross_entropy=False
    )
    with record.count_calls():
        assert_same(run(model, inputs), stock)
    assert len(calls) == 1
    assert (calls[0] != -100).sum() == (inputs["labels"][:, 1:] != -100).sum()
    assert record.coverage["cross_entropy"] == {"patched": 1, "candidates": 1}


# A trainer that computes metrics gets whole logits, without being told of the fused loss.
@pytest.mark.parametrize("family", ["llama", "granite", "gemma2"])
@pytest.mark.filterwarnings("ignore")
def test_metrics_get_logits_case_67(family, tmp_path):
    rows = [
        {"input_ids": ids.tolist(), "labels": ids.tolist()}
        for ids in zoo.text_inputs()["input_ids"]
    ]
    seen: list[Any] = []

    def keep(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = zoo.build(family)
    trainer = transformers.Trainer(model, arguments, eval_dataset=rows, compute_metrics=keep)
    trainer.evaluate()
    apply_liger_kernel(model, "all")
    trainer.evaluate()
    stock, ours = (x[0] if isinstance(x, tuple) else x for x in seen)
    assert ours.shape == (2, 12, zoo.VOCAB_SIZE)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(stock), rtol=1e-4, atol=1e-4)


# Dense and sparse layers in one model: each is patched by what it is, at its own place.
MIXED: dict[str, tuple[str, dict[str, Any], dict[str, set[str]]]] = {
    "qwen3_moe": (
        "qwen3_moe",
        {"mlp_only_layers": [0]},
        {
            "mlp": {"model.layers.0.mlp"},
            "experts": {"model.layers.1.mlp.experts"},
        },
    ),
    "llama4_text": (
        "llama4_text",
        {"interleave_moe_layer_step": 2},
        {
            "mlp": {
                "model.layers.0.feed_forward",
                "model.layers.1.feed_forward.shared_expert",
            },
            "experts": {"model.layers.1.feed_forward"},
        },
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_dense_and_sparse_layers_case_73(name):
    family, options, places = MIXED[name]
    model = zoo.build(family, **options).train()
    inputs = zoo.text_inputs()
    stock = run(model, inputs)
    record = apply_liger_kernel(model, "all")
    found = {op: {p.name for p in record.patches if p.op == op} for op in ("swiglu", "moe_experts")}
    if not zoo.IS_V5:
        # Version 4 has a list of experts, whose block is patched.
        blocks = {name.removesuffix(".experts") for name in places["experts"]}
        places = {**places, "experts": blocks}
    assert found == {"swiglu": places["mlp"], "moe_experts": places["experts"]}
    with record.count_calls():
        assert_same(run(model, inputs), stock)


# Accuracy without logits equals that of stock logits, for every family and with images; so does
# each token's own, from the fused op.
@pytest.mark.parametrize("family", zoo.ALL)
def test_token_accuracy_case_81(family):
    model = zoo.build(family).eval()
    inputs = zoo.inputs_of(family)
    hidden: list[Tensor] = []
    head: Any = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, given: hidden.append(given[0]))
    with torch.no_grad():
        stock = model(**inputs)
    handle.remove()
    # Labels that the model guesses for about half of the tokens; random ones match none.
    guesses = stock.logits.argmax(-1)
    labels = inputs["labels"].clone()
    is_guessed = torch.rand(labels.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    is_guessed &= labels != -100
    labels[:, 1:][is_guessed[:, 1:]] = guesses[:, :-1][is_guessed[:, 1:]]
    target = labels[:, 1:]
    is_label = target != -100
    is_correct = (guesses[:, :-1] == target) & is_label
    assert 0.2 < is_correct.sum() / is_label.sum() < 0.9
    with torch.no_grad():
        loss = F.cross_entropy(stock.logits[:, :-1].flatten(0, 1), target.flatten())

    record = apply_liger_kernel(model, "all")
    result = evaluate(
        NextToken(model, torch.device("cpu")),
        model,
        {"": [{}] * len(labels)},
        lambda rows: {**inputs, "labels": labels},
        batch_size=len(labels),
        accelerator=accelerate.Accelerator(cpu=True),
        record=record,
    )
    assert result.tokens == is_label.sum()
    assert result.token_accuracy == pytest.approx((is_correct.sum() / is_label.sum()).item())
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    assert not record.unused

    with torch.no_grad():
        _, stats = fused_linear_cross_entropy(
            hidden[0][:, :-1], head.weight, target.contiguous(), bias=head.bias, return_stats=True
        )
    assert torch.equal(stats.correct.bool(), is_correct)


# Labels that are shifted already, alone, give the loss of the stock model that is given both: of
# every position, but for two classes of version 4 that shift by themselves.
@pytest.mark.parametrize("family", zoo.ALL)
def test_shifted_labels_alone_case_63(family):
    model = zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    labels = inputs.pop("labels")
    shift_labels = F.pad(labels[:, 1:], (0, 1), value=7)
    with torch.no_grad():
        both = model(**inputs, labels=labels, shift_labels=shift_labels)
    every = F.cross_entropy(both.logits.flatten(0, 1), shift_labels.flatten())
    drops_the_last = not zoo.IS_V5 and family in ("gemma3", "llama4")
    if getattr(both, "aux_loss", None) is None:
        assert torch.isclose(both.loss, every, rtol=1e-5) != drops_the_last
    apply_liger_kernel(model, "all")
    torch.testing.assert_close(model(**inputs, shift_labels=shift_labels).loss.detach(), both.loss)
