"""`python -m jobs.sync`: what it sends, what it says, and the status it ends with."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import jobs.sync
from cluster.tracking.config import TrackingConfig
from cluster.tracking.mlflow_sink import make_sender
from cluster.tracking.spool import Spool
from cluster.tracking.spool_parts import SpoolParts
from cluster.tracking.tracker import Tracker
from jobs.sync import main
from tests.outages import Outage, Proxy


def record(run_dir: Path, uri: str, *, finish: bool = True) -> int:
    """A run whose tracking server was away all the time; returns the number of its events."""
    tracker = Tracker(run_dir, TrackingConfig(enabled=False, uri=uri, experiment=run_dir.name))
    tracker.start("run", layers=1)
    for step in range(3):
        tracker.metrics(step, {"objective": float(step)}, layer=0)
    if finish:
        tracker.finish("FAILED")
    tracker.close()
    return sum(1 for _ in Spool(run_dir / "events.jsonl").read())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a SQLite store, made by the first test that sends."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_copy_of_a_run_that_was_killed(
    tmp_path: Path, store: str, earlier: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its records are in parts, as in the object store, perhaps beside those of an attempt that had ended."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    events = record(tmp_path / "here", store, finish=False)
    spool, parts = tmp_path / "spool", SpoolParts(tmp_path / "copy")
    content = (tmp_path / "here" / "events.jsonl").read_bytes()
    if earlier:
        spool.write_bytes(content[: content.index(b"\n") + 1])
        parts.close(spool)
    spool.write_bytes(content)
    parts.append(spool)
    assert main([str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().out.startswith(f"{events} events sent to {store}, run ")
    assert (tmp_path / "copy" / "events.jsonl").read_bytes() == content


def test_what_is_left_is_sent_once(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    events = record(tmp_path / "left", store)
    assert main([str(tmp_path / "left")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{events} events sent to {store}, run ")
    assert err == ""
    client = MlflowClient(store, registry_uri=store)
    [experiment] = [e for e in client.search_experiments() if e.name == "left"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["layer 0", "run"]
    assert {run.info.status for run in runs.values()} == {"FAILED"}
    history = client.get_metric_history(runs["layer 0"].info.run_id, "objective")
    assert sorted((row.step, row.value) for row in history) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert out.split()[-1] == runs["run"].info.run_id

    assert main([str(tmp_path / "left")]) == 0
    assert capsys.readouterr().out.startswith("0 events sent")
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_a_server_that_is_away_leaves_everything_for_later(
    tmp_path: Path, store: str, closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    events = record(tmp_path / "away", f"http://127.0.0.1:{closed_port}", finish=False)
    assert main([str(tmp_path / "away"), "--uri", f"http://127.0.0.1:{closed_port}", "--wait", "0"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("0 events sent")
    assert f"{events} events not sent" in err
    assert "Connection refused" in err
    assert main([str(tmp_path / "away"), "--uri", store]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{events} events sent to {store}")
    assert "shows it as running" in out
    assert err == ""


def test_a_server_whose_answers_never_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each byte resets the client's time-outs."""
    monkeypatch.setattr(jobs.sync, "make_sender", partial(make_sender, stalled_s=1.0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    proxy = Proxy(0, Outage("drip", delay_s=0.2))
    events = record(tmp_path / "drip", proxy.uri)
    assert main([str(tmp_path / "drip"), "--uri", proxy.uri, "--wait", "0", "--timeout", "1"]) == 1
    proxy.close()
    assert f"{events} events not sent; the latest attempt failed: TimeoutError" in capsys.readouterr().err


def test_what_a_record_says_moves_no_terminal(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    events = record(tmp_path / "moves", store)
    with (tmp_path / "moves" / "events.jsonl").open("a") as spool:
        spool.write('{"kind":"\\u001b[2J\\u009b1m","time_ms":1}\n')
    assert main([str(tmp_path / "moves"), "--uri", store]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{events} events sent")
    assert err.startswith("refused: \\x1b[2J\\x9b1m: kind: expected one of ")


def test_a_folder_without_a_spool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", f"error: RUN_DIR: expected a folder with events.jsonl, got {tmp_path}\n")


def test_a_spool_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.jsonl").write_text('{"kind":"metrics"}\n')
    assert main([str(tmp_path)]) == 2
    assert "begin with the start of a run" in capsys.readouterr().err


def test_a_run_that_still_writes_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "http://127.0.0.1:1")
    writer = Spool(tmp_path / "events.jsonl").open()
    assert main([str(tmp_path), "--uri", "http://127.0.0.1:1"]) == 2
    writer.close()
    assert "another process is writing or sending" in capsys.readouterr().err


def test_a_malformed_uri(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "http://127.0.0.1:1")
    assert main([str(tmp_path), "--uri", "htp://x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: tracking.uri: expected a URI of scheme http")
    assert err.count("\n") == 1


def test_a_password_is_asked_for_and_not_shown(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://ada:secret@127.0.0.1:{closed_port}"
    record(tmp_path, uri)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main([str(tmp_path)]) == 2
    assert f"expected http://***@127.0.0.1:{closed_port} with its password" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main([str(tmp_path), "--wait", "0"]) == 1
    assert "secret" not in "".join(capsys.readouterr())
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.iterdir())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "RUN_DIR" in capsys.readouterr().out
