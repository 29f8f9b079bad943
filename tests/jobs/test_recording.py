"""The report at the end of a job: which records are in MLflow, which are not, and how to send them."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.tracking.config import TrackingConfig
from cluster.tracking.mlflow_model import ModelLogger
from cluster.tracking.tracker import Tracker
from jobs import pretrain
from jobs.recording import open_tracker, outcome_fields, outcome_lines
from tests.outages import Outage, Proxy


def ended(run_dir: Path, config: TrackingConfig, *, load: Any = None) -> Tracker:
    """A run of one metric, closed; `load` brings its model."""
    tracker = Tracker(run_dir, config, ModelLogger(load) if load else None)
    run_dir.mkdir(parents=True)
    tracker.start("run", layers=1)
    tracker.metrics(1, {"objective": 1.0}, layer=0)
    if load:
        tracker.model(run_dir / "model", (1, 2, 2))
    tracker.finish("FINISHED")
    tracker.close()
    return tracker


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_never_took_a_record(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.store.tracking.rest_store  # noqa: F401  (takes longer than the job waits)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    proxy = Proxy(0, Outage("error", status=status))
    tracker = ended(tmp_path / "a run", TrackingConfig(uri=proxy.uri, flush_s=0.5, timeout_s=1.0))
    proxy.close()
    [line] = outcome_lines(tracker)
    found = re.fullmatch(
        r"(\d+) records not sent to MLflow; the latest attempt failed: (.*); "
        r"send them with: python -m jobs\.sync (.*)",
        line,
    )
    assert found, line
    assert int(found[1]) == (tmp_path / "a run" / "events.jsonl").read_bytes().count(b"\n") == 3
    assert f"error code {status} != 200. Response body: 'a planned failure'" in found[2]
    assert shlex.split(found[3])[0] == str(tmp_path / "a run")
    assert outcome_fields(tracker) == {
        "mlflow_run_id": None, "lost_records": 0, "unsent_records": 3, "unsent_reason": found[2],
        "refused_records": 0, "refusals": [],
    }  # fmt: skip


def test_what_is_in_the_store_of_this_checkout_and_a_model_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(path: str) -> Any:
        raise ValueError("expected m1 and m2 to have the same dtype")

    monkeypatch.chdir(tmp_path)
    tracker = ended(Path("runs") / "a", TrackingConfig(), load=no_model)
    why = "ValueError: expected m1 and m2 to have the same dtype"
    assert outcome_lines(tracker) == [f"the model is not in MLflow: {why}", f"MLflow run: {tracker.run_id} (make ui)"]
    assert outcome_fields(tracker) == {
        "mlflow_run_id": tracker.run_id, "lost_records": 0, "unsent_records": 0, "unsent_reason": None,
        "refused_records": 1, "refusals": [f"model: {why}"],
    }  # fmt: skip
    assert tracker.run_id is not None


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("sqlite:////else where/m.db", "mlflow ui --backend-store-uri 'sqlite:////else where/m.db'"),
        ("http://ada:secret@host:5000", "http://***@host:5000"),
        ("postgresql://ada:secret@db/mlflow", "postgresql://***@db/mlflow"),
    ],
)
def test_where_a_run_is_looked_at(uri: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make ui` is of the local store only."""
    tracker = Tracker(tmp_path, TrackingConfig(uri=uri))
    monkeypatch.setattr(Tracker, "run_id", "1234")
    assert outcome_lines(tracker) == [f"MLflow run: 1234 ({shown})"]


def test_a_server_that_refuses_ends_a_job_before_it_starts(
    tmp_path: Path, digits_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = Proxy(0, Outage("error", status=403))
    command = ["--config", str(digits_yaml), "--set", f"tracking.uri={proxy.uri}", "--run-dir", str(tmp_path / "run")]
    try:
        assert pretrain.main(command) == 2
    finally:
        proxy.close()
    error = capsys.readouterr().err
    assert error == (
        f"error: tracking: MLflow at {proxy.uri}: 403: a planned failure; ask for the permission EDIT on "
        "experiment 'simmatch', or name another experiment in tracking.experiment\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_server_that_is_away_costs_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = Proxy(0, Outage("refuse"))
    try:
        open_tracker(tmp_path / "run", TrackingConfig(uri=proxy.uri))
    finally:
        proxy.close()
    error = capsys.readouterr().err
    assert error.startswith(f"warning: MLflow at {proxy.uri}: ")
    assert error.endswith("; the run goes on, and its records are kept\n")
    assert error.count("\n") == 1


def test_what_a_server_refuses_later_is_shown_within_a_minute(tmp_path: Path) -> None:
    proxy = Proxy(0, Outage("error", status=403))
    lines: list[str] = []
    tracker = Tracker(tmp_path / "run", TrackingConfig(uri=proxy.uri, timeout_s=1.0, flush_s=0.0))
    (tmp_path / "run").mkdir()
    tracker.announce_to(lines.append)
    tracker.start("run", layers=1)
    started = time.monotonic()
    while not lines and time.monotonic() - started < 60.0:
        time.sleep(0.1)
    tracker.finish("FINISHED")
    tracker.close()
    proxy.close()
    [line] = lines
    assert f"MLflow at {proxy.uri} takes no records" in line
    assert "403" in line
    assert "a planned failure" in line
