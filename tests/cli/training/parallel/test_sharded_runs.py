"""A sharded run: stopped and resumed on any number of ranks, killed in a save, read by commands."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from run_files import assert_same, metrics, names, stopped_copy, weights
from safetensors.torch import load_file
from sharded_runs import launch

from liger_cli.training.checkpoints.files import find_damage, read_manifest
from liger_cli.training.model.source import load_model, resolve_model

# What its fixtures run is run once, on one worker.
pytestmark = pytest.mark.xdist_group("sharded_runs")

BATCH = 8


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    found = [
        {"prompt": f"say {i} ", "completion": "word " * (1 + 3 * (i % 5) + i % 2)}
        for i in range(23)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def words_of(rows, run_dir, num_processes, *more):
    """Return the words of a run whose steps have the same rows on any number of ranks."""
    words = ("train", "-m", "qwen3", "-d", rows, "-o", run_dir, "--use-cpu", "--max-length", 64)
    words += ("--max-steps", 6, "--save-steps", 2, "--learning-rate", 1e-3)
    words += ("--lr-scheduler-type", "constant", "--per-device-train-batch-size", 2)
    return (*words, "--gradient-accumulation-steps", BATCH // 2 // num_processes, *more)


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """The unbroken run on two ranks."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert launch(2, *words_of(rows, run_dir, 2)) == [0, 0]
    return run_dir


def distance(checkpoint, other):
    some, others = weights(checkpoint), weights(other)
    assert some.keys() == others.keys()
    return max(float((some[name] - others[name]).abs().max()) for name in others)


def test_each_rank_writes_its_file_and_the_last_step_whole_ones(whole):
    assert names(whole) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for step in (2, 4, 6):
        path = whole / f"checkpoint-{step}"
        manifest = read_manifest(path)
        found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert found == {"manifest.json", *manifest["files"]}
        assert {"dcp/__0_0.distcp", "dcp/__1_0.distcp", "dcp/.metadata"} <= found
        assert {"config.json", "tokenizer.json", "rng-0.pt", "rng-1.pt"} <= found
        assert ("model.safetensors" in found) == (step == 6)
        assert manifest["num_processes"] == 2
        assert find_damage(path) is None


def test_case_93_on_the_same_ranks_a_resume_is_exact(rows, whole, tmp_path):
    again = stopped_copy(whole, tmp_path / "again", 2)
    assert launch(2, *words_of(rows, again, 2, "--resume", "auto")) == [0, 0]
    assert_same(whole, again)


def test_resume_on_2_1_4_2_ranks_ends_with_the_weights_of_the_unbroken_run(rows, whole, tmp_path):
    run = stopped_copy(whole, tmp_path / "run", 2)
    for steps, num_processes in ((3, 1), (4, 4), (6, 2)):
        more = ("--resume", "auto", "--max-steps", steps)
        codes = launch(num_processes, *words_of(rows, run, num_processes, *more))
        assert codes == [0] * num_processes
    counts = ("step", "tokens", "trained_tokens")
    assert metrics(run, *counts) == metrics(whole, *counts)
    assert distance(run / "checkpoint-6", whole / "checkpoint-6") <= 1e-6
    assert distance(run / "checkpoint-6", run / "checkpoint-3") >= 1e-3
    # One process writes what it always does.
    assert not (run / "checkpoint-3" / "dcp").exists()


@pytest.mark.parametrize("rank", [1, 0])
def test_kill_in_a_save_keeps_the_checkpoints_before(rows, whole, tmp_path, rank):
    run = tmp_path / "run"
    codes = launch(2, *words_of(rows, run, 2), faulty=(rank, "kill", 1))
    assert codes[rank] == -signal.SIGKILL
    # The other one ends too.
    assert codes[1 - rank] not in (None, 0)
    assert names(run) == ["checkpoint-2"]
    assert find_damage(run / "checkpoint-2") is None
    assert launch(2, *words_of(rows, run, 2, "--resume", "auto")) == [0, 0]
    assert_same(whole, run)
    assert not list(run.glob(".*"))


def test_full_disk_of_one_rank_is_the_same_error_on_all(rows, tmp_path):
    run = tmp_path / "run"
    words = words_of(rows, run, 2, "--save-consolidated", "every")
    codes = launch(2, *words, faulty=(1, "full", 1), logs=tmp_path)
    assert codes == [3, 3]
    said = [(tmp_path / f"rank-{rank}.json").read_text() for rank in (0, 1)]
    for text in said:
        assert f"{run / 'checkpoint-4'} cannot be written: process 1: [Errno 28]" in text
        assert "The earlier checkpoint-2 is as it was: --resume auto continues from it." in text
    assert names(run) == ["checkpoint-2"]
    assert find_damage(run / "checkpoint-2") is None
    assert weights(run / "checkpoint-2")
    assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    ("words", "whole_ones"),
    [
        (("--save-consolidated", "none"), []),
        # The first evaluation is the best: at the second the run ends, after it was saved.
        (("--eval-fraction", 0.2, "--eval-steps", 1, "--early-stopping-patience", 1), [2]),
    ],
    ids=["none", "early-end"],
)
def test_which_checkpoints_have_whole_files(rows, tmp_path, words, whole_ones):
    run = tmp_path / "run"
    more = ("--save-steps", 1, "--max-steps", 3, "--learning-rate", 10, *words)
    assert launch(2, *words_of(rows, run, 2, *more)) == [0, 0]
    steps = [
        int(path.parent.name.split("-")[1]) for path in run.glob("checkpoint-*/model.safetensors")
    ]
    assert steps == whole_ones
    assert len(names(run)) == (whole_ones or [3])[-1]
    assert all(find_damage(run / name) is None for name in names(run))


@pytest.fixture
def sharded(whole, tmp_path):
    """A checkpoint of shards alone, of another step than the last."""
    return stopped_copy(whole, tmp_path / "run", 4) / "checkpoint-4"


def test_commands_read_shards(rows, sharded, liger, tmp_path):
    merged = tmp_path / "merged"
    done = liger("merge", sharded.parent, "-o", merged, "--json")
    assert done.code == 0, done.err
    assert done.json()["num_files"] == 1
    words = ("--dataset", rows, "--use-cpu", "--max-length", 64, "--json")
    evals = [liger("eval", "--model", path, *words) for path in (sharded, merged)]
    assert [done.code for done in evals] == [0, 0], evals
    assert evals[0].json()["eval"] == evals[1].json()["eval"]
    said = [
        liger("generate", "--model", path, "--use-cpu", "--prompt", "say", "--max-new-tokens", 8)
        for path in (sharded, merged)
    ]
    assert [done.code for done in said] == [0, 0], said
    assert said[0].out == said[1].out
    assert liger("inspect", "--model", sharded).code == 0
    assert liger("compare", sharded.parent, sharded.parent).code == 0
    assert liger("verify", "--model", sharded, "--use-cpu").code == 0
    again = tmp_path / "again"
    done = liger(
        *("train", "--model", sharded, "--dataset", rows, "-o", again, "--use-cpu"),
        *("--max-steps", 1, "--max-length", 64, "--learning-rate", 0.0),
    )
    assert done.code == 0, done.err
    assert distance(again / "checkpoint-1", merged) == 0


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_harmed_shard_is_named(rows, sharded, liger, harm):
    shard = sharded / "dcp" / "__1_0.distcp"
    if harm == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:1000])
    said = find_damage(sharded)
    assert said.startswith("dcp/__1_0.distcp ")
    done = liger("generate", "--model", sharded, "--use-cpu", "--prompt", "say")
    assert done.code == 4
    assert f"{shard} cannot be read: " in done.err
    done = liger(
        *words_of(rows, sharded.parent, 1, "--resume", "auto", "--max-steps", 2, "--dry-run")
    )
    assert done.code == 0, done.err
    assert f"{sharded} is damaged: dcp/__1_0.distcp " in done.err


def test_resume_with_other_rows_names_the_keys_that_keep_them(rows, sharded, liger):
    words = words_of(rows, sharded.parent, 2, "--resume", "auto")
    done = liger(*words)
    assert done.code == 2
    assert "has 8 rows (2 a micro-batch, 2 micro-batches, 2 processes), and here " in done.err
    assert "would have 4 rows (2 a micro-batch, 2 micro-batches, 1 process)" in done.err
    assert "--gradient-accumulation-steps 4 keeps the rows of a step." in done.err
    done = liger(*words, "--gradient-accumulation-steps", 4, "--max-steps", 5)
    assert done.code == 0, done.err
    [line] = [line for line in done.err.splitlines() if line.startswith("resume: ")]
    assert "the number of processes is 1 (was 2): steps have the same rows, random" in line


def test_adapter_of_a_sharded_run_is_that_of_one_process(rows, tmp_path, liger):
    """accelerate #4206: peers save 1/N of it."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--adapter", "lora", "--max-steps", 2, "--save-steps", 1)
    assert launch(1, *words_of(rows, one, 1, *more)) == [0]
    assert launch(2, *words_of(rows, two, 2, *more)) == [0, 0]
    for step in (1, 2):
        assert distance(two / f"checkpoint-{step}", one / f"checkpoint-{step}") <= 1e-6
    settings = [
        json.loads((run / "checkpoint-1" / "adapter_config.json").read_text()) for run in (one, two)
    ]
    assert all(settings[0][key] == settings[1][key] for key in settings[0] if "base" not in key)
    # The shards hold the adapter alone.
    shard = torch.load(two / "checkpoint-1" / "dcp" / "optimizer.pt", weights_only=True)
    assert all("lora_" in name for group in shard[0]["param_groups"] for name in group["params"])
    shutil.rmtree(two / "checkpoint-2")
    done = liger(*words_of(rows, two, 1, *more, "--resume", "auto"))
    assert done.code == 0, done.err
    assert distance(two / "checkpoint-2", one / "checkpoint-2") <= 1e-6
    done = liger("merge", two, "-o", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    assert done.json()["num_merged"] > 0
    assert load_file(tmp_path / "merged" / "model.safetensors")


def test_dpo_finds_its_first_weights_again(tmp_path):
    """They are loaded once more as shards, from the model that the run started from."""
    pairs, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    row = {"prompt": "say ", "chosen": "yes " * 3, "rejected": "no " * 2}
    pairs.write_text("".join(json.dumps({**row, "chosen": f"yes {i}"}) + "\n" for i in range(9)))
    more = ("--objective", "dpo", "--reference", "model", "--max-steps", 3, "--save-steps", 1)
    assert launch(2, *words_of(pairs, run, 2, *more)) == [0, 0]
    [first, second, _] = metrics(run, "rewards/margins")
    assert first == (0.0,) != second
    again = stopped_copy(run, tmp_path / "again", 1)
    assert launch(2, *words_of(pairs, again, 2, *more, "--resume", "auto")) == [0, 0]
    assert metrics(again, "rewards/margins") == metrics(run, "rewards/margins")
    assert_same(run, again)


@pytest.mark.gpu
def test_two_gpus_write_what_one_resumes(rows, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def words(run_dir, num_processes, *more):
        found = words_of(rows, run_dir, num_processes, "--dtype", "float32", *more)
        return [word for word in found if word != "--use-cpu"]

    run = tmp_path / "run"
    assert launch(2, *words(run, 2)) == [0, 0]
    one, two = (stopped_copy(run, tmp_path / name, 4) for name in ("one", "two"))
    assert launch(2, *words(two, 2, "--resume", "auto")) == [0, 0]
    assert launch(1, *words(one, 1, "--resume", "auto")) == [0]
    wanted, before = (weights(run / "checkpoint-6"), load_shards(run / "checkpoint-4"))
    for other in (one, two):
        found = weights(other / "checkpoint-6")
        for name, value in wanted.items():
            moved = (value - before[name]).abs().mean()
            assert (found[name] - value).abs().mean() <= 0.01 * moved, name


def load_shards(checkpoint):
    return load_model(resolve_model(str(checkpoint)), dtype=torch.float32).state_dict()
