"""Limits of control groups: the tightest of a process and of those above it, what is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from liger_cli.common import environment
from liger_cli.common.cgroups import GroupMemory, group_memory

GB = 10**9


def write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")


def version_2(folder: str, limit: object, used: int, cache: int = 0) -> dict[str, object]:
    top = f"sys/fs/cgroup{folder}"
    return {
        f"{top}/memory.max": limit,
        f"{top}/memory.current": used,
        f"{top}/memory.stat": f"anon 1\ninactive_file {cache}\nactive_file 5",
    }


def test_the_tightest_group_counts(tmp_path):
    """A pod of 10 GB, a container of 8 in it, and no limit on the process's own group."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container/own",
            **version_2("/pod", 10 * GB, 9 * GB, GB),
            **version_2("/pod/container", 8 * GB, 5 * GB, GB // 2),
            **version_2("/pod/container/own", "max", 4 * GB),
        },
    )
    assert group_memory(tmp_path) == GroupMemory(8 * GB, 2 * GB)


def test_a_container_that_sees_its_own_group_at_the_top(tmp_path):
    """Its path is the host's, which is not below the mount."""
    write(tmp_path, {"proc/self/cgroup": "0::/docker/abc", **version_2("", 4 * GB, 5 * GB)})
    assert group_memory(tmp_path) == GroupMemory(4 * GB, 0)


def test_version_1(tmp_path):
    top = "sys/fs/cgroup/memory/slurm"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/slurm\n4:memory:/slurm/job\n0::/",
            f"{top}/memory.limit_in_bytes": 1 << 63,
            f"{top}/job/memory.limit_in_bytes": 6 * GB,
            f"{top}/job/memory.usage_in_bytes": 4 * GB,
            f"{top}/job/memory.stat": f"cache 7\ntotal_inactive_file {3 * GB}",
        },
    )
    assert group_memory(tmp_path) == GroupMemory(6 * GB, 5 * GB)


@pytest.mark.parametrize("text", [None, "0::/", "4:memory:/here"], ids=["none", "v2", "v1"])
def test_no_limit(tmp_path, text):
    write(tmp_path, {} if text is None else {"proc/self/cgroup": text})
    assert group_memory(tmp_path) is None


def test_the_host_has_no_more_than_its_group(monkeypatch):
    monkeypatch.setattr(environment, "group_memory", lambda: None)
    total, free = environment.host_memory(), environment.free_host_memory()
    assert 0 < free <= total
    monkeypatch.setattr(environment, "group_memory", lambda: GroupMemory(1000, 10))
    assert (environment.host_memory(), environment.free_host_memory()) == (1000, 10)
    monkeypatch.setattr(environment, "group_memory", lambda: GroupMemory(1 << 59, 1 << 59))
    assert environment.host_memory() == total
