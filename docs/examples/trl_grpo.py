"""Rewards with TRL's GRPOTrainer, the policy on these kernels (pip install trl).

python docs/examples/trl_grpo.py --model Qwen/Qwen3-0.6B --data trl-lib/tldr --steps 100
"""

from __future__ import annotations

import argparse

import torch
from tiny import TINY, load, rows
from trl import GRPOConfig, GRPOTrainer

from liger_kernels.transformers import apply_liger_kernel


def short(completions: list[str], **_: object) -> list[float]:
    """Reward answers of about twenty characters."""
    return [-abs(20 - len(text)) / 20 for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--data", default=TINY, help="rows of prompt")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", default="runs/trl-grpo")
    given = parser.parse_args()

    model, tokenizer = load(given.model)
    record = apply_liger_kernel(model)
    print(record.summary())

    arguments = GRPOConfig(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=24,
        beta=0.0,  # above 0 a reference is loaded: docs/trl.md says how to patch it
        learning_rate=1e-4,
        logging_steps=1,
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    data = rows(given.data, "prompt")
    trainer = GRPOTrainer(model, short, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
