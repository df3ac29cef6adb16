"""flash_attention_2 and later go through transformers' own route with the lengths of documents.

None of their binaries can be had here, so a function in their place records what it is called with
and computes documents one by one.
"""

from __future__ import annotations

import pytest
import torch
from document_rows import LENGTHS, build, documents, laid_end_to_end, loss_and_gradients, one_by_one
from transformers import modeling_flash_attention_utils as flash
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from liger_kernels.transformers.api import apply_liger_kernel


@pytest.fixture
def calls(monkeypatch):
    """Put a recording function in the place of flash_attn_varlen_func."""
    found = []

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
    ):  # fmt: skip
        found.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        assert causal
        assert not dropout_p
        # Both sides of it; causal leaves the left.
        return one_by_one(q, k, v, cu_seqlens_q, softmax_scale, (window_size[0], 0))

    def refused(*args, **options):
        raise AssertionError("rows were not taken for documents")

    keywords = flash._lazy_define_process_function(varlen)
    # Earlier releases have no function for caches, and one way to process keywords.
    functions = (
        refused,
        varlen,
        *[refused] * (3 if hasattr(flash, "_flash_with_kvcache_fn") else 2),
    )
    has_two = "process_paged_kwargs_fn" in flash._flash_attention_forward.__code__.co_varnames
    answer = functions, (keywords, keywords) if has_two else keywords
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: answer)
    return found


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize(("family", "ops"), [("llama", "all"), ("mistral", "none")])
def test_flash_attention_is_called_with_the_lengths(calls, family, version, ops):
    name = f"flash_attention_{version}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        pytest.skip(f"this release of transformers has no {name}")
    rows = documents()
    model = build(family, "sdpa")
    apply_liger_kernel(model, ops)
    # As loading does it where the package is there.
    model.config._attn_implementation_internal = name
    batch = laid_end_to_end(rows)
    ours = loss_and_gradients(model, batch)
    assert len(calls) == 2
    for ends_q, ends_k, max_q, max_k in calls:
        assert ends_q is batch["cu_seq_lens_q"]
        assert ends_k is batch["cu_seq_lens_k"]
        assert max_q == max_k == max(LENGTHS)
        assert type(max_q) is int
    stock = loss_and_gradients(build(family, "sdpa"), laid_end_to_end(rows))
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5)
