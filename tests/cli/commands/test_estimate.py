"""The memory estimate: beside real tensors, by hand, and beside steps measured on a GPU."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_cli.commands.estimate.cards import CARDS, find_card
from liger_cli.commands.estimate.fit import largest_that_fits
from liger_cli.config import load_config
from liger_cli.errors import ConfigError
from liger_cli.training.forward import LossOf
from liger_cli.training.memory import Batch, estimate_memory, meta_model_of, step_memory
from liger_cli.training.model.adapters import attach_adapter, new_adapter
from liger_cli.training.model.extended import extend_source
from liger_cli.training.model.source import load_model, resolve_model
from liger_cli.training.parallel.mesh import ParallelPlan
from liger_kernels.transformers.api import apply_liger_kernel

RESULTS = Path(__file__).parents[3] / "docs" / "results"
MIB = 1 << 20
# 2 layers, 4 heads of 2, 2 key heads: small enough to follow on paper.
TINY = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 100,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
# Llama 3.2 1B with 2 of its 16 layers.
SMALL = TINY | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
# The head of case 105: as wide as Llama's, with Gemma's vocabulary.
WIDE_HEAD = {**TINY, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 262144}
FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3-text",
    "glm4",
    "granite",
    "llama4-text",
    "mistral",
    "mixtral",
    "mllama",
    "olmo2",
    "paligemma",
    "phi3",
    "qwen2",
    "qwen2-5-vl",
    "qwen2-vl",
    "qwen3",
    "qwen3-moe",
)


def run(model: str, batch: int = 8, length: int = 2048, **keys):
    flags = {"model": model, "per_device_train_batch_size": batch, "max_length": length, **keys}
    return load_config(flags=flags)


def estimate(config, *, on_gpu: bool = True, plan: ParallelPlan | None = None, **batch):
    size = Batch(config.per_device_train_batch_size, config.max_length, **batch)
    source = extend_source(config, resolve_model(config.model))
    return estimate_memory(config, source, size, on_gpu=on_gpu, plan=plan)


@pytest.fixture
def config_file(tmp_path):
    def write(values: dict) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def small(config_file) -> str:
    return config_file(SMALL)


class Alive(TorchDispatchMode):
    """The bytes of real storages that were made while it is the mode, and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu":
                self.add(x)
        return result

    def add(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = -(-storage.nbytes() // 512) * 512
            weakref.finalize(storage, self._sizes.pop, key, None)


def kept_by_real_tensors(config) -> int:
    """What a forward of the real model on the CPU leaves for backward."""
    source = extend_source(config, resolve_model(config.model))
    model = load_model(
        source,
        dtype=torch.float32,
        attn_implementation=config.attn_implementation,
    )
    if config.adapter != "none":
        model = attach_adapter(model, new_adapter(config, model, source.tokens), base="")
    apply_liger_kernel(model, config.ops, save_memory=config.save_memory)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    shape = (config.per_device_train_batch_size, config.max_length)
    ids = torch.randint(1, 200, shape, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(shape).long()}
    loss_of, alive = LossOf(model, torch.device("cpu")), Alive()
    for parameter in model.parameters():
        # They are there before, and views of them are no new memory.
        alive.add(parameter)
    before = alive.num_bytes
    with alive:
        loss = loss_of(model, inputs, ids.numel())
    assert loss.requires_grad
    return alive.num_bytes - before


def kept_by_estimate(config) -> int:
    found = estimate(config, on_gpu=False)
    return sum(found.activations.values()) + found.kept_for_loss


@pytest.mark.parametrize("ops", ["none", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_keeps_what_real_tensors_keep(family: str, ops: str) -> None:
    config = run(family, 2, 64, ops=ops, dtype="float32", use_cpu=True)
    assert kept_by_estimate(config) == pytest.approx(kept_by_real_tensors(config), rel=0.05)


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"save_memory": False}, id="keeps-all"),
        pytest.param({"adapter": "lora"}, id="lora"),
        pytest.param({"adapter": "lora", "add_tokens": "look"}, id="lora-new-token"),
        pytest.param({"attn_implementation": "eager"}, id="eager-attention"),
        pytest.param({"adapter": "lora", "gradient_checkpointing": True}, id="lora-checkpointing"),
    ],
)
@pytest.mark.parametrize("family", ["mistral", "gemma3-text", "qwen3-moe"])
@pytest.mark.parametrize("ops", ["none", "auto"])
def test_so_it_does_with_options(family: str, ops: str, keys: dict) -> None:
    if "adapter" in keys:
        pytest.importorskip("peft")
    config = run(family, 2, 64, ops=ops, dtype="float32", use_cpu=True, **keys)
    assert kept_by_estimate(config) == pytest.approx(kept_by_real_tensors(config), rel=0.05)


def test_eager_parts_by_hand(config_file) -> None:
    """2 x 5 tokens in bfloat16; blocks are of 512 bytes, so that everything tiny is one."""
    config = run(config_file(TINY | {"hidden_size": 256, "intermediate_size": 512}), 2, 64)
    eager = config.model_copy(update={"ops": "none"})
    found, patched = estimate(eager), estimate(config)
    tokens, width, inner = 2 * 64, 256, 512
    # A norm: an fp32 copy of the input, the normalised value, and the output; 5 norms, of which the
    # last one's output goes to the head. And a number a row.
    assert found.activations["norms"] == 5 * (tokens * width * (4 + 2 + 2) + tokens * 4)
    # gate, up, activation and product.
    assert found.activations["mlp"] == 2 * tokens * inner * 4 * 2
    assert patched.activations["mlp"] == 2 * tokens * inner * 2 * 2
    # q and the output are as wide as the model, keys and values half, and fp32 sums a head.
    assert found.activations["attention"] == 2 * tokens * (2 * width + 2 * width // 2) * 2 + (
        2 * tokens * 4 * 4
    )
    # In bfloat16, in fp32, and the fp32 probabilities: then only these, and two gradients.
    assert found.logits == pytest.approx(tokens * 100 * 4 * 3, rel=0.02)
    assert patched.logits < found.logits


def test_weights_moments_and_gradients(config_file) -> None:
    config = run(config_file(TINY), 1, 8)
    found = estimate(config)
    num_parameters = sum(
        p.numel() for p in meta_model_of(config, resolve_model(config.model)).parameters()
    )
    for size, factor in ((found.weights, 2), (found.gradients, 2), (found.optimizer, 4)):
        # A tensor takes a block of 512 bytes at least.
        assert size == pytest.approx(factor * num_parameters, abs=30 * 1024)


def test_optimizers_have_their_own_state(small) -> None:
    weights = estimate(run(small, batch=1, length=128)).weights

    def state(**keys) -> float:
        return estimate(run(small, batch=1, length=128, **keys)).optimizer / weights

    assert state() == pytest.approx(2, rel=0.01)
    assert state(optim="sgd") == 0
    assert state(optim="adamw_8bit") == pytest.approx(1, rel=0.02)
    assert state(optim="adafactor") < 0.01
    # Of the layers one moment, of the embedding two.
    assert state(optim="muon") == pytest.approx((121.6 + 2 * 262.7) / 384.3, rel=0.01)


def test_the_step_of_a_loop_over_lists_takes_a_copy_of_the_moments(small) -> None:
    fused, lists = (
        estimate(run(small, batch=1, length=128, optim=f"adamw_torch{kind}"))
        for kind in ("_fused", "")
    )
    assert lists.phases["optimizer"] - fused.phases["optimizer"] == pytest.approx(
        fused.weights, rel=0.01
    )


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("batch", [1, 16], ids=["few-chunks", "many-chunks"])
def test_head_sized_gradient_buffers_case_105(config_file, is_frozen: bool, batch: int) -> None:
    """H 4096, V 262144: as large as the head, in fp32 where many chunks are summed, or none."""
    config = run(config_file(WIDE_HEAD), batch, 1024)
    model = meta_model_of(config, resolve_model(config.model))
    model.get_output_embeddings().requires_grad_(not is_frozen)
    found = step_memory(config, model, Batch(batch, 1024))
    head = 262144 * 4096
    # Of the sum in fp32 there is one in bfloat16 as well when it is handed over.
    expected = 0 if is_frozen else head * 2 if batch == 1 else head * 4
    assert found.head_buffers == expected
    assert found.at_peak.get("head buffers", 0) + found.at_peak.get("gradients", 0) >= expected
    assert found.logits < 1.5 * 960 * MIB + batch * 1024 * 4096 * 2


def test_master_weights_and_autocast(small) -> None:
    half = estimate(run(small, batch=1, length=128))
    mixed = estimate(run(small, batch=1, length=128, bf16=True))
    # fp32 weights; the copies that autocast keeps are there from forward to backward.
    assert mixed.weights == pytest.approx(2 * half.weights, rel=0.01)
    assert mixed.activations["mlp"] - half.activations["mlp"] == pytest.approx(
        2 * 3 * 2048 * 8192 * 2, rel=0.05
    )
    master = estimate(run(small, batch=1, length=128, master_weights=True))
    assert master.optimizer == pytest.approx(6 * half.weights, rel=0.01)


def test_adapter_has_moments_for_what_is_trained_only(small) -> None:
    pytest.importorskip("peft")
    whole, few = estimate(run(small)), estimate(run(small, adapter="lora"))
    assert few.optimizer < 0.05 * whole.optimizer
    assert few.head_buffers == 0
    packed = estimate(run(small, adapter="lora", load_in_4bit=True))
    # All but embedding, norms and adapter is in 4 bits.
    assert few.weights - packed.weights == pytest.approx((2 - 0.516) * 2 * 60_817_408, rel=0.01)
    # The fused op keeps what it keeps beside weights of 16 bits; peft's own code would keep more.
    assert packed.activations == few.activations


def test_accumulation_has_gradients_beside_the_activations(small) -> None:
    once, more = estimate(run(small)), estimate(run(small, gradient_accumulation_steps=2))
    assert more.phases["forward"] - once.phases["forward"] == more.gradients


def test_gradient_checkpointing_keeps_inputs_of_layers(small) -> None:
    found = estimate(run(small, gradient_checkpointing=True))
    assert sum(found.activations.values()) == pytest.approx(3 * 8 * 2048 * 2048 * 2, rel=0.01)


def test_attention_by_implementation_and_mask(small) -> None:
    flash = estimate(run(small, batch=2)).activations["attention"]
    eager = estimate(run(small, batch=2, attn_implementation="eager")).activations["attention"]
    scores = 2 * 32 * 2048 * 2048
    # Probabilities in fp32 and in bfloat16; and keys and values of every head.
    assert eager - flash >= 2 * scores * 6
    for masked in ({"is_packed": True}, {"is_padded": True}):
        found = estimate(run(small, batch=2), **masked).activations["attention"]
        # A mask of 2 x 2048 x 2048 a layer, and keys and values of every head; no scores.
        assert flash < found < flash + 2 * scores


def test_float32_shares_no_keys_and_so_makes_scores(small) -> None:
    half, whole = (
        estimate(run(small, batch=2, length=1024, dtype=dtype)).activations["attention"]
        for dtype in ("bfloat16", "float32")
    )
    assert whole - 2 * half >= 2 * 2 * 32 * 1024 * 1024 * 4


def test_experts_keep_the_tokens_that_they_get() -> None:
    stock = estimate(run("qwen3-moe", 2, 64, ops="none")).activations
    found = estimate(run("qwen3-moe", 2, 64)).activations
    # 2 layers, 2 experts a token, 96 wide. Stock: at least gate and up, and the gathered input.
    gate_up, gathered = (2 * 2 * 128 * width * 2 for width in (2 * 96, 128))
    assert stock["experts"] >= gate_up + gathered
    # Ours: gate and up, the router, and where each row is.
    assert gate_up <= found["experts"] <= 1.15 * gate_up
    assert "mlp" not in found


def test_fully_sharded_devices_share_and_gather() -> None:
    alone, shared = (
        estimate(run("llama-3b", 1, 512)),
        estimate(run("llama-3b", 1, 512), plan=ParallelPlan(dp_shard=8)),
    )
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(shared, part) == pytest.approx(getattr(alone, part) / 8, rel=0.01)
    # The embedding stays whole; a layer is gathered while the next one is.
    assert shared.at_peak["gathered weights"] > 128256 * 3072 * 2
    assert alone.peak / 8 < shared.peak < alone.peak / 3


# Presets cut to a number of layers, and how far the estimate may be off.
BENCHES = {
    "llama-1b-h100": ("llama-1b", None, "eager", 0.05),
    "mixtral-8x7b-2-layers-h200": ("mixtral-8x7b", 2, "patched", 0.03),
    "qwen3-30b-a3b-6-layers-h200": ("qwen3-30b-a3b", 6, "patched", 0.03),
}


@pytest.mark.parametrize("name", BENCHES)
def test_measured_steps_of_a_bench(name: str, config_file) -> None:
    model, num_layers, arm, tolerance = BENCHES[name]
    report = json.loads((RESULTS / f"bench-{name}.json").read_text(encoding="utf-8"))
    [measured] = [a["peak_memory_bytes"] for a in report["arms"] if a["name"] == arm]
    if num_layers is not None:
        model = config_file({**resolve_model(model).config, "num_hidden_layers": num_layers})
    ops = {"ops": "none"} if arm == "eager" else {}
    assert estimate(run(model, **ops)).peak == pytest.approx(measured, rel=tolerance)


def test_a_model_that_cannot_be_followed_says_so(monkeypatch) -> None:
    def forward(self, *args, **kwargs):
        raise RuntimeError("needs values")

    config = run("qwen3", 1, 8, ops="none")
    model = meta_model_of(config, resolve_model("qwen3"))
    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError, match="qwen3 model cannot be estimated: RuntimeError: needs"):
        step_memory(config, model, Batch(1, 8))
    assert (
        torch.nn.functional.scaled_dot_product_attention.__module__
        != "liger_cli.training.memory.attention"
    )


def test_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    estimate(run("qwen3", 1, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("limit", [0, 7, 100, 1009, 10**9])
@pytest.mark.parametrize("start", [1, 8, 900])
def test_largest_size_that_fits(limit: int, start: int) -> None:
    calls = []

    def peak_of(size: int) -> int:
        calls.append(size)
        return 5 + size + size * size // 50

    expected = max((n for n in range(1, 1001) if 5 + n + n * n // 50 <= limit), default=None)
    assert largest_that_fits(peak_of, limit, start=start, most=1000) == expected
    assert len(calls) <= 20


def test_cards_by_name_and_by_size() -> None:
    assert find_card("h100-80gb") == CARDS["H100-80GB"] == find_card("H100-80GB")
    assert find_card("l4").name == "L4-24GB"
    assert find_card("24").usable == 24_000_000_000 - (3 << 29)
    assert find_card("24GB") == find_card("24")
    for text, match in (("a100", "more than one card"), ("h10-80gb", "did you mean H100-80GB")):
        with pytest.raises(ConfigError, match=match):
            find_card(text)
    with pytest.raises(ConfigError, match="needs more than"):
        find_card("0.5")


def test_command_shows_parts_room_and_remedies(liger, small) -> None:
    done = liger("estimate", "--model", small, "--seq-len", 2048, "--gpu", "12", "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert report["peak"] == sum(row["at_peak"] for row in report["parts"])
    assert report["card"]["free"] == report["card"]["usable"] - report["peak"] > 0
    assert report["remedies"] == []
    done = liger("estimate", "--model", small, "--seq-len", 2048, "--gpu", "6")
    assert done.code == 5
    assert "are missing" in done.out
    assert done.out.count(": predicted ") == 3


def test_command_fits_batch_and_sequence(liger, small) -> None:
    done = liger("estimate", "--model", small, "--gpu", "12", "--fit", "batch", "--json")
    assert done.code == 0, done.err
    report = done.json()
    fit = report["fit"]
    assert fit["key"] == "per_device_train_batch_size"
    assert report["peak"] <= report["card"]["usable"]
    larger = estimate(run(small, batch=fit["value"] + 1, length=1024))
    assert larger.peak > report["card"]["usable"]
    done = liger("estimate", "--model", small, "--gpu", "3", "--fit", "seq")
    assert done.code == 5
    assert "does not fit into 3 GB with max_length 64" in done.err
    assert liger("estimate", "--model", small, "--fit", "seq").code == 2


def test_no_part_is_more_at_the_peak_than_in_all(liger, small) -> None:
    words = ("--adapter", "lora", "--gradient-checkpointing", "--gpu", "24", "--json")
    found = liger("estimate", "--model", small, *words).json()
    assert all(part["at_peak"] <= part["size"] for part in found["parts"])
    assert any(part["at_peak"] for part in found["parts"])


@pytest.mark.parametrize(
    ("short", "key"),
    [("--batch-size", "per_device_train_batch_size"), ("--seq-len", "max_length")],
)
def test_a_size_given_twice_is_refused(liger, short, key) -> None:
    done = liger("estimate", "--model", "qwen3", short, 2, f"--{key.replace('_', '-')}", 64)
    assert done.code == 2
    assert f"{short} and {key} are the same; give one of them" in done.err


def test_torch_compile_is_said_to_be_left_out(liger) -> None:
    for words in ((), ("--torch-compile",)):
        done = liger("estimate", "--model", "qwen3", *words, "--json")
        assert done.code == 0, done.err
        assert ("torch_compile is not in the estimate" in done.err) == bool(words)


def test_a_short_flag_wins_over_a_file(liger, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: qwen3\nper_device_train_batch_size: 4\nmax_length: 128\n")
    words = ("--set", "max_length=256", "--batch-size", 2, "--seq-len", 64, "--json")
    done = liger("estimate", "-c", file, *words)
    assert done.code == 0, done.err
    assert (done.json()["batch_size"], done.json()["sequence_length"]) == (2, 64)


def test_a_pair_is_two_sequences(liger):
    words = ("estimate", "--model", "qwen3", "--max-length", 256, "--json", "--use-cpu")
    rows = liger(*words, "--per-device-train-batch-size", 8).json()
    pairs = liger(*words, "--per-device-train-batch-size", 4, "--objective", "orpo").json()
    assert (pairs["batch_size"], pairs["sequence_length"]) == (8, 256)
    assert rows["batch_size"] == 8
    packed = liger(*words, "--per-device-train-batch-size", 4, "--objective", "orpo", "--packing")
    assert (packed.json()["batch_size"], packed.json()["sequence_length"]) == (4, 512)
    # Labelled answers are one each, and scored by the same code.
    answers = liger(*words, "--per-device-train-batch-size", 8, "--objective", "kto").json()
    assert (answers["batch_size"], answers["sequence_length"]) == (8, 256)
    assert (answers["peak"], answers["parts"]) == (pairs["peak"], pairs["parts"])
    # What is said to fit is the key, of pairs.
    fitted = liger(*words[:-1], "--objective", "orpo", "--gpu", "L4", "--fit", "batch").json()
    assert fitted["batch_size"] == 2 * fitted["fit"]["value"]
