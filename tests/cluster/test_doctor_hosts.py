"""`python -m jobs.doctor` on two hosts: a link of known bandwidth, a folder that is not shared, other data.

Needs root, iproute2 and util-linux; skipped, with the reason, where there are none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.benchmarks.links import Link
from jobs.benchmarks.processes import Host
from jobs.reporting import MissingError
from tests.cluster.drivers import ROOT
from tests.cluster.test_links import TOLERANCE
from tests.cluster.test_partition import Parted
from tests.image_files import idx_bytes

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(400)]

BITS_PER_S = 100e6
"""Of each direction of the link."""

PRIVATE = 'mount --bind "$0/own-runs" "$0/runs"; mount --bind "$0/other-images" "$0/images"; exec "$@"'
"""Folders of its own for what follows."""


AS_A_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
"""The code is not sent to the worker: both nodes would unpack it in one folder, as they share this machine's disk."""


class Hosts(Parted):
    """A head and a worker; the worker has folders of its own where the head sees `runs` and `images`."""

    def doctor(self, *words: str, **changes: str) -> tuple[int, list[dict[str, Any]]]:
        """Exit status, and the objects that it prints."""
        done = subprocess.run(
            self.command(0, "-m", "jobs.doctor", "--json", *words),
            env=self.environment | {"RAY_ADDRESS": self.address, "OMP_NUM_THREADS": "1"} | AS_A_JOB | changes,
            cwd=ROOT, capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        assert lines, done.stderr
        assert all(line.startswith("{") for line in lines), done.stdout
        return done.returncode, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    for number, name in enumerate(("images", "other-images")):
        write_images(folder / name, seed=number)
    for name in ("runs", "own-runs", "shared"):
        (folder / name).mkdir()
    try:
        with Link() as link:
            there = link.hosts[1]
            private = ("unshare", "--mount", "sh", "-ec", PRIVATE, str(folder))
            link.hosts[1] = Host((*there.command, *private), there.address)
            link.limit(BITS_PER_S)
            found = Hosts(link, folder)
            try:
                yield found
            finally:
                found.close()
    except MissingError as reason:
        pytest.skip(f"no network namespaces: {reason}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_images(folder: Path, seed: int) -> None:
    """Fashion-MNIST's files, of a few random images."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for kind, count in (("train", 60), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{kind}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{kind}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count, dtype=np.uint8) % 10))


def config_of(hosts: Hosts, images: str) -> list[str]:
    config = str(ROOT / "jobs" / "configs" / "fashion_mnist.yaml")
    changes = (f"data.root={hosts.folder / images}", "data.train_images=60", "data.test_images=20")
    changes += ("tracking.enabled=false", "model.layers=[{out_channels: 4, kernel_size: 5, train: {batch_size: 20}}]")
    return ["--config", config, *(word for change in changes for word in ("--set", change))]


def of_check(name: str, objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [each for each in objects if each["check"] == name]
    return found


def test_the_measured_bandwidth_is_that_of_the_link(hosts: Hosts) -> None:
    began = time.monotonic()
    status, objects = hosts.doctor(*config_of(hosts, "other-images"), "--run-dir", str(hosts.folder / "shared"))
    assert time.monotonic() - began < 120
    assert status == 0, objects
    assert objects[-1]["failures"] == 0
    addresses = [host.address for host in hosts.link.hosts]
    assert of_check("nodes", objects)["values"]["nodes"] == addresses
    interfaces = {each["nodes"][0]: each["message"] for each in objects if each["check"] == "interface"}
    assert interfaces == {address: f"link0 {address}" for address in addresses}
    links = of_check("links", objects)
    assert links["values"]["library"] == "gloo"
    assert {(link["from"], link["to"]) for link in links["values"]["links"]} == {
        tuple(addresses),
        tuple(addresses[::-1]),
    }
    for link in links["values"]["links"]:
        assert TOLERANCE[0] < 8 * link["bytes_per_s"] / BITS_PER_S < TOLERANCE[1], link


def test_a_folder_that_is_not_shared_and_other_data(hosts: Hosts) -> None:
    status, objects = hosts.doctor(*config_of(hosts, "images"), "--run-dir", str(hosts.folder / "runs"))
    assert status == 1
    failures = {each["check"]: each for each in objects if each["status"] == "failure" and each["check"] != "summary"}
    assert set(failures) == {"data", "run directory"}, failures
    worker = hosts.link.hosts[1].address
    for failure in failures.values():
        assert failure["nodes"] == [worker]
        assert failure["fix"]
    assert failures["run directory"]["message"].endswith("does not see the file that this job wrote there")
    assert "has the digest" in failures["data"]["message"]
    assert [*(hosts.folder / "runs").iterdir(), *(hosts.folder / "own-runs").iterdir()] == []


def test_a_wrong_token_is_one_failure_and_a_run_begins_nothing(hosts: Hosts) -> None:
    status, objects = hosts.doctor(RAY_AUTH_TOKEN=64 * "0")
    assert status == 1
    (failure,) = [each for each in objects[:-1] if each["status"] == "failure"]
    assert failure["check"] == "token"
    expected = f"RAY_AUTH_TOKEN: expected the token of the cluster at {hosts.address}, got one that it rejects"
    assert failure["message"] == expected
    run_dir = hosts.folder / "shared" / "run"
    done = subprocess.run(
        hosts.command(0, "-m", "jobs.pretrain", "--run-dir", str(run_dir), *config_of(hosts, "images")),
        env=hosts.environment | {"RAY_ADDRESS": hosts.address, "RAY_AUTH_TOKEN": 64 * "0"},
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, f"error: {expected}\n")
    assert not run_dir.exists()
