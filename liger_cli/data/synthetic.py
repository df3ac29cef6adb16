"""Random tokens, each row exactly max_length."""

from __future__ import annotations

import torch

from liger_cli.data.cache import Counts, Tokenised, cached
from liger_cli.data.encode import IGNORED
from liger_cli.data.makers import RowOptions, ids_table
from liger_cli.data.pair_formats import ANSWERS

__all__ = ["make_synthetic"]

_NUM_ROWS = {"train": 1024, "eval": 64}
# Rows that are longer than 32 768 tokens are fewer, so that they are drawn in seconds.
_MOST_TOKENS, _LEAST_ROWS = 1 << 25, 16


def make_synthetic(split: str, options: RowOptions, seed: int) -> Tokenised:
    """Return random rows; of pairs the first half of both answers is their prompt."""
    length = options.max_length
    num_rows = min(_NUM_ROWS[split], max(_LEAST_ROWS, _MOST_TOKENS // length))
    # Even and odd: no seed gives the rows of one split as those of the other.
    generator = torch.Generator().manual_seed(2 * seed + (split == "eval"))

    def draw(num_tokens: int) -> torch.Tensor:
        return torch.randint(options.vocab_size, (num_rows, num_tokens), generator=generator)

    num_prompt = length // 2 if options.pairs else 0
    prompt = draw(num_prompt)
    columns: dict[str, list[list[int]]] = {}
    for prefix in (f"{answer}_" for answer in ANSWERS) if options.pairs else ("",):
        ids = torch.cat((prompt, draw(length - num_prompt)), dim=1)
        labels = ids.clone()
        labels[:, : max(1, num_prompt)] = IGNORED
        columns |= {f"{prefix}input_ids": ids.tolist(), f"{prefix}labels": labels.tolist()}
    num_answers = len(columns) // 2
    counts = Counts(
        num_rows,
        tokens=num_answers * num_rows * length,
        trained_tokens=num_answers * num_rows * (length - max(1, num_prompt)),
    )
    return cached({}, lambda: [(ids_table(columns), counts)], keep=False)
