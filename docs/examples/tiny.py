"""A tiny random model, a tokenizer and a few rows, so that the examples run on a CPU in seconds."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

__all__ = ["TINY", "load", "rows"]

TINY = "tiny"
WORDS = [*"abcdefghijklmnop"]


def load(name: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer: those of a name or folder, or tiny ones."""
    if name != TINY:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), (
            AutoTokenizer.from_pretrained(name)
        )
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def rows(name: str, *columns: str) -> Any:
    """Return a data set: the train split of a hub's or of JSON lines, or eight tiny rows."""
    if name.endswith((".json", ".jsonl")):
        return load_dataset("json", data_files=name, split="train")
    if name != TINY:
        return load_dataset(name, split="train")
    texts = [" ".join(WORDS[(3 * i + 5 * j) % len(WORDS)] for j in range(12)) for i in range(8)]
    values = {"text": texts, "prompt": [text[:12] for text in texts]}
    values |= {"chosen": [text[12:] for text in texts], "rejected": [text[20:] for text in texts]}
    return Dataset.from_dict({name: values[name] for name in columns})
