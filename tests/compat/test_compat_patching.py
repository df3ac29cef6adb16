"""The functions that patch families, and trainers that call them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from typing import Any

import pytest
import torch
import transformers
import zoo
from checks import assert_same, run
from drop_in_checks import patched_classes, rows
from torch import nn

from liger_kernels import compat
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import restore
from liger_kernels.transformers.patching.families import FAMILIES

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.skipif(
        "liger_kernel" in sys.modules or importlib.util.find_spec("liger_kernel") is not None,
        reason="the original liger_kernel is installed; the drop-in refuses then",
    ),
]


# Patching ---------------------------------------------------------------------------------------


def _parts(family: str) -> set[str]:
    return {f"{family}{part}" for part in ("RMSNorm", "MLP")}


def test_signatures_are_those_of_the_families(alias):
    functions = alias.MODEL_TYPE_TO_APPLY_LIGER_FN
    assert functions.keys() >= FAMILIES.keys()
    for family in FAMILIES:
        function = functions[family]
        assert function is getattr(alias, f"apply_liger_kernel_to_{family}")
        parameters = inspect.signature(function).parameters
        options = {name: p.default for name, p in parameters.items() if name != "model"}
        assert options == FAMILIES[family].options
        with pytest.raises(ValueError, match=r"unknown option 'rms_nrom'; did you mean 'rms_norm'"):
            function(rms_nrom=False)


# The orders of liger_kernel 0.8 that differ: found by asking its functions for a value twice.
_TEXT = ("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm")
ORDERS = {
    "llama": (*_TEXT, "swiglu", "model"),
    "gemma2": (*_TEXT, "geglu", "model"),
    "gemma3": (*_TEXT[:3], "layer_norm", "rms_norm", "geglu", "model"),
    "mllama": (*_TEXT[:3], "layer_norm", "rms_norm", "swiglu", "model"),
    "qwen2_vl": (*_TEXT, "layer_norm", "swiglu", "model"),
    "llama4": (*_TEXT, "swiglu", "model", "layer_norm"),
    "smolvlm": ("cross_entropy", "fused_linear_cross_entropy", "rms_norm", "layer_norm", "model"),
    "llava": ("cross_entropy", "fused_linear_cross_entropy", "model"),
}


@pytest.mark.parametrize("family", ORDERS)
def test_positional_arguments_are_those_of_liger_kernel(family, alias):
    function, order = getattr(alias, f"apply_liger_kernel_to_{family}"), ORDERS[family]
    shown = inspect.signature(function).parameters
    assert tuple(shown)[: len(order)] == order
    if family not in FAMILIES:
        return
    model = zoo.build(family)
    given = dict.fromkeys(order, False) | {"rms_norm": True, "cross_entropy": True, "model": model}
    function(*given.values())
    by_name = zoo.build(family)
    function(**{**given, "model": by_name})
    found = patched_classes(model)
    assert found == patched_classes(by_name)
    assert any("Norm" in name for name in found)
    assert not any("MLP" in name or "Attention" in name for name in found)


def test_positional_arguments_that_are_wrong(alias):
    model = zoo.build("llama")
    llama = alias.apply_liger_kernel_to_llama
    with pytest.raises(TypeError, match=r"got a LlamaForCausalLM for 'rope'.*pass model=\.\.\."):
        llama(model)
    with pytest.raises(TypeError, match=r"at most 6 positional arguments \(rope, .*\), got 7"):
        llama(True, False, True, True, True, model, True)
    with pytest.raises(TypeError, match="multiple values for argument 'rope'"):
        llama(True, rope=False)
    with pytest.raises(ValueError, match="got rope=3; it is True or False"):
        llama(3, model=model)
    with pytest.raises(TypeError, match="llama4_text takes keyword arguments alone.* got 1"):
        alias.apply_liger_kernel_to_llama4_text(True)
    with pytest.raises(ValueError, match="model must be a transformers model, got 'llama'"):
        llama(model="llama")
    assert not patched_classes(model)
    # Some by place and some by name; None is False.
    llama(False, None, rms_norm=False, model=model)
    assert patched_classes(model) == {"LlamaMLP", "Linear"}


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_instance(family, alias):
    model = zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    stock = run(model, inputs)
    other = zoo.build(family)
    function = getattr(alias, f"apply_liger_kernel_to_{family}")
    for apply in (function, alias._apply_liger_kernel_to_instance):
        # Again with other options: the last call wins, where ours would raise.
        assert apply(model=model, rms_norm=False, rope=None) is None
        assert not any("Norm" in name or "Attention" in name for name in patched_classes(model))
        assert apply(model=model) is None
        assert any("Norm" in name for name in patched_classes(model))
        assert_same(run(model, inputs), stock)
        assert model(**inputs, skip_logits=True).logits is None
    assert not patched_classes(other)
    # An option of ours that chooses no op is taken too.
    for model_of in (zoo.build_unlisted(), model):
        alias._apply_liger_kernel_to_instance(model_of, save_memory=False)
        assert patched_classes(model_of)
    with pytest.raises(ValueError, match="unknown option 'layernorm'"):
        alias._apply_liger_kernel_to_instance(model, layernorm=True)
    restore(model)
    assert not patched_classes(model)


def test_instance_of_a_type_without_a_function(alias):
    model = zoo.build_unlisted().train()
    stock = run(model, zoo.text_inputs())
    alias._apply_liger_kernel_to_instance(
        model, rope=False, cross_entropy=True, fused_linear_cross_entropy=None
    )
    assert patched_classes(model) == {*_parts("SmolLM3"), "Linear"}
    assert_same(run(model, zoo.text_inputs()), stock)
    for options, words in (({"rop": False}, "did you mean 'rope'"), ({"rope": 1}, "rope must be")):
        with pytest.raises(ValueError, match=words):
            alias._apply_liger_kernel_to_instance(model, **options)
    with pytest.raises(ValueError, match="transformers model, got Linear"):
        alias._apply_liger_kernel_to_instance(nn.Linear(2, 2))


# Types without a row, by what their modules compute: of an instance, and of those built later.
def test_function_of_a_recognised_type(alias):
    model = zoo.build_unlisted().train()
    stock = run(model, zoo.text_inputs())
    assert model.config.model_type not in FAMILIES
    alias.apply_liger_kernel_to_smollm3(model=model, rope=False)
    assert patched_classes(model) == {*_parts("SmolLM3"), "Linear"}
    assert_same(run(model, zoo.text_inputs()), stock)
    alias.apply_liger_kernel_to_smollm3(rms_norm=False)
    assert patched_classes(zoo.build_unlisted()) == {"SmolLM3MLP", "SmolLM3Attention", "Linear"}
    with pytest.raises(ValueError, match="did you mean 'rms_norm'"):
        alias.apply_liger_kernel_to_smollm3(rms_nrom=False)
    with pytest.raises(ValueError, match="got a model of type 'llama'"):
        alias.apply_liger_kernel_to_smollm3(model=zoo.build("llama"))
    compat.uninstall()
    assert not patched_classes(zoo.build_unlisted())


def test_class_mode_ends_with_the_drop_in(alias):
    before = zoo.build("llama")
    for _ in range(2):
        alias.apply_liger_kernel_to_llama(rope=False)
        alias._apply_liger_kernel("qwen2", swiglu=None)
    assert patched_classes(zoo.build("llama")) == {*_parts("Llama"), "Linear"}
    assert patched_classes(zoo.build("qwen2")) == {
        *(_parts("Qwen2") - {"Qwen2MLP"}),
        "Qwen2Attention",
        "Linear",
    }
    # Built patched and asked for again, as Trainer does.
    model = zoo.build("llama")
    alias._apply_liger_kernel_to_instance(model=model)
    assert "LlamaAttention" in patched_classes(model)
    assert not patched_classes(before)
    with pytest.warns(UserWarning, match="'no_such' has no function"):
        alias._apply_liger_kernel("no_such")
    compat.uninstall()
    assert not patched_classes(zoo.build("llama"))
    assert not patched_classes(zoo.build("qwen2"))


def test_llama4_stands_for_its_text_model_too(alias):
    model = zoo.build("llama4_text")
    with pytest.raises(ValueError, match="unknown option 'rms_nrom'"):
        alias.apply_liger_kernel_to_llama4(model=model, rms_nrom=False)
    # Text has no layer norm.
    alias.apply_liger_kernel_to_llama4(model=model, rms_norm=False, layer_norm=True)
    assert "Llama4TextMLP" in patched_classes(model)
    assert "Llama4TextRMSNorm" not in patched_classes(model)
    alias.apply_liger_kernel_to_llama4(layer_norm=True, rope=False)
    assert "Llama4TextRMSNorm" in patched_classes(zoo.build("llama4_text"))
    assert "LayerNorm" in patched_classes(zoo.build("llama4"))


def test_auto_class(alias, tmp_path):
    stock = zoo.build("qwen3").train()
    stock.save_pretrained(tmp_path)
    load = alias.AutoLigerKernelForCausalLM.from_pretrained
    model = load(tmp_path, rope=False, dtype=torch.float32).train()
    assert patched_classes(model) == {*_parts("Qwen3"), "Linear"}
    assert_same(run(model, zoo.text_inputs()), run(stock, zoo.text_inputs()))
    with pytest.raises(ValueError, match="unknown option 'rms_nrom'"):
        load(tmp_path, rms_nrom=True)


TRAININGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, {"Attention", "RMSNorm", "MLP"}),
    "config": (
        {"liger_kernel_config": {"rope": False, "swiglu": True}},
        {"RMSNorm", "MLP"},
    ),
    "cross-entropy": (
        {
            "liger_kernel_config": {
                "cross_entropy": True,
                "fused_linear_cross_entropy": False,
                "rms_norm": False,
            }
        },
        {"Attention", "MLP"},
    ),
    "metrics": ({}, {"Attention", "RMSNorm", "MLP"}),
}


def accuracy(prediction: Any) -> dict[str, float]:
    guesses, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((guesses == labels)[labels != -100].mean())}


# Case 67: metrics get the logits they need, and training still makes none.
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.filterwarnings("ignore")
def test_trainer_asks_for_liger_kernel_case_67(training, tmp_path, monkeypatch):
    options, parts = TRAININGS[training]
    num_losses = 0
    head_loss = importlib.import_module("liger_kernels.transformers.lazy_logits.loss")
    is_plain = training == "cross-entropy"
    name = "cross_entropy" if is_plain else "fused_linear_cross_entropy"
    original = getattr(head_loss, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_losses
        num_losses += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(head_loss, name, counted)

    def train(**more: Any) -> tuple[list[float], nn.Module]:
        model = zoo.build("llama")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **more,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=rows(8),
            eval_dataset=rows(4),
            compute_metrics=accuracy if training == "metrics" else None,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        metrics = trainer.evaluate()
        losses += [
            metrics[f"eval_{name}"] for name in ("loss", "accuracy") if f"eval_{name}" in metrics
        ]
        assert len(losses) == (4 if training == "metrics" else 3)
        # A second run asks again.
        trainer.train()
        return losses, model

    wanted, _ = train()
    assert num_losses == 0
    with contextlib.ExitStack() as stack:
        compat.install()
        stack.callback(compat.uninstall)
        got, model = train(use_liger_kernel=True, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert patched_classes(model) == {"Linear", *(f"Llama{part}" for part in parts)}
    # 2 steps of 2 batches, twice. Trainer of version 5 evaluates without logits unless metrics
    # need them; that of 4 always makes them.
    assert num_losses == (10 if zoo.IS_V5 and training != "metrics" else 8)


@pytest.mark.filterwarnings("ignore")
def test_trainer_without_the_drop_in_says_what_is_missing(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_liger_kernel=True, use_cpu=True, report_to=[], max_steps=1
    )
    with pytest.raises(ImportError, match="liger-kernel"):
        transformers.Trainer(zoo.build("llama"), arguments, train_dataset=rows(2)).train()
