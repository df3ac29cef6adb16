"""No tensor of a step, or of an evaluation, grows faster than its rows: no T x T and no T x V."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_cli.config import load_config
from liger_cli.training.memory import ledger, probe_copy, step
from liger_cli.training.memory.build import estimate_memory
from liger_cli.training.memory.limits import RunMemory
from liger_cli.training.model.loading import load_patched
from liger_cli.training.model.source import resolve_model
from liger_cli.training.objectives.sft import TokenEvaluation
from liger_cli.training.parallel.mesh import ParallelPlan
from liger_kernels.ops.rows import pieces_of

VOCAB = 128_256
SMALL = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "max_position_embeddings": 1 << 20,
}
LONG = {
    "gradient_checkpointing": True,
    "activation_offloading": True,
    "tile_tokens": 1024,
    "adapter": "lora",
}
# Few numbers, such as those of documents or of a kernel's programs.
FEW = 1 << 16


class Largest(ledger.Ledger):
    """Notes the most bytes that a tensor of each operation has."""

    sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        note(self.sizes, func, result)
        return result


def note(sizes: Counter[str], func, result) -> None:
    for x in tree_leaves(result):
        if isinstance(x, torch.Tensor) and not x.is_meta:
            name = func.overloadpacket.__name__
            sizes[name] = max(sizes[name], x.untyped_storage().nbytes())


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "config.json"

    def write(**values) -> str:
        path.write_text(json.dumps({**SMALL, **values}), encoding="utf-8")
        return str(path)

    return write


def run_estimate(monkeypatch, counts, model: str, length: int, *, is_padded: bool, **keys):
    flags = {"model": model, "per_device_train_batch_size": 1, "max_length": length, **keys}
    config = load_config(flags=flags)
    source = resolve_model(config.model)
    memory = RunMemory.assumed(config, source, ParallelPlan(), is_padded=is_padded)
    monkeypatch.setattr(step, "Ledger", counts)
    # Not that of RunMemory, which is kept for all tests.
    return estimate_memory(memory.config, source, memory.batch)


def largest_of_step(monkeypatch, model: str, length: int, **keys):
    monkeypatch.setattr(Largest, "sizes", Counter())
    run_estimate(monkeypatch, Largest, model, length, **keys)
    return Largest.sizes


def assert_linear(short: Counter[str], long: Counter[str], num_bytes: int) -> None:
    """Twice the rows make no tensor more than twice as large, and none has the logits of all.

    num_bytes are those of a column of such logits.
    """
    assert short.keys() == long.keys()
    wider = {
        name: (short[name], long[name]) for name in long if long[name] > max(2.1 * short[name], FEW)
    }
    assert not wider
    assert max(long.values()) < num_bytes * VOCAB


@pytest.mark.parametrize(
    ("keys", "is_padded"),
    [
        pytest.param({}, False, id="plain"),
        pytest.param({"packing": True}, False, id="packed"),
        pytest.param({"per_device_train_batch_size": 2}, True, id="several-lengths"),
        pytest.param(LONG, False, id="long"),
        pytest.param({**LONG, "packing": True, "load_in_4bit": True}, False, id="long-packed"),
        pytest.param({"objective": "dpo", "beta": 0.1}, False, id="dpo"),
        pytest.param({"gradient_checkpointing": True, "bf16": True}, False, id="autocast"),
    ],
)
def test_a_step_grows_with_its_rows(monkeypatch, model_file, keys, is_padded):
    if "adapter" in keys:
        pytest.importorskip("peft")
    model = model_file()
    short, long = (
        largest_of_step(monkeypatch, model, length, is_padded=is_padded, **keys)
        for length in (8192, 16384)
    )
    assert_linear(short, long, 2 * 16384)


class Wide(ledger.Ledger):
    """Notes tensors of all tokens, or of all choices of experts, that have 4 x hidden a token."""

    found: dict[str, tuple[int, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for x in tree_leaves(result):
            is_of_all = isinstance(x, torch.Tensor) and any(n and n % TOKENS == 0 for n in x.shape)
            if is_of_all and x.numel() >= 4 * TOKENS * SMALL["hidden_size"]:
                self.found[func.overloadpacket.__name__] = tuple(x.shape)
        return result


# No size of the models is a multiple of it.
TOKENS = 5000
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "mlp_only_layers": [1],
}


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("values", [{}, EXPERTS], ids=["mlp", "experts"])
def test_no_tensor_of_all_tokens_is_four_times_as_wide_as_they_are(
    monkeypatch, model_file, values, adapter
):
    """With tiles; without, gate and up are such."""
    if adapter == "lora":
        pytest.importorskip("peft")
    if values and not zoo.IS_V5:
        pytest.skip("version 4 has one MLP an expert")
    found = []
    for tile in (512, "none"):
        monkeypatch.setattr(Wide, "found", {})
        keys = {**LONG, "adapter": adapter, "tile_tokens": tile}
        run_estimate(monkeypatch, Wide, model_file(**values), TOKENS, is_padded=False, **keys)
        found.append(Wide.found)
    assert found[0] == {}
    assert found[1]


def test_the_time_of_an_estimate_does_not_grow_with_the_row(monkeypatch, model_file):
    """Pieces that are alike are followed once, and come to the same."""
    calls = Counter()

    class Counted(ledger.Ledger):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[length, few] += 1
            return super().__torch_dispatch__(func, types, args, kwargs)

    model, peaks = model_file(), {}
    for length, few in ((4096, True), (32768, True), (32768, False)):
        with monkeypatch.context() as patch:
            if not few:
                patch.setattr(probe_copy, "_few_pieces", pieces_of)
            keys = {**LONG, "adapter": "none"}
            found = run_estimate(patch, Counted, model, length, is_padded=False, **keys)
        peaks[length, few] = found.phases, found.offloaded, found.activations
    assert calls[32768, True] < 1.1 * calls[4096, True] < calls[32768, False] / 2
    assert peaks[32768, True] == peaks[32768, False]


def test_a_mask_or_logits_would_be_seen(monkeypatch, model_file):
    """The same with eager attention and without the fused loss."""
    model = model_file()
    short, long = (
        largest_of_step(
            monkeypatch, model, n, is_padded=False, ops="none", attn_implementation="eager"
        )
        for n in (8192, 16384)
    )
    with pytest.raises(AssertionError):
        assert_linear(short, long, 2 * 16384)
    assert max(long.values()) >= 16384 * VOCAB
    assert long["_softmax"] > 3.9 * short["_softmax"]


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        note(self.sizes, func, result)
        return result


def test_an_evaluation_grows_with_its_rows(model_file):
    """Of real tensors: the loss, the right tokens and the entropies of rows of 512 and 1024."""
    narrow = {"hidden_size": 16, "head_dim": 4, "intermediate_size": 32, "num_hidden_layers": 1}
    model = model_file(**narrow)
    config = load_config(flags={"model": model, "dtype": "float32", "use_cpu": True})
    cpu = torch.device("cpu")
    loaded, _ = load_patched(config, resolve_model(model), cpu, lambda line: None, trains=False)
    evaluation, found = TokenEvaluation(loaded.eval(), cpu), []
    for length in (512, 1024):
        ids = torch.arange(length).reshape(1, -1)
        with torch.no_grad(), Recorded() as recorded:
            sums = evaluation.sums({"input_ids": ids, "labels": ids})
        assert torch.isfinite(sums).all()
        assert sums[3] == length - 1
        found.append(recorded.sizes)
    assert_linear(*found, 4 * 1024)
