"""The working folder of a run whose directory is an object store, and how a run directory by URI is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cluster.config import RunConfig, public
from cluster.messages import LayerProfiled, Outbox
from cluster.profiles import FOLDER, TraceWriter
from cluster.storage import AnyPath, locate, read, write_whole
from cluster.tracking.delivery import PROGRESS_NAME
from cluster.tracking.spool import SPOOL_NAME, Spool, SpoolBusyError
from jobs.mirror import Mirror
from jobs.run_directory import choose
from simmatch.config import ConfigError
from simmatch.profile import Recording, Trace
from simmatch.remote import StorageError
from tests.object_store import BUCKET, ObjectStore, object_store

FIRST, SECOND, OTHER = (json.dumps({"kind": "metrics", "step": step}).encode() + b"\n" for step in (1, 2, 3))


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def place(store: ObjectStore, tmp_path: Path) -> AnyPath:
    return locate(f"s3://{BUCKET}/{tmp_path.name}/run")


def mirror(place: AnyPath, work: Path) -> Mirror:
    work.mkdir(exist_ok=True)
    return Mirror(place, work)


def test_another_machine_begins_with_what_was_brought(place: AnyPath, tmp_path: Path) -> None:
    here = mirror(place, tmp_path / "here")
    for name, content in ((SPOOL_NAME, FIRST), (PROGRESS_NAME, b"offset"), ("config.yaml", b"name: x")):
        (here.work / name).write_bytes(content)
    (here.work / "figures").mkdir()
    (here.work / "figures" / "curve.png").write_bytes(b"png")
    here.close()
    assert read(place / "config.yaml") == b"name: x"
    assert read(place / "figures" / "curve.png") == b"png"
    there = mirror(place, tmp_path / "there")
    there.pull()
    assert (there.work / SPOOL_NAME).read_bytes() == FIRST
    assert (there.work / PROGRESS_NAME).read_bytes() == b"offset"


def test_copied_bytes_are_reported_and_waiting_events_are_flushed_first(place: AnyPath, tmp_path: Path) -> None:
    """The tracker sends no more than that: the next machine takes over the very same records, times and all."""
    work = tmp_path / "here"
    work.mkdir()
    pushed_bytes: list[int] = []
    waiting = [FIRST, SECOND + b"{half"]

    def flush() -> None:
        with (work / SPOOL_NAME).open("ab") as file:
            file.write(waiting.pop(0))

    here = Mirror(place, work, flush=flush, pushed=pushed_bytes.append)
    here.push()
    here.push()
    assert pushed_bytes == [len(FIRST), len(FIRST + SECOND)]
    there = Mirror(place, tmp_path / "there", pushed=pushed_bytes.append)
    there.pull()
    assert pushed_bytes[2:] == [len(FIRST + SECOND)]
    assert (there.work / SPOOL_NAME).read_bytes()[: pushed_bytes[-1]] == FIRST + SECOND


def test_records_of_this_machine_that_go_on_are_kept(place: AnyPath, tmp_path: Path) -> None:
    """The driver died before it could bring its last lines."""
    here = mirror(place, tmp_path / "here")
    write_whole(place / SPOOL_NAME, FIRST)
    (here.work / SPOOL_NAME).write_bytes(FIRST + SECOND)
    (here.work / PROGRESS_NAME).write_bytes(b"its own")
    here.pull()
    assert (here.work / SPOOL_NAME).read_bytes() == FIRST + SECOND
    assert (here.work / PROGRESS_NAME).read_bytes() == b"its own"


def test_records_of_another_machine_replace_stale_ones(place: AnyPath, tmp_path: Path) -> None:
    here = mirror(place, tmp_path / "here")
    write_whole(place / SPOOL_NAME, FIRST + OTHER)
    (here.work / SPOOL_NAME).write_bytes(FIRST + SECOND)
    (here.work / PROGRESS_NAME).write_bytes(b"its own")
    here.pull()
    assert (here.work / SPOOL_NAME).read_bytes() == FIRST + OTHER
    assert not (here.work / PROGRESS_NAME).exists()  # sending all again does no harm


def test_a_working_folder_in_use_is_left_alone(place: AnyPath, tmp_path: Path) -> None:
    here = mirror(place, tmp_path / "here")
    taken = Spool(here.work / SPOOL_NAME).open()
    with pytest.raises(SpoolBusyError):
        here.pull()
    taken.close()


def test_the_model_comes_to_this_machine(place: AnyPath, tmp_path: Path) -> None:
    write_whole(place / "model" / "config.yaml", b"layers")
    write_whole(place / "model" / "model.safetensors", b"weights")
    folder = mirror(place, tmp_path / "here").fetch_model()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.yaml": b"layers",
        "model.safetensors": b"weights",
    }


def test_traces_come_to_this_machine_and_their_tables_go_there(place: AnyPath, tmp_path: Path) -> None:
    name, report = "layer-0-rank-1.json.gz", Outbox()
    writer = TraceWriter(place, 1, report, patience_s=60.0)
    writer.submit(Recording(0, 4, 20, Trace(b'{"traceEvents": []}')))
    writer.close()
    (told,) = report.messages
    assert isinstance(told, LayerProfiled)
    assert told.file == name
    here = mirror(place, tmp_path / "here")
    folder = here.fetch(FOLDER, [name])
    assert (folder / name).read_bytes() == read(place / FOLDER / name)
    (folder / "summary.json").write_bytes(b"[]")
    here.close()
    assert read(place / FOLDER / "summary.json") == b"[]"


def test_a_store_that_is_away_takes_nothing(store: ObjectStore, place: AnyPath, tmp_path: Path) -> None:
    (tmp_path / SPOOL_NAME).write_bytes(FIRST)
    here = Mirror(place, tmp_path)
    store.stop()
    try:
        with pytest.raises(StorageError):
            here.push()  # and so nothing is committed
        with pytest.raises(StorageError):
            here.close()
    finally:
        store.start()
    here.close()
    assert read(place / SPOOL_NAME) == FIRST


def test_a_local_run_directory_has_no_mirror(tmp_path: Path) -> None:
    here = mirror(tmp_path / "run", tmp_path / "run")
    here.pull()
    here.close()
    assert list((tmp_path / "run").iterdir()) == []
    assert here.fetch_model() == tmp_path / "run" / "model"


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_a_run_directory_by_uri(
    place: AnyPath, make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = choose(make_config(), str(place), "auto")
    assert (str(start.destination), start.resume) == (str(place), None)
    assert start.run_dir.parent == tmp_path / "runs" / "remote"
    assert not (tmp_path / "runs").exists()  # choosing makes nothing
    write_whole(place / "config.yaml", yaml.safe_dump(public(make_config())).encode())
    assert "continuing the unfinished run in s3://" in choose(make_config(), str(place), "auto").note
    with pytest.raises(ConfigError, match="belongs to another configuration: seed: expected 0, got 1"):
        choose(make_config("seed=1"), str(place), "auto")
    write_whole(place / "summary.json", b'{"status": "FINISHED"}')
    assert choose(make_config(), str(place), "auto").finished
    assert str(choose(make_config(), str(place), "never").destination) == f"{place}-2"


@pytest.mark.parametrize(
    ("run_dir", "expected"),
    [
        ("foo://bucket/x", "a folder or a URI such as s3://bucket/prefix, got 'foo://bucket/x'"),
        ("s3://me:hush@bucket/x", "a URI without credentials or options"),
    ],
)
def test_a_run_directory_that_cannot_be(run_dir: str, expected: str, make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"^--run-dir: expected ") as caught:
        choose(make_config(), run_dir, "auto")
    assert expected in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_store_that_does_not_answer(
    store: ObjectStore, place: AnyPath, make_config: Callable[..., RunConfig]
) -> None:
    store.stop()
    try:
        with pytest.raises(ConfigError, match=r"^--run-dir: expected a store that answers, got s3://"):
            choose(make_config(), str(place), "auto")
    finally:
        store.start()
