"""Which interface and address the exchanges use, where there are several of both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cluster.config import RunConfig
from cluster.network import administrators, interface_of
from cluster.training import Assignment
from cluster.worker import Worker

ROOT = Path(__file__).resolve().parents[2]


def entry(address: str, family: int = socket.AF_INET) -> SimpleNamespace:
    return SimpleNamespace(family=family, address=address)


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """eth1 with three addresses, one of IPv6, beside eth10."""
    found = {
        "lo": [entry("127.0.0.1")],
        "eth1": [entry("10.0.0.1"), entry("fe80::1%eth1", socket.AF_INET6), entry("10.0.0.2"), entry("10.0.0.3")],
        "eth10": [entry("10.1.0.1")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


@pytest.mark.parametrize(
    ("name", "address", "expected"),
    [
        (None, "10.0.0.1", ("eth1", "10.0.0.1")),
        (None, "10.0.0.2", ("eth1", "10.0.0.2")),
        (None, "10.0.0.3", ("eth1", "10.0.0.3")),
        ("eth1", "10.0.0.2", ("eth1", "10.0.0.2")),
        ("eth1", "192.168.0.9", ("eth1", "10.0.0.1")),
        ("eth10", "10.0.0.2", ("eth10", "10.1.0.1")),
    ],
)
@pytest.mark.usefixtures("interfaces")
def test_of_several_addresses_it_is_the_nodes(name: str | None, address: str, expected: tuple[str, str]) -> None:
    assert interface_of(name, address) == expected


@pytest.mark.usefixtures("interfaces")
def test_a_missing_interface_is_named_with_all_that_there_are() -> None:
    known = (
        r"eth1 \(10\.0\.0\.1\), eth1 \(10\.0\.0\.2\), eth1 \(10\.0\.0\.3\), eth10 \(10\.1\.0\.1\), lo \(127\.0\.0\.1\)$"
    )
    with pytest.raises(ValueError, match=rf"expected the interface eth2 on .*, got {known}"):
        interface_of("eth2", "10.0.0.1")
    with pytest.raises(ValueError, match=rf"expected an interface with address 10\.9\.9\.9 on .*, got {known}"):
        interface_of(None, "10.9.9.9")


@pytest.mark.parametrize(
    ("set_before", "in_file", "expected"),
    [
        ({}, "", {"GLOO": "eth1", "NCCL": "=eth1"}),
        ({"NCCL": "ib0,ib1"}, "", {"GLOO": "eth1", "NCCL": "ib0,ib1"}),
        ({"GLOO": "ib0", "NCCL": "^docker"}, "", {"GLOO": "ib0", "NCCL": "^docker"}),
        ({}, "NCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME=^docker0,lo\n", {"GLOO": "eth1", "NCCL": None}),
        ({}, "#NCCL_SOCKET_IFNAME=ib0\nNCCL_SOCKET_IFNAME\n", {"GLOO": "eth1", "NCCL": "=eth1"}),
        ({"NCCL": ""}, "", {"GLOO": "eth1", "NCCL": "=eth1"}),
    ],
    ids=["ours", "nccl", "both", "nccl's file", "a comment in it", "empty"],
)
@pytest.mark.usefixtures("interfaces")
def test_an_administrators_interface_stays_and_ours_is_exact(
    set_before: dict[str, str],
    in_file: str,
    expected: dict[str, str | None],
    digits_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gloo takes a plain name, nccl a prefix unless a sign of equality stands before it.

    What nccl would read from a file of its own gives way to the environment, so that stays as it is.
    """
    joined: list[dict[str, str | None]] = []

    def join(*_: Any) -> None:
        joined.append({library: os.environ.get(f"{library}_SOCKET_IFNAME") for library in expected})

    conf = tmp_path / "nccl.conf"
    conf.write_text(in_file)
    monkeypatch.setattr("cluster.network.NCCL_FILES", (tmp_path / "none", conf))
    monkeypatch.delenv("NCCL_CONF_FILE", raising=False)

    for library in expected:
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "")  # so that what the rank sets is taken back
        monkeypatch.delenv(f"{library}_SOCKET_IFNAME")
    for library, value in set_before.items():
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", value)
    monkeypatch.setattr("cluster.worker.connect_store", lambda *_: None)
    monkeypatch.setattr("cluster.worker.join_group", join)
    monkeypatch.setattr("cluster.worker.join_mesh", lambda *_, link_timeout_s: None)
    Worker(Assignment(digits_config(2), tmp_path, 1)).join(None, "10.0.0.2", ("10.0.0.1", 1))
    assert joined == [expected]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "1"),
        ({"NCCL_CONF_FILE": "other"}, "2"),
        ({"NCCL_CONF_FILE": "none"}, "3"),
        ({"NCCL_SOCKET_IFNAME": "4"}, "4"),
    ],
)
def test_of_several_settings_of_nccl_its_own_order_decides(
    environment: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment, then NCCL_CONF_FILE or the file of the user, then that of the machine."""
    for name, value in (("user", "1"), ("other", "2"), ("machine", "3")):
        (tmp_path / name).write_text(f"NCCL_SOCKET_IFNAME={value}\n")
    monkeypatch.setattr("cluster.network.NCCL_FILES", (tmp_path / "user", tmp_path / "machine"))
    for variable in ("NCCL_CONF_FILE", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, str(tmp_path / value) if "FILE" in variable else value)
    assert administrators()["nccl"].partition(" in ")[0] == f"NCCL_SOCKET_IFNAME={expected}"


TWO_ADDRESSES = """
ip link set lo up
ip link add eth1 type veth peer name eth10
ip addr add 10.9.0.1/24 dev eth1
ip addr add 10.9.0.2/24 dev eth1
ip link set eth1 up
"""
ASK = "from cluster.network import interface_of; print(*(interface_of(None, f'10.9.0.{n}') for n in (1, 2)))"


def test_a_real_interface_with_two_addresses() -> None:
    words = ["unshare", "--net", "sh", "-ec", f'{TWO_ADDRESSES}exec "$0" -c "$1"', sys.executable, ASK]
    try:
        probe = subprocess.run([*words[:2], "sh", "-ec", TWO_ADDRESSES], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if probe.returncode != 0:
        pytest.skip(f"no network namespaces: {probe.stderr.strip()}")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "('eth1', '10.9.0.1') ('eth1', '10.9.0.2')\n", done.stderr
