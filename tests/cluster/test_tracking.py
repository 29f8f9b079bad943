"""Tracking against a real SQLite store, and the sender's promises against a sink whose failures are scripted."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from urllib.parse import unquote

import pytest
import torch
from torch import nn

import cluster.tracking.mlflow_model
import cluster.tracking.notices
import cluster.tracking.sender
from cluster.redaction import redact
from cluster.tracking.config import TrackingConfig, check_uri, resolve_uri, sqlite_uri
from cluster.tracking.delivery import MOST_DOUBTS, Delivery, RejectedError, RunsLostError, SendProgress
from cluster.tracking.events import Event, MetricsEvent, StartEvent, TagsEvent, Unreadable, flatten, line_of
from cluster.tracking.mlflow_model import MODEL_KEY_TAG, ModelLogger, load_exported
from cluster.tracking.mlflow_sink import PARENT, TRUNCATED, _shorten
from cluster.tracking.notices import REPORT_AFTER_S, Notices
from cluster.tracking.sender import Sender
from cluster.tracking.spool import Spool, SpoolBusyError
from cluster.tracking.tracker import Tracker
from simmatch.config import ConfigError, ModelConfig, parse
from simmatch.model import InputConfig, Stack, save_model
from tests.outages import problems

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    """An empty spool, open."""
    spool = Spool(tmp_path / "events.jsonl").open()
    yield spool
    spool.close()


def event_of(kind: str, number: int) -> Event:
    """An event of this kind whose time is this number."""
    if kind == "start":
        return StartEvent(
            time_ms=number, run_key="0", attempt=1, name="run", experiment="simmatch", layers=0, uri="here", tags={}
        )
    return MetricsEvent(time_ms=number, step=number, values={"objective": 1.0})


def fill(spool: Spool, kinds: Sequence[str]) -> None:
    for number, kind in enumerate(kinds):
        if kind == "bad":
            with spool.path.open("a") as file:
                file.write('{"kind":"bad"}\n')
        else:
            spool.append(event_of(kind, number))


# --- the spool -------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_ignored_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind":"a"}\n{"kind":"b"}\n{"kind":"c", "values"')
    assert [event.kind for event, _ in Spool(path).read()] == ["a", "b"]
    spool = Spool(path).open()
    event = TagsEvent(time_ms=1, values={"d": "é"})
    spool.append(event)
    spool.close()
    assert path.read_bytes() == b'{"kind":"a"}\n{"kind":"b"}\n' + line_of(event)


@pytest.mark.parametrize("length", [0, 65535, 65536, 200_000])
def test_a_torn_line_of_any_length_is_cut_off(tmp_path: Path, length: int) -> None:
    path = tmp_path / "events.jsonl"
    for whole in (b"", b'{"kind":"a"}\n'):
        path.write_bytes(whole + b"x" * length)
        Spool(path).open().close()
        assert path.read_bytes() == whole


def test_reading_from_each_offset_gives_the_rest(spool: Spool) -> None:
    events = [MetricsEvent(time_ms=1, step=step, values={"é\n": 0.5 * step}) for step in range(5)]
    for event in events:
        spool.append(event)
    offsets = [0, *(offset for _, offset in spool.read())]
    for index, offset in enumerate(offsets):
        assert [event for event, _ in spool.read(offset)] == events[index:]
    assert offsets[-1] == spool.size_bytes()


def test_numbers_without_a_json_form_survive(spool: Spool) -> None:
    spool.append(MetricsEvent(time_ms=1, step=1, values={"nan": math.nan, "inf": -math.inf, "one": 1.5}))
    [line] = spool.path.read_text().splitlines()
    [(event, _)] = spool.read()
    assert isinstance(event, MetricsEvent)
    for values in (json.loads(line, parse_constant=pytest.fail)["values"], event.values):
        assert math.isnan(float(values["nan"]))
        assert (float(values["inf"]), values["one"]) == (-math.inf, 1.5)


def test_a_spool_has_one_writer(spool: Spool) -> None:
    with pytest.raises(SpoolBusyError, match=r"events\.jsonl"):
        Spool(spool.path).open()
    spool.close()
    Spool(spool.path).open().close()


def test_progress_counts_only_for_its_destination_and_file(tmp_path: Path) -> None:
    path = tmp_path / "events.offset"
    progress = SendProgress("https://a", 120, {"parent": "r"})
    progress.save(path)
    assert SendProgress.load(path, "https://a", 120) == progress
    assert SendProgress.load(path, "https://b", 120) == SendProgress("https://b")
    assert SendProgress.load(path, "https://a", 119) == SendProgress("https://a")
    path.write_text("{half")
    assert SendProgress.load(path, "https://a", 120) == SendProgress("https://a")


# --- the sender ------------------------------------------------------------------------------------------------


class ScriptedSink:
    """Keeps what it gets; raises the next scripted error instead while there is one."""

    def __init__(self, errors: Sequence[Exception] = (), gate: threading.Event | None = None) -> None:
        self.errors = list(errors)
        self.gate = gate
        self.got: list[Event | Unreadable] = []
        self.connects: list[dict[str, str]] = []

    def connect(self, start: Event | Unreadable, runs: dict[str, str]) -> dict[str, str]:
        self.connects.append(dict(runs))
        return {"parent": "id"}

    def send(self, events: Sequence[Event | Unreadable]) -> None:
        if self.gate is not None:
            assert self.gate.wait(30), "the test never opened the gate"
        if self.errors:
            raise self.errors.pop(0)
        if any(isinstance(event, Unreadable) for event in events):
            raise RejectedError("no such kind")
        self.got += events

    @contextmanager
    def opened(self, alive: Callable[[], None]) -> Iterator[ScriptedSink]:
        yield self


def send_all(spool: Spool, sink: ScriptedSink, deadline_s: float = 30.0) -> Sender:
    sender = Sender(Delivery(spool, spool.path.with_suffix(".offset"), "here", redact), sink.opened)
    sender.delivery.load()
    sender.close(deadline_s)
    sender.run()
    return sender


def test_everything_is_sent_once_and_in_order(spool: Spool) -> None:
    fill(spool, ["start", *["metrics"] * 1200])
    sink = ScriptedSink()
    assert send_all(spool, sink).delivery.pending() == 0
    assert [event.time_ms for event in sink.got] == list(range(1201))
    again = ScriptedSink()
    assert send_all(spool, again).delivery.sent == 0
    assert again.got == []
    assert again.connects == [{"parent": "id"}]


def test_a_failure_is_retried_from_the_persisted_offset(spool: Spool) -> None:
    fill(spool, ["start", "metrics"])
    sink = ScriptedSink([ConnectionError("refused")])
    sender = send_all(spool, sink)
    assert [event.time_ms for event in sink.got] == [0, 1]
    assert (sender.delivery.pending(), sender.last_error) == (0, None)


def test_one_rejected_event_does_not_take_its_neighbours(spool: Spool) -> None:
    fill(spool, ["start", "metrics", "bad", "metrics"])
    sink = ScriptedSink()
    sender = send_all(spool, sink)
    assert [event.time_ms for event in sink.got] == [0, 1, 3]
    assert (sender.delivery.rejected, sender.delivery.pending()) == (1, 0)
    assert sender.delivery.notes == ["bad: no such kind"]


@pytest.mark.parametrize(("refusals", "rejected"), [(2 * (MOST_DOUBTS - 1), 0), (2 * MOST_DOUBTS, 1)])
def test_a_doubtful_refusal_has_to_be_repeated(
    refusals: int, rejected: int, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt tries the events together, then alone."""
    monkeypatch.setattr("cluster.tracking.sender.BACKOFF_FIRST_S", 0.01)
    fill(spool, ["start", "metrics"])
    sink = ScriptedSink([RejectedError("404 of a gateway", certain=False)] * refusals)
    sender = send_all(spool, sink)
    assert [event.time_ms for event in sink.got] == list(range(rejected, 2))
    assert (sender.delivery.rejected, len(sender.delivery.notes), sender.delivery.pending()) == (rejected, rejected, 0)


def test_lost_runs_are_made_anew_and_everything_sent_again(spool: Spool) -> None:
    fill(spool, ["start", "metrics"])
    send_all(spool, ScriptedSink())
    spool.append(event_of("metrics", 2))
    sink = ScriptedSink([RunsLostError("gone")])
    assert send_all(spool, sink).delivery.pending() == 0
    assert [event.time_ms for event in sink.got] == [0, 1, 2]
    assert sink.connects == [{"parent": "id"}, {}]


def test_the_deadline_leaves_the_rest_for_later(spool: Spool) -> None:
    fill(spool, ["start", "metrics"])
    secret = ConnectionError("no answer from https://ada:secret@host/")
    sender = send_all(spool, ScriptedSink([secret] * 100), deadline_s=0.0)
    assert sender.delivery.pending() == 2
    assert sender.last_error == "ConnectionError: no answer from https://***@host/"
    later = ScriptedSink()
    assert send_all(spool, later).delivery.pending() == 0
    assert len(later.got) == 2


def test_appending_does_not_wait_for_a_server_that_hangs(spool: Spool) -> None:
    fill(spool, ["start"])
    gate = threading.Event()
    sink = ScriptedSink(gate=gate)
    sender = Sender(Delivery(spool, spool.path.with_suffix(".offset"), "here"), sink.opened)
    thread = threading.Thread(target=sender.run, daemon=True)
    thread.start()
    for number in range(1, 2000):
        spool.append(event_of("metrics", number))
        sender.wake()
    assert sink.got == []  # every append returned while the server had answered nothing
    assert sender.delivery.pending() == 2000
    gate.set()
    sender.close(30.0)
    thread.join(30.0)
    assert [event.time_ms for event in sink.got] == list(range(2000))


def test_a_failure_is_reported_once_per_reason_and_so_is_its_end() -> None:
    now = 0.0
    notices, lines = Notices("here", lambda: now), []
    notices.failing("refused by 0x7f00aa11bb22 at /runs/1")
    now = REPORT_AFTER_S - 1
    notices.failing("refused by 0x7f00aa11bb22 at /runs/1")
    notices.working()  # nobody has heard of it, so nobody hears that it is over
    notices.failing("refused by 0x7f00aa11bb22 at /runs/1")
    now += REPORT_AFTER_S
    notices.failing("refused by 0x7f00aa11bb22 at /runs/1")
    notices.listen(lines.append)
    assert lines == [
        "MLflow at here takes no records: refused by 0x7f00aa11bb22 at /runs/1; the job continues, they are kept"
    ]
    notices.failing("refused by 0x7f00cc33dd44 at /runs/2")
    notices.failing("403")
    notices.failing("403")
    assert [line.partition(": ")[2].partition(";")[0] for line in lines[1:]] == ["403"]
    notices.working()
    notices.working()
    assert lines[2:] == ["MLflow at here takes records again"]
    notices.refused(["model: too large", "model: too large"])
    notices.refused(["model: too large"])
    assert lines[3:] == ["not recorded in MLflow: model: too large"]


def test_a_listener_that_fails_does_no_harm(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(line: str) -> None:
        raise BrokenPipeError(line)

    monkeypatch.setattr(cluster.tracking.notices, "REPORT_AFTER_S", 0.0)
    fill(spool, ["start", "metrics"])
    sink = ScriptedSink([ConnectionError("refused")])
    sender = Sender(Delivery(spool, spool.path.with_suffix(".offset"), "here"), sink.opened)
    sender.notices.listen(broken)
    sender.delivery.load()
    sender.close(30.0)
    sender.run()
    assert (sender.delivery.pending(), sink.errors) == (0, [])


# --- configuration and secrets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("htp://host:5000", "scheme http"),
        ("mlruns", "scheme http"),
        ("file:///tmp/mlruns", "scheme http"),
        ("http://", "HOST"),
        ("http://host:port", "HOST"),
        ("sqlite://mlflow.db", "sqlite:///PATH"),
    ],
)
def test_a_malformed_uri_is_refused_before_anything_starts(tmp_path: Path, uri: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tracking\.uri: expected .*{expected}.*, got '{uri}'$"):
        Tracker(tmp_path / "run", TrackingConfig(uri=uri))
    assert list(tmp_path.iterdir()) == []


def test_the_uri_comes_from_the_configuration_then_the_environment_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "runs" / "a"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(TrackingConfig(), run_dir) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://b:5000")
    assert resolve_uri(TrackingConfig(), run_dir) == "http://b:5000"
    assert resolve_uri(TrackingConfig(uri="https://a"), run_dir) == "https://a"


def test_a_sqlite_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_uri("sqlite:///m.db") == f"sqlite:///{tmp_path}/m.db"
    assert check_uri(f"sqlite:///{tmp_path}/m.db") == f"sqlite:///{tmp_path}/m.db"


@pytest.mark.parametrize("name", ["50%20off", "what?", "what?timeout=1", "#1", "a b", "%2e%2e", "é@host:1"])
def test_a_folder_of_any_name_is_opened_as_it_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy import make_url

    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database = str(folder / "mlflow.db")
    assert make_url(resolve_uri(TrackingConfig(), folder / "run")).database == database
    assert make_url(check_uri("sqlite:///mlflow.db")).database == database
    assert make_url(check_uri("sqlite:///mlflow.db?timeout=1")).query == {"timeout": "1"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ada:s3cr@t@host:5000/p", "https://***@host:5000/p"),
        ("postgresql+psycopg2://ada:secret@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("https://host/p?token=abc&x=1", "https://host/p?token=***&x=1"),
        ("https://host/a@b", "https://host/a@b"),
        ("ada@example.org", "ada@example.org"),
    ],
)
def test_redaction(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_no_password_reaches_the_disk(tmp_path: Path) -> None:
    uri = "http://ada:secret@127.0.0.1:1/"
    tracker = Tracker(tmp_path / "run", TrackingConfig(uri=uri, flush_s=0.0, timeout_s=1.0))
    tracker.start("run", layers=1, tags={"from": uri})
    tracker.params({"tracking": {"uri": uri}, "list": [uri]})
    tracker.finish("FINISHED")
    tracker.close()
    for thread in [each for each in threading.enumerate() if each.name.startswith("tracking-")]:
        thread.join(60)  # what it imports and says is not to meet the next test
        assert not thread.is_alive()
    for path in (tmp_path / "run").iterdir():
        assert b"secret" not in path.read_bytes(), path
    assert "secret" not in " ".join(problems(tracker))


def test_nested_parameters_get_dotted_names() -> None:
    values = {"a": {"b": {"c": 1}}, "layers": [{"k": 5}, {"k": 3}], "mesh": (2, 1), "none": None}
    assert dict(flatten(values)) == {
        "a.b.c": "1", "layers.0.k": "5", "layers.1.k": "3", "mesh": "[2, 1]", "none": "None",
    }  # fmt: skip


def test_long_values_end_in_a_marker() -> None:
    assert _shorten("x" * 10, 10) == "x" * 10
    assert _shorten("x" * 5000, 100) == "x" * (100 - len(TRUNCATED)) + TRUNCATED


def test_without_mlflow_the_spool_is_written_all_the_same(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", TrackingConfig(enabled=False))
    tracker.start("run", layers=1)
    tracker.metrics(1, {"objective": 1.0})
    assert (tracker.close(), tracker.run_id) == (0, None)
    assert [event.kind for event, _ in Spool(tmp_path / "run" / "events.jsonl").read()] == ["start", "metrics"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- a server that fails ---------------------------------------------------------------------------------------


def test_a_server_that_fails_costs_the_run_nothing(
    tmp_path: Path, broken_server: tuple[str, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow.store.tracking.rest_store  # noqa: F401  (takes longer than the job waits)

    uri, requests = broken_server
    tracker = Tracker(tmp_path / "run", TrackingConfig(uri=uri, flush_s=1.0, timeout_s=2.0))
    tracker.start("run", layers=1)
    for step in range(100):
        tracker.metrics(step, {"objective": 1.0}, layer=0)
    tracker.finish("FINISHED")
    assert tracker.close() == 102
    assert tracker.run_id is None
    assert requests, "the server was never asked"
    assert "500" in problems(tracker)[-1]
    assert capfd.readouterr() == ("", "")


# --- MLflow ----------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two named outputs of one input, like an exported stack."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x.flatten(1)).relu()
        return {"features": y, "scores": y[:, :3].cumsum(1)}


def toy(path: str) -> nn.Module:
    torch.manual_seed(len(Path(path).name))
    return Toy()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a SQLite store; setting one up takes seconds, so the tests share it."""
    folder = tmp_path_factory.mktemp("store") / "50%20off? #1"  # all that means something in a URI
    folder.mkdir()
    return folder


def config_of(store: Path, experiment: str) -> TrackingConfig:
    return TrackingConfig(uri=sqlite_uri(store / "mlflow.db"), experiment=experiment)


@pytest.fixture(scope="module")
def recorded(store: Path) -> Tracker:
    """A finished run of two layers."""
    run_dir = store / "run"
    (run_dir / "figures").mkdir(parents=True)
    (run_dir / "figures" / "filters.png").write_bytes(PNG)
    (run_dir / "config.yaml").write_text("seed: 1\n")
    tracker = Tracker(run_dir, config_of(store, "recorded"), ModelLogger(toy))
    tracker.start("fashion", layers=2, tags={"world_size": 2})
    tracker.params({"model": {"layers": [{"out_channels": 64}]}, "note": "x" * 7000})
    tracker.params({"out_channels": 64}, layer=1)
    tracker.artifact(run_dir / "config.yaml")
    tracker.dataset("digits", source="scikit-learn", digest="0123456789abcdef", num_images=1797)
    for step in range(1, 4):
        for layer in (0, 1):
            tracker.metrics(step, {"objective": 10.0 * layer - step, "residual": math.nan}, layer=layer, time_s=step)
    tracker.metrics(3, {"accuracy": 0.9})
    tracker.figure(run_dir / "figures" / "filters.png", layer=0)
    tracker.model(run_dir / "model", (3, 2, 2))
    tracker.finish("FINISHED")
    assert (tracker.close(), problems(tracker)) == (0, [])
    return tracker


@pytest.fixture(scope="module")
def client(store: Path, recorded: Tracker) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(recorded.uri, registry_uri=recorded.uri)


def layer_runs(tracker: Tracker) -> dict[int, str]:
    """MLflow's ids of the layers' runs."""
    return {int(which): run_id for which, run_id in tracker._sender.delivery.progress.runs.items() if which != PARENT}


def history(client: Any, run_id: str, key: str) -> list[tuple[int, int, float]]:
    return sorted((row.step, row.timestamp, row.value) for row in client.get_metric_history(run_id, key))


def test_the_page_of_a_run(recorded: Tracker, client: Any) -> None:
    parent = client.get_run(recorded.run_id)
    assert (parent.info.run_name, parent.info.status) == ("fashion", "FINISHED")
    assert parent.data.params["model.layers.0.out_channels"] == "64"
    assert parent.data.params["note"].endswith(TRUNCATED)
    assert parent.data.tags["world_size"] == "2"
    assert parent.data.tags["simmatch.attempts"] == "1"
    assert parent.data.metrics == {"accuracy": 0.9}
    assert [artifact.path for artifact in client.list_artifacts(recorded.run_id)] == ["config.yaml"]
    assert sorted(layer_runs(recorded)) == [0, 1]
    for layer, run_id in layer_runs(recorded).items():
        child = client.get_run(run_id)
        assert (child.info.run_name, child.info.status) == (f"layer {layer}", "FINISHED")
        assert child.data.tags["mlflow.parentRunId"] == recorded.run_id
        assert history(client, run_id, "objective") == [(s, 1000 * s, 10.0 * layer - s) for s in (1, 2, 3)]
        assert all(math.isnan(value) for _, _, value in history(client, run_id, "residual"))
    assert client.get_run(layer_runs(recorded)[1]).data.params == {"out_channels": "64"}
    assert [a.path for a in client.list_artifacts(layer_runs(recorded)[0], "figures")] == ["figures/filters.png"]
    [used] = parent.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("digits", "0123456789abcdef")
    assert json.loads(used.dataset.profile) == {"num_images": 1797}
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "training"}


def copy_of(logged: Any, folder: Path) -> Path:
    """A model's folder, elsewhere: MLflow reads none below a name that looks like a quoted one, as the store's does."""
    copied: Path = shutil.copytree(unquote(logged.artifact_location.removeprefix("file://")), folder)
    return copied


def test_the_logged_model_gives_the_same_outputs(recorded: Tracker, tmp_path: Path, client: Any) -> None:
    import mlflow.pytorch

    [output] = client.get_run(recorded.run_id).outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert (logged.name, logged.status, logged.source_run_id) == ("model", "READY", recorded.run_id)
    folder = copy_of(logged, tmp_path / "model")
    assert [path.suffix for path in (folder / "data").iterdir()] == [".pt2"]
    module = mlflow.pytorch.load_model(str(folder))
    for batch in (1, 7):  # neither is the batch it was traced with
        x = torch.rand(batch, 3, 2, 2)
        expected = toy("model")(x)
        loaded = module(x)
        assert sorted(loaded) == ["features", "scores"]
        for name, value in expected.items():
            torch.testing.assert_close(loaded[name], value)
    from mlflow.models import Model

    signature = Model.load(str(folder)).signature
    assert [spec.shape for spec in signature.inputs.inputs] == [(-1, 3, 2, 2)]
    assert {spec.name: spec.shape for spec in signature.outputs.inputs} == {"features": (-1, 5), "scores": (-1, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stack_is_logged_with_named_outputs(dtype: torch.dtype, store: Path, tmp_path: Path, client: Any) -> None:
    import mlflow.pytorch

    layer = {"out_channels": 6, "kernel_size": "full", "supervised": True, "dynamics": {"encode_iterations": 3}}
    source = InputConfig(in_channels=1, height=4, width=4, num_classes=3)
    stack = Stack(parse(ModelConfig, {"layers": [layer]}), source, dtype=dtype)
    torch.nn.init.normal_(stack.get_buffer("layers.0.label"), generator=torch.Generator().manual_seed(0))
    save_model(stack, tmp_path / "run" / "model")
    tracker = Tracker(tmp_path / "run", config_of(store, f"stack of {dtype}"), ModelLogger(load_exported))
    tracker.start("run", layers=1)
    tracker.model(tmp_path / "run" / "model", (1, 4, 4))
    assert (tracker.close(), problems(tracker)) == (0, [])
    [output] = client.get_run(tracker.run_id).outputs.model_outputs
    folder = str(copy_of(client.get_logged_model(output.model_id), tmp_path / "model"))
    x = torch.rand(5, 1, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    loaded, expected = mlflow.pytorch.load_model(folder)(x), stack.eval().outputs(x)
    assert sorted(loaded) == sorted(expected) == ["features", "scores"]
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value)


@pytest.mark.parametrize("ready", ["a", "b"])
def test_of_two_models_of_one_key_the_finished_one_is_linked(
    ready: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One was made by a request that came late; a link to the other may be under way already."""
    for name in ("_save", "_name"):
        monkeypatch.setattr(cluster.tracking.mlflow_model, name, lambda *_: None)
    models = [
        SimpleNamespace(model_id=name, status="READY" if name == ready else "PENDING", tags={MODEL_KEY_TAG: "key"})
        for name in ("a", "b")
    ]
    client = Mock()
    client.get_run.return_value = SimpleNamespace(info=SimpleNamespace(experiment_id="0"), outputs=None)
    client.search_logged_models.return_value = models
    ModelLogger(toy)(tmp_path, (3, 2, 2), "run", "key", client)
    client.create_logged_model.assert_not_called()
    [(_, [output])] = [call.args for call in client.log_outputs.call_args_list]
    assert output.model_id == ready


def test_a_replay_from_the_start_stores_nothing_twice(recorded: Tracker, client: Any) -> None:
    def picture() -> Any:
        runs = client.search_runs([client.get_experiment_by_name("recorded").experiment_id])
        return sorted(
            (
                run.info.run_id,
                run.info.status,
                run.info.end_time,
                [(key, len(history(client, run.info.run_id, key))) for key in sorted(run.data.metrics)],
                run.data.params,
                len(run.inputs.dataset_inputs),
                [output.model_id for output in run.outputs.model_outputs] if run.outputs else [],
            )
            for run in runs
        )

    before = picture()
    assert len(before) == 3
    spool = Spool(recorded.run_dir / "events.jsonl")
    events = sum(1 for _ in spool.read())
    (recorded.run_dir / "events.offset").unlink()
    replay = Tracker(recorded.run_dir, recorded.config, ModelLogger(toy))
    replay._sender.delivery.load()
    assert replay._sender.delivery.progress.runs == {}
    replay._sender.close(60.0)
    replay._sender.run()
    assert (replay._sender.delivery.sent, replay._sender.delivery.pending(), problems(replay)) == (events, 0, [])
    assert replay.run_id == recorded.run_id
    assert picture() == before
    assert len(client.search_logged_models([client.get_experiment_by_name("recorded").experiment_id])) == 1


def test_a_resumed_run_goes_on_where_it_was(store: Path, tmp_path: Path, client: Any) -> None:
    config = config_of(store, "resumed")
    first = Tracker(tmp_path / "run", config)
    first.start("run", layers=1)
    first.params({"seed": 1})
    first.metrics(1, {"objective": 1.0}, layer=0)
    first.finish("KILLED")
    assert first.close() == 0
    run_ids = first._sender.delivery.progress.runs.values()
    assert {client.get_run(run_id).info.status for run_id in run_ids} == {"KILLED"}
    with (tmp_path / "run" / "events.jsonl").open("ab") as spool:
        spool.write(b'{"kind":"metr')  # the crash of a writer
    second = Tracker(tmp_path / "run", config)
    second.start("run", layers=1)
    second.params({"seed": 2, "extra": 3})
    second.metrics(2, {"objective": 0.5}, layer=0)
    assert second.close() == 0
    assert (second.run_id, layer_runs(second)) == (first.run_id, layer_runs(first))
    run = client.get_run(second.run_id)
    assert (run.info.status, run.data.tags["simmatch.attempts"]) == ("RUNNING", "2")
    assert run.data.params == {"seed": "1", "extra": "3"}
    assert [problem for problem in problems(second) if "seed" in problem] == problems(second) != []
    assert [row[0] for row in history(client, layer_runs(second)[0], "objective")] == [1, 2]


def test_a_run_that_ends_twice_with_the_same_weights_has_one_model(store: Path, tmp_path: Path, client: Any) -> None:
    """It was cut off at its end, before the end was recorded, and the same command repeated it."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    for weights in (b"same", b"same", b"others"):
        (tmp_path / "run" / "model" / "weights").write_bytes(weights)
        tracker = Tracker(tmp_path / "run", config_of(store, "twice"), ModelLogger(toy))
        tracker.start("run", layers=0)
        tracker.finish("FINISHED")
        tracker.model(tmp_path / "run" / "model", (3, 2, 2))
        assert (tracker.close(), problems(tracker)) == (0, [])
        run = client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert len(run.outputs.model_outputs) == (2 if weights == b"others" else 1)


def test_what_mlflow_cannot_take_is_noted_and_passed_over(store: Path, tmp_path: Path, client: Any) -> None:
    tracker = Tracker(tmp_path / "run", config_of(store, "refused"), ModelLogger(broken_model))
    tracker.start("run", layers=1)
    tracker.metrics(1, {"good": 1.0})
    tracker.metrics(1, {"bad name: \\ §": 1.0})
    tracker.metrics(1, {"objective": 1.0}, layer=7)
    tracker.figure(tmp_path / "missing.png")
    tracker.model(tmp_path / "model", (1, 2, 2))
    tracker.metrics(2, {"good": 2.0})
    tracker.finish("FAILED")
    assert tracker.close() == 0
    assert [note.partition(":")[0] for note in problems(tracker)] == ["metrics", "metrics", "artifact", "model"]
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FAILED", {"good": 2.0})


def test_lines_that_are_no_events_are_noted_and_passed_over(store: Path, tmp_path: Path, client: Any) -> None:
    """What a failing disk, or a hand, has put into the spool holds nothing up."""
    tracker = Tracker(tmp_path / "run", TrackingConfig(enabled=False))
    tracker.start("run", layers=1)
    tracker.metrics(1, {"good": 1.0})
    tracker.close()
    strange: list[bytes] = [
        b"garbage", b"[1]", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"kind":"metrics"}',
        b'{"kind":"metrics","time_ms":1,"step":1,"values":{"a":"no number"}}',
        b'{"kind":"metrics","time_ms":1,"step":"x","values":{"a":1}}',
        b'{"kind":"metrics","time_ms":1,"step":1,"values":[]}', b'{"kind":"metrics","layer":{},"values":{}}',
        b'{"kind":"params","values":null}', b'{"kind":"finish","status":"GONE","time_ms":1}',
        b'{"kind":"dataset","time_ms":1}', b'{"kind":"artifact","path":"/","folder":"","name":"x","time_ms":1}',
    ]  # fmt: skip
    with (tmp_path / "run" / "events.jsonl").open("ab") as file:
        file.writelines(line + b"\n" for line in strange)
    again = Tracker(tmp_path / "run", config_of(store, "strange"))
    again.start("run", layers=1)
    again.metrics(2, {"good": 2.0})
    again.finish("FINISHED")
    assert again.close() == 0
    assert again._sender.delivery.rejected == len(strange)
    run = client.get_run(again.run_id)
    assert (run.info.status, [row[0] for row in history(client, again.run_id, "good")]) == ("FINISHED", [1, 2])


def test_text_that_is_no_utf8_holds_nothing_up(store: Path, tmp_path: Path, client: Any) -> None:
    tracker = Tracker(tmp_path / "run", config_of(store, "names"))
    tracker.start("run", layers=0)
    tracker.tags({"host": os.fsdecode(b"caf\xe9")})
    tracker.metrics(1, {"good": 1.0})
    assert (tracker.close(), problems(tracker)) == (0, [])
    run = client.get_run(tracker.run_id)
    assert (run.data.tags["host"], run.data.metrics) == ("caf?", {"good": 1.0})


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_nothing_is_passed_over_while_the_run_is_deleted(
    what: str, store: Path, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is reported; the events are kept, and sent once the run is back."""
    monkeypatch.setattr(cluster.tracking.notices, "REPORT_AFTER_S", 0.0)
    monkeypatch.setattr(cluster.tracking.sender, "BACKOFF_FIRST_S", 0.02)
    lines: list[str] = []
    tracker = Tracker(tmp_path / "run", config_of(store, f"without {what}"))
    tracker.announce_to(lines.append)
    tracker.start("run", layers=1)
    wait_until(lambda: tracker._sender.delivery.pending() == 0)
    run = client.get_run(tracker.run_id)
    delete = {"run": client.delete_run, "experiment": client.delete_experiment}
    restore = {"run": client.restore_run, "experiment": client.restore_experiment}
    which = run.info.run_id if what == "run" else run.info.experiment_id
    delete[what](which)
    tracker.metrics(1, {"good": 1.0})
    wait_until(lambda: lines)
    assert (tracker._sender.delivery.pending(), tracker._sender.delivery.rejected) == (1, 0)
    restore[what](which)
    assert (tracker.close(), problems(tracker)) == (0, [])
    assert client.get_run(tracker.run_id).data.metrics == {"good": 1.0}
    [why, end] = lines
    assert "must be in the 'active' state. Current state is deleted" in why
    assert end.endswith("takes records again")


@pytest.mark.fault
def test_a_locked_data_base_is_reported(
    store: Path, tmp_path: Path, recorded: Tracker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SQLite waits 20 s for the lock."""
    lines: list[str] = []
    tracker = Tracker(tmp_path / "run", config_of(store, "locked"))
    tracker.announce_to(lines.append)
    tracker.start("run", layers=1)
    wait_until(lambda: tracker._sender.delivery.pending() == 0)
    with closing(sqlite3.connect(store / "mlflow.db")) as other:
        other.execute("begin exclusive")
        tracker.metrics(1, {"good": 1.0})
        wait_until(lambda: lines, limit_s=60.0)
        assert "database is locked; the job continues" in lines[0]
    assert (tracker.close(), problems(tracker)) == (0, [])
    assert lines[1:] == [f"MLflow at {tracker.uri} takes records again"]
    assert "locked" not in "".join(capfd.readouterr())


def wait_until(condition: Callable[[], Any], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it has not come to that in time"
        time.sleep(0.02)


def broken_model(path: str) -> nn.Module:
    raise ValueError(f"no model in {path}")


def test_runs_the_server_does_not_know_are_looked_for_again(store: Path, tmp_path: Path, client: Any) -> None:
    config = config_of(store, "deleted")
    tracker = Tracker(tmp_path / "run", config)
    tracker.start("run", layers=0)
    tracker.metrics(1, {"accuracy": 0.5})
    assert tracker.close() == 0
    progress = SendProgress.load(tmp_path / "run" / "events.offset", redact(tracker.uri), sys.maxsize)
    stale = SendProgress(progress.destination, progress.offset, {"parent": "0" * 32})
    stale.save(tmp_path / "run" / "events.offset")
    again = Tracker(tmp_path / "run", config)
    again.start("run", layers=0)
    assert again.close() == 0
    assert again.run_id == tracker.run_id
    assert client.get_run(tracker.run_id).data.tags["simmatch.attempts"] == "2"


@pytest.mark.slow
def test_a_job_prints_nothing_of_mlflow_and_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from cluster.tracking.tracker import Tracker, TrackingConfig\n"
        "assert 'mlflow' not in sys.modules\n"
        "tracker = Tracker(pathlib.Path(sys.argv[1]), TrackingConfig())\n"
        "tracker.start('run', layers=1)\n"
        "tracker.finish('FINISHED')\n"
        "assert tracker.close() == 0, tracker.reason\n"
        "import os\n"
        "assert not [key for key in os.environ if 'MLFLOW' in key], os.environ\n"
    )
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "runs" / "a")],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {"a", "mlflow.db", "mlartifacts"}
