"""Attention of documents that lie end to end in a row, without padding and without a mask.

`liger_varlen` is an attention of transformers, chosen by attn_implementation="liger_varlen" once
`interface.py` is imported; importing apply_liger_kernel does that. Batches say where documents
begin in the arguments of transformers, as DataCollatorWithFlattening(return_flash_attn_kwargs=True)
does:

    cu_seq_lens_q, cu_seq_lens_k    (N + 1,) int32, the ends of N documents, from 0
    max_length_q, max_length_k      int, the longest document

Each layer is computed by the first of these that can (`choice.py`):

    varlen  torch.nn.attention.varlen on CUDA: no mask, no work across documents (`kernel.py`)
    flex    flex attention on CUDA: capped scores, sinks, chunks, wide heads (`backends.py`)
    mask    scaled_dot_product_attention, or its formula, with a mask of (T, T) (`backends.py`)

Without lengths, as in generation, it is transformers' sdpa with transformers' mask (`masks.py`).
"""
