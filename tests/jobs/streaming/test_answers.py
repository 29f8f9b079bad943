"""Answers while a stream learns: of one version each, those of records by id, and nothing but them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.benchmarks.stream.served import Client
from jobs.streaming.answers import Answers, Latest, as_json, prepared
from jobs.streaming.answers_config import AnswersConfig
from jobs.streaming.candidate import Candidate
from jobs.streaming.config import StreamDataConfig
from jobs.streaming.journal import Journal
from jobs.streaming.outcome import Answer, Metrics, Outcome
from jobs.streaming.records import Record
from jobs.streaming.seen import Seen
from jobs.streaming.served import Served
from jobs.streaming.service import Service
from simmatch.config import parse
from tests.broker import Broker
from tests.jobs.streaming.streams import ListSource, small, waves

TOKEN = "a token of the test, long"
HTTP = {"http": {"token_env": "STREAM_TEST_TOKEN", "share": 1.0}}
PROBE = [np.sin((1 + 2 * kind) * np.arange(16.0) + 0.5)[:, None].tolist() for kind in (0, 1)]


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_TEST_TOKEN", TOKEN)


def opened(url: str) -> Client:
    return Client(url, TOKEN)


def expected(candidate: Candidate, classes: list[str]) -> list[dict[str, Any]]:
    """What a candidate says about the probe, by its own method."""
    x = prepared(np.array(PROBE), StreamDataConfig(), [1, 1, 16])
    said = candidate.say(x)
    return [
        {
            "label": None if said.scores is None else classes[int(said.scores[index].argmax())],
            "scores": {} if said.scores is None else dict(zip(classes, said.scores[index].tolist(), strict=True)),
            "novelty": None if np.isnan(float(said.novelty[index])) else float(said.novelty[index]),
            "novel": bool(said.novel[index]),
            "features": said.encoded.features[index].tolist(),
        }
        for index in range(len(x))
    ]


def test_every_answer_is_of_one_version(tmp_path: Path) -> None:
    """A thread asks while the stream learns: each answer equals, to the last bit, what the candidate says between two
    batches, and more than a few versions are served."""
    config = small(answers=HTTP, batch_size=4)
    seen = Seen(tmp_path, config, print)
    journal = Journal(tmp_path / "journal", 2**20)
    journal.open()
    service = Service(config, tmp_path, journal, seen, print)
    pipeline = service.state.pipeline
    seen.follow(pipeline)
    by_batch: dict[int, list[dict[str, Any]]] = {}
    add = seen.add

    def noted(outcome: Any, usage: Any) -> None:
        candidate = pipeline.champion_candidate
        if pipeline.calibrated and candidate is not None:
            by_batch[pipeline.batch] = expected(candidate, pipeline.intake.classes)
        add(outcome, usage)
        seen.answers.served._not_before = 0.0  # every version is offered

    seen.add = noted  # type: ignore[method-assign]
    assert seen.answers.url is not None
    client, answers, ended = opened(seen.answers.url), [], threading.Event()

    def ask() -> None:
        while not ended.is_set():
            status, content = client.ask("POST", "/score", {"windows": PROBE, "features": True})
            if status == 200:
                answers.append(content)
            elif status == 503:  # before calibration; the connection ends
                client.close()

    thread = threading.Thread(target=ask)
    thread.start()
    service.run(ListSource(waves(240), set()))
    ended.set()
    thread.join()
    seen.idle()
    answers.append(client.ask("POST", "/score", {"windows": PROBE, "features": True})[1])
    versions = {answer["batch"] for answer in answers}
    assert len(versions) >= 5
    assert answers[-1]["batch"] == pipeline.batch
    for answer in answers:
        assert answer["windows"] == by_batch[answer["batch"]]
    status, state = client.ask("GET", "/state")
    assert status == 200
    assert (state["records"], state["champion"], state["served"]["batch"]) == (240, "main", pipeline.batch)
    assert client.work_s > 0
    assert state["requests"]["p99_ms"] >= state["requests"]["p50_ms"] > 0
    status, content = client.ask("GET", "/answers/r239")
    assert status == 200
    assert content["answers"][0]["label"] in ("a", "b")
    status, unknown = client.ask("GET", "/answers/nobody")
    assert (status, unknown["error"]) == (
        404, "expected the id of a recent record in which a window ends, got 'nobody'"
    )  # fmt: skip
    client.close()
    seen.close("ended")
    journal.close()
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_learning_goes_on_as_without_requests(tmp_path: Path) -> None:
    """Copies change nothing: the digest is that of a stream that nobody asks."""
    digests = []
    for part, answers in (("asked", HTTP), ("alone", {})):
        run_dir = tmp_path / part
        config = small(answers=answers)
        seen = Seen(run_dir, config, print)
        journal = Journal(run_dir / "journal", 2**20)
        journal.open()
        service = Service(config, run_dir, journal, seen, print)
        seen.follow(service.state.pipeline)
        service.run(ListSource(waves(200), set()))
        if seen.answers.url is not None:
            client = opened(seen.answers.url)
            assert client.ask("POST", "/score", {"windows": PROBE})[0] == 200
            seen.idle()
            assert client.ask("POST", "/score", {"windows": PROBE})[0] == 200
            client.close()
        digests.append(service.state.snapshot("s").digest)
        seen.close("ended")
        journal.close()
    assert digests[0] == digests[1]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAM_TEST_TOKEN", TOKEN)
        config = parse(AnswersConfig, HTTP)
        answers = Answers("waves", config, data=StreamDataConfig(), state=dict, tell=print)

    class Fixed:
        name, batch, shape = "main", 7, [2, 1, 4]

        def score(self, x: torch.Tensor, *, features: bool) -> list[dict[str, Any]]:
            return [{"shape": list(x.shape), "features": features}]

    answers.served._snapshot = Fixed()  # type: ignore[assignment]
    assert answers.url is not None
    client = opened(answers.url)
    yield client
    client.close()
    answers.close()


ONE = [[[0.0, 1.0]] * 4]
EMPTY = Outcome((), (), (), Metrics(1, 1, 0.0, 0, 0, 0, 0, 0, 0, 0, "main", {}))


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ([], "expected {"),
        ({}, "expected {"),
        ({"windows": ONE, "x": 1}, "expected {"),
        ({"windows": ONE, "features": 1}, "features: expected true or false"),
        ({"windows": []}, "windows: expected a list of 1 to 64"),
        ({"windows": ONE * 65}, "windows: expected a list of 1 to 64"),
        ({"windows": "abc"}, "windows: expected a list of 1 to 64"),
        ({"windows": [[["0", "1"]] * 4]}, "windows: expected lists of numbers"),
        ({"windows": [[[True, False]] * 4]}, "windows: expected lists of numbers"),
        ({"windows": [[[None, 1.0]] * 4]}, "windows: expected lists of numbers"),
        ({"windows": [[[0.0, 1.0], [0.0]]]}, "windows: expected lists of numbers"),
        ({"windows": [[[0.0, {"a": 1}]] * 4]}, "windows: expected lists of numbers"),
        ({"windows": [[[0.0, float("nan")]] * 4]}, "windows: expected finite numbers"),
        ({"windows": [[[0.0, 10**400]] * 4]}, "windows: expected lists of numbers"),
        ({"windows": [[[0.0, 1.0]] * 5]}, "windows: expected samples × channels of 4 × 2, got 5 × 2"),
        ({"windows": [[0.0, 1.0]]}, "windows: expected samples × channels of 4 × 2, got 2"),
        ({"windows": [1.0]}, "windows: expected samples × channels of 4 × 2, got a number"),
    ],
)
def test_windows_that_are_none(client: Client, body: Any, what: str) -> None:
    status, content = client.ask("POST", "/score", body)
    assert status == 400
    assert content["error"].startswith(what)
    client.close()
    assert client.ask("POST", "/score", {"windows": ONE, "features": True})[1]["windows"] == [
        {"shape": [1, 2, 1, 4], "features": True}
    ]


def test_ids_are_no_paths(client: Client) -> None:
    for path in ("/answers/../../etc/passwd", "/answers/%2e%2e%2fetc%2fpasswd", "/answers/", "/answers", "/state/x"):
        status, content = client.ask("GET", path)
        assert status == 404
        assert "root:" not in json.dumps(content)
        client.close()


def test_windows_are_scaled_as_those_of_records() -> None:
    """Against the pipeline's own intake of a record that is a window, and of an image."""
    from jobs.streaming.intake import Intake
    from jobs.streaming.ledger import Batch
    from jobs.streaming.pending import Pending

    draw = np.random.default_rng(0)
    cases = [draw.standard_normal((16, 3)), draw.integers(0, 256, (3, 5, 7)).astype(np.uint8)]
    for values in cases:
        data = StreamDataConfig(window_scale="center")
        intake = Intake(data, Pending(10, 2), fit=lambda shape: None)
        batch = Batch(1, "full", [(0, Record("a", 0.0, values))])
        (window,) = intake.take(batch).windows
        assert intake.shape is not None
        assert torch.equal(prepared(values[None].astype(np.float64), data, intake.shape)[0], window.x)


def answer(window: int, name: str | None = None, **fields: Any) -> Answer:
    return Answer(name or f"r{window}", window, 0.0, window, "", "main", 1, **fields)


def test_the_latest_answers_are_kept() -> None:
    latest = Latest(3)
    latest.add([answer(1), answer(2, "x"), answer(3, "x")])
    latest.add([answer(3, "x"), answer(2, "x")])  # applied again after a restart
    assert [each["window"] for each in latest.of("x")] == [2, 3]
    latest.add([answer(4)])
    assert latest.of("r1") == []
    assert [each["window"] for each in latest.of("x")] == [2, 3]
    latest.add([answer(5)])
    assert latest.of("x") == []
    assert [each["window"] for number in (4, 5) for each in latest.of(f"r{number}")] == [4, 5]


def test_answers_are_json_whatever_they_hold() -> None:
    odd = answer(1, "\ud800<>", scores={"a": float("nan"), "b": 1.5}, novelty=float("inf"), features=torch.ones(2))
    values = as_json(odd, features=True)
    assert (values["scores"], values["novelty"], values["features"]) == ({"a": None, "b": 1.5}, None, [1.0, 1.0])
    json.dumps(values, allow_nan=False)


def test_copies_take_a_small_share_of_the_time() -> None:
    now, copies = [0.0], 0

    def copied() -> Any:
        now[0] += 0.01
        return object()

    served = Served(clock=lambda: now[0])
    while now[0] < 100.0:
        copies += served.offer(copied)
        now[0] += 0.003
    assert 0.015 <= copies * 0.01 / now[0] <= 0.021
    assert served.offer(copied, idle=True)


def test_a_topic_gets_every_answer(tmp_path: Path) -> None:
    """With a real broker: each answer of a stream, in order, as `as_json` has it."""
    mqtt = pytest.importorskip("paho.mqtt.client")
    from paho.mqtt.enums import CallbackAPIVersion

    got: list[dict[str, Any]] = []
    with Broker(tmp_path / "broker") as broker:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, "listener")
        client.on_message = lambda *about: got.append(json.loads(about[2].payload))
        client.on_connect = lambda *_: client.subscribe("line/answers", qos=1)
        subscribed = threading.Event()
        client.on_subscribe = lambda *_: subscribed.set()
        client.connect("127.0.0.1", broker.port)
        client.loop_start()
        assert subscribed.wait(20)
        topic = {"host": "127.0.0.1", "port": broker.port, "topic": "line/answers", "features": True}
        config = parse(AnswersConfig, {"mqtt": topic})
        answers = Answers("waves", config, data=StreamDataConfig(), state=dict, tell=print)
        made = [answer(window, features=torch.tensor([0.5, window])) for window in range(1, 51)]
        for part in (made[:20], made[20:]):
            answers.add(replace(EMPTY, answers=tuple(part)))
        deadline = time.monotonic() + 20
        while len(got) < len(made) and time.monotonic() < deadline:
            time.sleep(0.005)
        answers.close()
        client.loop_stop()
        client.disconnect()
    assert got == [{"stream": "waves"} | as_json(each, features=True) for each in made]
    assert got[-1]["features"] == [0.5, 50.0]
    assert answers.dropped == 0
