"""Train in a loop of your own on these kernels; logits are made only if you read them.

python docs/examples/custom_loop.py --model Qwen/Qwen3-0.6B --data rows.jsonl --steps 100
"""

from __future__ import annotations

import argparse

import torch
from tiny import TINY, load, rows
from torch.utils.data import DataLoader

from liger_kernels.transformers import apply_liger_kernel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--data", default=TINY, help="rows with a column text")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(given.model)
    model.to(device).train()
    record = apply_liger_kernel(model)
    print(record.summary())

    texts = rows(given.data, "text")["text"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step = 0
    while step < given.steps:
        for batch in DataLoader(texts, batch_size=2, shuffle=True):
            inputs = tokenizer(
                list(batch), padding=True, truncation=True, max_length=1024, return_tensors="pt"
            ).to(device)
            inputs.pop("token_type_ids", None)
            is_text = inputs["attention_mask"].bool()
            labels = inputs["input_ids"].masked_fill(~is_text, -100)
            loss = model(**inputs, labels=labels).loss  # no logits: hidden states to loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            print(f"step {step}  loss {loss.item():.4f}")
            if step == given.steps:
                break


if __name__ == "__main__":
    main()
