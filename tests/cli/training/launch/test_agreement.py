"""Ranks that would not train one run are found before the first step."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, DataError, EnvironmentProblem
from liger_cli.training.launch import agreement
from liger_cli.training.launch.agreement import (
    check_same_data,
    check_same_launch,
    check_shared_directory,
)

HOST = socket.gethostname()
TWO = SimpleNamespace(num_processes=2, is_main_process=True)


@pytest.fixture
def other(monkeypatch):
    """Let another rank, of host b, answer with changed values."""

    def answer(change):
        monkeypatch.setattr(
            agreement, "gather_object", lambda own: [*own, ("b", *change(*own[0][1:]))]
        )

    return answer


def test_other_versions_are_found(other):
    other(lambda values: [{**values, "torch": "1.0"} if "torch" in values else values])
    with pytest.raises(EnvironmentProblem) as error:
        check_same_launch(RunConfig(model="qwen3"), TWO)
    assert "torch is '1.0' for rank 1 on b, and " in error.value.message
    assert f"for rank 0 on {HOST}" in error.value.message


def test_another_configuration_is_found(other):
    other(lambda values: [{**values, "seed": 7} if "seed" in values else values])
    with pytest.raises(ConfigError) as error:
        check_same_launch(RunConfig(model="qwen3"), TWO)
    assert error.value.message == f"seed is 7 for rank 1 on b, and 42 for rank 0 on {HOST}"


def test_other_data_are_found(other):
    own = {"training": {"rows": 3, "sha256": "ab"}}
    other(lambda values: [{**values, "the data (training)": {"rows": 3, "sha256": "cd"}}])
    with pytest.raises(DataError) as error:
        check_same_data(own, TWO)
    assert "the data (training) is {'rows': 3, 'sha256': 'cd'} for rank 1 on b" in (
        error.value.message
    )


def test_ranks_that_agree_pass(other, tmp_path, monkeypatch):
    other(lambda *values: values)
    monkeypatch.setattr(agreement, "broadcast_object_list", lambda values: values)
    check_same_launch(RunConfig(model="qwen3"), TWO)
    check_same_data({"training": {"rows": 3}}, TWO)
    check_shared_directory(tmp_path, TWO)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_another_host_does_not_see_is_found(other, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "broadcast_object_list", lambda values: values)
    monkeypatch.setattr(agreement, "_LOOK_S", 0.0)

    def look_elsewhere(directory, is_seen):
        assert is_seen
        assert agreement._appears(Path(directory) / "nowhere") is False
        return "/scratch/run", False

    other(look_elsewhere)
    with pytest.raises(EnvironmentProblem) as error:
        check_shared_directory(tmp_path, TWO)
    assert f"output_dir /scratch/run of rank 1 on b is not the directory that rank 0 on {HOST}" in (
        error.value.message
    )
    assert list(tmp_path.iterdir()) == []
