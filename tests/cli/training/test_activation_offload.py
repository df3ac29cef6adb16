"""Activation offloading: same bits with and without, pages that are used again, what is said."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from run_files import assert_same

from liger_cli.config import load_config
from liger_cli.errors import ConfigError, OutOfMemory
from liger_cli.training import activation_offload
from liger_cli.training.activation_offload import (
    ActivationOffload,
    HostPages,
    checkpoint_layers,
    offload_of,
)
from liger_cli.training.memory import Batch, long_rows, meta_model_of
from liger_cli.training.memory.limits import AUTO_TILE, RunMemory
from liger_cli.training.model.adapters import attach_adapter, new_adapter
from liger_cli.training.model.source import load_model, resolve_model
from liger_cli.training.parallel.mesh import ParallelPlan
from liger_kernels.transformers.api import apply_liger_kernel

CPU = torch.device("cpu")


def built(model: str = "qwen3", device: torch.device = CPU, dtype=torch.float32, **keys):
    config = load_config(flags={"model": model, **keys})
    source = resolve_model(config.model)
    found = load_model(source, dtype=dtype, device=device, seed=0)
    if config.adapter != "none":
        found = attach_adapter(found, new_adapter(config, found, source.tokens), base="", seed=0)
        generator = torch.Generator(device).manual_seed(1)
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                # At zero, as it begins, there is no gradient of lora_A.
                parameter.data.normal_(std=0.1, generator=generator)
    apply_liger_kernel(found, config.ops)
    return found.train()


def offload_to_host(device: torch.device = CPU) -> ActivationOffload:
    config = load_config(
        flags={"model": "qwen3", "gradient_checkpointing": True, "activation_offloading": True}
    )
    found = offload_of(config, device, lambda line: None)
    assert found is not None
    return found


def rows(length: int, size: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 200, (size, length), generator=generator)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def step(model, inputs) -> dict[str, torch.Tensor]:
    """The gradients of a step, by parameter."""
    model.zero_grad()
    device = next(model.parameters()).device
    # As a run does with an adapter in fp32 beside a model in bf16.
    is_mixed = len({p.dtype for p in model.parameters()}) > 1
    with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
        loss = model(**{key: x.to(device) for key, x in inputs.items()}, use_cache=False).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, wanted) -> None:
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def assert_kept(offload: ActivationOffload, num_layers: int, num_steps: int) -> None:
    """The input of each layer was taken in each step, and the graphs are gone: pages are back."""
    kept, rest = divmod(offload.num_kept, num_steps)
    # Some versions of transformers let the embeddings beside an adapter need no gradient.
    assert num_layers - 1 <= kept <= num_layers
    assert rest == 0
    assert offload.pages.num_allocated == len(offload.pages._free) >= kept


@pytest.mark.parametrize("keys", [{}, {"adapter": "lora"}], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3-text", "qwen3-moe"])
def test_gradients_are_the_same_bits(family, keys, monkeypatch):
    if keys:
        pytest.importorskip("peft")
    # Of several pages an input.
    monkeypatch.setattr(activation_offload, "_LEAST_PAGE", 1 << 10)
    plain, offloaded = built(family, **keys), built(family, **keys)
    offload = offload_to_host()
    checkpoint_layers(plain)
    checkpoint_layers(offloaded, offload)
    for number, length in enumerate((24, 24, 40)):
        inputs = rows(length, seed=number)
        assert_equal(step(offloaded, inputs), step(plain, inputs))
    assert_kept(offload, plain.config.num_hidden_layers, 3)
    assert offload.pages.num_allocated > 3 * plain.config.num_hidden_layers


def chain(offload: ActivationOffload, x: torch.Tensor) -> torch.Tensor:
    """The sum of what six layers make of x, each in a checkpoint."""
    weight = torch.linspace(1, 2, 4, requires_grad=True)
    for _ in range(6):
        run = torch.utils.checkpoint.checkpoint
        x = offload.checkpoint(run, lambda x: (x * weight).sin(), x, use_reentrant=False)
    return x.sum()


def test_two_inputs_at_most_are_on_the_device(monkeypatch):
    """Of those of a forward the last stays; backward has the one in use and the next."""
    inputs, most = [], []

    class Counted(activation_offload._Input):
        def __init__(self, *args):
            super().__init__(*args)
            inputs.append(self)

        def fetch(self):
            super().fetch()
            most.append(sum(one._on_device is not None for one in inputs))

    monkeypatch.setattr(activation_offload, "_Input", Counted)
    loss = chain(offload_to_host(), torch.ones(3, 4, requires_grad=True))
    assert [one._on_device is not None for one in inputs] == [False] * 5 + [True]
    loss.backward()
    # Each is fetched one layer ahead, and found to be there when its layer asks.
    assert most == [1] * 11
    assert all(one._on_device is None for one in inputs)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.ones(2, 2), id="mask"),
        pytest.param(torch.empty(0, requires_grad=True), id="empty"),
        pytest.param(torch.ones(2, 2, device="meta", requires_grad=True), id="elsewhere"),
    ],
)
def test_what_is_no_input_of_a_layer_stays(x):
    """torch before 2.13 saves an empty tensor beside the inputs, on the CPU of a run on a GPU."""
    offload = offload_to_host()
    assert offload._unpack(offload._pack(x)) is x
    assert offload.num_kept == offload.pages.num_allocated == 0


def test_backward_twice_has_the_inputs_again():
    offload = offload_to_host()
    x = torch.linspace(0, 1, 12).view(3, 4).requires_grad_()
    loss = chain(offload, x)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)


def test_pages_come_back_without_a_backward():
    offload = offload_to_host()
    loss = chain(offload, torch.ones(3, 4, requires_grad=True))
    del loss
    assert len(offload.pages._free) == offload.pages.num_allocated == 6


def test_two_forwards_before_a_backward():
    model, plain = built(), built()
    checkpoint_layers(model, offload_to_host())
    checkpoint_layers(plain)
    found = []
    for one in (model, plain):
        losses = [one(**rows(n, seed=n), use_cache=False).loss for n in (16, 32)]
        # Backward of the first runs while inputs of the second are away.
        losses[0].backward()
        losses[1].backward()
        found.append({name: p.grad for name, p in one.named_parameters()})
    assert_equal(*found)


def test_pages_are_used_again_by_rows_of_any_length():
    made = []

    def allocate(num_bytes):
        made.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    page = activation_offload._LEAST_PAGE
    pages = HostPages(allocate)
    short, long = pages.take(10), pages.take(2 * page + 1)
    assert [len(short), len(long)] == [1, 3]
    for taken in (short, long):
        pages.give(taken)
    again = pages.take(4 * page)
    assert set(map(id, again)) == set(map(id, [*short, *long]))
    assert made == [page] * 4
    assert pages.num_allocated == 4


@pytest.mark.parametrize("num_bytes", [1 << 27, (1 << 30) - 1, 2_457_600_000, 524_288 * 8192])
def test_pages_are_what_torch_pins_without_loss(num_bytes):
    """A power of two each, and together little more than what they hold."""
    pages = HostPages(lambda n: torch.empty(n, dtype=torch.uint8, device="meta"))
    taken = pages.take(num_bytes)
    assert pages.page_bytes.bit_count() == 1
    assert num_bytes <= len(taken) * pages.page_bytes <= 1.125 * num_bytes
    assert len(taken) <= 16


def test_what_the_host_has_no_room_for_stays():
    """Of six layers the last four, whose backward is first; the bits are the same."""
    page = activation_offload._LEAST_PAGE
    pages = HostPages(lambda n: torch.empty(n, dtype=torch.uint8), 2 * page + page // 2)
    offload, grads = ActivationOffload(CPU, pages), []
    for one in (offload, offload, offload_to_host()):
        x = torch.linspace(0, 1, 12).view(3, 4).requires_grad_()
        chain(one, x).backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[2])
    assert (offload.num_kept, offload.num_left) == (4, 8)
    assert pages.num_allocated == len(pages._free) == 2


def test_a_host_without_room_keeps_nothing():
    offload = ActivationOffload(CPU, HostPages(lambda n: torch.empty(n), 0))
    loss = chain(offload, torch.ones(3, 4, requires_grad=True))
    loss.backward()
    assert (offload.num_kept, offload.num_left, offload.pages.num_allocated) == (0, 6, 0)


def test_memory_that_cannot_be_pinned_is_said_once(monkeypatch):
    lines, empty = [], torch.empty

    def refuse(*args, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    allocate = activation_offload._pinned_bytes(torch.device("cuda"), lines.append)
    assert [allocate(8).numel(), allocate(9).numel()] == [8, 9]
    assert len(lines) == 1
    assert "no pinned memory (CUDA error: out of memory)" in lines[0]


def test_a_run_has_the_same_steps(train, run_dir, tmp_path):
    words = ("--gradient-checkpointing", "--gradient-accumulation-steps", 2)
    assert train(*words).code == 0
    other = tmp_path / "offloaded"
    done = train(*words, "--activation-offloading", "true", "--output-dir", other)
    assert done.code == 0
    assert "activation_offloading: on a CPU inputs of layers are copied" in done.err + done.out
    assert_same(run_dir, other)
    assert "activation_offloading: false" in (run_dir / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--activation-offloading", "true"], ["gradient_checkpointing"]),
        (["--activation-offloading", "1"], ["activation_offloading", "auto, true"]),
        (
            ["--activation-offloading=true", "--gradient-checkpointing", "--torch-compile=true"],
            ["torch_compile"],
        ),
    ],
    ids=["no-checkpoints", "number", "compiled"],
)
def test_what_does_not_go_together_is_refused(train, words, names):
    done = train(*words)
    assert done.code == 2
    for name in names:
        assert name in done.err


def test_a_model_whose_layers_cannot_be_reached_is_refused(monkeypatch):
    model = built()
    monkeypatch.setattr(type(model), "activation_checkpointing_enable", lambda *_: None)
    monkeypatch.setattr(type(model), "gradient_checkpointing_enable", lambda *_: None)
    with pytest.raises(ConfigError, match="activation_offloading: .*checkpoints its layers"):
        checkpoint_layers(model, offload_to_host())


# The estimate, and what auto decides by it ------------------------------------------------------


def memory_of(length: int, **keys) -> RunMemory:
    flags = {"model": "gemma3-text", "per_device_train_batch_size": 1, "max_length": length}
    config = load_config(flags={**flags, "gradient_checkpointing": True, **keys})
    return RunMemory(config, resolve_model(config.model), Batch(1, length), on_gpu=True)


def test_the_estimate_has_inputs_of_layers_on_the_host():
    # Of ten pages each.
    tokens = 1 << 17
    memory = memory_of(tokens)
    text = meta_model_of(memory.config, memory.source).config
    plain, offloaded = memory.estimate(), memory.trying(activation_offloading=True).estimate()
    one = tokens * text.hidden_size * 2
    assert offloaded.offloaded == {"inputs of layers": text.num_hidden_layers * one}
    # The last one stays.
    saved = sum(plain.activations.values()) - sum(offloaded.activations.values())
    assert saved == (text.num_hidden_layers - 1) * one
    # At the peak of backward, which may lie where few of them are left, too.
    assert plain.phases["backward"] - offloaded.phases["backward"] >= 2 * one


def on_host(num_bytes: int) -> RunMemory:
    """A step whose inputs of layers go to a host with so many bytes."""
    memory = memory_of(1 << 17, activation_offloading=True)
    return replace(memory, host_bytes=num_bytes)


def test_a_host_that_holds_some_inputs_keeps_those_and_it_is_said():
    whole = memory_of(1 << 17, activation_offloading=True).estimate()
    taken, left = whole.inputs_on_host
    assert taken > 3
    assert left == 0
    assert long_rows.host_line(on_host(whole.offloaded["inputs of layers"]), 1 << 40) is None
    memory = on_host(3 * whole.offloaded["inputs of layers"] // taken + 1)
    found = memory.estimate()
    assert found.inputs_on_host == (3, taken - 3)
    assert found.phases["forward"] > whole.phases["forward"]
    line = long_rows.host_line(memory, 1 << 40)
    assert f"room for 3 of the {taken} inputs of layers" in line
    assert "a step takes" in line


def test_a_host_without_room_for_one_input_is_refused():
    with pytest.raises(OutOfMemory, match="activation_offloading needs .* of host memory") as info:
        long_rows.host_line(on_host(1 << 20), 1 << 40)
    assert info.value.exit_code == 5
    assert "activation_offloading" in info.value.hint


def test_a_run_settles_by_the_free_memory_of_the_host(monkeypatch):
    """As on a GPU of 1 TB beside a host that has room for three inputs."""
    memory = memory_of(1 << 17, activation_offloading=True, tile_tokens="none")
    whole = memory.estimate()
    one = whole.offloaded["inputs of layers"] // whole.inputs_on_host[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(long_rows, "free_host_memory", lambda: int(2 * 3.5 * one / 0.9))
    monkeypatch.setattr(long_rows, "device_memory", lambda device: 10**12)
    monkeypatch.setattr(long_rows, "broadcast_object_list", lambda found: None)
    monkeypatch.setattr(RunMemory, "of", classmethod(lambda *args: memory))
    inputs = SimpleNamespace(attention=SimpleNamespace(applied=lambda config: config))
    accelerator = SimpleNamespace(device=torch.device("cuda"))
    settled = long_rows.settle_long_rows(memory.config, inputs, accelerator, ParallelPlan())
    assert 3 * one <= settled.host_bytes < 4 * one
    assert "room for 3 of the" in settled.line
    assert settled.config == memory.config


class FakeMemory:
    """A step whose peak is read from a table by its keys; of a host with room, 7 bytes go there."""

    def __init__(self, peaks, host=None, **keys):
        flags = {"model": "qwen3", "gradient_checkpointing": True}
        self.peaks, self.host, self.keys = peaks, host, keys
        self.config = load_config(flags={**flags, **keys})

    def trying(self, **keys):
        return FakeMemory(self.peaks, self.host, **{**self.keys, **keys})

    @property
    def found(self):
        taken = self.config.activation_offloading is True and self.host != 0
        sizes = {"inputs of layers": 7} if taken else {}
        return SimpleNamespace(offloaded=sizes, inputs_on_host=(4 * taken, 0))

    def peak(self):
        is_tiled = self.config.tile_size is not None
        return self.peaks[is_tiled, self.config.activation_offloading is True]


PEAKS = {(False, False): 100, (True, False): 80, (False, True): 60, (True, True): 40}


@pytest.mark.parametrize(
    ("card", "host", "keys", "is_tiled", "is_offloaded"),
    [
        (100, 9, {}, False, False),
        (90, 9, {}, True, False),
        (70, 9, {}, False, True),
        (50, 9, {}, True, True),
        (30, 9, {}, True, True),
        # A host that has no room keeps them on the device.
        (30, 0, {}, True, False),
        # What is said is kept.
        (90, 9, {"tile_tokens": "none"}, False, True),
        (90, 9, {"activation_offloading": False, "tile_tokens": "none"}, False, False),
        (70, 9, {"tile_tokens": "256"}, True, True),
    ],
)
def test_auto_takes_what_costs_least_of_what_fits(card, host, keys, is_tiled, is_offloaded):
    found, line = long_rows.with_long_rows(FakeMemory(PEAKS, host, **keys), card)
    tile = keys.get("tile_tokens", str(AUTO_TILE) if is_tiled else "none")
    assert found == {"activation_offloading": is_offloaded, "tile_tokens": tile}
    is_auto = found != {**long_rows._closed(FakeMemory(PEAKS, **keys).config)}
    assert (line is not None) is is_auto


def test_what_cannot_be_estimated_stays_off():
    found, line = long_rows.with_long_rows(FakeMemory(dict.fromkeys(PEAKS)), 1)
    assert found == {"activation_offloading": False, "tile_tokens": "none"}
    assert "cannot be estimated" in line


def test_tiles_of_a_model_that_has_none_are_refused_before_it_is_loaded(train, run_dir):
    done = train("--tile-tokens", 64, "--ops", "rms_norm", "--dry-run")
    assert done.code == 2
    assert "tile_tokens" in done.err
    assert "no patched gated MLP or experts" in done.err
