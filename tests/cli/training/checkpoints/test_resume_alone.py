"""--resume PATH needs no other flag: the keys are those of the run."""

from __future__ import annotations

import shutil

import pytest
from run_files import assert_same, stopped_copy

from liger_cli.config import load_config

STEPS = ("--max-steps", 4, "--save-steps", 2, "--learning-rate", 1e-3, "--lora-r", 4)
STEPS += ("--adapter", "lora", "--lora-dropout", 0.2, "--seed", 5)


@pytest.fixture
def finished(train, run_dir):
    done = train(*STEPS)
    assert done.code == 0, done.err
    return run_dir


@pytest.mark.parametrize("names", ["run", "checkpoint"])
def test_a_stopped_run_continues_by_its_path_alone(liger, finished, tmp_path, names):
    stopped = stopped_copy(finished, tmp_path / "moved", 2)
    done = liger("train", "--resume", stopped if names == "run" else stopped / "checkpoint-2")
    assert done.code == 0, done.err
    assert_same(finished, stopped)
    # output_dir of its config.yaml is where it was before it was moved.
    assert load_config(stopped / "config.yaml").output_dir == stopped


def test_max_steps_alone_lengthens_it(liger, train, finished, tmp_path):
    longer = tmp_path / "longer"
    shutil.copytree(finished, longer, symlinks=True)
    done = liger("train", "--resume", longer, "--max-steps", 6)
    assert done.code == 0, done.err
    assert "max_steps is 6 (was 4)" in done.err
    assert (longer / "checkpoint-6").is_dir()


def test_flags_win_and_are_checked(liger, finished, tmp_path):
    done = liger("train", "--resume", finished, "--learning-rate", 0.5)
    assert done.code == 2
    assert "learning_rate is 0.5, but" in done.err


def test_a_file_of_keys_stands_in_place_of_the_runs(liger, finished, tmp_path):
    file = tmp_path / "other.yaml"
    file.write_text("seed: 5\n")
    done = liger("train", "--resume", finished, "-c", file)
    assert done.code == 2
    assert "model is missing" in done.err


@pytest.mark.parametrize("path", ["nowhere", "nowhere/checkpoint-2"])
def test_a_path_that_is_not_there(liger, tmp_path, path):
    done = liger("train", "--resume", tmp_path / path)
    assert done.code == 2
    assert "there is no checkpoint of this name" in done.err


def test_a_file_beside_the_run_is_not_its_own(liger, finished):
    (finished / "config.yaml").rename(finished.parent / "config.yaml")
    done = liger("train", "--resume", finished)
    assert done.code == 2
    assert "model is missing" in done.err
