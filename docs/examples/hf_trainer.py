"""Train with transformers' Trainer on these kernels: patch the model, and change nothing else.

python docs/examples/hf_trainer.py --model Qwen/Qwen3-0.6B --data rows.jsonl --steps 100
"""

from __future__ import annotations

import argparse

import torch
from tiny import TINY, load, rows
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from liger_kernels.transformers import apply_liger_kernel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--data", default=TINY, help="rows with a column text")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", default="runs/hf-trainer")
    given = parser.parse_args()

    model, tokenizer = load(given.model)
    record = apply_liger_kernel(model)
    print(record.summary())

    data = rows(given.data, "text").map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=1024),
        remove_columns=["text"],
    )
    arguments = TrainingArguments(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        logging_steps=1,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    trainer.save_model()  # an ordinary checkpoint: the patch leaves no trace in it


if __name__ == "__main__":
    main()
