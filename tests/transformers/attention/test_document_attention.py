"""liger_varlen: documents of a row are computed as if each were alone, by every backend."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from document_rows import (
    LENGTHS,
    SIGNATURES,
    build,
    documents,
    laid_end_to_end,
    lengths_of,
    loss_and_gradients,
    one_by_one,
    padded,
    use_flex,
    use_kernel,
    varlen_with_is_causal,
)

from liger_kernels.transformers.api import apply_liger_kernel
from liger_kernels.transformers.attention import choice, kernel
from liger_kernels.transformers.attention.choice import (
    LayerForm,
    choose_backend,
    model_problem,
    plan_layers,
)
from liger_kernels.transformers.attention.interface import LIGER_VARLEN, recorded_choices
from liger_kernels.transformers.attention.kernel import Lengths, varlen_attention
from liger_kernels.transformers.attention.masks import document_numbers

# Full and sliding layers, mixed ones, norms of queries, experts, capped scores, sinks, chunks.
FAMILIES = ("llama", "mistral", "qwen3", "gemma3_text", "mixtral", "phi3", "glm4")
MASKED = ("gemma2", "gpt_oss", "llama4_text")
# Flex attention takes heads of 16 at least; those of the zoo have 8.
WIDE = {name: {"hidden_size": 64, "head_dim": 16} for name in ("gemma2", "llama4_text")}
CPU = torch.device("cpu")


# The proof: the documents are those of rows of their own.


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_case_101_varlen_has_the_loss_and_gradients_of_padded_rows(monkeypatch, family, signature):
    use_kernel(monkeypatch, SIGNATURES[signature])
    rows = documents()
    stock = loss_and_gradients(build(family, "sdpa"), padded(rows))
    with recorded_choices() as found:
        ours = loss_and_gradients(build(family), laid_end_to_end(rows))
    assert {layer.backend for layer in found} == {"varlen"}
    assert sum(layer.num_layers for layer in found) == 2
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, *MASKED])
def test_case_101_the_mask_has_the_loss_and_gradients_of_padded_rows(family):
    """On a CPU; what sdpa cannot do is compared with transformers' own eager attention."""
    rows = documents()
    stock = loss_and_gradients(build(family, "eager" if family in MASKED else "sdpa"), padded(rows))
    with recorded_choices() as found:
        ours = loss_and_gradients(build(family), laid_end_to_end(rows))
    assert {layer.backend for layer in found} == {"mask"}
    assert all("it needs a CUDA GPU, and this is cpu" in layer.reason for layer in found)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", MASKED)
def test_case_101_flex_has_the_loss_and_gradients_of_padded_rows(monkeypatch, family):
    """Capped scores, sinks and chunks; uncompiled, which is how a CPU can run its backward."""
    use_kernel(monkeypatch)
    use_flex(monkeypatch)
    rows, sizes = documents(), WIDE.get(family, {})
    stock = loss_and_gradients(build(family, "eager", **sizes), padded(rows))
    with recorded_choices() as found, torch.compiler.set_stance("force_eager"):
        ours = loss_and_gradients(build(family, **sizes), laid_end_to_end(rows))
    assert "flex" in {layer.backend for layer in found}
    assert "mask" not in {layer.backend for layer in found}
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["mask", "varlen", "flex"])
@pytest.mark.parametrize("family", [*FAMILIES, *MASKED])
def test_case_101_no_document_has_a_gradient_in_another(monkeypatch, family, backend):
    """Zero to the bit: the gradient of one document's logits in the embeddings of the others."""
    if (backend == "varlen" and family in MASKED) or (backend == "flex" and family in FAMILIES):
        pytest.skip("another one computes these")
    if backend != "mask":
        use_kernel(monkeypatch)
        use_flex(monkeypatch)
    model = build(family, **WIDE.get(family, {})).eval()
    batch = laid_end_to_end(documents())
    del batch["labels"]
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    with recorded_choices() as found, torch.compiler.set_stance("force_eager"):
        logits = model(inputs_embeds=embedded, **batch, use_cache=False).logits
    assert backend in {layer.backend for layer in found}
    ends = batch["cu_seq_lens_q"].tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        own = slice(start, end)
        total = logits[:, own].square().sum()
        (gradient,) = torch.autograd.grad(total, embedded, retain_graph=True)
        assert gradient[:, own].any()
        gradient[:, own] = 0
        assert not gradient.any()


@pytest.mark.parametrize("backend", ["mask", "varlen"])
def test_several_rows_of_documents_in_a_batch(monkeypatch, backend):
    if backend == "varlen":
        use_kernel(monkeypatch)
    first, second = documents((13, 7), 1), documents((1, 19), 2)
    batches = [laid_end_to_end(rows) for rows in (first, second)]
    both = {name: torch.cat([b[name] for b in batches]) for name in ("input_ids", "position_ids")}
    model = build("mistral").eval()
    with torch.no_grad():
        logits = model(**both, **lengths_of([13, 7, 1, 19]), use_cache=False).logits
        for row, batch in zip(logits, batches, strict=True):
            del batch["labels"]
            wanted = model(**batch, use_cache=False).logits[0]
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)


def test_lengths_alone_separate_documents():
    """Positions need not restart: transformers then knows nothing of documents."""
    rows = documents()
    batch = laid_end_to_end(rows)
    batch["position_ids"] = torch.arange(sum(LENGTHS)).unsqueeze(0)
    model = build("llama").eval()
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0, -LENGTHS[-1] :]
        alone = model(input_ids=rows[-1].unsqueeze(0), use_cache=False).logits[0]
    # Rotary positions are relative.
    torch.testing.assert_close(logits, alone, rtol=1e-3, atol=1e-4)


def test_collator_of_transformers_is_enough():
    rows = documents()
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": row.tolist()} for row in rows])
    batch = {name: value for name, value in batch.items() if value is not None}
    with recorded_choices() as found:
        ours = loss_and_gradients(build("llama"), batch)
    assert sum(layer.num_layers for layer in found) == 2, "lengths did not arrive"
    stock = loss_and_gradients(build("llama", "sdpa"), padded(rows))
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


# Without lengths it is transformers' own attention.


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gemma2", "gpt_oss"])
def test_padded_rows_and_generation_are_those_of_transformers(family):
    batch = padded(documents())
    stock = build(family, "eager")
    torch.testing.assert_close(
        loss_and_gradients(build(family), batch),
        loss_and_gradients(stock, batch),
        rtol=1e-4,
        atol=1e-6,
    )
    prompt = {"input_ids": batch["input_ids"][3:4], "max_new_tokens": 4, "do_sample": False}
    model = build(family).eval()
    assert torch.equal(model.generate(**prompt), stock.eval().generate(**prompt))


def test_lengths_with_a_cache_are_refused(monkeypatch):
    use_kernel(monkeypatch)
    model = build("llama").eval()
    rows = documents((5, 4))
    batch = laid_end_to_end(rows)
    del batch["labels"]
    cache = model(input_ids=rows[0].unsqueeze(0), use_cache=True)
    name = "past_key_values" if "past_key_values" in cache else "cache"
    with pytest.raises(ValueError, match="without a cache: there are 9 queries and 14 keys"):
        model(**batch, **{name: cache[name]})


def test_models_are_copied_and_saved_as_before(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    assert "liger_varlen" not in (tmp_path / "config.json").read_text()
    assert copy.deepcopy(model).config._attn_implementation == LIGER_VARLEN


# With our kernels, under autocast, checkpointed and compiled.


def test_patched_model_has_the_same_loss(monkeypatch):
    use_kernel(monkeypatch)
    rows = documents()
    model = build("qwen3")
    apply_liger_kernel(model, "all")
    ours = loss_and_gradients(model, laid_end_to_end(rows))
    stock = loss_and_gradients(build("qwen3", "sdpa"), padded(rows))
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5)


def test_autocast_reaches_the_kernel(monkeypatch):
    """Stock rope gives float32 queries and keys beside bfloat16 values."""
    seen = []

    def kernel_of(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
    ):
        seen.append((query.dtype, key.dtype, value.dtype))
        return one_by_one(query, key, value, cu_seq_q, scale, window_size)

    use_kernel(monkeypatch, kernel_of)
    monkeypatch.setattr(choice, "_HALVES", (torch.bfloat16, torch.float16))
    with torch.autocast("cpu", torch.bfloat16):
        build("llama")(**laid_end_to_end(documents()), use_cache=False).loss.backward()
    assert seen == [(torch.bfloat16,) * 3] * 2
    with recorded_choices() as found:
        build("llama")(**laid_end_to_end(documents()), use_cache=False)
    assert {layer.backend for layer in found} == {"mask"}
    assert "in bfloat16 or float16, and this is float32" in found[0].reason


def test_gradient_checkpointing(monkeypatch):
    use_kernel(monkeypatch)
    batch = laid_end_to_end(documents())
    plain = loss_and_gradients(build("mistral"), batch)
    model = build("mistral")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(loss_and_gradients(model, batch), plain)


def test_layers_are_compiled_twice_for_all_lengths(monkeypatch):
    """All layers together: once for the first batch, once with dynamic lengths."""
    use_kernel(monkeypatch, _opaque_kernel)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model, plain = build("llama"), build("llama")
    for layer in model.model.layers:
        layer.compile(backend=counter, dynamic=None)
    batches = [(13, 9), (4, 8, 21), (1, 1, 1, 30, 2), (17,), (9, 8)]
    for seed, lengths in enumerate(batches):
        batch = laid_end_to_end(documents(lengths, seed))
        ours = model(**batch, use_cache=False).loss
        torch.testing.assert_close(ours, plain(**batch, use_cache=False).loss)
    torch._dynamo.reset()
    assert counter.frame_count <= 2


@torch.library.custom_op("liger_tests::varlen", mutates_args={})
def _opaque(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, scale: float,
    left: int,
) -> torch.Tensor:  # fmt: skip
    return one_by_one(query, key, value, ends, scale, (left, 0)).contiguous()


@_opaque.register_fake
def _(query, key, value, ends, scale, left):
    return torch.empty_like(query)


def _opaque_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    return _opaque(query, key, value, cu_seq_q, scale, window_size[0])


# The call of the kernel.


@pytest.mark.parametrize("signature", [*SIGNATURES, "is_causal"])
@pytest.mark.parametrize(("size", "value_size"), [(8, 8), (12, 8), (16, 20), (7, 7)])
def test_heads_of_any_size_and_scale(monkeypatch, signature, size, value_size):
    """The kernel takes multiples of 8, alike for queries and values."""
    functions = {**SIGNATURES, "is_causal": varlen_with_is_causal}
    widths = []

    def call(query, key, value, lengths, scale, left):
        widths.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return bound(query, key, value, lengths, scale, left)

    bound = kernel.bind_varlen(functions[signature])
    monkeypatch.setattr(kernel, "_call", call)
    torch.manual_seed(0)
    query, key = torch.randn(50, 4, size), torch.randn(50, 2, size)
    value = torch.randn(50, 2, value_size)
    lengths = Lengths.of(lengths_of(LENGTHS))
    out = varlen_attention(query, key, value, lengths, scale=0.3)
    wanted = one_by_one(query, key, value, lengths.ends_q, 0.3, (-1, 0))
    torch.testing.assert_close(out, wanted)
    width = -(-max(size, value_size) // 8) * 8
    assert widths == [(width,) * 3]


def test_release_without_windows_says_so(monkeypatch):
    monkeypatch.setattr(kernel, "_call", kernel.bind_varlen(varlen_with_is_causal))
    x = torch.randn(50, 2, 8)
    with pytest.raises(ValueError, match="no sliding window; torch 2.11 has one"):
        varlen_attention(x, x, x, Lengths.of(lengths_of(LENGTHS)), window=4)


def test_torch_of_this_environment_can_be_bound():
    """Its signature has what the call needs; there is no kernel to run on a CPU."""
    from torch.nn.attention.varlen import varlen_attn

    x = torch.randn(50, 2, 8, device="meta", dtype=torch.bfloat16)
    lengths = Lengths.of(lengths_of(LENGTHS))
    call = kernel.bind_varlen(varlen_attn)
    on_meta = Lengths(lengths.ends_q.to("meta"), lengths.ends_k.to("meta"), 21, 21)
    assert call(x, x[:, :1], x[:, :1], on_meta, 0.3, 7).shape == x.shape


# Bad input.


def test_empty_documents_and_documents_of_one_token(monkeypatch):
    ends = torch.tensor([0, 0, 2, 2, 2, 3, 7, 7], dtype=torch.int32)
    assert document_numbers(ends, 7).tolist() == [1, 1, 4, 5, 5, 5, 5]
    model = build("llama").eval()
    rows = documents((2, 1, 4))
    batch = laid_end_to_end(rows)
    with torch.no_grad():
        wanted = model(**batch, use_cache=False).logits
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        torch.testing.assert_close(model(**batch, use_cache=False).logits, wanted)


def test_a_hundred_thousand_documents():
    count = 100_000
    ends = torch.arange(count + 1, dtype=torch.int32)
    numbers = document_numbers(ends, count)
    assert torch.equal(numbers, torch.arange(count))


# Which backend, and why.


def form(**changes) -> LayerForm:
    values = {
        "layer_type": "full_attention",
        "head_size": 128,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 0),
    }
    return LayerForm(**{**values, **changes})


@pytest.fixture
def gpu(monkeypatch):
    """Say that there is a GPU, of a compute capability that tests may change."""
    monkeypatch.setattr(torch.version, "hip", None)
    found = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: found[0])
    return found


def test_choice_is_traced(gpu):
    """In the graph of a layer, without a break; the GPU is asked while it is traced."""

    @torch.compile(backend="eager", fullgraph=True)
    def compute(x: torch.Tensor) -> torch.Tensor:
        return x + (choose_backend(form(head_size=256)).backend == "varlen")

    torch._dynamo.reset()
    assert compute(torch.zeros(2)).tolist() == [1, 1]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("changes", "backend", "reason"),
    [
        ({}, "varlen", None),
        ({"layer_type": "sliding_attention"}, "varlen", None),
        ({"dtype": torch.float16, "head_size": 256}, "varlen", None),
        ({"is_capped": True}, "flex", "does not cap scores"),
        ({"has_sinks": True}, "flex", "no attention sinks"),
        ({"head_size": 257}, "mask", "heads of at most 256, and these have 257"),
        ({"head_size": 8, "is_capped": True}, "mask", "flex: it takes heads of 16 to 256, and"),
        ({"layer_type": "chunked_attention"}, "flex", "more than documents and a window"),
        ({"has_own_mask": True}, "flex", "more than documents and a window"),
        ({"has_bias": True}, "mask", "no bias"),
        ({"dropout": 0.1}, "mask", "attention_dropout is 0.1"),
        ({"dtype": torch.float32}, "mask", "and this is float32"),
        ({"device": CPU}, "mask", "needs a CUDA GPU, and this is cpu"),
    ],
)
def test_choice_and_its_reason(gpu, changes, backend, reason):
    found = choose_backend(form(**changes))
    assert found.backend == backend
    assert found.reason is None if reason is None else reason in found.reason


def test_small_and_old_gpus(gpu):
    gpu[0] = (8, 9)
    assert choose_backend(form(head_size=192)).backend == "varlen"
    wide = choose_backend(form(head_size=256))
    assert wide.backend == "flex"
    assert "on this GPU its backward takes heads of at most 192" in wide.reason
    gpu[0] = (7, 5)
    old = choose_backend(form())
    assert old.backend == "mask"
    assert "needs compute capability 8.0, and this GPU has 7.5" in old.reason


def test_torch_without_the_kernel(gpu, monkeypatch):
    monkeypatch.setattr(kernel, "_call", None)
    found = choose_backend(form())
    assert found.backend == "mask"
    assert "has no torch.nn.attention.varlen" in found.reason


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("llama", {("full_attention", 2, "varlen")}),
        ("mistral", {("sliding_attention", 2, "varlen")}),
        ("gemma3_text", {("sliding_attention", 2, "varlen")}),
        ("gemma2", {("sliding_attention", 1, "flex"), ("full_attention", 1, "flex")}),
        ("gpt_oss", {("sliding_attention", 1, "flex"), ("full_attention", 1, "flex")}),
        ("llama4_text", {("chunked_attention", 1, "flex"), ("full_attention", 1, "varlen")}),
    ],
)
def test_plan_of_a_model(gpu, family, wanted):
    # Flex attention takes heads of 16 at least.
    sizes = {} if family == "gpt_oss" else {"hidden_size": 64, "head_dim": 16}
    with torch.device("meta"):
        model = build(family, **sizes)
    found = plan_layers(model, torch.device("cuda", 0), torch.bfloat16)
    assert {(x.layer_type, x.num_layers, x.backend) for x in found} == wanted


def test_plan_is_what_happens(monkeypatch):
    use_kernel(monkeypatch)
    monkeypatch.setattr(choice, "_flex_problem", lambda form: "flex: not here")
    for family in (*FAMILIES, *MASKED):
        model = build(family)
        with recorded_choices() as found:
            model(**laid_end_to_end(documents()), use_cache=False)
        assert set(found) == set(plan_layers(model, CPU, torch.float32)), family


def test_models_that_take_no_lengths():
    assert model_problem(build("llama")) is None
    sizes = {"vocab_size": 64, "hidden_size": 16}
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, n_layer=1, n_head=2))
    assert "not one that transformers lets choose" in model_problem(bloom)
