"""What a node lets a process use, as the process itself finds it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest
import torch

from cluster.allocation import Allocation, allocation, visible_gpus
from cluster.network import LOOPBACK


def test_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an independent library's figures."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("cluster.network.NCCL_FILES", (tmp_path / "none",))
    here = allocation(None, LOOPBACK)
    assert here.host == socket.gethostname()
    assert (here.interface, here.address, here.interface_error) == ("lo", LOOPBACK, "")
    assert here.cores == psutil.cpu_count()
    assert 1 <= here.cpus <= len(os.sched_getaffinity(0))
    assert 2**20 < here.memory_bytes <= psutil.virtual_memory().total
    assert len(here.gpus) == torch.cuda.device_count()
    assert here.chosen == {"gloo": "GLOO_SOCKET_IFNAME=ib0"}


def test_a_missing_interface_is_reported_with_all_the_rest() -> None:
    here = allocation("eth77", "10.9.9.9")
    assert (here.interface, here.address) == ("", "10.9.9.9")
    assert here.interface_error.startswith("cluster.interface: expected the interface eth77 on ")
    assert here.cpus >= 1


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        (None, 2, ("0", "1")),
        ("3", 1, ("3",)),
        ("6,4", 2, ("6", "4")),
        ("GPU-4bf2a0c1, GPU-99", 2, ("GPU-4bf2a0c1", "GPU-99")),
        ("", 0, ()),
        ("0,1", 0, ()),  # named, but torch finds none
        ("0,9", 1, ("0",)),  # CUDA stops at the first that there is not
    ],
)
def test_gpus_are_named_as_their_variable_does(
    visible: str | None, count: int, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert visible_gpus() == expected


def test_the_cpus_in_a_sentence() -> None:
    assert Allocation("a", "10.0.0.7", 64, cores=64).of_cpus == "64 CPUs"
    assert Allocation("a", "10.0.0.7", 1, cores=8, limited_by="affinity").of_cpus == "1 CPU (of 8, by its affinity)"
