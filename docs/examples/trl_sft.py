"""Supervised fine-tuning with TRL's SFTTrainer on these kernels (pip install trl).

python docs/examples/trl_sft.py --model Qwen/Qwen3-0.6B --data trl-lib/Capybara --steps 100
"""

from __future__ import annotations

import argparse

import torch
from tiny import TINY, load, rows
from trl import SFTConfig, SFTTrainer

from liger_kernels.transformers import apply_liger_kernel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--data", default=TINY, help="rows with a column text, or messages")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", default="runs/trl-sft")
    given = parser.parse_args()

    model, tokenizer = load(given.model)
    record = apply_liger_kernel(model)
    print(record.summary())

    arguments = SFTConfig(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        logging_steps=1,
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model, arguments, train_dataset=rows(given.data, "text"), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
