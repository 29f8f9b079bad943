"""Files by URI, here and on a real S3 protocol server: whole or absent, one kind of error, no endless wait."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import cluster.storage
import simmatch.remote
from cluster.checkpoints.committer import Committed, Committer, commit, prune, publish_model
from cluster.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    Cursor,
    LayerState,
    Manifest,
    folder_of,
    read_manifest,
)
from cluster.checkpoints.reader import Reader, newest_good
from cluster.checkpoints.shard_writer import write_shard
from cluster.storage import (
    AnyPath,
    check_exclusive,
    copy_whole,
    create_whole,
    exists,
    fetch,
    find,
    is_local,
    locate,
    read,
    remove,
    write_whole,
)
from simmatch.model import MODEL_FILES
from simmatch.remote import StorageError, retry
from simmatch.sharding.rows import Rows, split_rows
from tests.object_store import BUCKET, ObjectStore, object_store

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, store: ObjectStore) -> AnyPath:
    """A run directory that holds nothing yet."""
    return tmp_path / "run" if request.param == "local" else locate(f"s3://{BUCKET}/{tmp_path.name}/run")


def write(run_dir: AnyPath, step: int, world_size: int = 2, token: str = "") -> AnyPath:
    """A checkpoint of w = step + 0 … 5."""
    folder = folder_of(run_dir, step)
    shards = []
    for rank, rows in enumerate(split_rows(6, world_size)):
        tensors = {"w": step + torch.arange(6.0)[rows.start : rows.stop]}
        shards.append(write_shard(folder, rank, world_size, tensors, {"w": rows}, token))
    commit(folder, manifest_of(step, world_size, shards))
    return folder


def manifest_of(step: int, world_size: int, shards: list) -> Manifest:  # type: ignore[type-arg]
    return Manifest(
        cursor=Cursor(step=step, layer=0, updates=step),
        config={},
        layers=[LayerState(usual=2.0)],
        shards=shards,
    )


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_of_this_machine_and_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("runs/x") == tmp_path / "runs" / "x"
    assert locate(f"file://{tmp_path}/x") == tmp_path / "x"
    remote = locate("s3://bucket/runs/x")
    assert (str(remote), remote.name, str(remote.parent)) == ("s3://bucket/runs/x", "x", "s3://bucket/runs")
    assert (is_local(tmp_path), is_local(remote)) == (True, False)
    assert str(pickle.loads(pickle.dumps(remote)) / "y") == "s3://bucket/runs/x/y"  # as an actor gets it


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("foo://bucket/x", "a folder or a URI such as s3://bucket/prefix, got 'foo://bucket/x'"),
        ("s3://key:hush@bucket/x", "a URI without credentials or options"),
        ("s3://bucket?secret=hush/x", "a URI without credentials or options"),
    ],
)
def test_a_place_that_cannot_be(place: str, expected: str) -> None:
    with pytest.raises(ValueError, match=r"^a ") as caught:
        locate(place)
    assert expected in str(caught.value)
    assert "hush" not in str(caught.value)


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_and_folders(place: AnyPath, tmp_path: Path) -> None:
    assert not exists(place)
    assert find(place, "*") == []
    write_whole(place / "b" / "two", b"2")
    write_whole(place / "a", b"1")
    write_whole(place / "a", b"3")
    assert read(place / "a") == b"3"
    assert [path.name for path in find(place, "*")] == ["a", "b"]
    assert fetch(place / "b" / "two", lambda: tmp_path / "copies").read_bytes() == b"2"
    assert exists(place / "b")
    remove(place / "b")
    remove(place / "b")  # gone already
    assert not exists(place / "b" / "two")
    with pytest.raises(FileNotFoundError, match="two"):
        read(place / "b" / "two")


def test_a_file_is_copied_to_and_from_any_place(place: AnyPath, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"1")
    copy_whole(tmp_path / "source", place / "deep" / "one")
    copy_whole(place / "deep" / "one", place / "two")
    copy_whole(place / "two", tmp_path / "copies" / "two")
    assert (read(place / "deep" / "one"), read(place / "two")) == (b"1", b"1")
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["two"]
    assert (tmp_path / "copies" / "two").read_bytes() == b"1"
    assert (tmp_path / "source").exists()
    with pytest.raises(FileNotFoundError, match="missing"):
        copy_whole(place / "missing", tmp_path / "copies" / "missing")
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["two"]


def test_a_file_is_created_once(place: AnyPath) -> None:
    """Whoever comes second is told; whoever repeats its own call, because the answer was lost, is not."""
    create_whole(place / "deep" / "owner", b"first")
    create_whole(place / "deep" / "owner", b"first")
    with pytest.raises(FileExistsError, match="owner"):
        create_whole(place / "deep" / "owner", b"second")
    assert read(place / "deep" / "owner") == b"first"
    assert [path.name for path in find(place / "deep", "*")] == ["owner"]
    assert check_exclusive(place) is None
    assert [path.name for path in find(place, "*")] == ["deep"]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_create_a_file_one_succeeds(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    contents = [str(number).encode() * 1000 for number in range(10, 26)]
    created: list[bytes] = []

    def create(content: bytes) -> None:
        with suppress(FileExistsError):
            create_whole(tmp_path / "owner", content)
            created.append(content)

    threads = [threading.Thread(target=create, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert created == [read(tmp_path / "owner")]
    assert [path.name for path in tmp_path.iterdir()] == ["owner"]


def test_a_link_or_a_folder_is_not_a_file_that_was_created(tmp_path: Path) -> None:
    (tmp_path / "same").write_bytes(b"first")
    (tmp_path / "link").symlink_to("same")
    (tmp_path / "folder").mkdir()
    for name in ("link", "folder"):
        with pytest.raises(FileExistsError, match=name):
            create_whole(tmp_path / name, b"first")


@pytest.mark.parametrize("kind", ["ignores", "refuses"])
def test_a_store_that_does_not_know_the_header(kind: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files can be written there, and it is noticed that they are not protected."""
    from moto.s3.exceptions import S3ClientError
    from moto.s3.responses import S3Response
    from werkzeug.datastructures import Headers

    put_object = S3Response.put_object

    def put(response: S3Response) -> object:
        if kind == "refuses" and "If-None-Match" in response.headers:
            raise S3ClientError("NotImplemented", "A header you provided implies functionality not implemented")
        response.headers = Headers(list(response.headers.items()))
        response.headers.pop("If-None-Match", None)
        return put_object(response)

    monkeypatch.setattr(S3Response, "put_object", put)
    place = locate(f"s3://{BUCKET}/{kind}")
    create_whole(place / "owner", b"first")
    with pytest.raises(FileExistsError, match="owner"):
        create_whole(place / "owner", b"second")
    assert read(place / "owner") == b"first"
    assert check_exclusive(place) == f"{place}: its store replaces a file that was to be created"


def test_an_answer_that_is_lost(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks again by itself, and is told that the file exists: it is its own."""
    from moto.s3.responses import S3Response

    put_object, calls = S3Response.put_object, []

    def put(response: S3Response) -> object:
        answer = put_object(response)
        calls.append(answer)
        if len(calls) == 1:
            raise RuntimeError("the answer is lost")  # the client sees a failure of the server
        return answer

    monkeypatch.setattr(S3Response, "put_object", put)
    path = locate(f"s3://{BUCKET}/lost/owner")
    create_whole(path, b"first")
    assert read(path) == b"first"


def test_a_file_that_is_replaced_while_it_is_read(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a lease that is renewed: one content or the other is read, and no error."""
    from moto.s3.responses import S3Response

    path, head_object = locate(f"s3://{BUCKET}/replaced/lease"), S3Response.head_object
    write_whole(path, "first")

    def head(*arguments: Any, **named: Any) -> object:
        answer = head_object(*arguments, **named)
        write_whole(path, "second")
        return answer

    monkeypatch.setattr(S3Response, "head_object", head)
    assert read(path) in (b"first", b"second")


@pytest.mark.parametrize("replaces", [True, False])
def test_a_model_gets_its_place(place: AnyPath, replaces: bool) -> None:
    """The model of an abandoned group that still writes is not published; nor is half of one."""
    new, old, half = (f"model-0123abc{number}" for number in range(3))
    for name, content in ((new, b"new"), (old, b"old"), *([("model", b"before")] if replaces else [])):
        for file in MODEL_FILES:
            write_whole(place / name / file, content)
    publish_model(place, new)
    assert [read(place / "model" / file) for file in MODEL_FILES] == [b"new", b"new"]
    assert [path.name for path in find(place, "*")] == ["model"]
    write_whole(place / half / MODEL_FILES[0], b"half")
    with pytest.raises(OSError, match=rf"{half}.*: expected the model of rank 0, got nothing"):
        publish_model(place, half)
    assert [read(place / "model" / file) for file in MODEL_FILES] == [b"new", b"new"]


@pytest.mark.parametrize("links", [True, False])
def test_a_disk_without_room_for_a_second_copy_takes_the_model(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On file systems without links the model is copied, and lost nowhere when that fails."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", refuse)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for file in MODEL_FILES:
        write_whole(tmp_path / "model-0123abcd" / file, b"new")
    with nullcontext() if links else pytest.raises(OSError, match="No space left"):
        publish_model(tmp_path, "model-0123abcd")
    folder = tmp_path / ("model" if links else "model-0123abcd")
    assert [read(folder / file) for file in MODEL_FILES] == [b"new", b"new"]


def test_what_a_person_keeps_beside_a_model_stays(place: AnyPath) -> None:
    """A run directory may be a folder in which other things lie as well."""
    own = ("model/notes.txt", "model-of-ada/weights", "model-zoo", "model-0123abcd-old/weights")
    for name in own:
        write_whole(place / name, b"ours")
    for file in MODEL_FILES:
        write_whole(place / "model-0123abcd" / file, b"new")
    publish_model(place, "model-0123abcd")
    assert [read(place / "model" / file) for file in MODEL_FILES] == [b"new", b"new"]
    assert [read(place / name) for name in own] == [b"ours"] * len(own)


@pytest.mark.parametrize("fault", ["missing", "short"])
def test_no_checkpoint_without_its_shards(place: AnyPath, fault: str) -> None:
    """A rank wrote its shard where this process does not see it, or sees less of it; the one before stays."""
    write(place, 4)
    folder = folder_of(place, 8)
    shard = write_shard(folder, 0, 1, {"w": torch.arange(6.0)}, {"w": Rows.all(6)})
    whole = read(folder / shard.file)
    assert shard.size_bytes == len(whole)
    remove(folder / shard.file)
    if fault == "short":
        write_whole(folder / shard.file, whole[:-1])
    committer = Committer(place, keep=1)
    committer.submit(manifest_of(8, 1, [shard]))
    ((step, why),) = [(outcome.step, outcome.reason) for outcome in committer.settled(60.0)]
    assert step == 8
    assert why is not None
    size = "nothing" if fault == "missing" else str(len(whole) - 1)
    assert f"{shard.file}: expected {len(whole)} bytes of rank 0, got {size}" in why
    assert newest_good(place, pytest.fail) == folder_of(place, 4)


def test_a_local_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert read(tmp_path / "file") == b"old"


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_any_rows_of_a_checkpoint(place: AnyPath) -> None:
    folder = write(place, 4, world_size=3)
    reader = Reader(folder, read_manifest(folder))
    assert torch.equal(reader.rows("w", Rows(1, 5, 6, 4)), 4 + torch.arange(1.0, 5.0))
    assert torch.equal(reader.rows("w", Rows.all(6)), 4 + torch.arange(6.0))


def test_the_newest_sound_one_is_found_and_old_ones_go(place: AnyPath) -> None:
    for step in (4, 8, 12, 16):
        write(place, step)
    prune(place, 3, 16)
    assert [path.name for path in find(place / "checkpoints", "*")] == [f"step-{step:08d}" for step in (8, 12, 16)]
    shard = read_manifest(folder_of(place, 16)).shards[1].file
    write_whole(folder_of(place, 16) / shard, b"damaged")
    write_whole(folder_of(place, 12) / MANIFEST, b"{}")
    warnings: list[str] = []
    assert newest_good(place, warnings.append) == folder_of(place, 8)
    assert [text.partition(" ")[0] for text in warnings] == ["step-00000016", "step-00000012"]
    assert str(folder_of(place, 16) / shard) in warnings[0]
    assert str(folder_of(place, 12) / MANIFEST) in warnings[1]


def test_a_group_that_was_given_up_touches_nothing_of_the_next(place: AnyPath) -> None:
    """Its rank still runs and writes its shard of the same step, with other values, before and after the commit."""
    folder = folder_of(place, 4)
    rows = Rows.all(6)
    write_shard(folder, 0, 2, {"w": torch.zeros(3)}, {"w": Rows(0, 3, 6, 3)}, "old")
    write(place, 4, token="new")
    assert newest_good(place, pytest.fail) == folder
    write_shard(folder, 0, 2, {"w": torch.zeros(3)}, {"w": Rows(0, 3, 6, 3)}, "old")
    assert torch.equal(Reader(folder, read_manifest(folder)).rows("w", rows), 4 + torch.arange(6.0))


def test_copies_of_shards_go_with_their_reader(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = write(locate(f"s3://{BUCKET}/copies"), 4)
    reader = Reader(folder, read_manifest(folder))
    reader.rows("w", Rows(0, 3, 6, 3))
    (copies,) = tmp_path.iterdir()
    assert len(list(copies.iterdir())) == 1  # only the shard that was needed
    del reader
    assert list(tmp_path.iterdir()) == []


# -- a store that is away ----------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients made from here on ask once."""
    import s3fs

    monkeypatch.setattr(simmatch.remote, "ATTEMPTS", 1)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_is_away_is_one_error_and_not_an_empty_one(impatient: None, store: ObjectStore) -> None:
    place = locate(f"s3://{BUCKET}/away")
    folder = write(place, 4)
    store.stop()
    try:
        for call in (
            lambda: read(folder / MANIFEST),
            lambda: write_whole(place / "x", b""),
            lambda: newest_good(place, pytest.fail),
            lambda: read_manifest(folder),
            lambda: write(place, 8),
        ):
            with pytest.raises(StorageError, match="s3://simmatch-test/away"):
                call()
    finally:
        store.start()
    assert newest_good(place, pytest.fail) == folder  # nothing was lost, nothing half there


def test_a_store_that_comes_back_in_time_was_never_away(impatient: None, store: ObjectStore) -> None:
    place = locate(f"s3://{BUCKET}/back")
    folder = write(place, 4)
    store.stop()
    timer = threading.Timer(2.0, store.start)
    timer.start()
    try:
        manifest = retry(lambda: read_manifest(folder), 60.0)
        assert manifest.cursor.step == 4
    finally:
        timer.join()
    store.stop()
    timer = threading.Timer(2.0, store.start)
    timer.start()
    try:
        reader = Reader(folder, manifest, patience_s=60.0)
        assert torch.equal(reader.rows("w", Rows.all(6)), 4 + torch.arange(6.0))
    finally:
        timer.join()


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def away() -> None:
        calls.append(1)
        raise StorageError("s3://x: away")

    started = time.monotonic()
    with pytest.raises(StorageError, match="away"):
        retry(away, 1.2)
    assert 2 <= len(calls) <= 3
    assert time.monotonic() - started < 10


def test_a_server_that_never_answers_is_left_in_time(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts the connection and says nothing; the call gives up by itself, whatever the client's own limits."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(cluster.storage, "LIMIT_S", 1.0)
        started = time.monotonic()
        with pytest.raises(StorageError, match="no answer within 1 s"):
            read(locate(f"s3://{BUCKET}/silent"))
        assert time.monotonic() - started < 10


# -- the committer -----------------------------------------------------------------------------------------------------


def test_commits_come_in_order_and_prune(place: AnyPath) -> None:
    committer = Committer(place, keep=1)
    for step in (4, 8):
        folder = folder_of(place, step)
        shards = [write_shard(folder, 0, 1, {"w": torch.arange(6.0)}, {"w": Rows.all(6)})]
        committer.submit(manifest_of(step, 1, shards))
    assert committer.settled(60.0) == [Committed(4), Committed(8)]
    assert committer.settled(0.0) == []
    assert [path.name for path in find(place / "checkpoints", "*")] == ["step-00000008"]


def test_what_has_to_be_safe_first_comes_first(tmp_path: Path) -> None:
    def away() -> None:
        assert not (folder_of(tmp_path, 4) / MANIFEST).exists()
        raise StorageError("s3://x: away")

    committer = Committer(tmp_path, keep=1, before=away)
    committer.submit(manifest_of(4, 1, []))
    assert committer.settled(60.0) == [Committed(4, "s3://x: away")]
    assert newest_good(tmp_path, pytest.fail) is None


def test_a_commit_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    monkeypatch.setattr("cluster.checkpoints.committer.commit", lambda *_: free.wait(60))
    committer = Committer(tmp_path, keep=1)
    committer.submit(manifest_of(4, 1, []))
    started = time.monotonic()
    assert committer.settled(0.1) == []
    assert time.monotonic() - started < 5
    free.set()
    assert committer.settled(60.0) == [Committed(4)]


def test_a_failed_commit_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    committer = Committer(tmp_path, keep=1)
    committer.submit(manifest_of(4, 1, []))
    (outcome,) = committer.settled(60.0)
    assert outcome.step == 4
    assert outcome.reason is not None
    assert "step-00000004" in outcome.reason


def test_a_checkpoint_is_absent_until_its_manifest_is_there(place: AnyPath) -> None:
    folder = folder_of(place, 4)
    write_shard(folder, 0, 1, {"w": torch.arange(6.0)}, {"w": Rows.all(6)})
    assert newest_good(place, pytest.fail) is None
    with pytest.raises(CheckpointError, match="found no such file"):
        read_manifest(folder)
