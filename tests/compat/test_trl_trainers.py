"""TRL's trainers on patched models train as on stock ones, and so do the models they build."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

from liger_kernels import compat
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import apply_liger_kernel, apply_liger_kernel_to_llama
from liger_kernels.transformers.replacements.subclasses import is_patched

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.skipif(
        importlib.util.find_spec("liger_kernel") is not None,
        reason="the original liger_kernel is installed; the drop-in refuses then",
    ),
    pytest.mark.filterwarnings("ignore"),
]
STEPS = 3
# A trainer's settings, next to those of COMMON.
GENERATES = {"max_completion_length": 6}
SAMPLES = {**GENERATES, "num_generations": 2, "beta": 0.1}
TRAINERS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "DPO": {},
    "KTO": {},
    "GRPO": SAMPLES,
    "RLOO": SAMPLES,
    "Reward": {},
    "Distillation": GENERATES,
    "GKD": {"max_new_tokens": 6},
    "ORPO": {},
    "CPO": {},
}
COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 3e-4,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
# What builds a reference in full training, and what loads a teacher in any.
REFERENCE = ("DPO", "KTO", "GRPO", "RLOO")
TEACHER = ("Distillation", "GKD")
# GKD alone asks for messages.
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"


def words(start: int, length: int) -> str:
    return " ".join(f"t{(7 * start + 3 * i) % 90}" for i in range(length))


def rows(kind: str) -> Any:
    prompts = [words(row, 5) for row in range(12)]
    chosen = [f" {words(row + 30, 4 + row % 3)}" for row in range(12)]
    rejected = [f" {words(row + 60, 6)}" for row in range(12)]
    columns: dict[str, Any] = {"prompt": prompts}
    if kind == "SFT":
        columns["completion"] = chosen
    elif kind == "KTO":
        columns |= {"completion": chosen, "label": [row % 2 == 0 for row in range(12)]}
    elif kind == "GKD":
        columns = {
            "messages": [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for prompt, answer in zip(prompts, chosen, strict=True)
            ]
        }
    elif kind in ("DPO", "ORPO", "CPO", "Reward"):
        columns |= {"chosen": chosen, "rejected": rejected}
    return datasets.Dataset.from_dict(columns)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def trl_class(name: str) -> Any:
    if hasattr(trl, name):
        return getattr(trl, name)
    package = name.removesuffix("Trainer").removesuffix("Config").lower()
    return getattr(importlib.import_module(f"trl.experimental.{package}"), name)


@dataclass
class Run:
    """What a training came to: the loss of each step, and how far each weight went."""

    losses: list[float]
    moves: dict[str, Tensor]
    policy: nn.Module
    # A reference or a teacher that the trainer built, or None.
    second: nn.Module | None


def train(
    kind: str,
    adapter: str,
    folder: Path,
    patch: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> Run:
    """Train with a trainer that gets a policy and builds the rest itself."""
    is_reward = kind == "Reward"
    auto = f"AutoModelFor{'SequenceClassification' if is_reward else 'CausalLM'}"
    model = getattr(transformers, auto).from_pretrained(
        folder / ("reward" if is_reward else "policy"), dtype=torch.float32
    )
    if patch:
        patch(model)
    parts: dict[str, Any] = {"reward_funcs": reward} if "beta" in TRAINERS[kind] else {}
    if kind in TEACHER:
        parts["teacher_model"] = str(folder / "teacher")
    if adapter == "lora":
        parts["peft_config"] = peft.LoraConfig(
            r=4,
            target_modules="all-linear",
            init_lora_weights="gaussian",
            task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
        )
    options |= {"output_dir": str(folder / "out"), **COMMON, **TRAINERS[kind]}
    encoder = zoo.tokenizer()
    encoder.chat_template = TEMPLATE
    trainer = trl_class(f"{kind}Trainer")(
        model=model,
        args=trl_class(f"{kind}Config")(**options),
        train_dataset=rows(kind),
        processing_class=encoder,
        **parts,
    )
    losses: list[float] = []
    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        loss = step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = recorded
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moves = {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}
    name = "teacher_model" if kind in TEACHER else "ref_model"
    return Run(losses, moves, trainer.model, getattr(trainer, name, None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the policy, the reward model and the teacher."""
    found = tmp_path_factory.mktemp("trainers")
    policy = zoo.build("llama")
    policy.save_pretrained(found / "policy")
    zoo.build("llama", seed=1).save_pretrained(found / "teacher")
    policy.config.num_labels = 1
    torch.manual_seed(0)
    zoo.spread(transformers.LlamaForSequenceClassification(policy.config)).save_pretrained(
        found / "reward"
    )
    return found


@functools.cache
def stock(kind: str, adapter: str, folder: Path) -> Run:
    return train(kind, adapter, folder)


def by_class(kind: str, adapter: str, folder: Path) -> Run:
    """Patch what is built from here on: the policy, and what the trainer builds."""
    record = apply_liger_kernel_to_llama()
    try:
        return train(kind, adapter, folder)
    finally:
        record.undo()


def by_compat(kind: str, adapter: str, folder: Path) -> Run:
    """Do the same through the name that other programs import."""
    compat.install()
    try:
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
        return train(kind, adapter, folder)
    finally:
        compat.uninstall()


def by_option(kind: str, adapter: str, folder: Path) -> Run:
    """Let the trainer ask for the drop-in, by the option that TRL 1.16 deprecates."""
    compat.install()
    try:
        return train(kind, adapter, folder, use_liger_kernel=True)
    finally:
        compat.uninstall()


def by_instance(kind: str, adapter: str, folder: Path) -> Run:
    """Patch the policy alone."""
    return train(kind, adapter, folder, apply_liger_kernel)


def is_any_patched(model: nn.Module | None) -> bool:
    return model is not None and any(map(is_patched, model.modules()))


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return how far two trainings ended from each other, relative to how far they went."""
    assert ours.keys() == theirs.keys()
    apart, way = (
        torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
        for tensors in ([ours[name] - theirs[name] for name in theirs], theirs.values())
    )
    assert way > 0
    return float(apart / way)


@pytest.mark.parametrize("way", [by_class, by_compat, by_instance, by_option])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_case_209_trl_trains_as_on_stock_models(kind, adapter, way, folder):
    wanted, got = stock(kind, adapter, folder), way(kind, adapter, folder)
    builds_second = kind in TEACHER or (kind in REFERENCE and adapter == "full")
    assert len(wanted.losses) == len(got.losses) == STEPS
    assert not is_any_patched(wanted.policy)
    layers = [module for module in got.policy.modules() if is_patched(module)]
    assert layers
    # Adapters that the trainer adds are patched too.
    assert any(hasattr(layer, "lora_A") for layer in layers) == (adapter == "lora")
    assert (got.second is not None) == builds_second
    # What the trainer builds is reached by a patch of the class alone.
    assert is_any_patched(got.second) == (builds_second and way in (by_class, by_compat))
    torch.testing.assert_close(got.losses, wanted.losses, rtol=0, atol=2e-6)
    # Where a gradient is rounding noise Adam still makes a full step: KTO has some of these.
    assert difference(got.moves, wanted.moves) < 5e-3
