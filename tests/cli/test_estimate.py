"""The memory estimate: numbers worked out by hand, and steps measured on a GPU."""

from __future__ import annotations

import pytest
import torch

from liger_cli.estimate import StepShape, estimate_memory, estimate_memory_ratio, model_shape
from liger_kernels.ops.chunked_linear import chunk_tokens

# 2 layers, 4 heads of 2, 2 key heads: small enough to follow on paper.
TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_3B = {
    **LLAMA_1B,
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
}


def _coverage(num_layers: int, *patched: str) -> dict[str, dict[str, int]]:
    candidates = {
        "rope": num_layers,
        "rms_norm": 2 * num_layers + 1,
        "swiglu": num_layers,
        "fused_linear_cross_entropy": 1,
    }
    return {
        op: {"patched": num if op in patched or "all" in patched else 0, "candidates": num}
        for op, num in candidates.items()
    }


def test_eager_parts_by_hand() -> None:
    estimate = estimate_memory(TINY, _coverage(2), StepShape(batch_size=2, sequence_length=5))
    # Embeddings and head 2*100*8; a layer: attention 8*(2*8 + 2*4), MLP 3*8*16.
    num_parameters = 1600 + 2 * (192 + 384)
    assert estimate.weights == 2 * num_parameters
    assert estimate.gradients == 2 * num_parameters
    assert estimate.optimizer == 4 * num_parameters
    # 10 tokens. Norms: 5 of 8 wide, each fp32 copy + normalised + output = 4 + 2 + 2 bytes.
    assert estimate.activations["norms"] == 10 * 5 * 8 * 8
    # q and output 8 wide, k and v 4 wide, 2 bytes, 2 layers.
    assert estimate.activations["attention"] == 10 * 2 * (8 + 8 + 4 + 4) * 2
    # gate, up, activation, product: 4 of 16.
    assert estimate.activations["mlp"] == 10 * 2 * 4 * 16 * 2
    # bf16 logits and three fp32 tensors.
    assert estimate.logits == 10 * 100 * 14
    assert estimate.head_buffers == 0
    assert estimate.peak == 6 * num_parameters + 3200 + 960 + 2560 + 14000


def test_patched_parts_by_hand() -> None:
    step = StepShape(batch_size=2, sequence_length=5)
    estimate = estimate_memory(TINY, _coverage(2, "all"), step)
    # Input and output of a norm; gate, up, product of an MLP.
    assert estimate.activations["norms"] == 10 * 5 * 8 * (2 + 2)
    assert estimate.activations["mlp"] == 10 * 2 * 3 * 16 * 2
    # All logits fit into one chunk; gradients of head (100 x 8) and hidden states (10 x 8).
    assert estimate.logits == 10 * 100 * 2
    assert estimate.head_buffers == 100 * 8 * 2 + 10 * 8 * 2


def test_chunk_bounds_the_fused_logits() -> None:
    coverage = _coverage(16, "all")
    # 512 MiB hold 2092 rows of 128256 logits in bf16: 16 tiles of 128.
    assert estimate_memory(LLAMA_1B, coverage, StepShape(8, 2048)).logits == 2048 * 128256 * 2
    # A vocabulary so large that 1024 tokens take more; a small one of which 2048 are enough.
    large = {**LLAMA_1B, "vocab_size": 2**20}
    assert estimate_memory(large, coverage, StepShape(8, 2048)).logits == 1024 * 2**20 * 2
    assert estimate_memory(TINY, _coverage(2, "all"), StepShape(8, 2048)).logits == 2048 * 100 * 2


@pytest.mark.parametrize("vocab", [1000, 49152, 2**20])
def test_chunk_on_a_cpu_is_that_of_the_op(vocab: int) -> None:
    step = StepShape(8, 4096, parameter_bytes=4, compute_bytes=4, on_cpu=True)
    estimate = estimate_memory({**TINY, "vocab_size": vocab}, _coverage(2, "all"), step)
    tokens = chunk_tokens(8 * 4096, 8, vocab, torch.float32, torch.device("cpu"))
    assert estimate.logits == tokens * vocab * 4


def test_head_gradient_is_summed_in_fp32_over_many_chunks() -> None:
    head, inputs = 128256 * 2048, 16384 * 2048
    few = estimate_memory(LLAMA_1B, _coverage(16, "all"), StepShape(8, 2048))
    assert few.head_buffers == head * 2 + inputs * 2
    many = estimate_memory(LLAMA_1B, _coverage(16, "all"), StepShape(16, 2048))
    assert many.head_buffers == head * (4 + 2) + 2 * inputs * 2


def test_each_op_saves_what_it_says() -> None:
    step = StepShape(8, 2048)
    eager = estimate_memory(LLAMA_1B, _coverage(16), step)
    norms = estimate_memory(LLAMA_1B, _coverage(16, "rms_norm"), step)
    assert eager.peak - norms.peak == 33 * 2048 * 16384 * 4
    mlp = estimate_memory(LLAMA_1B, _coverage(16, "swiglu"), step)
    assert eager.peak - mlp.peak == 16 * 8192 * 16384 * 2
    assert estimate_memory(LLAMA_1B, _coverage(16, "rope"), step).peak == eager.peak


def test_frozen_head_has_no_gradient_buffer_case_105() -> None:
    config = {**LLAMA_1B, "hidden_size": 4096, "vocab_size": 262144}
    trainable = estimate_memory(config, _coverage(16, "all"), StepShape(1, 1024))
    frozen = estimate_memory(
        config, _coverage(16, "all"), StepShape(1, 1024, is_head_trainable=False)
    )
    assert trainable.head_buffers - frozen.head_buffers == 262144 * 4096 * 2


def test_lora_has_moments_for_what_is_trained_only() -> None:
    estimate = estimate_memory(TINY, _coverage(2), StepShape(1, 1, num_trainable=10))
    assert (estimate.gradients, estimate.optimizer) == (20, 40)


def test_autocast_keeps_a_copy_of_the_weights() -> None:
    step = StepShape(1, 1, parameter_bytes=4, compute_bytes=2, num_parameters=1000)
    assert estimate_memory(TINY, _coverage(2), step).weights == 6000


def test_accumulation_has_gradients_beside_the_activations() -> None:
    once = estimate_memory(LLAMA_1B, _coverage(16), StepShape(8, 2048))
    more = estimate_memory(LLAMA_1B, _coverage(16), StepShape(8, 2048, accumulates=True))
    assert more.peak - once.peak == once.gradients


def test_experts_count_those_a_token_goes_to() -> None:
    config = {**TINY, "num_local_experts": 8, "num_experts_per_tok": 2}
    coverage = {"swiglu": {"patched": 0, "candidates": 2}}
    estimate = estimate_memory(config, coverage, StepShape(1, 10))
    # Two experts of 16, four kept tensors, and two gathered inputs of 8.
    assert estimate.activations["mlp"] == 10 * 2 * (2 * 2 * 16 * 4 + 2 * 8 * 2)
    assert model_shape(config).num_parameters(is_gated=True) == 1600 + 2 * (192 + 3 * 8 * 16 * 8)


def test_plain_mlp_keeps_two_tensors_patched_or_not() -> None:
    coverage = {"layer_norm": {"patched": 5, "candidates": 5}}
    estimate = estimate_memory(TINY, coverage, StepShape(1, 10))
    assert estimate.activations["mlp"] == 10 * 2 * (2 * 2 * 16)
    assert estimate_memory_ratio(TINY, coverage, StepShape(1, 10)) == 1.0


def test_text_part_of_an_image_text_model() -> None:
    assert model_shape({"text_config": TINY, "vision_config": {}}) == model_shape(TINY)


def test_missing_size_is_named() -> None:
    config = {key: value for key, value in TINY.items() if key != "vocab_size"}
    with pytest.raises(ValueError, match="vocab_size"):
        estimate_memory(config, _coverage(2), StepShape(1, 1))


# Peaks of whole training steps on one H100 (torch 2.11, transformers 5.17, bf16, AdamW, sdpa);
# the patched ones ran another package's kernels, which keep the same tensors.
@pytest.mark.parametrize(
    ("config", "batch", "length", "checkpointing", "eager_gib", "patched_gib"),
    [
        pytest.param(LLAMA_1B, 8, 2048, False, 61.2, 26.3, id="1b"),
        pytest.param(LLAMA_1B, 32, 512, True, 35.6, 10.7, id="1b-checkpointing"),
        pytest.param(LLAMA_3B, 4, 4096, True, 48.4, 25.6, id="3b-checkpointing"),
    ],
)
def test_measured_steps(
    config: dict[str, int],
    batch: int,
    length: int,
    checkpointing: bool,
    eager_gib: float,
    patched_gib: float,
) -> None:
    step = StepShape(batch, length, gradient_checkpointing=checkpointing)
    num_layers = config["num_hidden_layers"]
    eager = estimate_memory(config, _coverage(num_layers), step)
    patched = estimate_memory(config, _coverage(num_layers, "all"), step)
    assert eager.peak / 2**30 == pytest.approx(eager_gib, rel=0.05)
    assert patched.peak / 2**30 == pytest.approx(patched_gib, rel=0.05)
    ratio = estimate_memory_ratio(config, _coverage(num_layers, "all"), step)
    assert ratio == pytest.approx(patched_gib / eager_gib, rel=0.05)
