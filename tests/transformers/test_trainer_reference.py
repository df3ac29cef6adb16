"""Reference models that a trainer builds itself, as docs/trl.md says to patch them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import apply_liger_kernel, apply_liger_kernel_to_llama
from liger_kernels.transformers.replacements.subclasses import is_patched

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.filterwarnings("ignore"),
]


def build_trainer(kind: str, path: str, output_dir: str, model: nn.Module) -> Any:
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    datasets = pytest.importorskip("datasets")
    prompts = [" ".join(f"t{(7 * row + 3 * i) % 90}" for i in range(5)) for row in range(8)]
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=output_dir,
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        beta=0.1,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return getattr(trl, f"{kind}Trainer")(
        model,
        # All completions are worth the same, so that nothing but the KL has a gradient.
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=zoo.tokenizer(),
    )


def moved(model: nn.Module, before: dict[str, Tensor]) -> float:
    return max(float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_case_209_class_mode_reaches_the_reference_of_a_trainer(kind, tmp_path):
    path = str(tmp_path / "model")
    zoo.build("llama").save_pretrained(path)

    def train(way: str) -> tuple[float, set[bool]]:
        record = apply_liger_kernel_to_llama() if way == "class" else None
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            if way == "policy":
                apply_liger_kernel(model)
            trainer = build_trainer(kind, path, str(tmp_path / way), model)
        finally:
            if record is not None:
                record.undo()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.train()
        are_patched = {
            any(map(is_patched, each.modules())) for each in (trainer.model, trainer.ref_model)
        }
        return moved(trainer.model, before), are_patched

    assert train("stock") == (0.0, {False})
    # Both run the same kernels and agree to the bit, as stock ones do.
    assert train("class") == (0.0, {True})
    # A patch of the policy alone does not reach it.
    assert train("policy")[1] == {True, False}
