"""liger_varlen on a GPU: torch's varlen kernel and flex attention against the formula in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from document_rows import LENGTHS, build, documents, laid_end_to_end, lengths_of
from torch import nn

from liger_kernels.transformers.api import apply_liger_kernel
from liger_kernels.transformers.attention import interface
from liger_kernels.transformers.attention.interface import recorded_choices
from liger_kernels.transformers.attention.masks import DeferredMask

pytestmark = pytest.mark.gpu

LONG = (300, 1, 77, 513, 128, 5)
BF16 = torch.bfloat16
DEVICE = "cuda"


class Layer(nn.Module):
    """An attention layer of which the interface reads its type alone."""

    is_causal = True

    def __init__(self, layer_type: str, groups: int) -> None:
        super().__init__()
        self.layer_type = layer_type
        self.num_key_value_groups = groups
        self.config = None


def causal_mask(lengths: tuple[int, ...], window: int | None) -> DeferredMask:
    """Return the mask of a row as transformers would ask for it."""
    from transformers import masking_utils

    total = sum(lengths)
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    arguments = {"batch_size": 1, "q_length": total, "kv_length": total, "device": DEVICE}
    return DeferredMask({**arguments, "q_offset": 0, "kv_offset": 0, "mask_function": function})


def attention(inputs: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Return output and gradients of the interface."""
    tensors = [inputs[name].detach().requires_grad_() for name in ("query", "key", "value")]
    window = options.get("sliding_window")
    groups = tensors[0].shape[1] // tensors[1].shape[1]
    layer = Layer("sliding_attention" if window else "full_attention", groups)
    given = {name: value for name, value in lengths_of(LONG).items() if isinstance(value, int)}
    ends = lengths_of(LONG)["cu_seq_lens_q"].to(DEVICE)
    given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    mask = causal_mask(LONG, window)
    out, _ = interface.document_attention(layer, *tensors, mask, **given, **options)
    return [out, *torch.autograd.grad(out, tensors, inputs["grad"].to(out.dtype))]


def tensors(heads: int, shared: int, size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    total = sum(LONG)

    def one(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, generator=generator)

    return {
        "query": one(1, heads, total, size),
        "key": one(1, shared, total, size),
        "value": one(1, shared, total, size),
        "grad": one(1, total, heads, size),
    }


@pytest.mark.parametrize("window", [None, 64, 2])
@pytest.mark.parametrize(
    ("heads", "shared", "size"),
    [(8, 8, 64), (8, 2, 64), (8, 8, 128), (6, 2, 128), (4, 1, 256), (4, 4, 80), (4, 4, 36)],
)
def test_case_101_varlen_is_no_worse_than_the_formula(heads, shared, size, window):
    _compare(tensors(heads, shared, size), "varlen", sliding_window=window)


@pytest.mark.parametrize("kind", ["softcap", "sinks", "wide"])
@pytest.mark.parametrize("window", [None, 64])
def test_case_101_flex_is_no_worse_than_the_formula(kind, window):
    size = {"softcap": 128, "sinks": 64, "wide": 256}[kind]
    options: dict[str, Any] = {"sliding_window": window}
    if kind != "sinks":
        options["softcap"] = 20.0
    if kind == "sinks":
        options["s_aux"] = torch.randn(8, device=DEVICE)
    _compare(tensors(8, 2, size), "flex", **options)


def _compare(inputs: dict[str, torch.Tensor], backend: str, **options: Any) -> None:
    """Compare with float32, which is computed by the mask; bf16 by the mask is the yardstick."""
    halves = {name: x.to(BF16) for name, x in inputs.items()}
    with recorded_choices() as found:
        ours = attention(halves, **options)
    assert [layer.backend for layer in found] == [backend], found
    rounded = {name: x.to(BF16).float() for name, x in inputs.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interface, "choose_backend", _always_mask)
        eager = attention(halves, **options)
        exact = attention(rounded, **options)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        error, allowed = (a.float() - c).norm() / c.norm(), (b.float() - c).norm() / c.norm()
        assert error <= 2 * allowed + 2e-3, f"{name}: {error:.5f}, the formula has {allowed:.5f}"


def _always_mask(form: Any) -> Any:
    return interface.Choice("mask", "a test asks for it")


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


# Heads of 8 are widened to what kernels take; gemma2 caps, gpt_oss has sinks, llama4 has chunks.
@pytest.mark.parametrize("backend", ["as chosen", "mask"])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen3", "gemma3_text", "gemma2", "gpt_oss", "llama4_text"]
)
def test_case_101_no_document_has_a_gradient_in_another(monkeypatch, family, backend):
    if backend == "mask":
        monkeypatch.setattr(interface, "choose_backend", _always_mask)
    # Flex attention takes heads of 16 at least.
    sizes = {} if family == "gpt_oss" else {"hidden_size": 64, "head_dim": 16}
    model = build(family, **sizes).cuda().to(BF16).eval()
    batch = on_gpu(laid_end_to_end(documents()))
    del batch["labels"]
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    ends = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for start, end in zip(ends, ends[1:], strict=False):
        own = slice(start, end)
        with recorded_choices() as found:
            logits = model(inputs_embeds=embedded, **batch, use_cache=False).logits.float()
        assert found
        assert ({layer.backend for layer in found} == {"mask"}) == (backend == "mask"), found
        (gradient,) = torch.autograd.grad(logits[:, own].square().sum(), embedded)
        assert gradient[:, own].any()
        gradient[:, own] = 0
        assert not gradient.any()


@pytest.mark.parametrize("has_autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("ops", ["none", "all"])
def test_model_loss_is_that_of_the_mask(ops, has_autocast):
    def loss(attention: str) -> torch.Tensor:
        model = build("llama", attention, hidden_size=128).cuda()
        model = model if has_autocast else model.to(BF16)
        apply_liger_kernel(model, ops)
        with torch.autocast("cuda", BF16, enabled=has_autocast):
            out = model(**on_gpu(laid_end_to_end(documents())), use_cache=False)
        out.loss.backward()
        return torch.stack([out.loss.detach().float(), model.model.norm.weight.grad.norm().float()])

    with recorded_choices() as found:
        ours = loss("liger_varlen")
    assert {layer.backend for layer in found} == {"varlen"}, found
    torch.testing.assert_close(ours, loss("sdpa"), rtol=0.05, atol=0.02)


def test_attention_does_not_synchronize():
    inputs = {name: x.to(BF16) for name, x in tensors(4, 2, 64).items()}
    attention(inputs)
    ends = lengths_of(LONG)["cu_seq_lens_q"].cuda()
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 513}
    query, key, value = (inputs[name].requires_grad_() for name in ("query", "key", "value"))
    mask = causal_mask(LONG, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = interface.document_attention(
            Layer("full_attention", 2), query, key, value, mask, **given, max_length_k=513
        )
        out.backward(inputs["grad"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_layers():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    model, plain = (build("llama", hidden_size=128).cuda().to(BF16) for _ in range(2))
    for layer in model.model.layers:
        layer.compile(backend=counter)
    for seed, lengths in enumerate([(13, 9), (4, 8, 21), (1, 1, 1, 30, 2), (17,), (90, 40)]):
        batch = on_gpu(laid_end_to_end(documents(lengths, seed)))
        ours = model(**batch, use_cache=False).loss
        ours.backward()
        wanted = plain(**batch, use_cache=False).loss
        torch.testing.assert_close(ours, wanted, rtol=0.05, atol=0.02)
    torch._dynamo.reset()
    assert counter.frame_count <= 2
