"""Packing: rows are filled, documents are kept apart, and the loss is that of the documents."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from liger_cli.data.batches import count_labels, count_tokens
from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.packing import (
    PackedRows,
    check_packed,
    join_rows,
    pack,
    refuse_packing,
    row_lengths,
)
from liger_cli.errors import ConfigError
from liger_cli.training.forward import LossOf
from liger_cli.training.model.source import build_meta_model, load_model, resolve_model
from liger_cli.training.model.tokenizers import byte_tokenizer
from liger_kernels.transformers.api import apply_liger_kernel

# Full and sliding attention, capped scores, norms of queries, experts, chunked attention.
PRESETS = ("mistral", "qwen3", "gemma3-text", "mixtral", "olmo2", "llama4-text")
LENGTHS = (23, 9, 31, 6, 17, 12)


def build(preset: str, attention: str | None = None):
    source = resolve_model(preset)
    return load_model(source, dtype=torch.float32, seed=3, attn_implementation=attention)


def documents(vocab_size: int = 200, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        labels = [IGNORED, *ids[1:]]
        labels[2:4] = [IGNORED] * 2
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def packed_batch(rows: list[dict], **options) -> dict[str, torch.Tensor]:
    packs = pack([len(row["input_ids"]) for row in rows], 48)
    return Collator(0, **options)([join_rows([rows[i] for i in one]) for one in packs])


# How rows are filled.


@pytest.mark.parametrize("strategy", ["bfd", "sequential"])
def test_every_document_is_in_one_row(strategy):
    generator = random.Random(0)
    for max_length in (1, 7, 64, 500):
        lengths = [generator.randint(1, max_length) for _ in range(generator.randint(1, 300))]
        rows = pack(lengths, max_length, strategy)
        assert Counter(i for row in rows for i in row) == Counter(range(len(lengths)))
        assert max(sum(lengths[i] for i in row) for row in rows) <= max_length
        assert rows == pack(lengths, max_length, strategy)
        if strategy == "sequential":
            assert [i for row in rows for i in row] == list(range(len(lengths)))
        else:
            assert len(rows) <= len(pack(lengths, max_length, "sequential"))


def test_best_fit_fills_rows():
    lengths = [3, 3, 3, 5, 5, 5]
    assert pack(lengths, 8) == [[3, 2], [4, 1], [5, 0]]
    assert pack(lengths, 8, "sequential") == [[0, 1], [2, 3], [4], [5]]
    # 4 goes where it leaves nothing, although the row of 5 has space for it too.
    assert pack([5, 6, 4, 3], 10) == [[1, 2], [0, 3]]


def test_packed_rows_of_a_dataset(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": "ab" * n}) + "\n" for n in (9, 3, 5, 12, 1)))
    rows = load_examples(str(path), byte_tokenizer(), RowOptions(26, 264)).examples
    assert row_lengths(rows).tolist() == [19, 7, 11, 25, 3]
    packed = PackedRows.of(rows, 26, "bfd")
    assert [len(packed[i]["input_ids"]) for i in range(len(packed))] == [25, 26, 14]
    first, second = rows[0], rows[1]
    assert packed[1] == {
        "input_ids": first["input_ids"] + second["input_ids"],
        "labels": first["labels"] + second["labels"],
        "position_ids": [*range(19), *range(7)],
    }
    # A selection has an order of its own, in which lengths are looked up.
    assert row_lengths(rows.select([3, 1])).tolist() == [25, 7]


def test_first_token_of_a_document_has_no_target_case_101():
    rows = documents()
    packed = join_rows(rows)
    starts = [i for i, position in enumerate(packed["position_ids"]) if position == 0]
    assert starts == [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    assert all(packed["labels"][start] == IGNORED for start in starts)


# What the model makes of them.


@pytest.mark.parametrize(
    ("preset", "attention"),
    [*((preset, kind) for preset in PRESETS for kind in ("sdpa", "eager")), ("gemma2", "eager")],
)
def test_documents_do_not_see_each_other_case_101(preset, attention):
    """Another document 1 leaves the logits of document 2 as they are, and they are its own."""
    model = build(preset, attention).eval()
    rows = documents()
    batch = Collator(0)([join_rows(rows[:3]), join_rows(rows[3:])])
    assert batch["position_ids"].shape == (2, sum(LENGTHS[:3]))
    inputs = {"position_ids": batch["position_ids"], "use_cache": False}
    first, second = slice(0, LENGTHS[0]), slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    changed = batch["input_ids"].clone()
    changed[0, first] = (changed[0, first] + 7) % 100 + 3
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], **inputs).logits[0]
        moved = model(input_ids=changed, **inputs).logits[0]
        alone = model(input_ids=batch["input_ids"][:1, second], use_cache=False).logits[0]
    assert not torch.allclose(moved[first], logits[first], atol=1e-3)
    # Experts see the tokens in another order, in which sums may round differently.
    torch.testing.assert_close(moved[second], logits[second], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits[second], alone, rtol=1e-4, atol=1e-5)
    check_packed(model)
    check_packed(model, flatten=True)


@pytest.mark.parametrize("ops", ["none", "all"])
@pytest.mark.parametrize("flatten", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("preset", ["mistral", "gemma2", "qwen3"])
def test_packed_loss_and_gradients_are_those_of_the_documents_case_101(preset, flatten, ops):
    rows = documents()
    separate, packed = Collator(0)(rows), packed_batch(rows, flatten=flatten)
    assert count_labels(packed) == count_labels(separate) > 0
    assert count_tokens(packed) == count_tokens(separate) == sum(LENGTHS)
    found = []
    for batch in (separate, packed):
        model = build(preset)
        apply_liger_kernel(model, ops)
        loss = LossOf(model, torch.device("cpu"))(model, batch, count_labels(batch))
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-6)


def test_flat_batch_has_no_padding():
    rows = documents()
    batch = packed_batch(rows, flatten=True)
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    assert (batch["position_ids"] == 0).sum() == len(LENGTHS)


def test_padding_of_a_packed_row_is_a_document_of_its_own_case_98():
    batch = Collator(5, 8)([join_rows(documents()[:2])])
    assert batch["input_ids"].shape == (1, 32)
    assert batch["position_ids"][0].tolist() == [*range(23), *range(9)]
    batch = Collator(5, 8)([join_rows(documents()[1:2])])
    assert batch["position_ids"][0].tolist() == [*range(9), *range(7)]
    assert (batch["labels"][0, 9:] == IGNORED).all()
    assert count_tokens(batch) == 9


# Models that cannot.


def test_three_dimensional_positions_are_refused_case_102():
    model = build_meta_model(resolve_model("qwen2-vl"))
    with pytest.raises(ConfigError, match="qwen2_vl cannot .* positions have three dimensions"):
        refuse_packing(model, 64)
    # Unpacked rows carry no positions, so nothing can take three dimensions for documents.
    assert "position_ids" not in Collator(0)(documents())


def test_recurrent_models_are_refused():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}
    config = transformers.MambaConfig(**sizes, state_size=4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="mamba cannot .* state from token to token"):
        refuse_packing(model, 64)


def test_models_without_positions_are_refused():
    config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="bloom cannot .* takes no position_ids"):
        refuse_packing(model, 64)


def test_chunks_that_are_counted_from_the_start_of_a_row_are_refused(monkeypatch):
    model = build_meta_model(resolve_model("llama4-text"))
    chunk = model.config.attention_chunk_size
    name = "remap_positions_for_packed_sequence"
    monkeypatch.delattr(transformers.masking_utils, name, raising=False)
    refuse_packing(model, chunk)
    with pytest.raises(ConfigError, match=f"chunks of {chunk} tokens from the start of a row"):
        refuse_packing(model, chunk + 1)


def test_a_model_that_mixes_documents_is_refused_when_it_is_asked():
    model = build("mistral")
    forward = model.model.forward
    # A mask that somebody makes without looking at positions.
    model.model.forward = lambda **inputs: forward(
        **{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    )
    with pytest.raises(ConfigError, match="'sdpa' a document in a row sees the one before it"):
        check_packed(model)
    model.model.forward = lambda **inputs: forward(
        **{**inputs, "position_ids": inputs["position_ids"] * 9}
        if inputs.get("position_ids") is not None
        else inputs
    )
    with pytest.raises(ConfigError, match="logits differ from those of the documents one by one"):
        check_packed(model)
    assert not model.model.embed_tokens._forward_hooks


# Runs.


def losses(run_dir: Path) -> list[tuple]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "loss", "grad_norm", "tokens", "trained_tokens")
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


def test_train_packed(train, run_dir, tmp_path):
    """One step over all rows is the same step, packed or not; padding is gone."""
    words = ("--max-steps", 1, "--per-device-train-batch-size", 23, "--max-length", 128)
    plain = train(*words, "--output-dir", tmp_path / "plain", "--json")
    done = train(*words, "--packing", "--json", "--eval-dataset", tmp_path / "data.jsonl")
    assert done.code == plain.code == 0, done.err
    assert "packed into" in done.err
    assert losses(run_dir) == [pytest.approx(row, rel=1e-4) for row in losses(tmp_path / "plain")]
    assert done.json()["data"] == {**plain.json()["data"], "eval_rows": 23}


@pytest.mark.parametrize("strategy", ["bfd", "sequential"])
def test_case_93_packed_run_resumes_exactly(train, run_dir, tmp_path, strategy):
    words = ("--packing", "--packing-strategy", strategy, "--max-length", 96, "--save-steps", 2)
    words += ("--per-device-train-batch-size", 2, "--max-steps", 9, "--learning-rate", 1e-3)
    assert train(*words).code == 0
    stopped = tmp_path / "stopped"
    shutil.copytree(run_dir, stopped)
    for step in (6, 8, 9):
        shutil.rmtree(stopped / f"checkpoint-{step}")
    done = train(*words, "--output-dir", stopped, "--resume", "auto")
    assert done.code == 0, done.err
    assert losses(stopped) == losses(run_dir)
    done = train("--output-dir", stopped, "--resume", "auto", "--max-length", 96)
    assert done.code == 2
    assert "is False, but" in done.err


def test_train_refuses_what_cannot_be_packed(train):
    done = train("--model", "qwen2-vl", "--packing")
    assert done.code == 2
    assert "qwen2_vl cannot train on packed rows" in done.err
