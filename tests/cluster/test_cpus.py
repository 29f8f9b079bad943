"""The CPUs that control groups allow, on files as kernels lay them out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info

from cluster.cpus import all_cpus, allowed_cpus, cpu_limit
from simmatch.memory import machine_bytes


@pytest.fixture(autouse=True)
def sixty_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """/proc and /sys with these groups of the process and these files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V2 = "0::/kubepods/pod7/main\n"
V1 = "12:memory:/docker/7\n4:cpu,cpuacct:/docker/7\n1:name=systemd:/docker/7\n0::/system.slice\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"kubepods/pod7/main/cpu.max": "400000 100000\n"}, 4),
        (V2, {"kubepods/pod7/main/cpu.max": "max 100000\n"}, 64),
        (V2, {"kubepods/pod7/main/cpu.max": "max 100000\n", "kubepods/pod7/cpu.max": "250000 100000\n"}, 2),
        (V2, {"kubepods/pod7/main/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),  # inside a container with groups of its own
        ("0::/../../other\n", {"cpu.max": "300000 100000\n"}, 3),
        (
            V1,
            {"cpu,cpuacct/docker/7/cpu.cfs_quota_us": "600000", "cpu,cpuacct/docker/7/cpu.cfs_period_us": "100000"},
            6,
        ),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "50000"}, 3),
        (V1, {"cpu,cpuacct/docker/7/cpu.cfs_quota_us": "-1", "cpu,cpuacct/docker/7/cpu.cfs_period_us": "100000"}, 64),
        (V1, {"memory/docker/7/cpu.cfs_quota_us": "100000", "memory/docker/7/cpu.cfs_period_us": "100000"}, 64),
        (V2, {"kubepods/pod7/main/cpu.max": "nonsense"}, 64),
        (V2, {}, 64),
        ("nonsense\n", {}, 64),
    ],
)
def test_what_the_groups_allow(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    assert allowed_cpus(system(tmp_path, groups, files)) == expected


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"kubepods/pod7/main/memory.max": "8589934592\n"}, 2**33),
        (V2, {"kubepods/pod7/main/memory.max": "max\n", "kubepods/pod7/memory.max": "4096\n"}, 4096),
        (V2, {"kubepods/pod7/main/memory.max": "max\n"}, None),
        (V1, {"memory/docker/7/memory.limit_in_bytes": "4294967296\n"}, 2**32),
        (V1, {"memory/docker/7/memory.limit_in_bytes": "9223372036854771712\n"}, None),  # no limit
        ("", {}, None),
    ],
)
def test_the_memory_that_the_groups_allow(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int | None
) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine_bytes(system(tmp_path, groups, files)) == min(expected or physical, physical)


def test_what_limits_the_cpus_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    root = system(tmp_path, V2, {"kubepods/pod7/main/cpu.max": "400000 100000\n"})
    assert cpu_limit(root) == (4, "control group")
    assert cpu_limit(tmp_path / "no such system") == (64, "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 9})
    assert cpu_limit(root) == (2, "affinity")


def test_affinity_counts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = system(tmp_path, V2, {"kubepods/pod7/main/cpu.max": "400000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 9})
    assert allowed_cpus(root) == 2
    assert allowed_cpus(tmp_path / "no such system") == 2


def test_all_of_them_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.cpus.allowed_cpus", lambda: 3)
    before = torch.get_num_threads()
    with all_cpus():
        assert torch.get_num_threads() == 3
        assert all(pool["num_threads"] <= 3 for pool in threadpool_info())
    assert torch.get_num_threads() == before
