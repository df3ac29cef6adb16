"""The flags of a launch and the variables of slurm: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from liger_cli.common.ranks import adopt_slurm, find_rank, first_host
from liger_cli.config.launch_flags import Launch, without_launch_flags
from liger_cli.errors import ConfigError
from liger_cli.training.launch import plan as planning
from liger_cli.training.launch.plan import LaunchPlan, plan_launch


@pytest.fixture
def plan(monkeypatch):
    def make(*, num_gpus=0, use_cpu=False, environ=None, **flags):
        monkeypatch.setattr(planning, "_count_gpus", lambda: num_gpus)
        return plan_launch(Launch(**flags), use_cpu=use_cpu, environ=environ or {})

    return make


HOSTS = {"nnodes": 2, "rdzv_endpoint": "gpu01:29400"}
MEANT = [
    ({}, None),
    ({"nproc": "1"}, None),
    ({"nproc": "1", "nnodes": 1}, None),
    ({"nproc": "auto"}, None),
    ({"nproc": "auto", "num_gpus": 4}, LaunchPlan(4)),
    ({"nproc": "auto", "num_gpus": 4, "use_cpu": True}, None),
    ({"nproc": "3"}, LaunchPlan(3)),
    ({"nproc": "3", "num_gpus": 2, "use_cpu": True}, LaunchPlan(3)),
    ({"nproc": "2", "log_rank": 1}, LaunchPlan(2, log_rank=1)),
    ({"num_gpus": 8, **HOSTS}, LaunchPlan(8, 2, None, ("gpu01", 29400))),
    ({"nproc": "1", "node_rank": 1, **HOSTS}, LaunchPlan(1, 2, 1, ("gpu01", 29400))),
    (
        {"nproc": "2", "nnodes": 2, "rdzv_endpoint": "[::1]:1"},
        LaunchPlan(2, 2, None, ("::1", 1)),
    ),
]


@pytest.mark.parametrize(("flags", "expected"), MEANT)
def test_flags_of_a_launch(plan, flags, expected):
    assert plan(**flags) == expected


REFUSED = [
    ({"nproc": "0"}, "--nproc 0: should be a number", "auto starts one for each GPU"),
    ({"nproc": "-1"}, "--nproc -1: should be", "auto"),
    ({"nproc": "two"}, "--nproc two: should be", "auto"),
    ({"nproc": "3", "num_gpus": 2}, "this host has 2 GPUs", "--nproc 2 at most, or --use-cpu"),
    ({"nproc": "2", "nnodes": 0}, "--nnodes 0: should be at least 1", ""),
    ({"nproc": "2", "nnodes": 2}, "--nnodes 2: hosts need a place", "--rdzv-endpoint HOST:PORT"),
    ({"nproc": "2", "rdzv_endpoint": "a:1"}, "are for several hosts: add --nnodes", ""),
    ({"nproc": "2", **HOSTS, "rdzv_endpoint": "gpu01"}, "--rdzv-endpoint gpu01: should be", ""),
    ({"nproc": "2", **HOSTS, "rdzv_endpoint": "a:70000"}, "should be HOST:PORT", ""),
    ({"nproc": "2", **HOSTS, "node_rank": 2}, "the hosts of --nnodes 2 are numbered 0 to 1", ""),
    ({"nproc": "2", "log_rank": 2}, "--log-rank 2: ranks are numbered 0 to 1", ""),
    ({"log_rank": 1}, "--log-rank 1: ranks are numbered 0 to 0", ""),
    (
        {"nproc": "2", "environ": {"RANK": "1", "WORLD_SIZE": "4"}},
        "this one is rank 1 of 4 of a launch already",
        "Leave the flags away",
    ),
]


@pytest.mark.parametrize(("flags", "message", "hint"), REFUSED)
def test_flags_without_a_meaning_are_refused_with_the_fix(plan, flags, message, hint):
    with pytest.raises(ConfigError) as error:
        plan(**flags)
    assert message in error.value.message
    assert hint in (error.value.hint or "")


def test_a_rank_gets_the_words_without_the_launch():
    words = ("train", "--nproc", "2", "-m", "a", "--rdzv_endpoint=h:1", "--log-rank", "1", "--json")
    assert without_launch_flags(words) == ["train", "-m", "a", "--json"]
    words = ("train", "--nproc-per-node=2", "-m", "a", "--nnodes", "2", "--node_rank", "1")
    assert without_launch_flags(words) == ["train", "-m", "a"]


def test_a_bench_needs_numbers_of_processes_to_compare(liger):
    done = liger("bench", "-m", "qwen3", "--nproc", 2)
    assert done.code == 2
    assert "--nproc 2: should be the numbers of processes to compare" in done.err


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu01", "gpu01"),
        ("gpu01,gpu02", "gpu01"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("rack1-gpu[01-02]-ib,x", "rack1-gpu01-ib"),
    ],
)
def test_first_host_of_a_list_of_slurm(nodes, first):
    assert first_host(nodes) == first


STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "gpu[03-06]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "1",
}


def test_srun_means_what_torchrun_means():
    environ = dict(STEP)
    adopt_slurm(environ)
    found = {name: value for name, value in environ.items() if not name.startswith("SLURM")}
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "23457",
    }
    rank = find_rank(environ)
    assert (rank.number, rank.num_ranks, rank.local) == (5, 7, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_NUM_TASKS": None},  # a batch script, which has the tasks of the whole job
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"RANK": "0"},  # torchrun, started by srun
    ],
)
def test_variables_of_slurm_that_start_no_rank(changed):
    environ = {name: value for name, value in {**STEP, **changed}.items() if value is not None}
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before


def test_what_is_set_beside_srun_stays():
    environ = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    adopt_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "29500")
    assert environ["RANK"] == "5"
