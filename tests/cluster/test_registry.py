"""Finished runs as versions of a registered model: once each, and the champion only for what can be compared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.tracking.config import TrackingConfig, sqlite_uri
from cluster.tracking.mlflow_client import mlflow_settings
from cluster.tracking.mlflow_model import ModelLogger
from cluster.tracking.tracker import Tracker
from jobs import sync
from jobs.recording import outcome_lines
from simmatch.config import ConfigError
from tests.outages import Outage, Proxy

pytest.importorskip("mlflow")
NAME = "digits of 8 x 8"


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": x.flatten(1) * self.weight}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sqlite_uri(tmp_path_factory.mktemp("store") / "mlflow.db")


@pytest.fixture(scope="module")
def client(store: str) -> Any:
    from mlflow import MlflowClient

    with mlflow_settings(store, 10.0):
        yield MlflowClient(store, store)


def finish(run_dir: Path, uri: str, accuracy: float | None, *, data: str = "d1", probe: str = "ridge") -> list[str]:
    """A run with this result; the lines of its end."""
    (run_dir / "model").mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "model.safetensors"):
        (run_dir / "model" / name).write_text(f"{run_dir.name}")
    config = TrackingConfig(uri=uri, register=NAME, flush_s=60.0)
    tracker = Tracker(run_dir, config, ModelLogger(lambda path: Toy()))
    tracker.start(run_dir.name, layers=0)
    tracker.finish("FINISHED")
    tracker.model(run_dir / "model", (1, 2, 2))
    tracker.register(data=data, probe=probe, accuracy=accuracy)
    tracker.close()
    return outcome_lines(tracker)


def champion(client: Any) -> str:
    return str(client.get_registered_model(NAME).aliases["champion"])


def test_the_champion_moves_to_what_is_better_and_comparable(
    store: str, client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [
        ({"accuracy": 5 / 6}, "1", "this version, the first; accuracy 0.8333"),
        ({"accuracy": 0.7}, "1", "stays version 1: its accuracy 0.8333 is not below 0.7000"),
        ({"accuracy": 5 / 6}, "1", "stays version 1: its accuracy 0.8333 is not below 0.8333"),
        ({"accuracy": 0.9}, "4", "moved here from version 1: accuracy 0.9000, was 0.8333"),
        ({"accuracy": 0.99, "data": "d2"}, "4", "stays version 4, which was measured with other data: d1, here d2"),
        ({"accuracy": 0.99, "probe": "knn"}, "4", "stays version 4, which was measured with another probe: ridge, "),
        ({"accuracy": None}, "4", "not considered, no readout was fitted"),
    ]
    for number, (result, holder, why) in enumerate(expected, start=1):
        lines = finish(tmp_path / f"run {number}", store, **result)
        assert lines[-1].startswith(f"registered as {NAME}, version {number}; champion: {why}"), lines
        assert champion(client) == holder
    version = client.get_model_version(NAME, "4")
    run = client.get_run(version.run_id)
    assert run.info.run_name == "run 4"
    assert version.tags.items() >= {
        "simmatch.data": "d1", "simmatch.probe": "ridge", "simmatch.accuracy": "0.900000",
        "simmatch.run": run.info.run_id,
    }.items()  # fmt: skip
    assert version.source == client.get_logged_model(run.outputs.model_outputs[0].model_id).artifact_location

    # the same run once more, in the job and by jobs.sync from the start: nothing is registered again, and the alias
    # that somebody has moved stays
    client.set_registered_model_alias(NAME, "champion", "2")
    assert "version 4; champion: moved here" in finish(tmp_path / "run 4", store, accuracy=0.9)[-1]
    (tmp_path / "run 4" / "events.offset").unlink()
    assert sync.main([str(tmp_path / "run 4"), "--uri", store]) == 0
    assert f"registered as {NAME}, version 4; champion: moved here from version 1" in capsys.readouterr().out
    assert len(client.search_model_versions(f"name = '{NAME}'")) == len(expected)
    assert champion(client) == "2"


def test_a_stream_decides_itself_which_model_is_the_champion(store: str, client: Any, tmp_path: Path) -> None:
    """Two models of one run, the second with a lower accuracy; a stream of another name leaves the alias alone."""
    for name, decided in (("line 4", ("fast answers", "slow answers in place of fast")), ("line 5", ("alone",))):
        config = TrackingConfig(uri=store, register="a stream", flush_s=60.0)
        tracker = Tracker(tmp_path / name, config, ModelLogger(lambda path: Toy()))
        tracker.start(name, layers=0)
        for number, why in enumerate(decided):
            folder = tmp_path / name / "models" / str(number)
            folder.mkdir(parents=True)
            for file in ("config.yaml", "model.safetensors"):
                (folder / file).write_text(why)
            key = tracker.model(folder, (1, 2, 2))
            accuracy = None if name == "line 5" else 0.9 - 0.2 * number
            tracker.register(data=f"stream {name}", probe="prequential", accuracy=accuracy, key=key, decided=why)
        tracker.finish("FINISHED")
        tracker.close()
        told = [line for line in outcome_lines(tracker) if line.startswith("registered")]
        if name == "line 4":
            assert told == [
                "registered as a stream, version 1; champion: this version, the first; accuracy 0.9000",
                "registered as a stream, version 2; champion: moved here from version 1: slow answers in place of fast",
            ]
        else:
            assert "version 3; champion: stays version 2, which was measured with other data" in told[0]
        assert str(client.get_registered_model("a stream").aliases["champion"]) == "2"
    sources = {client.get_model_version("a stream", str(number)).source for number in (1, 2, 3)}
    assert len(sources) == 3


def test_a_version_that_was_made_twice_remains_once(store: str, client: Any, tmp_path: Path) -> None:
    finish(tmp_path / "twice", store, 0.1)
    [first] = [v for v in client.search_model_versions(f"name = '{NAME}'") if v.tags["simmatch.accuracy"] == "0.100000"]
    client.create_model_version(NAME, first.source, first.run_id, tags=first.tags, await_creation_for=0)
    (tmp_path / "twice" / "events.offset").unlink()
    assert sync.main([str(tmp_path / "twice"), "--uri", store]) == 0
    [left] = [v for v in client.search_model_versions(f"name = '{NAME}'") if v.tags["simmatch.accuracy"] == "0.100000"]
    assert left.version == first.version


def test_a_registry_that_is_away_gets_the_version_later(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    proxy = Proxy(9, Outage("refuse"))
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", proxy.uri)
    run_dir = tmp_path / "late"
    (run_dir / "model").mkdir(parents=True)
    (run_dir / "model" / "model.safetensors").write_text("late")
    tracker = Tracker(run_dir, TrackingConfig(uri=store, register=NAME, flush_s=5.0), ModelLogger(lambda path: Toy()))
    tracker.start("late", layers=0)
    tracker.finish("FINISHED")
    tracker.model(run_dir / "model", (1, 2, 2))
    tracker.register(data="d", probe="p", accuracy=0.5)
    while tracker._sender.delivery.pending() > 1:
        time.sleep(0.1)
    assert tracker.close() == 1
    proxy.close()
    own = sqlite_uri(tmp_path / "registry.db")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", own)
    assert sync.main([str(run_dir), "--uri", store]) == 0
    assert f"registered as {NAME}, version 1; champion: this version" in capsys.readouterr().out
    with mlflow_settings(own, 10.0):
        [version] = MlflowClient(own, own).search_model_versions(f"name = '{NAME}'")
    assert f"/runs/{tracker.run_id}?" in version.run_link


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "it's", "x\ny"])
def test_a_name_that_no_registry_takes(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tracking\.register: expected letters"):
        Tracker(tmp_path, TrackingConfig(register=name))


PROGRAM = """
import sys, threading
from cluster.tracking.mlflow_client import mlflow_settings, open_client
from mlflow import MlflowClient
import mlflow.store.tracking.sqlalchemy_store
print("ready", flush=True)
sys.stdin.readline()
with mlflow_settings(sys.argv[1], 10.0), open_client(sys.argv[1], lambda: None) as client:
    client.create_experiment(sys.argv[2])
"""


def test_jobs_that_begin_at_once_make_one_data_base(tmp_path: Path) -> None:
    """MLflow's own way breaks here: `table _alembic_tmp_latest_metrics already exists`."""
    from mlflow import MlflowClient

    uri = sqlite_uri(tmp_path / "new" / "mlflow.db")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, uri, str(number)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in started:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    with mlflow_settings(uri, 10.0):
        assert {e.name for e in MlflowClient(uri).search_experiments()} == {"Default", "0", "1"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlflow.db"]
