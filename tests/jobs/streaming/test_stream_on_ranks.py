"""`python -m jobs.stream` with a mesh: the digest of one process, and a replay without ranks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.online_group import Call
from cluster.online_rank import Reply
from jobs.stream import main
from jobs.streaming.config import parse_stream
from jobs.streaming.history import load
from jobs.streaming.job import StreamJob
from simmatch.config import ConfigError
from tests.cluster.stream_groups import FATAL, LOST, Group, Groups, groups_here
from tests.jobs.streaming.streams import small, waves
from tests.jobs.streaming.test_stream import command, lines, summary

EXACT = ("--set", "reduce=exact", "--set", "model.layers.0.dynamics.exchange=gather_state")


@pytest.mark.fault
@pytest.mark.slow
def test_ranks_give_the_digest_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for mesh in ("mesh.channel=1", "mesh.channel=2"):
        folder = tmp_path / mesh
        folder.mkdir()
        (folder / "waves.jsonl").write_text(lines(waves(80, labelled=0.5)))
        arguments = command(folder, *EXACT, "--set", mesh)
        done = subprocess.run(
            [sys.executable, "-m", "jobs.stream", *arguments], capture_output=True, text=True, timeout=110, check=False
        )
        assert done.returncode == 0, done.stderr
        assert ("ray: embedded" in done.stdout) == (mesh == "mesh.channel=2")
        found[mesh] = summary(folder)["digest"]
    assert len(set(found.values())) == 1
    assert main(["--run-dir", str(tmp_path / "mesh.channel=2" / "run"), "--replay"]) == 0
    assert f"digest {found['mesh.channel=1']}" in capsys.readouterr().out


def test_local_is_one_process_and_may_go_on_with_exact_sums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With fast sums another mesh has other bits."""
    for options, code in ((EXACT, 0), ((), 2)):
        folder = tmp_path / str(code)
        folder.mkdir()
        (folder / "waves.jsonl").write_text(lines(waves(30)))
        assert main(command(folder, *options, "--set", "mesh.channel=2", "--local")) == 0
        config = folder / "run" / "config.yaml"
        config.write_text(config.read_text().replace("channel: 1", "channel: 2"))
        before = summary(folder)["digest"]
        assert main(command(folder, *options, "--set", "mesh.channel=2", "--local")) == code
        assert ("mesh.channel: expected 2, got 1" in capsys.readouterr().err) == (code == 2)
        assert summary(folder)["digest"] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"layer": 2}}, "mesh.layer: expected at most 1, as layers learn one after the other"),
        ({"mesh": {"channel": 9}}, "mesh.channel: expected at most 8, the out_channels of model.layers.0, got 9"),
        (
            {"reduce": "exact"},
            "reduce: expected fast with model.layers.0.dynamics.exchange: every_iteration, got exact",
        ),
        (
            {"mesh": {"channel": 2}, "cluster": {"min_shards": 3}},
            "cluster.min_shards: expected at most mesh.channel=2, got 3",
        ),
        ({"mesh": {"data": 2}, "cluster": {"min_shards": 1}}, "cluster.min_shards: expected none with data 2"),
        (
            {
                "mesh": {"channel": 2},
                "cluster": {"threads_per_rank": 2},
                "reduce": "exact",
                "model": {
                    "layers": [{"out_channels": 8, "kernel_size": [1, 8], "dynamics": {"exchange": "gather_state"}}]
                },
            },
            "cluster.threads_per_rank: expected threads=1 with reduce: exact, as in one process, got 2",
        ),
    ],
)
def test_a_mesh_that_does_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_stream(small(**{}).model_dump(mode="json") | changes)


def test_a_replay_of_other_sums_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "waves.jsonl").write_text(lines(waves(30)))
    assert main(command(tmp_path)) == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("channel: 1", "channel: 2"))
    assert main(["--run-dir", str(tmp_path / "run"), "--replay"]) == 2
    assert "error: reduce: expected exact to replay a stream of data 1 × layer 1 × channel 2, got fast" in (
        capsys.readouterr().err
    )


RANKS = ("--set", "mesh.channel=2", "--set", "cluster.heartbeat_s=0.2", "--set", "cluster.backoff_s=0.001")
TWO = ("--set", "candidates={main: [], slow: [model.layers.0.plasticity.lr=0.01]}")


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[Groups]:
    """Ranks in this process, which are gone when the job has ended."""
    monkeypatch.setattr(StreamJob, "_start_ranks", lambda job: None)
    threads = set(threading.enumerate())
    with groups_here() as groups:
        yield groups
    assert groups.alive == 0
    assert not [each.name for each in set(threading.enumerate()) - threads if each.name == "ranks of a stream"]


def whole(folder: Path) -> Path:
    """A folder with records, labels early and late, and `run`: what one process makes of them."""
    folder.mkdir()
    (folder / "waves.jsonl").write_text(lines(waves(80, labelled=0.5)))
    return folder


def test_ranks_that_are_lost_change_no_digest(
    tmp_path: Path, groups: Groups, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two candidates; ranks of either are lost at random, also while a snapshot takes their state, and while they
    recompute a readout."""
    options = (*EXACT, *TWO, "--set", "recompute_every=3", "--set", "readout.reservoir=16")
    alone, ranks = whole(tmp_path / "alone"), whole(tmp_path / "ranks")
    assert main(command(alone, *options)) == 0
    draw = random.Random(1)
    groups.before = lambda number, call: LOST if draw.random() < 0.1 else None
    groups.after = lambda number, call: LOST if draw.random() < (0.3 if call.name == "state" else 0.1) else None
    assert main(command(ranks, *options, *RANKS, "--set", "cluster.max_restarts=50")) == 0
    assert summary(ranks)["digest"] == summary(alone)["digest"]
    assert groups.calls.count("restore") > 5
    shown = capsys.readouterr()
    assert {line.partition(":")[0] for line in shown.out.splitlines() if "rank 1 was lost" in line} == {"main", "slow"}
    assert shown.err == ""


REFUSED = ConfigError("device: expected a GPU")


@pytest.mark.parametrize(
    ("name", "error", "code", "message"),
    [
        ("calibrate", REFUSED, 2, "error: device: expected a GPU\n"),
        *((name, FATAL, 1, "error: rank 0 failed: no such thing\n") for name in ("encode", "learn_labels", "state")),
    ],
)
def test_ranks_that_end_the_stream_end_it_with_one_line(
    tmp_path: Path,
    groups: Groups,
    capsys: pytest.CaptureFixture[str],
    *,
    name: str,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    """Nobody waits for them any more; the same command goes on to the digest of one process."""
    model = ("--set", "model.layers.0.supervised=true")
    alone, ranks = whole(tmp_path / "alone"), whole(tmp_path / "ranks")
    groups.after = lambda number, call: error if call.name == name and number >= 12 * (name != "calibrate") else None
    assert main(command(ranks, *EXACT, *model, *RANKS)) == code
    assert capsys.readouterr().err == message
    ended = summary(ranks)
    assert (ended["status"], ended["digest"]) == ("FAILED", None)
    assert not (ranks / "run" / "model").exists()
    groups.after = lambda number, call: None
    assert main(command(ranks, *EXACT, *model, *RANKS)) == 0
    assert main(command(alone, *EXACT, *model)) == 0
    assert summary(ranks)["digest"] == summary(alone)["digest"]


@contextmanager
def handler_of(signum: int) -> Iterator[None]:
    """It is what it was, afterwards."""
    before = signal.getsignal(signum)
    try:
        yield
    finally:
        signal.signal(signum, before)


def test_a_second_signal_ends_a_wait_for_ranks(
    tmp_path: Path, groups: Groups, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as for room in a cluster, which they may have only after half an hour."""
    ranks, pid = whole(tmp_path / "ranks"), os.getpid()

    def wait(generation: int) -> None:
        for _ in range(2):
            os.kill(pid, signal.SIGINT)
        time.sleep(30.0)

    groups.start = wait
    with handler_of(signal.SIGINT):
        assert main(command(ranks, *EXACT, *RANKS)) == 130
    assert capsys.readouterr().err == "error: ended by SIGINT\n"
    assert (summary(ranks)["status"], summary(ranks)["digest"], groups.calls) == ("KILLED", None, [])


def test_a_signal_that_ends_ranks_as_well_ends_the_stream(
    tmp_path: Path, groups: Groups, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one to a control group, or to all processes of a terminal."""
    ranks, pid = whole(tmp_path / "ranks"), os.getpid()

    def end(number: int, call: Call) -> BaseException | None:
        if number < 10:
            return None
        os.kill(pid, signal.SIGTERM)
        return FATAL

    groups.before = end
    with handler_of(signal.SIGTERM):
        assert main(command(ranks, *EXACT, *RANKS)) == 143
    shown = capsys.readouterr()
    assert shown.err == "error: ended by SIGTERM\n"
    assert "rank 0 failed: no such thing" in shown.out
    assert (summary(ranks)["status"], summary(ranks)["digest"]) == ("KILLED", None)


def test_a_stream_that_has_nothing_new_starts_no_ranks(tmp_path: Path, groups: Groups) -> None:
    ranks = whole(tmp_path / "ranks")
    assert main(command(ranks, *EXACT, *RANKS)) == 0
    before, calls = summary(ranks)["digest"], len(groups.calls)
    assert main(command(ranks, *EXACT, *RANKS)) == 0
    assert (summary(ranks)["digest"], len(groups.calls)) == (before, calls)


def test_costs_count_the_processors_of_ranks(tmp_path: Path, groups: Groups) -> None:
    """Each call costs a thousand seconds somewhere else."""
    perform = Group.perform

    def slow(group: Group, call: Call) -> Reply:
        return replace(perform(group, call), seconds=1000.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "perform", slow)
        ranks = whole(tmp_path / "ranks")
        assert main(command(ranks, *EXACT, *RANKS)) == 0
    kept = load(ranks / "run")
    assert kept is not None
    assert kept.latest is not None
    assert kept.latest.candidates["main"].seconds > 1000.0 * kept.latest.batch


def test_ranks_that_cannot_be_started_leave_no_stream_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So another mesh can be tried."""
    folder = whole(tmp_path / "ranks")
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    assert main(command(folder, "--set", "mesh.channel=2")) == 2
    assert "error: RAY_ADDRESS: expected host:port" in capsys.readouterr().err
    assert main(command(folder)) == 0
