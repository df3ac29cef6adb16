"""Templates, tokenizers and files of rows."""

from __future__ import annotations

import json
from pathlib import Path

from liger_cli.data.encode import IGNORED
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.training.model.tokenizers import byte_tokenizer

SPECIAL = [
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|end|>"),
]


def make_tokenizer(template: str | None = None, *, metaspace: bool = False, begin: bool = False):
    """A small tokenizer with real merges, so that tokens can cross the borders of trained parts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<pad>" if metaspace else None))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [
        "\n\n hello there, the answer is yes. What is it? assistant\n\nuser\n[end] ## [INST]"
    ] * 9
    special = [AddedToken(word, normalized=False, special=True) for word in SPECIAL]
    trainer = BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A",
            pair="<s> $A $B",
            special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer=None, *, max_length=512, vocab_size=10**6, **options):
    tokenizer = tokenizer or byte_tokenizer()
    row_options = RowOptions(max_length, vocab_size, **options.pop("row_options", {}))
    return load_examples(str(path), tokenizer, row_options, **options)


def check_labels(row) -> None:
    """A label is the token at its place, and the first token has none."""
    assert len(row["labels"]) == len(row["input_ids"])
    assert row["labels"][0] == IGNORED
    assert all(
        label in (IGNORED, token)
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )


# Conversations.

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "\n\nyes, the answer\n"},
    {"role": "user", "content": "assistant\n\nyes"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "the answer is "},
    {"role": "assistant", "content": "What is it?"},
]


SAID = [message["content"] for message in CONVERSATION if message["role"] == "assistant"]
