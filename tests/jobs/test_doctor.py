"""`python -m jobs.doctor`: what it makes of facts, and its lines and exit status for each failure."""

from __future__ import annotations

import errno
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.allocation import Allocation
from cluster.tracking.server_check import ServerAnswer
from jobs import doctor, preflight, pretrain
from jobs.diagnosis import examination, judge, link_check, node, nodes, report, surroundings
from jobs.diagnosis.findings import Finding, ok
from jobs.diagnosis.links import LinkSpeed
from jobs.diagnosis.node import Gpus, Room, Versions
from jobs.diagnosis.nodes import Answers, Node, late
from tests.object_store import BUCKET, object_store

ROOT = Path(__file__).resolve().parents[2]
HERE, THERE = "10.0.0.1", "10.0.0.2"

MB, GB = 10**6, 10**9


def a_node(name: str, **resources: float) -> Node:
    return Node(f"id-of-{name}", name, name, {"CPU": 4.0, **resources})


def an_allocation(**changes: Any) -> Allocation:
    own = Allocation("host", HERE, 4, cores=4, memory_bytes=16 * GB, interface="eth0")
    return replace(own, **changes)


VERSIONS = Versions("3.11.7", "2.60.0", "2.14.1", "3.17.2", "f00d")
NO_GPU = Gpus((), "this torch was built without CUDA", None, "", None)
CARD = Gpus(("NVIDIA H100",), "", "13.0", "580.65.06", (13, 0))


# -- judgements --------------------------------------------------------------------------------------------------------


def only(findings: Sequence[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.mark.parametrize(
    ("package", "value", "status", "text"),
    [
        ("torch", "2.13.0", "failure", "torch differs: 2.14.1 on 10.0.0.1, 10.0.0.3; 2.13.0 on 10.0.0.2"),
        ("simmatch", "beef", "failure", "source of simmatch differs: f00d on 10.0.0.1, 10.0.0.3; beef on 10.0.0.2"),
        ("mlflow", "none", "warning", "MLflow differs: 3.17.2 on 10.0.0.1, 10.0.0.3; none on 10.0.0.2"),
    ],
)
def test_the_node_with_another_version_is_named(package: str, value: str, status: str, text: str) -> None:
    versions = {HERE: VERSIONS, THERE: replace(VERSIONS, **{package: value}), "10.0.0.3": VERSIONS}
    finding = only(judge.judge_versions(versions))
    assert (finding.status, finding.text) == (status, text)
    assert finding.fix


def test_of_many_nodes_some_are_named() -> None:
    found = {f"10.0.0.{number}": VERSIONS for number in range(1, 100)}
    text = only(judge.judge_versions(found | {"10.0.0.9": replace(VERSIONS, ray="2.59.0")})).text
    assert text == "Ray differs: 2.60.0 on 10.0.0.1, 10.0.0.2, 10.0.0.3, 10.0.0.4 and 94 more; 2.59.0 on 10.0.0.9"


def test_gpus(make_config: Callable[..., Any]) -> None:
    two, asks = [a_node(HERE), a_node(THERE, GPU=1.0)], make_config("device=cuda", "mesh.channel=2")
    finding = only(judge.judge_gpus({HERE: NO_GPU, THERE: CARD}, two, asks))
    assert finding.status == "failure"
    assert finding.text == "device: cuda needs 2 GPUs, one for each rank; Ray offers 1"
    finding = only(judge.judge_gpus({HERE: NO_GPU}, two[:1], asks))
    assert finding.text.endswith("Ray offers 0: this torch was built without CUDA")
    fits = make_config("device=cuda", "mesh.channel=1")
    assert only(judge.judge_gpus({HERE: NO_GPU, THERE: CARD}, two, fits)).status == "ok"
    blind = replace(CARD, names=(), error="torch sees no CUDA device")
    finding = only(judge.judge_gpus({HERE: NO_GPU, THERE: blind}, two, fits))
    assert (finding.status, finding.nodes) == ("failure", (THERE,))
    assert finding.text == "Ray offers 1 GPU, torch sees 0: torch sees no CUDA device"
    old = replace(blind, driver="535.104.05", driver_cuda=(12, 2))
    finding = only(judge.judge_gpus({HERE: NO_GPU, THERE: old}, two, fits))
    assert finding.text == "driver 535.104.05 knows CUDA 12.2, and torch was built with CUDA 13.0"
    hidden = only(judge.judge_gpus({HERE: CARD, THERE: CARD}, two, fits))
    assert (hidden.status, hidden.nodes, hidden.fix) == ("warning", (HERE,), "ray start --num-gpus 1")
    idle = only(judge.judge_gpus({THERE: CARD}, two[1:], make_config("mesh.channel=1")))
    assert idle.status == "warning"
    assert idle.text.startswith("1 GPU in the cluster; a run on cpu")


def test_room_for_all_ranks(make_config: Callable[..., Any]) -> None:
    two = [a_node(HERE), a_node(THERE)]
    assert only(judge.judge_nodes(two, make_config("mesh.channel=8", "mesh.data=1"))).status == "ok"
    finding = only(judge.judge_nodes(two, make_config("mesh.channel=8", "cluster.cpus_per_rank=2")))
    assert finding.status == "failure"
    assert finding.text == f"2 nodes with 8 CPUs: {HERE}, {THERE}; room for 4 of 8 ranks of 2 CPUs"


def test_cores_against_threads_and_against_what_ray_offers(make_config: Callable[..., Any]) -> None:
    many = make_config("mesh.channel=4", "cluster.threads_per_rank=2")
    finding = only(judge.judge_cores({HERE: an_allocation()}, [a_node(HERE)], many))
    assert finding.status == "warning"
    assert finding.text == "4 CPUs for up to 4 ranks, fewer than cluster.threads_per_rank=2 for each: slower, same bits"
    assert finding.fix.startswith("cluster.threads_per_rank=1")
    limited = an_allocation(cpus=2, cores=64, limited_by="control group")
    finding = only(judge.judge_cores({HERE: limited}, [a_node(HERE)], None))
    assert (finding.status, finding.fix) == ("warning", "ray start --num-cpus 2")
    assert finding.text.startswith("2 CPUs (of 64, by its control group), of which Ray offers 4")
    assert only(judge.judge_cores({HERE: an_allocation()}, [a_node(HERE)], None)).status == "ok"


def test_memory_against_the_ranks_that_fit(make_config: Callable[..., Any]) -> None:
    two = make_config("mesh.channel=2")

    def status(memory_bytes: int, rank_bytes: float) -> str:
        return only(
            judge.judge_memory({HERE: an_allocation(memory_bytes=memory_bytes)}, [a_node(HERE)], two, rank_bytes)
        ).status

    assert [status(16 * GB, 8.0 * GB), status(16 * GB, 8.1 * GB)] == ["ok", "failure"]


def test_clocks() -> None:
    finding = only(judge.judge_clocks({HERE: (0.2, 0.1), THERE: (-3.5, 0.1)}))
    assert (finding.status, finding.nodes) == ("warning", (THERE,))
    assert finding.text == "the clock is 3.5 s behind the driver's"
    assert only(judge.judge_clocks({THERE: (-3.5, 3.0)})).status == "ok", "the answer itself took that long"


@pytest.mark.parametrize(
    ("what", "free", "needed", "status"),
    [
        ("run directory", 3 * GB, 2 * GB, "ok"),
        ("run directory", 1 * GB, 2 * GB, "failure"),
        ("cache", 1 * GB, 2 * GB, "warning"),
        ("cache", 0, 0, "failure"),
        ("Ray's files", 3 * GB, 0, "warning"),
        ("Ray's files", 30 * GB, 0, "ok"),
    ],
)
def test_a_full_disk(what: str, free: int, needed: int, status: str) -> None:
    finding = only(judge.judge_room("disk", {THERE: [Room(what, "/data", free, 100 * GB)]}, {what: needed}))
    assert (finding.status, finding.nodes) == (status, (THERE,))
    assert finding.text.startswith(f"{what} /data: ")


def test_the_slowest_link_is_named() -> None:
    speeds = [LinkSpeed(0, 1, 110e6, 1e-4), LinkSpeed(1, 0, 112e6, 1e-4), LinkSpeed(1, 2, 12e6, 2e-4)]
    speeds += [LinkSpeed(2, 1, 111e6, 1e-4), LinkSpeed(0, 2, 110e6, 5e-4), LinkSpeed(2, 0, 113e6, 1e-4)]
    finding = only(judge.judge_links(speeds, ["a", "b", "c"], "gloo"))
    assert finding.status == "warning"
    assert finding.text == (
        "gloo, 3 pairs: 12 MB/s to 113 MB/s, slowest b → c; latency up to 0.5 ms, a → c; the median is 110 MB/s"
    )
    alike = [replace(speed, bytes_per_s=111e6) for speed in speeds]
    assert only(judge.judge_links(alike, ["a", "b", "c"], "gloo")).status == "ok"


# -- a cluster of two nodes that is none -------------------------------------------------------------------------------


class FakeNodes:
    """Two nodes in this process. `instead`: (name of a question, name of a node) → what is asked in its place."""

    def __init__(self, given: Sequence[Node], instead: dict[tuple[str, str], Callable[..., Any]]) -> None:
        self.nodes, self._instead = list(given), instead

    def start(self, limit_s: float) -> list[Finding]:
        return []

    def ask(
        self, check: str, limit_s: float, question: Callable[..., Any], arguments: Callable[[Node], Any] = nodes.nothing
    ) -> Answers:
        answers = Answers()

        def one(each: Node) -> None:
            asked = self._instead.get((question.__name__, each.name), question)
            try:
                answers.by_node[each.name] = asked(*arguments(each))
            except Exception as error:
                answers.faults.append(Finding(check, "failure", str(error), "", (each.name,)))

        threads = [threading.Thread(target=one, args=(each,), daemon=True) for each in self.nodes]
        deadline = time.monotonic() + limit_s
        for thread in threads:
            thread.start()
        for thread, each in zip(threads, self.nodes, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                answers.faults.append(late(check, limit_s, each.name))
        return answers

    def end(self) -> None:
        pass


class FakeLinks:
    def __init__(self, given: Sequence[Node], config: Any, limit_s: float) -> None:
        pass

    def start(self) -> None:
        pass

    def run(self) -> list[Finding]:
        return [ok("links", "gloo, 1 pair: 100 MB/s; latency up to 0.1 ms")]

    def end(self) -> None:
        pass


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[tuple[str, str], Callable[..., Any]]:
    """A healthy cluster, and what its nodes answer otherwise."""
    others: dict[tuple[str, str], Callable[..., Any]] = {}
    for name in (HERE, THERE):  # these say what this machine cannot
        others["versions", name] = lambda: VERSIONS
        others["gpus", name] = lambda: NO_GPU
        others["allocation", name] = lambda _, address: an_allocation(address=address)
        others["room_of_node", name] = lambda _: [Room("cache", "/cache", 50 * GB, 100 * GB)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(examination, "start_ray", lambda cpus, limit_s: "cluster at 10.0.0.1:6379")
    monkeypatch.setattr(examination, "shut_down_ray", lambda: True)
    monkeypatch.setattr(examination, "living", lambda: [a_node(HERE), a_node(THERE)])
    monkeypatch.setattr(examination, "RayNodes", lambda given: FakeNodes(given, others))
    monkeypatch.setattr(link_check, "LinkCheck", FakeLinks)
    return others


Diagnosis = tuple[int, list[str]]


@pytest.fixture
def diagnose(digits_yaml: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Diagnosis]:
    """Options → exit status, and the lines that are not ok; the last one is the summary."""

    def run(*words: str) -> Diagnosis:
        status = doctor.main(["--config", str(digits_yaml), "--set", "data.train_images=200", *words])
        lines = capsys.readouterr().out.splitlines()
        return status, [" ".join(line.split()) for line in lines if not line.startswith("ok ")]

    return run


def test_a_healthy_cluster(
    instead: object, digits_yaml: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A line for each check, in order and aligned; with --json an object each; nothing is left in the run directory."""
    words = ["--config", str(digits_yaml)]
    assert doctor.main(words) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [line[:7].strip() for line in lines] == ["ok"] * len(lines)
    checks = list(dict.fromkeys(line[9:22].strip() for line in lines))
    assert checks == list(examination.CHECKS)
    assert all(line[22:24] == "  " and line[24] != " " for line in lines)
    assert any(line.endswith("on both nodes: 4 CPUs, Ray offers 4") for line in lines)
    assert summary.startswith(f"{len(lines)} ok, 0 warnings, 0 failures in ")
    assert summary.endswith(": a run can start")
    assert list(tmp_path.iterdir()) == []
    assert doctor.main([*words, "--json"]) == 0
    *objects, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(each["check"] for each in objects)) == checks
    assert {tuple(each) for each in objects} == {("check", "status", "message", "fix", "nodes", "values")}
    assert {**last, "seconds": 0} == {
        "check": "summary", "status": "ok", "ok": len(lines), "warnings": 0, "failures": 0, "seconds": 0,
    }  # fmt: skip
    (cores,) = [each for each in objects if each["check"] == "cores"]
    assert cores["nodes"] == [HERE, THERE]


def test_another_version_on_a_node(instead: Any, diagnose: Callable[..., Diagnosis]) -> None:
    instead["versions", THERE] = lambda: replace(VERSIONS, torch="2.13.0")
    status, (line, _) = diagnose()
    assert status == 1
    assert line == f"failure versions torch differs: 2.14.1 on {HERE}; 2.13.0 on {THERE}; fix: {judge.SAME_FIX}"


def test_another_data_set_on_a_node(instead: Any, diagnose: Callable[..., Diagnosis]) -> None:
    instead["data_digest", THERE] = lambda _: "0123456789abcdef"
    status, (line, _) = diagnose()
    assert status == 1
    assert line.startswith(f"failure data on {THERE}: digits has the digest 0123456789abcdef, the driver's has ")


def test_no_gpu_where_one_is_asked_for(instead: Any, diagnose: Callable[..., Diagnosis]) -> None:
    status, (line, summary) = diagnose("--set", "device=cuda")
    assert status == 1
    assert line.startswith("failure gpus device: cuda needs 2 GPUs, one for each rank; Ray offers 0: this torch was")
    assert summary.endswith("a run would not work")


def test_a_check_that_hangs_is_named_and_nothing_waits_for_it(
    instead: Any, diagnose: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "CHECK_S", 4.0)
    instead["versions", THERE] = lambda: time.sleep(60)
    began = time.monotonic()
    status, (line, _) = diagnose()
    assert status == 1
    assert line == f"failure versions on {THERE}: no answer within 4 s; fix: {nodes.LATE_FIX}"
    assert time.monotonic() - began < 30


def test_a_node_is_asked_once_for_what_three_checks_need(instead: Any, diagnose: Callable[..., Diagnosis]) -> None:
    asked: list[str] = []

    def answer(_: object, address: str) -> Allocation:
        asked.append(address)
        if len(asked) > 2 and address == THERE:
            raise OSError("no such device")
        return an_allocation(address=address, interface_error="no interface")

    instead["allocation", HERE] = instead["allocation", THERE] = answer
    status, (interface, _) = diagnose()
    assert (status, sorted(asked)) == (1, sorted([HERE, THERE]))
    assert interface.startswith("failure interface on both nodes: no interface")
    status, lines = diagnose()
    assert [line.split(": ")[0] for line in lines[:-1]] == [
        f"failure cores on {THERE}", f"failure interface on {HERE}",
    ]  # fmt: skip


def test_the_driver_itself_hangs(
    instead: Any, diagnose: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted folder whose server is gone."""
    monkeypatch.setattr(examination, "CHECK_S", 4.0)
    monkeypatch.setattr(surroundings, "write_nonce", lambda *_: time.sleep(60))
    status, (line, _) = diagnose()
    assert status == 1
    assert line == f"failure run directory no answer within 6 s; fix: {nodes.LATE_FIX}"


@pytest.mark.parametrize("moment", ["disk_usage", "quota"])
def test_no_room(
    instead: Any, diagnose: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    if moment == "disk_usage":
        monkeypatch.setattr(node.shutil, "disk_usage", lambda _: node.shutil._ntuple_diskusage(100 * GB, 100 * GB, 0))
        expected = "failure disk run directory "
    else:  # a disk with room, for others

        def write(*_: object) -> str:
            raise OSError(122, "Disk quota exceeded")

        monkeypatch.setattr(surroundings, "write_nonce", write)
        expected = "failure run directory "
    status, (line, _) = diagnose()
    assert status == 1
    assert line.startswith(expected)
    assert ("0 B free of 100 GB, a run writes" if moment == "disk_usage" else "Disk quota exceeded; fix: ") in line


def test_a_node_that_cannot_write_and_one_that_sees_another_folder(
    instead: Any, diagnose: Callable[..., Diagnosis]
) -> None:
    instead["try_run_dir", THERE] = lambda *_: ("[Errno 30] Read-only file system: '/runs/digits'", "")
    status, (line, _) = diagnose("--run-dir", "shared")
    assert status == 1
    assert f"failure run directory on {THERE}: " in line
    assert line.endswith(f"[Errno 30] Read-only file system: '/runs/digits'; fix: {surroundings.WRITE_FIX}")
    instead["try_run_dir", THERE] = lambda *_: ("", "")  # it has written, elsewhere
    status, (line, _) = diagnose("--run-dir", "shared")
    assert status == 1
    assert line.endswith(f"wrote a file there that this job does not see; fix: {surroundings.SHARED_FIX}")
    instead["try_run_dir", THERE] = lambda run_dir, token, number: node.try_run_dir(
        run_dir / "elsewhere", token, number
    )
    status, (line, _) = diagnose("--run-dir", "shared")
    assert status == 1
    assert line.endswith(f"does not see the file that this job wrote there; fix: {surroundings.SHARED_FIX}")
    assert not Path("shared").exists()


def test_a_store_that_fails_is_left_as_it_was(
    instead: Any, diagnose: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(surroundings, "check_exclusive", fail)
    status, (line, _) = diagnose("--run-dir", "shared")
    assert status == 1
    assert "Disk quota exceeded; fix: " in line
    assert not Path("shared").exists()


def test_a_store_that_replaces_files(
    instead: Any, diagnose: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "check_exclusive", lambda folder: f"{folder}: its store replaces a file")
    status, (line, summary) = diagnose("--run-dir", "shared")
    assert status == 0
    assert line.startswith("warning run directory ")
    assert summary.endswith("a run can start")


@pytest.mark.parametrize(("verdict", "expected"), [("away", ("warning", 0)), ("refused", ("failure", 1))])
def test_mlflow(
    instead: Any,
    diagnose: Callable[..., Diagnosis],
    monkeypatch: pytest.MonkeyPatch,
    verdict: Any,
    expected: tuple[str, int],
) -> None:
    """What a server says is told by `ask_server`, which has tests with real ones."""
    answer = ServerAnswer(verdict, "MLflow at http://10.0.0.9: 403: Invalid Host header", "start the server with …")
    monkeypatch.setattr(surroundings, "ask_server", lambda *_, limit_s: answer)
    status, (line, _) = diagnose()
    assert (line.split()[0], status) == expected
    assert line.endswith(f"mlflow {answer.text}; fix: {answer.fix}")


def test_data_that_is_missing_is_one_failure(instead: Any, diagnose: Callable[..., Diagnosis]) -> None:
    status, (line, _) = diagnose("--set", "data={path: /nowhere/photos, test_fraction: 0.1}")
    assert status == 1
    assert line.startswith("failure configuration data.path: /nowhere/photos: no such folder; fix: ")


@pytest.mark.parametrize(
    ("assignment", "check"),
    [
        ("model.layers.0.kernel_size=99", "configuration"),
        ("model.layers.0.train.images=5000", "configuration"),
        ("tracking.uri=ftp://x", "mlflow"),
        ("tracking.register=a/b", "mlflow"),
    ],
)
def test_a_key_that_is_wrong_is_one_failure(
    instead: Any, diagnose: Callable[..., Diagnosis], assignment: str, check: str
) -> None:
    status, (line, _) = diagnose("--set", assignment)
    assert status == 1
    assert line.startswith(f"failure {check} {assignment.partition('=')[0]}: expected ")
    assert line.endswith(f"; fix: {examination.CONFIG_FIX}")


def test_data_that_hangs_is_one_failure(
    instead: Any, diagnose: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted folder whose server is gone."""
    monkeypatch.setattr(examination, "CHECK_S", 4.0)
    monkeypatch.setattr(examination, "data_of", lambda _: time.sleep(60))
    status, (line, _) = diagnose()
    assert status == 1
    assert line == f"failure configuration no answer within 4 s; fix: {nodes.LATE_FIX}"


def test_signals_are_data_like_any_other(instead: Any, diagnose: Callable[..., Diagnosis], tmp_path: Path) -> None:
    folder = tmp_path / "signals"
    folder.mkdir()
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", np.arange(500.0))
    layer = "{out_channels: 8, kernel_size: [1, 4], train: {images: 20, batch_size: 10}}"
    data = f"{{path: {folder}, window: 16, test_fraction: 0.5}}"
    status, lines = diagnose("--set", f"data={data}", "--set", f"model.layers=[{layer}]")
    assert (status, len(lines)) == (0, 1), lines


def test_colours_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    finding = Finding("disk", "failure", "full", "make room", (HERE,))
    report.Report(["disk"]).add("disk", [finding])
    assert capsys.readouterr().out == "failure  disk  full; fix: make room\n"
    monkeypatch.setattr(report, "Console", partial(Console, force_terminal=True, width=80, _environ={}))
    terminal = report.Report(["disk"])
    with terminal:
        terminal.waiting(["disk"])
        terminal.add("disk", [finding])
    out = capsys.readouterr().out
    assert "\x1b[1;31mfailure\x1b[0m" in out
    assert "waiting for: disk" in out
    as_json = report.Report(["disk"], as_json=True)
    with as_json:
        as_json.add("disk", [finding])
    assert json.loads(capsys.readouterr().out)["fix"] == "make room"


# -- what is no cluster, and bad options -------------------------------------------------------------------------------


def run_job(job: str, environment: dict[str, str], folder: Path, *words: str, **changes: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *words],
        env=environment | changes, cwd=folder, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_head_that_is_away(environment: dict[str, str], digits_yaml: Path, tmp_path: Path, closed_port: int) -> None:
    """The other checks are made; a run begins nothing."""
    address = {"RAY_ADDRESS": f"127.0.0.1:{closed_port}"}
    status, out, err = run_job("doctor", environment, tmp_path, "--config", str(digits_yaml), **address)
    assert (status, err) == (1, "")
    (line,) = [line for line in out.splitlines() if line.startswith("failure")]
    assert line.startswith(
        f"failure  cluster        RAY_ADDRESS: expected a running cluster at 127.0.0.1:{closed_port}"
    )
    assert line.endswith(f"; fix: {examination.CLUSTER_FIX}")
    assert "ok       run directory" in out
    status, out, err = run_job("pretrain", environment, tmp_path, "--config", str(digits_yaml), **address)
    assert status != 0
    assert err.startswith(f"error: RAY_ADDRESS: expected a running cluster at 127.0.0.1:{closed_port}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["no bucket", "wrong credentials"])
def test_a_store_that_takes_nothing(
    instead: object,
    diagnose: Callable[..., Diagnosis],
    digits_yaml: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same line from both; a run leaves nothing on this machine."""
    monkeypatch.setattr(preflight, "check_cluster", lambda limit_s: None)
    with object_store() as store, refusing_store() as refuser:
        bucket = "nobody-made-it"
        if kind == "wrong credentials":
            bucket = BUCKET
            monkeypatch.setenv("AWS_ENDPOINT_URL", refuser)
        assert store.environment
        status, (line, _) = diagnose("--run-dir", f"s3://{bucket}/digits", "--set", "tracking.enabled=false")
        assert status == 1
        assert line.startswith(f"failure run directory s3://{bucket}/digits")
        words = ["--config", str(digits_yaml), "--set", "data.train_images=200", "--set", "tracking.enabled=false"]
        assert pretrain.main([*words, "--run-dir", f"s3://{bucket}/digits"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: --run-dir: expected a ")
    assert f"s3://{bucket}/digits" in err
    assert ("The specified bucket does not exist" if kind == "no bucket" else "Forbidden") in err
    assert list(tmp_path.iterdir()) == []


@contextmanager
def refusing_store() -> Iterator[str]:
    """Address of a store that knows no key."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (
                b"<Error><Code>InvalidAccessKeyId</Code><Message>The AWS Access Key Id does not exist</Message></Error>"
            )
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Of loopback; nobody listens there, and nobody else gets it."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "seed=1"], "error: --set: expected --config FILE, whose keys it overrides\n"),
        (
            ["--config", "nowhere.yaml"],
            "error: --config: expected a YAML file, got nowhere.yaml, which does not exist\n",
        ),
    ],
)
def test_bad_options(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(words) == 2
    assert capsys.readouterr() == ("", message)


def test_a_word_of_the_doctor_is_not_abbreviated() -> None:
    """What is left of `--sub` in the job's own command would submit another job, and so on."""
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--sub"])
