"""Rows laid end to end instead of padded: the same steps, losses and gradients, without padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from document_rows import use_kernel

from liger_cli.config import load_config
from liger_cli.data.batches import count_labels, count_tokens, placeholder
from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED
from liger_cli.data.packing import document_lengths
from liger_cli.data.padding import packed_share, padding_share
from liger_cli.errors import ConfigError
from liger_cli.training.attention import Rows, plan_attention
from liger_cli.training.checkpoints.files import read_manifest, write_manifest
from liger_cli.training.forward import LossOf
from liger_cli.training.model.source import build_meta_model, load_model, resolve_model
from liger_kernels.transformers.attention.interface import LIGER_VARLEN

PRESETS = ("mistral", "qwen3", "gemma3-text", "mixtral", "olmo2", "llama4-text", "gemma2")
LENGTHS = (23, 9, 1, 31, 6, 17)
CPU = torch.device("cpu")
FREE = {"flatten": True, "padding_free": True}


def documents(vocab_size: int = 200) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    return rows


# Batches.


def test_batch_is_one_row_that_says_where_documents_begin():
    rows = documents()
    padded, free = Collator(0)(rows), Collator(0, **FREE, has_lengths=True)(rows)
    assert free["input_ids"].shape == (1, sum(LENGTHS))
    assert "attention_mask" not in free
    assert count_tokens(free) == count_tokens(padded) == sum(LENGTHS)
    assert count_labels(free) == count_labels(padded)
    ends = [0, *np.cumsum(LENGTHS).tolist()]
    assert free["cu_seq_lens_q"].tolist() == free["cu_seq_lens_k"].tolist() == ends
    assert free["cu_seq_lens_q"].dtype == torch.int32
    assert free["max_length_q"] == free["max_length_k"] == 31
    assert type(free["max_length_q"]) is int
    assert free["position_ids"][0, :25].tolist() == [*range(23), 0, 1]


def test_packed_rows_and_padding_are_documents_too():
    from liger_cli.data.packing import join_rows

    rows = documents()
    packed = [join_rows(rows[:2]), join_rows(rows[2:])]
    batch = Collator(0, 16, **FREE, has_lengths=True)(packed)
    assert batch["input_ids"].shape == (1, 96)
    # 87 tokens, and 9 of padding, which nothing sees and which has no label.
    assert batch["cu_seq_lens_q"].tolist() == [0, 23, 32, 33, 64, 70, 87, 96]
    assert count_tokens(batch) == 87
    assert (batch["labels"][0, 87:] == IGNORED).all()


def test_row_in_place_of_none_counts_nothing():
    batch = Collator(0, **FREE, has_lengths=True)([placeholder(documents()[0])])
    assert count_tokens(batch) == count_labels(batch) == 0
    assert batch["cu_seq_lens_q"].tolist() == [0, 2]


def test_a_hundred_thousand_documents_in_a_row():
    count = 100_000
    lengths = document_lengths(torch.zeros(1, count, dtype=torch.int64))
    assert torch.equal(lengths["cu_seq_lens_q"], torch.arange(count + 1, dtype=torch.int32))
    assert lengths["max_length_q"] == 1


@pytest.mark.parametrize("attention", [None, LIGER_VARLEN, "varlen"])
@pytest.mark.parametrize("preset", PRESETS)
def test_case_101_loss_and_gradients_are_those_of_padded_rows(monkeypatch, preset, attention):
    """In float32 on a CPU: by the mask of transformers, by that of liger_varlen, by a kernel."""
    if attention == "varlen":
        if preset in ("gemma2", "llama4-text"):
            pytest.skip("varlen does not serve these")
        use_kernel(monkeypatch)
        attention = LIGER_VARLEN
    source = resolve_model(preset)
    has_lengths = attention is not None
    found = []
    for layout in ({}, {**FREE, "has_lengths": has_lengths}):
        batch = Collator(0, **layout)(documents())
        chosen = attention if layout else None
        model = load_model(source, dtype=torch.float32, seed=3, attn_implementation=chosen)
        loss = LossOf(model, CPU)(model.train(), batch, count_labels(batch))
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert abs(found[1][0] - found[0][0]) <= 1e-6 * abs(found[0][0])


# What is chosen.


def plan(rows: Rows, preset: str = "qwen3", **keys):
    config = load_config(flags={"model": preset, **keys})
    model = build_meta_model(resolve_model(preset))
    return plan_attention(config, model, rows, CPU, torch.float32)


@pytest.mark.parametrize(
    ("keys", "rows", "wanted"),
    [
        ({}, Rows(False, padding=0.5), (LIGER_VARLEN, True, True)),
        # Nothing to gain: rows of one length.
        ({}, Rows(False, padding=0.0), (None, False, False)),
        # A stream's rows are not known.
        ({}, Rows(False, padding=None), (LIGER_VARLEN, True, True)),
        ({}, Rows(True), (LIGER_VARLEN, True, True)),
        ({}, Rows(False, has_images=True), (None, False, False)),
        ({"padding_free": "false"}, Rows(False, padding=0.5), (None, False, False)),
        ({"padding_free": "false"}, Rows(True), (LIGER_VARLEN, False, True)),
        ({"padding_free": "true"}, Rows(False, padding=0.0), (LIGER_VARLEN, True, True)),
        # A name that the user gives is kept.
        ({"attn_implementation": "sdpa"}, Rows(False, padding=0.5), ("sdpa", False, False)),
        ({"attn_implementation": "sdpa"}, Rows(True), ("sdpa", False, False)),
        (
            {"attn_implementation": "sdpa", "padding_free": "true"},
            Rows(False),
            ("sdpa", True, False),
        ),
        ({"attn_implementation": "eager"}, Rows(True), ("eager", False, False)),
    ],
)
def test_choice_where_varlen_serves(monkeypatch, keys, rows, wanted):
    use_kernel(monkeypatch)
    found = plan(rows, **keys)
    assert (found.implementation, found.padding_free, found.has_lengths) == wanted


@pytest.mark.parametrize(
    ("keys", "rows", "wanted"),
    [
        ({}, Rows(False, padding=0.5), (None, False, False)),
        ({}, Rows(True), (None, False, False)),
        ({"padding_free": "true"}, Rows(False, padding=0.5), (None, True, False)),
        ({"attn_implementation": LIGER_VARLEN}, Rows(True), (LIGER_VARLEN, False, False)),
        (
            {"attn_implementation": LIGER_VARLEN, "padding_free": "true"},
            Rows(False),
            (LIGER_VARLEN, True, False),
        ),
    ],
)
def test_choice_on_a_cpu(keys, rows, wanted):
    found = plan(rows, **keys)
    assert (found.implementation, found.padding_free, found.has_lengths) == wanted
    if rows.is_packed and not keys:
        assert "needs a CUDA GPU, and this is cpu" in found.lines()[0]


def test_flash_attention_gets_lengths_and_one_row():
    found = plan(Rows(True), attn_implementation="flash_attention_2")
    assert found.layout == {"flatten": True, "padding_free": False, "has_lengths": True}
    assert found.lines() == ["attention: flash_attention_2"]


def test_models_that_mix_documents_are_padded_or_refused(monkeypatch):
    use_kernel(monkeypatch)
    assert not plan(Rows(False, padding=0.5), "qwen2-vl").padding_free
    with pytest.raises(ConfigError, match="padding_free: qwen2_vl .* positions have three dim"):
        plan(Rows(False, padding=0.5), "qwen2-vl", padding_free="true")


def test_share_of_padding_is_that_of_the_batches():
    lengths = np.asarray([4, 2, 2, 4, 1])
    assert padding_share(lengths, 2, None) == pytest.approx(1 - 13 / (8 + 8 + 1))
    assert padding_share(lengths, 8, 5) == pytest.approx(1 - 13 / 20)
    assert padding_share(lengths, 1, 5) == 0
    assert packed_share(lengths, 8, "bfd") == (2, pytest.approx(1 - 13 / 16))


# Runs.


def steps(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    keys = ("loss", "grad_norm", "tokens", "trained_tokens")
    return [{key: json.loads(line)[key] for key in keys} for line in lines]


def assert_equal_steps(one: Path, other: Path) -> None:
    assert len(steps(one)) == len(steps(other)) > 0
    for a, b in zip(steps(one), steps(other), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


ACCUMULATED = ("--gradient-accumulation-steps", 2, "--learning-rate", 1e-3)


@pytest.mark.parametrize(
    "more",
    [
        ACCUMULATED,
        ("--adapter", "lora", "--gradient-checkpointing"),
        ("--packing", *ACCUMULATED),
        ("--packing", "--adapter", "dora", "--gradient-checkpointing"),
        ("--packing", "--streaming", "--eval-steps", 2),
        ("--streaming",),
    ],
    ids=["accumulation", "lora", "packed", "packed-dora", "packed-stream", "stream"],
)
def test_runs_by_a_kernel_have_the_steps_of_runs_by_a_mask(
    monkeypatch, train, run_dir, tmp_path, data, more
):
    """What a GPU does by default, with a kernel in the place of torch's."""
    words = (*more, "--eval-dataset", data, "--json")
    plain = train(*words, "--output-dir", tmp_path / "plain", "--no-padding-free")
    use_kernel(monkeypatch)
    done = train(*words)
    assert done.code == plain.code == 0, done.err + plain.err
    assert_equal_steps(run_dir, tmp_path / "plain")
    found = done.json()
    assert "attention: full_attention (2 layers) by varlen" in done.err
    assert found["attention"]["implementation"] == LIGER_VARLEN
    assert found["attention"]["padding_free"]
    assert [layer["backend"] for layer in found["attention"]["layers"]] == ["varlen"]
    for name in ("loss", "token_accuracy", "entropy", "tokens"):
        assert found["eval"][name] == pytest.approx(plain.json()["eval"][name], rel=1e-4)
    assert found["data"] == plain.json()["data"]
    # A wish of the user stays what it was.
    assert "attn_implementation: null" in (run_dir / "config.yaml").read_text()


def test_true_works_on_a_cpu_by_the_mask(train, run_dir, tmp_path, data):
    words = ("--eval-dataset", data, "--json")
    plain = train(*words, "--output-dir", tmp_path / "plain")
    assert "attention" not in plain.json()
    done = train(*words, "--padding-free")
    assert done.code == 0, done.err
    assert_equal_steps(run_dir, tmp_path / "plain")
    assert done.json()["attention"]["padding_free"]
    assert done.json()["attention"]["reason"].startswith("varlen: it needs a CUDA GPU")
    assert done.json()["eval"]["loss"] == pytest.approx(plain.json()["eval"]["loss"], rel=1e-5)


def test_a_model_that_fails_the_check_is_padded(monkeypatch, train, run_dir, tmp_path):
    from liger_cli.training import document_check

    def fails(model, **layout):
        raise ConfigError("it mixes them")

    assert train("--output-dir", tmp_path / "plain").code == 0
    use_kernel(monkeypatch)
    monkeypatch.setattr(document_check, "check_packed", fails)
    done = train("--json")
    assert done.code == 0, done.err
    assert "padding_free is off: it mixes them" in done.err
    assert "attention" not in done.json()
    assert_equal_steps(run_dir, tmp_path / "plain")
    refused = train("--padding-free", "--output-dir", tmp_path / "refused")
    assert refused.code == 2
    assert "it mixes them" in refused.err


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ((), "auto"),
        (("--padding-free",), "true"),
        (("--padding_free", "--bf16"), "true"),
        (("--padding-free", "auto"), "auto"),
        (("--padding-free=false",), "false"),
        (("--no-padding-free",), "false"),
        (("--set", "padding_free=false"), "false"),
        (("--set", "padding_free=maybe"), None),
        (("--padding-free=maybe",), None),
    ],
)
def test_spellings(liger, words, value):
    done = liger("config", "show", "--model", "qwen3", *words, "--json")
    if value is None:
        assert done.code == 2
        assert "should be 'auto', 'true' or 'false', got 'maybe'" in done.err
    else:
        assert done.code == 0, done.err
        assert done.json()["keys"]["padding_free"]["value"] == value


def test_checkpoint_from_before_the_key_resumes_padded(monkeypatch, train, run_dir):
    use_kernel(monkeypatch)
    words = ("--save-steps", 1, "--max-steps")
    assert train(*words, 1).code == 0
    checkpoint = run_dir / "checkpoint-1"
    manifest = read_manifest(checkpoint)
    assert manifest["config"].pop("padding_free") == "auto"
    del manifest["files"]
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, manifest)
    done = train(*words, 2, "--resume", "auto", "--json")
    assert done.code == 0, done.err
    assert done.json()["config"]["padding_free"] == "false"
    assert "attention" not in done.json()
    assert "padding_free is" not in done.err, "it did not change"
    asked = train(*words, 3, "--resume", "auto", "--padding-free", "--json")
    assert asked.code == 0, asked.err
    assert "padding_free is 'true' (was 'false')" in asked.err


@pytest.mark.parametrize("strategy", ["bfd", "sequential"])
def test_packed_evaluation_has_the_same_figures(liger, data, strategy):
    words = ("eval", "--model", "qwen3", "--dataset", data, "--use-cpu", "--max-length", 96)
    plain = liger(*words, "--json")
    done = liger(*words, "--packing", "--packing-strategy", strategy, "--json")
    assert done.code == plain.code == 0, done.err
    assert done.json()["data"] == plain.json()["data"]
    for name, value in plain.json()["eval"].items():
        assert done.json()["eval"][name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "model", "code", "message"),
    [
        ("flash_attention_2", "qwen3", 3, "the full_attention layers of qwen3: it needs a CUDA"),
        ("flex_attention", "qwen3", 3, "the full_attention layers of qwen3: it has no backward"),
        ("sdpa", "gemma2", 2, "the sliding_attention layers of gemma2: it does not cap scores"),
    ],
)
def test_attention_that_cannot_serve_is_refused(train, run_dir, name, model, code, message):
    done = train("--model", model, "--attn-implementation", name)
    assert done.code == code
    assert f"attn_implementation {name} cannot compute {message}" in done.err
    assert "These can: liger_varlen" in done.err
    assert not run_dir.exists()


# Advice.


def test_first_lines_say_what_padding_costs(train, monkeypatch):
    """23 rows of 13 to 76 tokens, cut at 64."""
    done = train("--dry-run")
    assert done.code == 0, done.err
    [line] = [x for x in done.err.splitlines() if x.startswith("padding: ")]
    share, times = (float(word.strip("%")) for word in (line.split()[1], line.split()[11]))
    assert line.startswith(f"padding: {share:.0f}% of the tokens of a batch; --packing would feed ")
    assert share > 10
    assert times > 1.0
    packed = train("--dry-run", "--packing")
    assert f"padded one by one it would be {share:.0f}% of the tokens of a batch" in packed.err
    assert "attention: that of the model, with a mask of documents; varlen: it needs" in packed.err
    use_kernel(monkeypatch)
    free = train("--dry-run", "--json")
    assert f"rows are laid end to end; padded it would be {share:.0f}%" in free.err
    assert "attention: full_attention (2 layers) by varlen" in free.err
    assert free.json()["first_batch"]["padding"] == 0
    assert free.json()["first_batch"]["shapes"][0][0] == 1


def test_preview_says_what_packing_brings(liger, data):
    done = liger("data", "preview", "--model", "qwen3", "--dataset", data, "-n", 0)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("padding: ")
    assert "--packing feeds" in done.out.splitlines()[-1]


def test_packing_that_brings_little_is_not_advised(train, liger, tmp_path):
    """Rows of 40 to 60 tokens: no two of them are together in a row of 64."""
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f'{{"text": "{"a" * (40 + i)}"}}\n' for i in range(20)))
    done = train("--dataset", path, "--dry-run")
    assert done.code == 0, done.err
    [line] = [x for x in done.err.splitlines() if x.startswith("padding: ")]
    assert "--packing" not in line
    assert line.endswith("; --padding-free would feed none")
    words = ("--model", "qwen3", "--dataset", path, "--max-length", 64, "-n", 0)
    shown = liger("data", "preview", *words)
    assert shown.out.splitlines()[-1].endswith("; packing would not make it much less")


# Reports.


def test_report_names_the_backends(monkeypatch, liger, train, run_dir, tmp_path):
    use_kernel(monkeypatch)
    assert train("--packing", "--max-steps", 1).code == 0
    page, text = tmp_path / "report.html", tmp_path / "report.md"
    done = liger("report", run_dir, "--html", page, "--markdown", text)
    assert done.code == 0, done.err
    assert "(2 layers): varlen" in text.read_text()
    assert "attention, full_attention (2 layers)" in page.read_text()


# On a GPU: the kernel itself.


@pytest.mark.gpu
@pytest.mark.parametrize("more", [(), ("--packing",), ("--packing", "--adapter", "lora")])
def test_gpu_runs_have_the_losses_of_the_mask(liger, data, tmp_path, more):
    words = ["train", "--model", "qwen3", "--dataset", data, "--max-steps", 4, "--max-length", 64]
    words += ["--per-device-train-batch-size", 4, "--eval-dataset", data, "--json", *more]
    masked = ("--no-padding-free", "--attn-implementation", "sdpa")
    plain = liger(*words, *masked, "--output-dir", tmp_path / "plain")
    done = liger(*words, "--output-dir", tmp_path / "run")
    assert done.code == plain.code == 0, done.err + plain.err
    assert "attention: full_attention (2 layers) by varlen" in done.err
    assert done.json()["attention"]["padding_free"]
    for a, b in zip(steps(tmp_path / "run"), steps(tmp_path / "plain"), strict=True):
        assert a["trained_tokens"] == b["trained_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
    loss = plain.json()["eval"]["loss"]
    assert done.json()["eval"]["loss"] == pytest.approx(loss, rel=5e-3)
