"""Preferences with TRL's DPOTrainer, policy and reference on these kernels (pip install trl).

python docs/examples/trl_dpo.py --model Qwen/Qwen3-0.6B --data trl-lib/ultrafeedback_binarized
"""

from __future__ import annotations

import argparse
import copy

import torch
from tiny import TINY, load, rows
from trl import DPOConfig, DPOTrainer

from liger_kernels.transformers import apply_liger_kernel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--data", default=TINY, help="rows of prompt, chosen and rejected")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", default="runs/trl-dpo")
    given = parser.parse_args()

    model, tokenizer = load(given.model)
    record = apply_liger_kernel(model)
    print(record.summary())
    # A reference that the trainer loads itself is not patched, and differs by rounding.
    reference = copy.deepcopy(model).eval()

    arguments = DPOConfig(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=2,
        beta=0.1,
        learning_rate=1e-5,
        logging_steps=1,
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    data = rows(given.data, "prompt", "chosen", "rejected")
    trainer = DPOTrainer(
        model, reference, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
