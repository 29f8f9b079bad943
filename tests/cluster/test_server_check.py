"""What a real MLflow server says to a job before it starts, and what a job makes of it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.tracking.config import TrackingConfig
from cluster.tracking.experiments import KIND, KIND_TAG
from cluster.tracking.server_check import INVALID_HOST, ServerAnswer, ask_server
from simmatch.config import ConfigError
from tests.outages import Outage, Proxy, mlflow_server

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server that wants to be called by its address, as charts start it."""
    with mlflow_server(tmp_path_factory.mktemp("server"), "--allowed-hosts", "127.0.0.1:*") as port:
        yield port


def client_of(server: int) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"http://127.0.0.1:{server}")


def ask(uri: str, experiment: str | None = None, limit_s: float = 20.0) -> ServerAnswer:
    return ask_server(TrackingConfig(uri=uri, experiment=experiment), Path("/nowhere"), limit_s=limit_s)


def test_a_server_that_takes_records(server: int) -> None:
    client = client_of(server)
    answer = ask(f"http://127.0.0.1:{server}", "made here")
    assert answer == ServerAnswer("ok", f"MLflow at http://127.0.0.1:{server}: takes records of experiment 'made here'")
    made = client.get_experiment_by_name("made here")
    assert made.tags[KIND_TAG] == KIND
    client.set_experiment_tag(made.experiment_id, KIND_TAG, "finetuning")
    assert ask(f"http://127.0.0.1:{server}", "made here").verdict == "ok"
    assert client.get_experiment(made.experiment_id).tags[KIND_TAG] == "finetuning", "somebody's own choice is kept"
    assert client.search_runs([made.experiment_id]) == []


def test_a_server_called_by_a_name_that_it_does_not_allow(server: int) -> None:
    answer = ask(f"http://localhost:{server}")
    assert answer.verdict == "refused"
    assert f"403: {INVALID_HOST}" in answer.text
    assert f"--allowed-hosts localhost:{server} " in answer.fix, "the header holds the port, and so must the option"
    assert "\n" not in str(answer)


def test_a_deleted_experiment_names_its_restoration(server: int) -> None:
    client = client_of(server)
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    answer = ask(f"http://127.0.0.1:{server}", "gone")
    assert (answer.verdict, answer.text.partition(": ")[2]) == ("refused", "experiment 'gone' is deleted")
    assert f"restore --experiment-id {number}" in answer.fix
    client.restore_experiment(number)
    assert ask(f"http://127.0.0.1:{server}", "gone").verdict == "ok"


def test_the_experiment_comes_from_the_configuration_then_the_environment(
    server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, uri = client_of(server), f"http://127.0.0.1:{server}"
    number = client.create_experiment("by its id")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    assert ask(uri).text.endswith("'by its id'")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by its id")
    assert ask(uri).text.endswith("'by its id'")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    answer = ask(uri)
    assert answer.verdict == "refused"
    assert f"expected experiment 'another' to have the id {number}, but it does not exist" in answer.text
    assert ask(uri, "given").text.endswith("'given'")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "987654321")
    answer = ask(uri)
    assert answer.verdict == "refused"
    assert "no experiment has the id 987654321" in answer.text
    assert "$MLFLOW_EXPERIMENT_ID" in answer.fix


@pytest.mark.parametrize(
    ("status", "verdict", "text", "fix"),
    [
        (401, "refused", "401: a planned failure", "set MLFLOW_TRACKING_USERNAME"),
        (403, "refused", "403: a planned failure", "permission EDIT on experiment 'x'"),
        (404, "away", "a planned failure", "check the server"),  # as of a gateway whose server is away
        (500, "away", "too many 500 error responses", "check the server"),
    ],
)
def test_what_else_is_answered(status: int, verdict: str, text: str, fix: str) -> None:
    proxy = Proxy(9, Outage("error", status=status))
    try:
        answer = ask(proxy.uri, "x")
    finally:
        proxy.close()
    assert answer.verdict == verdict
    assert text in answer.text
    assert fix in answer.fix


def test_who_may_read_but_not_write_is_refused(server: int) -> None:
    proxy = Proxy(server, Outage("error", "set-experiment-tag", status=403))
    try:
        client_of(server).create_experiment("of somebody else")
        assert "EDIT on experiment 'of somebody else'" in ask(proxy.uri, "of somebody else").fix
    finally:
        proxy.close()


def test_wrong_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "opensesame")
    proxy = Proxy(9, Outage("error", status=401))
    try:
        assert "correct the user of $MLFLOW_TRACKING_USERNAME" in ask(proxy.uri).fix
    finally:
        proxy.close()


@pytest.mark.parametrize("kind", ["refuse", "hang", "drip"])
def test_a_server_that_is_away_costs_little_time(kind: Any) -> None:
    import mlflow  # noqa: F401

    proxy = Proxy(9, Outage(kind, delay_s=0.1))
    started = time.monotonic()
    try:
        answer = ask(proxy.uri, limit_s=2.0)
        assert answer.verdict == "away"
        assert time.monotonic() - started < 10.0
    finally:
        proxy.close()
    assert "tracking.uri" in answer.fix


def test_a_server_without_tls_asked_for_it(server: int) -> None:
    answer = ask(f"https://127.0.0.1:{server}")
    assert answer.verdict == "refused"
    assert "http:// or https://" in answer.fix


def test_a_data_base_on_this_machine(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    file = tmp_path / "50%?" / "mlflow.db"
    file.parent.mkdir()
    config = TrackingConfig(experiment="x")
    run_dir = file.parent / "run"
    assert ask_server(config, run_dir).text.endswith("will be made")
    file.touch()
    assert ask_server(config, run_dir).verdict == "ok"
    client = MlflowClient(f"sqlite:///{tmp_path}/50%25%3F/mlflow.db")
    number = client.create_experiment("x")
    assert ask_server(config, run_dir).text.endswith("takes records of experiment 'x'")
    client.delete_experiment(number)
    assert f"restore --experiment-id {number}" in ask_server(config, run_dir).fix
    with sqlite3.connect(file) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = ask_server(config, run_dir)
        assert answer.verdict == "away"
        assert "locked" in answer.text
    file.write_text("no data base " * 100)
    answer = ask_server(config, run_dir)
    assert answer.verdict == "refused"
    assert "not a database" in answer.text


def test_nothing_is_asked_where_nothing_is_sent(tmp_path: Path) -> None:
    assert ask_server(TrackingConfig(uri="http://127.0.0.1:9", enabled=False), tmp_path).verdict == "ok"
    with pytest.raises(ConfigError, match=r"^tracking\.experiment: expected a name, got ' '$"):
        ask_server(TrackingConfig(experiment=" "), tmp_path)
