"""Documents, the batches they make, and a kernel in place of torch's, which has none on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention
import torch.nn.functional as F
import transformers

from liger_kernels.transformers.attention import choice, kernel
from liger_kernels.transformers.attention.interface import LIGER_VARLEN

# Longer and shorter than the windows of the zoo, which are 8; and one token.
LENGTHS = (13, 9, 1, 21, 6)


def one_by_one(
    query: Any, key: Any, value: Any, ends_q: Any, scale: float | None, window: tuple[int, int]
) -> torch.Tensor:
    """Compute causal attention document by document with sdpa."""
    assert window[1] == 0, "not causal"
    ends = ends_q.tolist()
    assert ends[-1] == query.shape[0]
    parts = []
    for start, end in zip(ends, ends[1:], strict=False):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        places = torch.arange(end - start)
        distance = places.unsqueeze(1) - places
        seen = distance >= 0
        if window[0] >= 0:
            seen &= distance <= window[0]
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), k_cache=None, v_cache=None, cache_seqlens=None, cache_batch_idx=None,
    page_table=None, seqused_k=None,
):  # fmt: skip
    """The signature of torch 2.11."""
    return one_by_one(query, key, value, cu_seq_q, scale, window_size)


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """The signature of torch 2.13, which refuses shared keys that are not asked for."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return one_by_one(query, key, value, cu_seq_q, scale, window_size)


def varlen_with_is_causal(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    """The signature of the first release that had it."""
    assert is_causal
    return one_by_one(query, key, value, cu_seq_q, None, (-1, 0))


SIGNATURES = {"2.11": varlen_2_11, "2.13": varlen_2_13}


def use_kernel(monkeypatch: pytest.MonkeyPatch, function: Any = varlen_2_13) -> None:
    """Put a function in place of torch's kernel, on a CPU and in float32 too."""
    monkeypatch.setattr(kernel, "_call", kernel.bind_varlen(function))
    monkeypatch.setattr(kernel, "device_problem", lambda device: None)
    monkeypatch.setattr(choice, "_HALVES", (torch.bfloat16, torch.float16, torch.float32))


def use_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flex attention run on a CPU as it is without being compiled, its backward too."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *x: None)


def lengths_of(lengths: Any) -> dict[str, Any]:
    """Return the arguments that say where documents begin."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def documents(lengths: Any = LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 90, (n,), generator=generator) for n in lengths]


def laid_end_to_end(rows: list[torch.Tensor]) -> dict[str, Any]:
    """Return a batch of one row with the labels of next tokens within documents."""
    ids = torch.cat(rows)
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    labels = ids.masked_fill(positions == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {
        **{name: value.unsqueeze(0) for name, value in batch.items()},
        **lengths_of([len(row) for row in rows]),
    }


def padded(rows: list[torch.Tensor]) -> dict[str, Any]:
    """Return the same documents as rows that are padded right."""
    shape = (len(rows), max(map(len, rows)))
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for i, row in enumerate(rows):
        batch["input_ids"][i, : len(row)] = row
        batch["labels"][i, 1 : len(row)] = row[1:]
        batch["attention_mask"][i, : len(row)] = 1
    return batch


def build(family: str, attention: str = LIGER_VARLEN, **options: Any) -> Any:
    """Return a tiny model of tests/transformers in float32, in training."""
    import zoo

    if family == "gpt_oss":
        config = transformers.GptOssConfig(
            vocab_size=zoo.VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            max_position_embeddings=128,
            pad_token_id=0,
            rope_scaling=None,
            attn_implementation=attention,
            **options,
        )
        torch.manual_seed(0)
        model = zoo.spread(transformers.GptOssForCausalLM(config))
    else:
        model = zoo.build(family, attn_implementation=attention, **options)
    return model.train()


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the mean loss over all labels of a batch, and the gradient of every parameter."""
    num_labels = int((batch["labels"][:, 1:] != -100).sum())
    loss = model(**batch, use_cache=False, num_items_in_batch=num_labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}
