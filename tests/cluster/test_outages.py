"""A real MLflow server behind a proxy that fails as planned: nothing is lost, nothing is there twice.

The oracle is the spool itself, turned into what MLflow should hold by other code than the sink's.
"""

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cluster.tracking.mlflow_model
import cluster.tracking.notices
import cluster.tracking.sender
import jobs.sync
from cluster.tracking.config import TrackingConfig
from cluster.tracking.events import RunStatus, StartEvent
from cluster.tracking.mlflow_model import ModelLogger
from cluster.tracking.spool import SPOOL_NAME, Spool
from cluster.tracking.tracker import Tracker
from tests.outages import Outage, Proxy, mlflow_server, problems

PNG = b"\x89PNG\r\n\x1a\n"
LAYERS = 2
RECORDS = 25
QUICK_S = 0.02

REQUESTS = {
    "get experiment": r"GET .*/experiments/get-by-name$",
    "create experiment": r"POST .*/experiments/create$",
    "search runs": r"POST .*/runs/search$",
    "create run": r"POST .*/runs/create$",
    "log batch": r"POST .*/runs/log-batch$",
    "get run": r"GET .*/runs/get$",
    "log inputs": r"POST .*/runs/log-inputs$",
    "upload artifact": r"PUT .*/artifacts/.*figures/filters\.png$",
    "search models": r"POST .*/logged-models/search$",
    "create model": r"POST .*/logged-models$",
    "get model": r"GET .*/logged-models/[^/]*$",
    "upload model": r"PUT .*/artifacts/.*/MLmodel$",
    "finalize model": r"PATCH .*/logged-models/[^/]*$",
    "log outputs": r"POST .*/runs/outputs$",
    "update run": r"POST .*/runs/update$",
}
"""Every kind of request that a run makes: name → where it goes."""

OWN_TAGS = r"simmatch\.|mlflow\.(?!user$)"
"""Those that the sink and MLflow put in themselves."""

CREATING = ("create experiment", "create run", "log batch", "log inputs", "create model", "log outputs", "update run")
"""Requests that would leave something twice, or stale, if the same came again late."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of an MLflow server. It takes some 10 s to start, so the tests share it; each has an experiment."""
    with mlflow_server(tmp_path_factory.mktemp("server")) as port:
        yield port


@pytest.fixture
def outage(server: int) -> Iterator[Callable[..., Proxy]]:
    """(plan) → a proxy before the server."""
    proxies: list[Proxy] = []

    def start(*plan: Outage) -> Proxy:
        proxies.append(Proxy(server, *plan))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


@pytest.fixture(scope="module")
def client(server: int) -> Any:
    """A client of the server itself, past all proxies."""
    from mlflow import MlflowClient

    uri = f"http://127.0.0.1:{server}"
    return MlflowClient(uri, registry_uri=uri)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter pauses, and a model that takes no seconds to trace: neither is what is tested here."""
    monkeypatch.setattr(cluster.tracking.sender, "BACKOFF_FIRST_S", QUICK_S)
    monkeypatch.setattr(cluster.tracking.sender, "BACKOFF_MOST_S", 8 * QUICK_S)
    monkeypatch.setattr(cluster.tracking.mlflow_model, "_save", save_nothing)
    monkeypatch.setattr(jobs.sync, "load_exported", no_model)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def save_nothing(module: Any, path: Path, input_shape: Any) -> None:
    """An MLflow model folder as small as can be."""
    path.mkdir()
    (path / "MLmodel").write_text("flavors: {}\n")


def no_model(path: str) -> Any:
    return None


def make_tracker(run_dir: Path, proxy: Proxy | str, *, timeout_s: float = 10.0, flush_s: float = 60.0) -> Tracker:
    """A tracker that is started, with the first records of a run of two layers."""
    uri = proxy if isinstance(proxy, str) else proxy.uri
    config = TrackingConfig(uri=uri, experiment=run_dir.name, timeout_s=timeout_s, flush_s=flush_s)
    tracker = Tracker(run_dir, config, ModelLogger(no_model))
    tracker.start("a run", layers=LAYERS, tags={"world_size": 2})
    tracker.params({"seed": 1, "mesh": {"channel": 2}})
    for layer in range(LAYERS):
        tracker.params({"out_channels": 10 * (layer + 1)}, layer=layer)
    tracker.dataset("digits", source="scikit-learn", digest="0123456789abcdef", num_images=1797)
    return tracker


def record(tracker: Tracker, first: int = 1, count: int = RECORDS) -> None:
    """Metrics of some steps; values repeat, and some are no numbers."""
    for step in range(first, first + count):
        for layer in range(LAYERS):
            values = {"objective": 1.0 / step, "residual": math.nan, "dead_channels": 0.0}
            tracker.metrics(step, values, layer=layer, time_s=1e9 + step)
        tracker.metrics(step, {"images_per_second": 100.0})


def end(tracker: Tracker, status: RunStatus = "FINISHED") -> int:
    """What comes at the end of a run; returns what is left to send."""
    figure_and_model(tracker)
    tracker.finish(status)
    return tracker.close()


def figure_and_model(tracker: Tracker) -> None:
    figure = tracker.run_dir / "filters.png"
    figure.write_bytes(PNG)
    tracker.figure(figure, layer=0)
    tracker.tags({"restarts": "1"})
    tracker.model(tracker.run_dir / "model", (1, 8, 8))


def expected(run_dir: Path) -> dict[str, Any]:
    """What MLflow should hold, read off the spool."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    names = ["a run", *(f"layer {layer}" for layer in range(LAYERS))]
    picture: dict[str, Any] = {
        name: {"metrics": Counter(), "params": {}, "tags": {}, "files": set(), "status": "RUNNING", "end": None}
        for name in names
    }
    datasets: set[str] = set()
    models = 0
    for event in events:
        run = picture["a run" if event.get("layer") is None else f"layer {event['layer']}"]
        if event["kind"] == "metrics":
            rows = [(key, event["step"], event["time_ms"], float(value)) for key, value in event["values"].items()]
            run["metrics"].update(map(repr, rows))
        elif event["kind"] == "params":
            run["params"] |= event["values"]
        elif event["kind"] in ("tags", "start"):
            run["tags"] |= {key: str(value) for key, value in event.get("tags", event.get("values")).items()}
        elif event["kind"] == "artifact":
            run["files"].add("/".join(filter(None, (event["folder"], event["name"]))))
        elif event["kind"] == "dataset":
            datasets.add(event["digest"])
        elif event["kind"] == "model":
            models += 1
        elif event["kind"] == "finish":
            for run in picture.values():
                run |= {"status": event["status"], "end": event["time_ms"]}
    return picture | {"datasets": sorted(datasets), "models": ["READY"] * models, "linked": models}


def in_mlflow(client: Any, name: str) -> dict[str, Any]:
    """What MLflow holds of the only run of an experiment."""
    experiment = client.get_experiment_by_name(name)
    runs = client.search_runs([experiment.experiment_id])
    names = [run.info.run_name for run in runs]
    assert sorted(names) == ["a run", *(f"layer {layer}" for layer in range(LAYERS))]
    [parent] = [run for run in runs if run.info.run_name == "a run"]
    picture: dict[str, Any] = {}
    for run in runs:
        if run is not parent:
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        rows: Counter[str] = Counter()
        for key in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, key)
            rows.update(repr((row.key, row.step, row.timestamp, row.value)) for row in history)
        picture[run.info.run_name] = {
            "metrics": rows,
            "params": run.data.params,
            "tags": {
                key: value for key, value in run.data.tags.items() if not re.match(r"simmatch|mlflow\.(?!user)", key)
            },
            "files": files(client, run.info.run_id),
            "status": run.info.status,
            "end": run.info.end_time,
        }
    models = client.search_logged_models([experiment.experiment_id])
    outputs = parent.outputs.model_outputs if parent.outputs else []
    assert {output.model_id for output in outputs} == {model.model_id for model in models}
    return picture | {
        "datasets": sorted(used.dataset.digest for used in parent.inputs.dataset_inputs),
        "models": [str(model.status) for model in models],
        "linked": len(outputs),
    }


def files(client: Any, run_id: str, folder: str | None = None) -> set[str]:
    names: set[str] = set()
    for entry in client.list_artifacts(run_id, folder):
        names |= files(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return names


def sync(run_dir: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """`python -m jobs.sync RUN_DIR --uri …`, as the run's server is known to its user: status, output, errors.

    Without the links that MLflow prints when a run ends: a request abandoned in an outage may end only now, in a
    thread of its own.
    """
    capsys.readouterr()
    start, _ = next(Spool(run_dir / SPOOL_NAME).read())
    assert isinstance(start, StartEvent)
    code = jobs.sync.main([str(run_dir), "--uri", start.uri, *arguments])
    out, err = capsys.readouterr()
    return code, "".join(line for line in out.splitlines(keepends=True) if not line.startswith(("🏃", "🧪"))), err


def check_whole(client: Any, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the spool is in MLflow, once, and sending again changes nothing."""
    whole = expected(run_dir)
    assert in_mlflow(client, run_dir.name) == whole
    progress = (run_dir / "events.offset").read_bytes()
    code, out, err = sync(run_dir, capsys)
    assert (code, out.partition(" sent")[0], err) == (0, "0 events", "")
    assert in_mlflow(client, run_dir.name) == whole
    assert (run_dir / "events.offset").read_bytes() == progress


def test_no_outage_and_the_requests_of_a_run(
    tmp_path: Path, outage: Callable[..., Proxy], client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of requests is whole: each is made, and none is made that it does not know."""
    proxy = outage()
    tracker = make_tracker(tmp_path / "undisturbed", proxy)
    record(tracker)
    assert (end(tracker), problems(tracker)) == (0, [])
    check_whole(client, tmp_path / "undisturbed", capsys)
    for name, pattern in REQUESTS.items():
        assert any(re.search(pattern, request) for request in proxy.seen), name
    assert [seen for seen in proxy.seen if not any(re.search(known, seen) for known in REQUESTS.values())] == []


@pytest.mark.parametrize(
    "outcome",
    [
        Outage("lost reply", count=1),
        pytest.param(Outage("error", count=1), marks=pytest.mark.fault),
        pytest.param(Outage("error", count=1, status=404), marks=pytest.mark.fault),
    ],
    ids=["lost reply", "500", "404"],
)
def test_every_kind_of_request_fails_once(
    outcome: Outage, tmp_path: Path, outage: Callable[..., Proxy], client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = outage(*(replace(outcome, match=match) for match in REQUESTS.values()))
    run_dir = tmp_path / f"each-{outcome.kind.replace(' ', '-')}-{outcome.status}"
    tracker = make_tracker(run_dir, proxy)
    record(tracker)
    wait_until(lambda: tracker.run_id)
    experiment = client.get_experiment_by_name(run_dir.name)
    assert len(client.search_runs([experiment.experiment_id])) == 1 + LAYERS  # at the end it would be tidied up
    assert (end(tracker), problems(tracker)) == (0, [])
    assert {failed.match for failed in proxy.failed} == set(REQUESTS.values())
    check_whole(client, run_dir, capsys)


@pytest.mark.fault
@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("kind", ["lost reply", "refuse"])
def test_one_kind_of_request_fails_three_times(
    kind: Any, name: str, tmp_path: Path, outage: Callable[..., Proxy], client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = outage(Outage(kind, REQUESTS[name], count=3))
    run_dir = tmp_path / f"{kind}-{name}".replace(" ", "-")
    tracker = make_tracker(run_dir, proxy)
    record(tracker)
    assert (end(tracker), problems(tracker)) == (0, [])
    assert len(proxy.failed) >= 1
    check_whole(client, run_dir, capsys)


@pytest.mark.parametrize(
    "names", [("create run", "create model"), pytest.param(CREATING, marks=pytest.mark.fault)], ids=["some", "all"]
)
def test_requests_arrive_after_they_were_given_up(
    names: tuple[str, ...],
    tmp_path: Path,
    outage: Callable[..., Proxy],
    client: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The client has asked again by then: of two runs or two models of one key, one has to go."""
    plan = [Outage("late", REQUESTS[name], count=1, delay_s=1.5) for name in names if name != "update run"]
    proxy = outage(*plan)
    run_dir = tmp_path / f"late-{len(names)}"
    tracker = make_tracker(run_dir, proxy, timeout_s=1.0)
    record(tracker)
    figure_and_model(tracker)
    wait_until(lambda: {failed.match for failed in proxy.failed} == {late.match for late in plan})
    time.sleep(2.0)  # the last one arrives
    tracker.finish("FINISHED")
    assert (tracker.close(), problems(tracker)) == (0, [])
    check_whole(client, run_dir, capsys)


AWAY = {
    "refusing": Outage("refuse"),
    "hanging": Outage("hang"),
    "500": Outage("error"),
    "503": Outage("error", status=503),
    "401": Outage("error", status=401),
    "403": Outage("error", status=403),
    "400 of a gateway": Outage("error", status=400),
    "404 of a gateway": Outage("error", status=404),
    "answers lost": Outage("lost reply"),
    "dripping": Outage("drip", delay_s=0.3),
}
FAST = ("hanging", "404 of a gateway", "answers lost")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.fault) for n in AWAY])
def test_away_for_the_whole_run(
    name: str, tmp_path: Path, outage: Callable[..., Proxy], client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything waits in the spool, status and all, until it is asked for."""
    proxy = outage(AWAY[name])
    run_dir = tmp_path / f"away-{name.replace(' ', '-')}"
    tracker = make_tracker(run_dir, proxy, timeout_s=1.0, flush_s=1.0)
    record(tracker)
    wait_until(lambda: proxy.failed)
    events = end(tracker, "KILLED")
    assert events == (run_dir / "events.jsonl").read_bytes().count(b"\n")
    proxy.lift()
    code, out, err = sync(run_dir, capsys)
    assert (code, out.partition(" sent")[0], err) == (0, f"{events} events", "")
    assert expected(run_dir)["a run"]["status"] == "KILLED"
    check_whole(client, run_dir, capsys)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("404 of a gateway", "dripping") else pytest.mark.fault) for n in AWAY]
)
def test_away_in_the_middle_and_back_again(
    name: str, tmp_path: Path, outage: Callable[..., Proxy], client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run continues meanwhile, and later sends the events that have collected."""
    count = 2 if name == "dripping" else 4
    proxy = outage(replace(AWAY[name], first=12, count=count))
    run_dir = tmp_path / f"middle-{name.replace(' ', '-')}"
    tracker = make_tracker(run_dir, proxy, timeout_s=1.0)
    tracker._sender._stalled_s = 2.0
    for part in range(5):
        record(tracker, 1 + 5 * part, 5)
        wait_until(lambda: tracker.run_id)
    assert (end(tracker, "FAILED"), problems(tracker)) == (0, [])
    assert len(proxy.failed) == count
    check_whole(client, run_dir, capsys)


def test_a_refusal_is_reported_once_and_so_is_its_end(
    tmp_path: Path,
    outage: Callable[..., Proxy],
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each of two reasons is reported in the server's words, and MLflow itself prints nothing."""
    monkeypatch.setattr(cluster.tracking.notices, "REPORT_AFTER_S", 0.0)
    refused = {401: Outage("error", first=12, count=3, status=401), 403: Outage("error", first=12, count=4, status=403)}
    proxy = outage(*refused.values())
    run_dir = tmp_path / "told"
    tracker = make_tracker(run_dir, proxy)
    lines: list[str] = []
    tracker.announce_to(lines.append)
    record(tracker)
    wait_until(lambda: len(lines) == 3)
    assert (end(tracker), problems(tracker)) == (0, [])
    assert [line.partition(" at http")[0] for line in lines] == 3 * ["MLflow"]
    for line, status in zip(lines, refused, strict=False):
        assert f"error code {status} != 200. Response body: 'a planned failure'; the job continues" in line
    assert lines[2] == f"MLflow at {proxy.uri} takes records again"
    assert in_mlflow(client, "told") == expected(run_dir)
    assert "planned" not in "".join(capfd.readouterr())


def test_slow(tmp_path: Path, outage: Callable[..., Proxy], client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = outage(Outage("slow", first=3, count=2, delay_s=1.0))
    tracker = make_tracker(tmp_path / "slow", proxy)
    record(tracker)
    assert (end(tracker), problems(tracker)) == (0, [])
    assert len(proxy.failed) == 2
    check_whole(client, tmp_path / "slow", capsys)


def test_a_port_where_nobody_listens_until_the_server_is_back(
    tmp_path: Path, server: int, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    run_dir = tmp_path / "port"
    tracker = make_tracker(run_dir, f"http://127.0.0.1:{port}")
    record(tracker)
    wait_until(lambda: "refused" in str(problems(tracker)))
    proxy = Proxy(server, port=port)
    try:
        assert (end(tracker), problems(tracker)) == (0, [])
        check_whole(client, run_dir, capsys)
    finally:
        proxy.close()


@pytest.mark.parametrize("request_name", ["upload artifact", pytest.param("upload model", marks=pytest.mark.fault)])
@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_an_upload_that_hangs_does_not_hold_up_the_end(
    kind: Any,
    request_name: str,
    tmp_path: Path,
    outage: Callable[..., Proxy],
    client: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxy = outage(Outage(kind, REQUESTS[request_name], delay_s=0.3))
    run_dir = tmp_path / f"{kind}-{request_name.replace(' ', '-')}"
    tracker = make_tracker(run_dir, proxy, timeout_s=1.0, flush_s=1.0)
    figure_and_model(tracker)
    wait_until(lambda: proxy.failed)
    tracker.finish("FINISHED")
    started = time.monotonic()
    assert tracker.close() > 0
    assert time.monotonic() - started < 1.0 + 1.0 + 1.5
    proxy.lift()
    code, _, err = sync(run_dir, capsys)
    assert (code, err) == (0, "")
    check_whole(client, run_dir, capsys)


def test_a_refusal_of_mlflow_is_told_apart_from_one_of_a_gateway(
    tmp_path: Path, outage: Callable[..., Proxy], client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What MLflow itself refuses is passed over, and does not hold up what comes after."""
    proxy = outage(Outage("error", REQUESTS["upload artifact"], status=413))
    tracker = make_tracker(tmp_path / "refused", proxy)
    record(tracker, count=1)
    assert end(tracker) == 0
    assert [problem.partition(":")[0] for problem in problems(tracker)] == ["artifact"]
    whole = expected(tmp_path / "refused")
    whole["layer 0"]["files"] = set()
    assert in_mlflow(client, "refused") == whole


def wait_until(condition: Callable[[], Any], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it has not come to that in time"
        time.sleep(0.02)
