"""Long rows on a CUDA device: the streams of offloading under copies that are slow, and tiles."""

from __future__ import annotations

import functools

import pytest
import torch
from test_activation_offload import assert_kept, built, offload_to_host, rows, step
from torch.nn.attention import SDPBackend, sdpa_kernel

from liger_cli.training import activation_offload
from liger_cli.training.activation_offload import (
    ActivationOffload,
    HostPages,
    checkpoint_layers,
)
from liger_kernels.transformers.replacements.tiles import tile_modules

GPU = torch.device("cuda")
# Some 50 ms: far more than a layer of these models takes.
CYCLES = 100_000_000
# Flash attention sums the gradient of the queries by atomics.
FIXED_ORDER = functools.partial(sdpa_kernel, SDPBackend.MATH)


@pytest.fixture(params=["as-they-are", "slow-out", "slow-back"])
def copies(request, monkeypatch):
    """Copies as they are, or so late that only a stream that waits sees what they bring."""
    # Of several pages an input.
    monkeypatch.setattr(activation_offload, "_LEAST_PAGE", 1 << 12)
    copy = activation_offload._CopyStream.copy

    def late(self, target, source, *, after=None):
        if target.is_cuda == (request.param == "slow-back"):
            with torch.cuda.stream(self._stream):
                torch.cuda._sleep(CYCLES)
        return copy(self, target, source, after=after)

    if request.param != "as-they-are":
        monkeypatch.setattr(activation_offload._CopyStream, "copy", late)
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"adapter": "lora"}], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3-text"])
def test_offloaded_steps_have_the_same_bits(family, keys, copies):
    if keys:
        pytest.importorskip("peft")
    plain = built(family, GPU, torch.bfloat16, **keys)
    offloaded = built(family, GPU, torch.bfloat16, **keys)
    offload = offload_to_host(GPU)
    checkpoint_layers(plain)
    checkpoint_layers(offloaded, offload)
    num_same = 0
    for number, length in enumerate((512, 512, 1024)):
        inputs = rows(length, seed=number)
        with FIXED_ORDER():
            wanted, again, got = (step(one, inputs) for one in (plain, plain, offloaded))
        assert got.keys() == wanted.keys()
        for name in wanted:
            # Gradients that are summed by atomics have other bits in each step.
            if torch.equal(wanted[name], again[name]):
                num_same += 1
                assert torch.equal(got[name], wanted[name]), name
    assert num_same >= 0.5 * 3 * len(wanted)
    assert_kept(offload, plain.config.num_hidden_layers, 3)
    assert all(page.data.is_pinned() for page in offload.pages._free)


@pytest.mark.gpu
def test_what_the_host_has_no_room_for_has_the_same_bits(monkeypatch):
    monkeypatch.setattr(activation_offload, "_LEAST_PAGE", 1 << 12)
    plain, offloaded = (built("qwen3", GPU, torch.bfloat16) for _ in range(2))
    inputs = rows(512)
    one = inputs["input_ids"].numel() * plain.config.hidden_size * 2
    allocate = activation_offload._pinned_bytes(GPU, print)
    offload = ActivationOffload(GPU, HostPages(allocate, 3 * one // 2))
    checkpoint_layers(plain)
    checkpoint_layers(offloaded, offload)
    for _ in range(2):
        with FIXED_ORDER():
            wanted, again, got = (step(model, inputs) for model in (plain, plain, offloaded))
        same = [name for name in wanted if torch.equal(wanted[name], again[name])]
        assert len(same) >= 0.5 * len(wanted)
        assert all(torch.equal(got[name], wanted[name]) for name in same)
    assert offload.num_kept == 2
    assert offload.num_left > 0


@pytest.mark.gpu
def test_inputs_of_layers_leave_the_device():
    """Eight layers whose inputs are 32 MiB each: forward leaves one, backward has two."""
    width, tokens = 2048, 8192
    one = width * tokens * 2
    weights = [torch.randn(width, width, device=GPU, dtype=torch.bfloat16) for _ in range(8)]
    for weight in weights:
        weight.mul_(width**-0.5).requires_grad_()
    peaks, grads = [], []
    for offload in (None, offload_to_host(GPU), offload_to_host(GPU)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        x = torch.ones(1, tokens, width, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        for weight in weights:
            run = torch.utils.checkpoint.checkpoint
            args = (lambda x, w=weight: torch.tanh(x @ w), x)
            if offload is None:
                x = run(*args, use_reentrant=False)
            else:
                x = offload.checkpoint(run, *args, use_reentrant=False)
        x.float().square().mean().backward()
        del x
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        grads.append([weight.grad.clone() for weight in weights])
        for weight in weights:
            weight.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads[:2], strict=True))
    assert peaks[0] - peaks[1] >= 3 * one


def distances(got, truth) -> dict[str, float]:
    """Each gradient's distance from the truth, over its norm or a share of the largest one."""
    largest = max(grad.norm().item() for grad in truth.values())
    found = {}
    for name, grad in truth.items():
        scale = max(grad.norm().item(), 0.05 * largest)
        found[name] = (got[name].double() - grad).norm().item() / scale
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"adapter": "lora"}], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3-text"])
def test_tiles_are_no_worse_than_the_whole(family, keys):
    """In bf16 against fp64: 2000 tokens in pieces of 96, at most twice the whole MLP's error."""
    if keys:
        pytest.importorskip("peft")
    inputs = rows(1000)
    # What bf16 rounds the parameters to, in fp64.
    exact = built(family, GPU, torch.bfloat16, ops="none", **keys).double()
    truth = step(exact, inputs)
    whole, tiled = (built(family, GPU, torch.bfloat16, **keys) for _ in range(2))
    assert tile_modules(tiled, 96) == whole.config.num_hidden_layers
    found = []
    for model in (whole, tiled):
        checkpoint_layers(model)
        found.append(distances(step(model, inputs), truth))
    for name, distance in found[1].items():
        assert distance <= 2 * found[0][name] + 2e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_both_together_have_the_bits_of_tiles(keys):
    if keys:
        pytest.importorskip("peft")
    models = [built("qwen3", GPU, torch.bfloat16, **keys) for _ in range(2)]
    for model in models:
        tile_modules(model, 128)
    checkpoint_layers(models[0])
    checkpoint_layers(models[1], offload_to_host(GPU))
    inputs = rows(512)
    with FIXED_ORDER():
        wanted, again, got = (step(models[i], inputs) for i in (0, 0, 1))
    same = [name for name in wanted if torch.equal(wanted[name], again[name])]
    assert len(same) >= 0.5 * len(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in same)
