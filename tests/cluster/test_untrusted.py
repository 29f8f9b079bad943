"""A run directory that somebody else can write to: what it names is read, written and sent only where it lies in it.

Each test plays the stranger: the spool, the offset, a manifest and links as he would leave them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import jobs.sync
from cluster.checkpoints.committer import commit
from cluster.checkpoints.manifest import (
    DIGEST,
    MANIFEST,
    CheckpointError,
    Cursor,
    LayerState,
    Manifest,
    digest_of,
    read_manifest,
)
from cluster.checkpoints.reader import Reader
from cluster.checkpoints.shard_writer import write_shard
from cluster.summary import RunRecord
from cluster.tracking.config import TrackingConfig
from cluster.tracking.delivery import RejectedError, SendProgress
from cluster.tracking.events import MOST_LAYERS, event_of, parse_event
from cluster.tracking.experiments import _folder_name
from cluster.tracking.mlflow_sink import MlflowSink
from cluster.tracking.spool import LONGEST_LINE_BYTES, Spool
from cluster.tracking.tracker import Tracker
from simmatch.config import ConfigError
from simmatch.files import PARTIAL, open_inside, write_whole
from simmatch.sharding.rows import Rows
from tests.open_files import open_files

Values = dict[str, Any]

START: Values = {
    "kind": "start", "time_ms": 1, "run_key": "0" * 32, "attempt": 1, "name": "run", "experiment": "simmatch",
    "layers": 1, "uri": "http://127.0.0.1:1", "tags": {},
}  # fmt: skip
ARTIFACT = {"kind": "artifact", "time_ms": 1, "path": "config.yaml", "folder": None, "name": "config.yaml"}
MODEL = {"kind": "model", "time_ms": 1, "path": "model", "input_shape": [1, 2, 2]}
METRICS = {"kind": "metrics", "time_ms": 1, "step": 1, "values": {"objective": 1.0}, "layer": 0}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with a file, beside it a secret that is none of its business."""
    (tmp_path / "secret").write_text("hush")
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "figures" / "a.png").write_bytes(b"png")
    return folder


# --- events ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "changes", "expected"),
    [
        (ARTIFACT, {"name": "/etc/cron.d/x"}, "name: expected a path in the run directory, got '/etc/cron.d/x'"),
        (ARTIFACT, {"name": "../x"}, "name: expected a path in the run directory, got '../x'"),
        (ARTIFACT, {"name": "a/b"}, "name: expected a plain name, got 'a/b'"),
        (ARTIFACT, {"name": "x" * 256}, "name: expected a plain name, got 'xxx"),
        (ARTIFACT, {"name": None}, "name: expected"),
        (ARTIFACT, {"path": "/etc/passwd"}, "path: expected a path in the run directory, got '/etc/passwd'"),
        (ARTIFACT, {"path": "file:///etc/passwd"}, "path: expected a path in the run directory, got 'file:///etc"),
        (ARTIFACT, {"path": "a/../../x"}, "path: expected a path in the run directory"),
        (ARTIFACT, {"path": "a\0b"}, "path: expected a path in the run directory"),
        (ARTIFACT, {"folder": "../up"}, "folder: expected a path in the run directory"),
        (MODEL, {"path": "/srv/model"}, "path: expected a path in the run directory"),
        (MODEL, {"input_shape": [10**6, 10**6, 10**6]}, "input_shape: expected an image of at most"),
        (MODEL, {"input_shape": [1, 2]}, "input_shape: expected"),
        (START, {"run_key": "x' OR ''='"}, "run_key: expected text that matches"),
        (START, {"layers": 10**9}, f"layers: expected less than or equal to {MOST_LAYERS}, got 1000000000"),
        (START, {"experiment": "x" * 10**6}, "experiment: expected at most 10000 characters, got 1000000"),
        (METRICS, {"layer": {}}, "layer: expected an integer, got {}"),
        (METRICS, {"layer": 10**6}, "layer: expected less than 1000"),
        (METRICS, {"step": "1"}, "step: expected an integer, got '1'"),
        (METRICS, {"step": 2**70}, "step: expected"),
        (METRICS, {"values": {"a": "x"}}, "values.a: expected a number"),
        (METRICS, {"values": [1]}, "values: expected"),
        (METRICS, {"time_ms": None}, "time_ms: expected an integer"),
        (METRICS, {"kind": "exec"}, "kind: expected one of start, params"),
        (METRICS, {"kind": ["start"]}, "kind: expected one of start, params"),
    ],
)
def test_an_event_that_is_not_of_its_kind_is_one_line(event: Values, changes: Values, expected: str) -> None:
    assert parse_event(event).kind == event["kind"]
    with pytest.raises(ConfigError) as caught:
        parse_event(event | changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_later_versions_add_is_left_out() -> None:
    assert parse_event(METRICS | {"more": [1]}).model_dump() == METRICS


# --- files -------------------------------------------------------------------------------------------------------


def test_files_of_the_run_directory_are_opened(run_dir: Path) -> None:
    with open_inside(run_dir, "figures/a.png") as file:
        assert file.read() == b"png"
    with open_inside(run_dir, "config.yaml", 8) as file:
        assert file.read() == b"seed: 1\n"
    with pytest.raises(ValueError, match=r"expected at most 7 bytes, got 8 in .config\.yaml."):
        open_inside(run_dir, "config.yaml", 7)
    with pytest.raises(FileNotFoundError):
        open_inside(run_dir, "figures/b.png")


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "../secret", "link", "linked/secret", "figures/up", "pipe", "figures", "", "device"]
)
@pytest.mark.timeout(20)
def test_what_lies_elsewhere_is_not_opened(run_dir: Path, place: str) -> None:
    (run_dir / "link").symlink_to(run_dir.parent / "secret")
    (run_dir / "linked").symlink_to(run_dir.parent)
    (run_dir / "figures" / "up").symlink_to("../../secret")
    (run_dir / "device").symlink_to("/dev/zero")
    os.mkfifo(run_dir / "pipe")
    with pytest.raises(ValueError, match=r"^expected a"):
        open_inside(run_dir, place)
    assert open_files(run_dir.parent, "/etc/passwd", "/dev/zero") == []


def sink_of(run_dir: Path) -> tuple[MlflowSink, Mock, Mock]:
    client, log_model = Mock(), Mock()
    client.get_run.return_value = SimpleNamespace(info=SimpleNamespace(run_id="id"))
    sink = MlflowSink(client, "http://127.0.0.1:9", run_dir, log_model)
    sink.connect(parse_event(START), {"parent": "id", "0": "id-0"})
    return sink, client, log_model


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "TARGET"},
        {"name": "../../../../../../../TARGET"},
        {"path": "/etc/passwd"},
        {"path": "../secret"},
        {"path": "link"},
        {"folder": "../../x"},
    ],
)
def test_an_artifact_is_neither_read_nor_written_elsewhere(run_dir: Path, tmp_path: Path, changes: Values) -> None:
    (run_dir / "link").symlink_to(tmp_path / "secret")
    target = str(tmp_path / "written")
    changes = {key: value.replace("TARGET", target) for key, value in changes.items()}
    sink, client, _ = sink_of(run_dir)
    sink.send([parse_event(ARTIFACT)])
    assert client.log_artifact.call_count == 1
    with pytest.raises(RejectedError):
        sink.send([event_of(json.dumps(ARTIFACT | changes).encode())])
    assert client.log_artifact.call_count == 1
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("linked", ["model", "model/config.yaml", "model/model.safetensors"])
def test_a_model_is_not_loaded_from_elsewhere(run_dir: Path, tmp_path: Path, linked: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (other / name).write_text("of somebody else")
    sink, _, log_model = sink_of(run_dir)
    if linked == "model":
        (run_dir / "model").symlink_to(other)
    else:
        (run_dir / "model").mkdir()
        (run_dir / linked).symlink_to(other / Path(linked).name)
    with pytest.raises(RejectedError, match="leads through a link"):
        sink.send([parse_event(MODEL)])
    log_model.assert_not_called()


@pytest.mark.parametrize(
    ("name", "folder"),
    [("simmatch", "simmatch"), ("/etc/x", "%2Fetc%2Fx"), ("..", "%2E%2E"), ("a b/../c", "a b%2F..%2Fc")],
)
def test_an_experiments_folder_lies_where_it_belongs(name: str, folder: str) -> None:
    assert _folder_name(name) == folder
    assert Path("/root/artifacts", folder).resolve().parent == Path("/root/artifacts")


def test_a_link_in_place_of_a_file_is_not_written_through(run_dir: Path, tmp_path: Path) -> None:
    for name in ("summary.json", f"summary.json{PARTIAL}"):
        (run_dir / name).symlink_to(tmp_path / "secret")
    write_whole(run_dir / "summary.json", "{}")
    write_whole(run_dir / "other.json", lambda file: file.write_text("{}"))
    assert (tmp_path / "secret").read_text() == "hush"
    assert (run_dir / "summary.json").read_text() == "{}"
    assert not (run_dir / "summary.json").is_symlink()


@pytest.mark.timeout(20)
def test_a_spool_that_is_a_link_is_neither_cut_nor_appended_to(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "events.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match=r"events\.jsonl"):
        Spool(run_dir / "events.jsonl").open()
    (run_dir / "events.jsonl").unlink()
    os.mkfifo(run_dir / "events.jsonl")
    with pytest.raises(OSError, match=r"events\.jsonl"):
        Spool(run_dir / "events.jsonl").open()
    assert (tmp_path / "secret").read_text() == "hush"


def test_a_line_longer_than_any_of_ours_is_passed_over(tmp_path: Path) -> None:
    content = [b'{"kind":"a"}', b'{"x":"' + b"y" * (2 * LONGEST_LINE_BYTES) + b'"}', b'{"kind":"b"}']
    (tmp_path / "events.jsonl").write_bytes(b"".join(line + b"\n" for line in content))
    lines = list(Spool(tmp_path / "events.jsonl").read())
    assert [event.kind for event, _ in lines] == ["a", "unreadable", "b"]
    assert lines[-1][1] == (tmp_path / "events.jsonl").stat().st_size
    assert [event.kind for event, _ in Spool(tmp_path / "events.jsonl").read(lines[1][1])] == ["b"]


@pytest.mark.parametrize(
    "content",
    [
        '{"destination":"here","offset":"9"}',
        '{"destination":"here","offset":9,"runs":{"parent":1}}',
        '{"destination":"here","offset":9,"runs":{"parent":"\\u001b[2J"}}',
        '{"destination":"here","offset":9,"runs":{"parent":"x\' OR 1=1"}}',
        "[]",
    ],
)
def test_an_offset_of_other_types_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "events.offset").write_text(content)
    assert SendProgress.load(tmp_path / "events.offset", "here", 100) == SendProgress("here")


def test_records_that_are_none_are_not_taken_over(tmp_path: Path) -> None:
    sound = METRICS | {"values": {"objective": 0.5, "bytes_exchanged": 1, "num_exchanges": 2}}
    strange = [METRICS, sound | {"layer": {}}, sound | {"values": 3}, sound | {"step": "x"}, sound]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in strange))
    record = RunRecord()
    record.continue_from(tmp_path / "events.jsonl")
    assert record.curves == {0: [(1, {"objective": 0.5, "bytes_exchanged": 1.0, "num_exchanges": 2.0})]}


# --- manifests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "shard"),
    [
        ({}, {"file": "/etc/passwd"}),
        ({}, {"file": "../../../secret"}),
        ({}, {"file": ".."}),
        ({}, {"rows": {"w": [0]}}),
        ({}, {"rows": {"w": [-3, 3]}}),
        ({}, {"rows": {}}),
        ({}, {"shapes": {"other": [6]}, "rows": {"other": [0, 6]}}),
        ({"cursor": {"step": -1, "layer": 0, "updates": 1}}, {}),
        ({"layers": [{"usual": "2"}]}, {}),
        ({"constants": [{"sha256": "../../secret", "rows": {}, "shapes": {}}]}, {}),
        ({"constants": [{"sha256": 63 * "0" + "/", "rows": {}, "shapes": {}}]}, {}),
        ({"constants": [{"sha256": 64 * "0" + "\n", "rows": {}, "shapes": {}}]}, {}),
        ({"rate": 1e9}, {}),
    ],
)
def test_a_manifest_that_names_something_else(tmp_path: Path, changes: Values, shard: Values) -> None:
    """Its digest is right: whoever writes it can compute that."""
    folder = tmp_path / "checkpoints" / "step-00000004"
    written = write_shard(folder, 0, 1, {"w": torch.arange(6.0)}, {"w": Rows.all(6)})
    manifest = Manifest(
        cursor=Cursor(step=4, layer=0, updates=4), config={},
        layers=[LayerState(usual=2.0)], shards=[written],
    )  # fmt: skip
    commit(folder, manifest)
    assert Reader(folder, read_manifest(folder)).rows("w", Rows.all(6)).tolist() == [0, 1, 2, 3, 4, 5]
    values: dict[str, Any] = manifest.model_dump(mode="json") | changes
    values["shards"][0] |= shard
    (folder / MANIFEST).write_text(json.dumps({DIGEST: digest_of(values), **values}))
    with pytest.raises(CheckpointError) as caught:
        Reader(folder, read_manifest(folder)).rows("w", Rows.all(6))
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(20)
def test_a_shard_that_is_a_link_or_a_pipe_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    written = write_shard(folder, 0, 1, {"w": torch.arange(6.0)}, {"w": Rows.all(6)})
    manifest = Manifest(
        cursor=Cursor(step=4, layer=0, updates=4), config={}, layers=[],
        shards=[written],
    )  # fmt: skip
    (folder / written.file).rename(tmp_path / "elsewhere")
    (folder / written.file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="found a link or something else"):
        Reader(folder, manifest).verify()
    (folder / written.file).unlink()
    os.mkfifo(folder / written.file)
    with pytest.raises(CheckpointError, match="found a link or something else"):
        Reader(folder, manifest).verify()


# --- a server that only the record names -------------------------------------------------------------------------


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "staple-of-tokens-77")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def leave(run_dir: Path, uri: str) -> None:
    (run_dir / "events.jsonl").write_text(json.dumps(START | {"uri": uri}) + "\n")


@pytest.mark.usefixtures("credentials")
def test_sync_sends_no_credentials_to_a_server_of_the_record(
    run_dir: Path,
    broken_server: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri, got = broken_server
    leave(run_dir, uri)
    for ambient in (None, "http://127.0.0.1:1"):
        if ambient:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", ambient)
        assert jobs.sync.main([str(run_dir), "--wait", "0"]) == 2
        assert capsys.readouterr().err == (
            f"error: --uri: expected {uri} here or in $MLFLOW_TRACKING_URI: a record alone is not trusted\n"
        )
    assert got == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # the environment's own
    assert jobs.sync.main([str(run_dir), "--wait", "0"]) == 1
    assert got[0] == "Bearer staple-of-tokens-77"


@pytest.mark.parametrize("uri", ["sqlite:////run/evil.db", "postgresql://db/x", "databricks"])
def test_sync_opens_no_data_base_of_the_record(
    run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the stranger's could say where on this machine artifacts are put."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    leave(run_dir, uri)
    assert jobs.sync.main([str(run_dir), "--wait", "0"]) == 2
    assert f"expected {uri} here or in $MLFLOW_TRACKING_URI" in capsys.readouterr().err


def test_sync_reports_an_unsound_start(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "events.jsonl").write_text(json.dumps(START | {"layers": "many"}) + "\n")
    assert jobs.sync.main([str(run_dir)]) == 2
    assert capsys.readouterr().err == "error: RUN_DIR: events.jsonl: layers: expected an integer, got 'many'\n"


@pytest.mark.usefixtures("credentials")
def test_a_run_that_goes_on_sends_nothing_to_a_server_of_the_record(
    run_dir: Path, broken_server: tuple[str, list[str]]
) -> None:
    uri, got = broken_server
    leave(run_dir, uri)
    tracker = Tracker(run_dir, TrackingConfig(uri="http://127.0.0.1:1", flush_s=0.5, timeout_s=1.0))
    tracker.start("run", layers=1)
    assert tracker.close() == 2
    assert got == []
