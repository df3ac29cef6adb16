"""LoRA on a patched model under the Trainer of transformers and TRL's SFTTrainer, and what a
checkpoint recomputes."""

from __future__ import annotations

import pytest
import torch
import transformers
import zoo
from test_lora import ATTENTION, MLP, OP, add_lora, coverage, llama, spy_on, step

from liger_kernels.ops import adapted_linear
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.replacements import adapters as lora_code
from liger_kernels.transformers.replacements import mlps as mlp_code

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.filterwarnings("ignore"),
]
COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def losses(trainer) -> list[float]:
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == COMMON["max_steps"]
    return found


def rows() -> list[dict[str, torch.Tensor]]:
    inputs = [zoo.text_inputs(1, length) for length in (12, 12, 12, 12)]
    return [{name: value[0] for name, value in one.items()} for one in inputs] * 3


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("order", ["patch-then-peft", "peft-then-patch"])
def test_trainer_with_lora(order, checkpoint, tmp_path, monkeypatch):
    def train(patches: bool) -> list[float]:
        model = zoo.build("llama").train()
        if patches and order == "patch-then-peft":
            apply_liger_kernel(model, "all")
        model = add_lora(model, lora_dropout=0.1)
        if patches and order == "peft-then-patch":
            assert coverage(apply_liger_kernel(model, "all")) == (14, 14)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), gradient_checkpointing=checkpoint, **COMMON
        )
        return losses(transformers.Trainer(model, arguments, train_dataset=rows()))

    wanted = train(patches=False)
    linears = spy_on(monkeypatch, lora_code, "lora_linears")
    mlps = spy_on(monkeypatch, mlp_code, "lora_mlp")
    got = train(patches=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    # In a checkpoint gate and up are a group, and down is alone.
    forwards = COMMON["max_steps"] * COMMON["gradient_accumulation_steps"] * 2
    assert linears[:4] == ([3, 1, 2, 1] if checkpoint else [3, 1, 3, 1])
    assert len(mlps) == (0 if checkpoint else forwards)


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_sft_with_a_peft_config(packing, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    datasets = pytest.importorskip("datasets")
    texts = [" ".join(f"t{(7 * row + 3 * i) % 90}" for i in range(10)) for row in range(12)]
    targets = [*ATTENTION, *MLP]

    def train(patches: bool) -> list[float]:
        model = zoo.build("llama")
        if patches:
            apply_liger_kernel(model, "all")
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=str(tmp_path),
                packing=packing,
                max_length=16,
                gradient_checkpointing=False,
                **COMMON,
            ),
            train_dataset=datasets.Dataset.from_list([{"text": text} for text in texts]),
            processing_class=zoo.tokenizer(),
            peft_config=peft.LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian"),
        )
        return losses(trainer)

    wanted = train(patches=False)
    linears = spy_on(monkeypatch, lora_code, "lora_linears")
    mlps = spy_on(monkeypatch, mlp_code, "lora_mlp")
    torch.testing.assert_close(train(patches=True), wanted, rtol=1e-3, atol=1e-4)
    assert linears[:2] == [3, 1]
    assert mlps[:1] == [3]


def test_a_checkpoint_does_not_repeat_the_last_product(monkeypatch):
    """It stops once the last tensor is saved, which is before the product with down's weight."""
    model = llama()
    apply_liger_kernel(model, "all")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    used: dict[int, int] = {}
    right = adapted_linear.frozen_weight

    def counted(weight, dtype):
        used[id(weight)] = used.get(id(weight), 0) + 1
        return right(weight, dtype)

    monkeypatch.setattr(adapted_linear, "frozen_weight", counted)
    step(model, zoo.text_inputs())
    counts = {
        name.rpartition("layers.")[2]: used[id(module.base_layer.weight)]
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    # Forward, recomputation and backward.
    assert {n for name, n in counts.items() if "down_proj" not in name} == {3}
    assert {n for name, n in counts.items() if "down_proj" in name} == {2}


def test_packed_rows_with_position_ids():
    """Documents of one row are separated by their positions, as with --packing."""
    inputs = zoo.text_inputs(1, 24)
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.cat([torch.arange(10), torch.arange(14)])[None]
    stock = step(llama(), inputs)
    model = llama()
    record = apply_liger_kernel(model, "all")
    assert record.coverage[OP] == {"patched": 14, "candidates": 14}
    ours = step(model, inputs)
    for name, value in ours.items():
        assert (value - stock[name]).abs().max() <= 2e-5 * stock[name].abs().max(), name
