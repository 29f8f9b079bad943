"""Two attempts at one run: whichever is frozen where, one of them has the run, and the other changes nothing more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.checkpoints.committer
import cluster.checkpoints.manifest
import cluster.fence
import cluster.holder
import cluster.lease
from cluster.checkpoints.committer import commit, complete_commit, prune, publish_model, remove_unnamed
from cluster.checkpoints.manifest import (
    CONSTANTS,
    MANIFEST,
    Cursor,
    LayerState,
    Manifest,
    Shard,
    folder_of,
    read_manifest,
    write_manifest,
)
from cluster.checkpoints.reader import newest_good
from cluster.fence import COMMITS, AttemptLostError, Commits, Fence
from cluster.holder import Holder, begun
from cluster.lease import LEASE, Lease, LeaseKeeper, RunBusyError, wait_for_holder
from cluster.storage import AnyPath, exists, find, locate, read, write_whole
from simmatch.documents import dump_json
from simmatch.model import MODEL_FILES
from simmatch.remote import StorageError
from tests.object_store import BUCKET, ObjectStore, object_store

pytestmark = pytest.mark.timeout(300)

ELSEWHERE = Holder(host="far", pid=7, user="ada", job="job-1", since="2026-01-02 03:04:05 UTC", machine="another")


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> AnyPath:
    if request.param == "local":
        return tmp_path / "run"
    request.getfixturevalue("store")
    return locate(f"s3://{BUCKET}/{tmp_path.name}/run")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is looked up again each time."""
    monkeypatch.setattr(cluster.fence, "VERIFY_S", 0.0)
    monkeypatch.setattr(cluster.fence, "PAUSE_S", 0.01)


def manifest_of(step: int, shard: str = "rank-0-of-1.safetensors") -> Manifest:
    states = [LayerState(usual=1.0)]
    shards = [Shard(rank=0, file=shard, sha256="0", size_bytes=0, rows={}, shapes={})]
    return Manifest(cursor=Cursor(step=step, layer=0, updates=step), config={}, layers=states, shards=shards)


def names(run_dir: AnyPath) -> list[str]:
    return [path.name for path in find(run_dir / COMMITS, "*")]


# -- entries -----------------------------------------------------------------------------------------------------------


def test_the_attempt_that_began_last_has_the_run(place: AnyPath) -> None:
    """It is numbered, the other one is told who it is, and what follows the last entry of that stays taken."""
    first, second = Fence(place, Holder.here()), Fence(place, ELSEWHERE)
    assert Commits(place).newest() == (0, None)
    assert first.begin(0) is None
    first.commit("checkpoint", step=4)
    first.check()
    newest, entry = Commits(place).newest()
    assert (newest, entry and entry.kind, entry and entry.attempt) == (2, "checkpoint", 1)
    assert second.begin(newest) == entry
    second.commit("checkpoint", step=8)
    second.commit("checkpoint", step=12)
    second.prune()
    assert names(place) == ["00000001.json", "00000002.json", "00000003.json", "00000005.json"]
    with pytest.raises(AttemptLostError):
        first.prune()
    told = (
        "another attempt took over this run: ada, process 7 on far, job job-1, since 2026-01-02 03:04:05 UTC; "
        "this one stops and changes nothing"
    )
    for call in (lambda: first.commit("checkpoint", step=8), first.check, lambda: first.commit("end", status="FAILED")):
        with pytest.raises(AttemptLostError) as caught:
            call()
        assert str(caught.value) == told
    assert (first.owned(), second.owned()) == (False, True)
    assert len(names(place)) == 4


def test_an_attempt_that_loses_while_it_begins_leaves_its_number_taken(
    place: AnyPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one that was frozen before would find it free, and go on."""
    first, second, third = (Fence(place, ELSEWHERE) for _ in range(3))
    first.begin(0)
    first.commit("checkpoint", step=4)
    newest = second.commits.newest

    def overtaken() -> Any:
        third.begin(3)
        return newest()

    monkeypatch.setattr(second.commits, "newest", overtaken)
    with pytest.raises(AttemptLostError):
        second.begin(2)
    with pytest.raises(AttemptLostError):
        first.commit("checkpoint", step=8)
    third.commit("checkpoint", step=8)


def test_a_commit_whose_answer_was_lost_stays_the_last_one(place: AnyPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt does not know of it, and is cut off while another one takes over and deletes old entries."""
    first, second = Fence(place, ELSEWHERE), Fence(place, ELSEWHERE)
    first.begin(0)
    create = cluster.fence.create_whole

    def lost(path: AnyPath, content: bytes) -> None:
        create(path, content)
        raise StorageError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(cluster.fence, "create_whole", lost)
        with pytest.raises(StorageError):
            first.commit("checkpoint", step=4)
    second.begin(Commits(place).newest()[0])
    for step in (8, 12):
        second.commit("checkpoint", step=step)
    second.prune()
    with pytest.raises(AttemptLostError):
        first.commit("checkpoint", step=8)


def test_what_is_looked_up_between_commits_is_enough(place: AnyPath) -> None:
    first = Fence(place, Holder.here())
    first.begin(0)
    first.check()
    Fence(place, ELSEWHERE).begin(1)
    with pytest.raises(AttemptLostError, match="ada, process 7 on far"):
        first.check()


def test_of_two_that_begin_at_the_same_moment_one_begins(place: AnyPath) -> None:
    Fence(place, ELSEWHERE).begin(0)
    with pytest.raises(AttemptLostError, match="process 7 on far"):
        Fence(place, Holder.here()).begin(0)
    assert names(place) == ["00000001.json"]


def test_an_attempt_does_not_fence_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by threads, nor by an entry whose answer was lost and that is there all the same."""
    fence = Fence(tmp_path, Holder.here())
    fence.begin(0)
    threads = [threading.Thread(target=fence.commit, args=("checkpoint",), kwargs={"step": n}) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        fence.check()
        thread.join()
    assert len(names(tmp_path)) == 9
    create = cluster.fence.create_whole

    def lost(path: AnyPath, content: bytes) -> None:
        create(path, content)
        raise StorageError("no answer")

    monkeypatch.setattr(cluster.fence, "create_whole", lost)
    with pytest.raises(StorageError):
        fence.commit("checkpoint", step=20)
    monkeypatch.setattr(cluster.fence, "create_whole", create)
    fence.check()
    fence.commit("checkpoint", step=24)
    newest, entry = Commits(tmp_path).newest()
    assert (newest, entry and entry.step) == (11, 24)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 2}', b"\xff"])
def test_an_entry_that_cannot_be_read_is_another_attempts(tmp_path: Path, content: bytes) -> None:
    """Such as one of a later version; it has a number, so this attempt goes on after it, or has lost."""
    fence = Fence(tmp_path, Holder.here())
    fence.begin(0)
    write_whole(tmp_path / COMMITS / "00000002.json", content)
    with pytest.raises(AttemptLostError, match="took over this run: unknown;"):
        fence.commit("checkpoint", step=4)
    assert Commits(tmp_path).newest() == (2, None)
    Fence(tmp_path, Holder.here()).begin(2)
    assert wait_for_holder(tmp_path, pytest.fail) == 3


def test_a_store_that_does_not_answer_takes_the_run_from_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fence = Fence(tmp_path, Holder.here())
    fence.begin(0)

    def away(_: AnyPath) -> bool:
        raise StorageError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(cluster.fence, "exists", away)
        Fence(tmp_path, ELSEWHERE).begin(1)
        assert fence.owned()
        with pytest.raises(StorageError):
            fence.check(sure=True)  # as before records are copied there
    assert not fence.owned()


@pytest.mark.parametrize("work", [publish_model, remove_unnamed, prune])
def test_a_loser_stops_between_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[..., None]
) -> None:
    """It is frozen at the first one of what it copies, or deletes."""
    first = Fence(tmp_path, Holder.here())
    first.begin(0)
    constants = [tmp_path / "checkpoints" / CONSTANTS / f"{digit * 64}.safetensors" for digit in "01"]
    manifests = [folder_of(tmp_path, step) / MANIFEST for step in (4, 8, 12)]
    for path in (*constants, *(tmp_path / "model-0123abcd" / file for file in MODEL_FILES)):
        write_whole(path, b"")
    for step, path in zip((4, 8, 12), manifests, strict=True):
        write_manifest(path.parent, manifest_of(step))
    done: list[str] = []

    def frozen(*paths: AnyPath) -> None:
        done.append(paths[-1].name)
        Fence(tmp_path, ELSEWHERE).begin(1)

    for name in ("remove", "copy_whole"):
        monkeypatch.setattr(cluster.checkpoints.committer, name, frozen)
    what = {publish_model: ("model-0123abcd",), prune: (1, 12)}.get(work, ())
    with pytest.raises(AttemptLostError):
        work(tmp_path, *what, first)
    assert len(done) == 1


# -- every interleaving ------------------------------------------------------------------------------------------------


class Memory:
    """Files in a dictionary; each call to them is one step of the attempt that makes it."""

    def __init__(self, turn: Callable[[], None]) -> None:
        self.files: dict[Path, bytes] = {}
        self.turn = turn

    def create_whole(self, path: Path, content: bytes) -> None:
        self.turn()
        if self.files.setdefault(path, content) != content:
            raise FileExistsError(path)

    def write_whole(self, path: Path, content: bytes | str) -> None:
        self.turn()
        self.files[path] = content.encode() if isinstance(content, str) else content

    def exists(self, path: Path) -> bool:
        self.turn()
        return path in self.files

    def size_bytes(self, path: Path) -> int | None:
        self.turn()
        return len(self.files[path]) if path in self.files else None

    def read(self, path: Path) -> bytes:
        self.turn()
        try:
            return self.files[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    def find(self, folder: Path, pattern: str) -> list[Path]:
        self.turn()
        parts = [path.relative_to(folder).parts for path in self.files if path.is_relative_to(folder)]
        deep = len(Path(pattern).parts)
        found = {folder.joinpath(*part[:deep]) for part in parts if len(part) >= deep}
        return sorted(path for path in found if fnmatch(str(path.relative_to(folder)), pattern))

    def remove(self, path: Path) -> None:
        for each in [each for each in self.files if each == path or each.is_relative_to(path)]:
            self.turn()
            self.files.pop(each, None)


class Stage:
    """Runs two attempts by turns: so many steps of one, so many of the other, then each to its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory = Memory(self._turn)
        for module in (cluster.fence, cluster.checkpoints.committer, cluster.checkpoints.manifest):
            for name in ("create_whole", "write_whole", "exists", "size_bytes", "read", "find", "remove"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, getattr(self.memory, name))
        self._left: dict[str, int] = {}
        self._turns = {name: threading.Semaphore(0) for name in "AB"}
        self._paused = threading.Semaphore(0)

    def _turn(self) -> None:
        name = threading.current_thread().name
        if name in self._left:
            if self._left[name] == 0:
                self._paused.release()
                self._turns[name].acquire(timeout=60)
            self._left[name] -= 1

    def play(self, attempts: dict[str, Callable[[], None]], schedule: list[tuple[str, int]]) -> dict[str, int]:
        """Returns how many of its steps each attempt did not need."""
        threads = {}

        def run(name: str) -> None:
            try:
                attempts[name]()
            finally:
                self._paused.release()

        for name, steps in schedule:
            self._left[name] = steps
            if name not in threads:
                threads[name] = threading.Thread(target=run, args=(name,), name=name, daemon=True)
                threads[name].start()
            elif threads[name].is_alive():
                self._turns[name].release()
            else:
                continue
            self._paused.acquire()
        for thread in threads.values():
            thread.join()
        return self._left


RUN = Path("/run")
MANY = 10**6


class Attempt:
    """What a job does to a run directory: begins, commits checkpoints, deletes old ones, ends."""

    def __init__(self, name: str, memory: Memory) -> None:
        self.name, self.memory = name, memory
        self.fence = Fence(RUN, ELSEWHERE.model_copy(update={"user": name}))
        self.outcome = "?"
        self.done: list[int] = []

    def __call__(self) -> None:
        try:
            newest, _ = Commits(RUN).newest()
            complete_commit(RUN, self.fence.begin(newest))
            start = max(
                [int(path.parent.name[5:]) for path in self.memory.find(RUN / "checkpoints", "*/*.json")] or [0]
            )
            for step in (start + 4, start + 8):
                folder = folder_of(RUN, step)
                shard = f"rank-0-of-1-{self.name}.safetensors"
                self.memory.write_whole(folder / shard, b"")
                try:
                    commit(folder, manifest_of(step, shard), self.fence)
                except OSError:  # the winner has deleted the shard meanwhile: a checkpoint that is not written
                    continue
                self.done.append(step)
                self.fence.check()
                prune(RUN, 1, step, self.fence)
                self.fence.prune()
            self.fence.commit("end", status="FINISHED")
            self.outcome = "finished"
        except AttemptLostError:
            self.outcome = "lost"


def test_every_interleaving_of_two_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is frozen after each of its steps, then the second after each of its own, and both go on."""
    monkeypatch.setattr(cluster.fence, "PAUSE_S", 0.0)  # nothing is ever half written here
    alone = Stage(monkeypatch)
    only = Attempt("A", alone.memory)
    steps = MANY - alone.play({"A": only}, [("A", MANY)])["A"]
    assert (only.outcome, only.done) == ("finished", [4, 8])
    assert 20 < steps < 60
    seen = set()
    for first in range(steps + 1):
        for second in range(steps + 9):
            stage = Stage(monkeypatch)
            attempts = {name: Attempt(name, stage.memory) for name in "AB"}
            stage.play(attempts, [("A", first), ("B", second), ("A", MANY), ("B", MANY)])
            seen.add(check_end(stage.memory, attempts))
    assert {("finished", "lost"), ("lost", "finished"), ("finished", "finished")} == seen


def check_end(memory: Memory, attempts: dict[str, Attempt]) -> tuple[str, str]:
    """One attempt has the run; its newest checkpoint is the newest one, and is whole."""
    entries = [json.loads(memory.files[path]) for path in sorted(memory.files) if path.parent == RUN / COMMITS]
    owners = [entry["holder"]["user"] for entry in entries]
    winner = attempts[owners[-1]]
    assert winner.outcome == "finished"
    assert entries[-1]["kind"] == "end"
    lost = [name for name in owners if owners.count(name) == 1]  # while it began, in a number that was free again
    owners = [name for name in owners if name not in lost]
    turns = [owner for index, owner in enumerate(owners) if index == 0 or owners[index - 1] != owner]
    assert len(turns) <= 2  # nothing of one after the other has begun
    manifests = {
        int(path.parent.name[5:]): json.loads(memory.files[path]) for path in memory.files if path.name == MANIFEST
    }
    newest = manifests[max(manifests)]
    assert max(manifests) == winner.done[-1]
    (file,) = newest["shards"]
    assert file["file"] == f"rank-0-of-1-{winner.name}.safetensors"
    for step, manifest in manifests.items():  # one written late may name what the winner has deleted since
        shard = manifest["shards"][0]["file"]
        late = step < max(manifests) and shard != f"rank-0-of-1-{winner.name}.safetensors"
        assert late or folder_of(RUN, step) / shard in memory.files
    return attempts["A"].outcome, attempts["B"].outcome


# -- leases ------------------------------------------------------------------------------------------------------------


def lease_of(run_dir: AnyPath, attempt: int, renewals: int, uptime_s: float = 0.0) -> None:
    lease = Lease(attempt=attempt, renewals=renewals, uptime_s=uptime_s)
    write_whole(run_dir / LEASE, dump_json(lease.model_dump()))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are renewed often, and expire soon."""
    monkeypatch.setattr(cluster.lease, "RENEW_S", 0.02)
    monkeypatch.setattr(cluster.lease, "LOOK_S", 0.02)
    monkeypatch.setattr(cluster.lease, "EXPIRE_S", 1.0)


def test_nobody_is_waited_for(tmp_path: Path) -> None:
    """In a new folder, after an end, and after a process of this machine that is gone, whatever it has left."""
    assert wait_for_holder(tmp_path, pytest.fail) == 0
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        holder = Holder.here().model_copy(update={"pid": process.pid, "process": begun(process.pid)})
        assert not holder.ended()
        process.communicate(b"\n")
    assert holder.ended()
    Fence(tmp_path, holder).begin(0)
    lease_of(tmp_path, 1, 3, time.monotonic())
    assert wait_for_holder(tmp_path, pytest.fail) == 1
    far = Fence(tmp_path, ELSEWHERE)
    far.begin(1)
    far.commit("end", status="KILLED")
    assert wait_for_holder(tmp_path, pytest.fail) == 3


def test_a_process_of_this_machine_is_refused_at_once_while_it_lives(tmp_path: Path) -> None:
    """If it is frozen, it has given no sign of life for a while; another process of the same number is not it."""
    holder = Holder.here().model_copy(update={"pid": os.getppid(), "process": begun(os.getppid())})
    Fence(tmp_path, holder).begin(0)
    lease_of(tmp_path, 1, 3, time.monotonic() - 5)
    with pytest.raises(RunBusyError, match=rf"another attempt works in {tmp_path}: .*process {os.getppid()} on "):
        wait_for_holder(tmp_path, pytest.fail)
    lease_of(tmp_path, 1, 3, max(0.0, time.monotonic() - 65))
    told: list[str] = []
    assert wait_for_holder(tmp_path, told.append) == 1
    assert "taking over from an attempt that has given no sign of life for 65 s" in told[0]
    assert holder.model_copy(update={"process": "1"}).ended()


def test_a_process_that_the_system_hides_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, where /proc is mounted with hidepid: its lease counts."""

    def refuse(pid: int, signum: int) -> None:
        raise PermissionError(pid, signum)

    holder = Holder.here().model_copy(update={"pid": os.getppid(), "process": begun(os.getppid())})
    monkeypatch.setattr(cluster.holder, "begun", lambda _: "")
    monkeypatch.setattr(os, "kill", refuse)
    Fence(tmp_path, holder).begin(0)
    lease_of(tmp_path, 1, 3, time.monotonic() - 5)
    with pytest.raises(RunBusyError):
        wait_for_holder(tmp_path, pytest.fail)


@pytest.mark.usefixtures("soon")
def test_an_attempt_of_another_machine_is_watched(place: AnyPath) -> None:
    """Its clock may say anything. If its lease does not change, it has ended; if it is renewed, it works."""
    far = Fence(place, ELSEWHERE)
    far.begin(0)
    told: list[str] = []
    for uptime_s in (0.0, 1e9):
        lease_of(place, 1, 3, uptime_s)
        assert wait_for_holder(place, told.append) == 1
    assert told[0] == f"{place}: waiting at most 2 s for an earlier attempt to end: {ELSEWHERE}"
    keeper = LeaseKeeper(place, far)
    keeper.start()
    with pytest.raises(RunBusyError, match="ada, process 7 on far"):
        wait_for_holder(place, told.append)
    keeper.release()
    assert not exists(place / LEASE)


def test_who_was_frozen_while_it_waited_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt that it waits for has gone on meanwhile."""
    Fence(tmp_path, ELSEWHERE).begin(0)
    lease_of(tmp_path, 1, 3)
    now_s, looks, look = 1000.0, 0, cluster.lease._read

    def frozen(*arguments: Any) -> Lease | None:
        nonlocal now_s, looks
        seen, looks = look(*arguments), looks + 1
        if looks == 2:
            now_s += 3600.0
            lease_of(tmp_path, 1, 4)
        return seen

    monkeypatch.setattr(cluster.lease, "_read", frozen)
    monkeypatch.setattr(cluster.lease, "time", SimpleNamespace(monotonic=lambda: now_s, sleep=lambda _: None))
    with pytest.raises(RunBusyError, match="ada, process 7 on far"):
        wait_for_holder(tmp_path, lambda _: None)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("how", ["ends", "is drained", "is taken over"])
def test_the_wait_ends_with_the_attempt(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an old job and its replacement overlap for a while."""
    monkeypatch.setattr(cluster.lease, "EXPIRE_S", 60.0)
    far = Fence(tmp_path, ELSEWHERE)
    far.begin(0)
    keeper = LeaseKeeper(tmp_path, far)
    keeper.start()
    waiting = threading.Event()
    found: list[int | None] = []
    waiter = threading.Thread(target=lambda: found.append(wait_for_holder(tmp_path, lambda _: waiting.set())))
    waiter.start()
    assert waiting.wait(30)
    if how == "ends":
        far.commit("end", status="FINISHED")
        waiter.join(0.2)
        assert found == []  # its last records are on their way
        keeper.release()
    elif how == "is drained":
        keeper.release()
    else:
        Fence(tmp_path, ELSEWHERE).begin(1)
    waiter.join(30)
    assert found == [None]
    keeper.release()
    if how == "ends":
        assert wait_for_holder(tmp_path, pytest.fail) == 2


@pytest.mark.usefixtures("soon")
def test_an_attempt_that_has_lost_leaves_the_lease_alone(tmp_path: Path) -> None:
    first, second = Fence(tmp_path, ELSEWHERE), Fence(tmp_path, Holder.here())
    first.begin(0)
    keeper = LeaseKeeper(tmp_path, first)
    keeper.start()
    second.begin(1)
    lease_of(tmp_path, 2, 0)
    keeper._thread.join(30)  # type: ignore[union-attr]
    keeper.release()
    assert json.loads(read(tmp_path / LEASE))["attempt"] == 2
    assert first.lost is not None


# -- processes ---------------------------------------------------------------------------------------------------------

WORK = """
import sys
import cluster.fence
from cluster.checkpoints.committer import Committer
from cluster.checkpoints.manifest import Cursor, LayerState, Manifest, folder_of
from cluster.checkpoints.shard_writer import write_shard
from cluster.holder import Holder
from cluster.storage import locate
from simmatch.sharding.rows import Rows
import torch

cluster.fence.VERIFY_S = 0.0
place, name = locate(sys.argv[1]), sys.argv[2]
fence = cluster.fence.Fence(place, Holder(host=name, pid=1))
committer = Committer(place, keep=2, fence=fence)
for line in sys.stdin:
    step = int(line)
    if step == 0:
        fence.begin(cluster.fence.Commits(place).newest()[0])
        print("begun", flush=True)
        continue
    shard = write_shard(folder_of(place, step), 0, 1, {"w": torch.arange(6.0)}, {"w": Rows.all(6)}, name)
    cursor = Cursor(step=step, layer=0, updates=step)
    committer.submit(Manifest(cursor=cursor, config={}, layers=[LayerState(usual=1.0)], shards=[shard]))
    (outcome,) = committer.settled(120.0)
    print(outcome.reason, flush=True)
"""


def test_an_attempt_that_is_frozen_while_another_one_commits(place: AnyPath) -> None:
    """It goes on, and is told so at its next checkpoint, of the same step as one of the other; that stays as it is."""
    with Worker(place, "first") as first, Worker(place, "second") as second:
        assert (first.do(0), first.do(4), first.do(8)) == ("begun", "None", "None")
        os.kill(first.process.pid, signal.SIGSTOP)
        assert (second.do(0), second.do(12), second.do(16)) == ("begun", "None", "None")
        before = {str(path): read(path) for path in find(place, "*/*/*") if path.suffix == ".json"}
        os.kill(first.process.pid, signal.SIGCONT)
        for step in (12, 20):
            assert "another attempt took over this run: process 1 on second" in first.do(step)
        assert {str(path): read(path) for path in find(place, "*/*/*") if path.suffix == ".json"} == before
        assert second.do(24) == "None"
    newest = newest_good(place, pytest.fail)
    assert newest == folder_of(place, 24)
    assert [shard.file for shard in read_manifest(newest).shards] == ["rank-0-of-1-second.safetensors"]


class Worker:
    """A process that commits checkpoints when it is told to."""

    def __init__(self, place: AnyPath, name: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", WORK, str(place), name], **pipes)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def do(self, step: int) -> str:
        """Begin with 0, or commit the checkpoint of a step."""
        print(step, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()
