"""Process and broker are killed at random moments, while records come twice and out of order.

Oracle: what was published. The journal holds each of it once, and its replay gives the digests of the snapshots.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.streaming.config import StreamConfig
from jobs.streaming.mqtt import MqttConnection
from jobs.streaming.mqtt_config import MqttConfig
from jobs.streaming.records import LateLabel, Record
from jobs.streaming.replay import replay
from simmatch.config import parse
from simmatch.documents import dump_yaml
from tests.broker import Broker
from tests.jobs.streaming.streams import Item, journalled, named, small, wait_until, waves

KILLS = int(os.environ.get("SIMMATCH_KILLS", "200"))
PER_KILL = 12
"""Records published between two kills."""

BROKER_TOO = 5
"""Of so many kills of the process, one is of the broker as well."""

LIMIT_S = 120.0


class Jobs:
    """Processes of a stream, one after the other."""

    def __init__(self, folder: Path, config: StreamConfig) -> None:
        self.log = folder / "log"
        path = folder / "stream.yaml"
        path.write_text(dump_yaml(config.model_dump(mode="json")))
        self._arguments = ["--config", str(path), "--run-dir", str(folder / "run")]
        warm, source = folder / "warm.yaml", {"lines": {"path": str(folder / "warm.jsonl"), "follow": False}}
        warm.write_text(dump_yaml(small(source=source).model_dump(mode="json")))
        (folder / "warm.jsonl").write_text("".join(line(item) + "\n" for item in waves(50)))
        command = [sys.executable, str(Path(__file__).with_name("forked_job.py")), str(self.log)]
        root = Path(__file__).resolve().parents[3]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, str(warm), str(folder / "warm")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
            )
        self.number = 0

    def start(self) -> None:
        """The next process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(self._arguments), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, self.log.read_text()
        self.number = int(answer)

    def end(self, signum: signal.Signals) -> int:
        """Signal the process; its status."""
        os.kill(self.number, signum)
        self.number = 0
        assert self._process.stdout is not None
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))

    def close(self) -> None:
        if self.number:
            os.kill(self.number, signal.SIGKILL)
        self._process.kill()
        self._process.communicate()


@contextmanager
def jobs(folder: Path, config: StreamConfig) -> Iterator[Jobs]:
    made = Jobs(folder, config)
    try:
        yield made
    finally:
        made.close()


def line(item: Item) -> str:
    """A record or a label as JSON."""
    match item:
        case Record():
            label = {} if item.label is None else {"label": item.label}
            return json.dumps({"id": item.id, "time": item.time, "values": item.values.tolist(), **label})
        case LateLabel():
            return json.dumps({"id": item.id, "label": item.label})
    raise AssertionError(item)


def name(item: Item) -> str:
    """As in `named`."""
    return next(iter(named([item])))


def disturbed(items: Sequence[Item], draw: random.Random) -> list[Item]:
    """Some change places with their neighbours, and some come twice, at once or later."""
    order = list(items)
    for place in range(1, len(order)):
        if draw.random() < 0.1:
            order[place - 1], order[place] = order[place], order[place - 1]
    for item in draw.sample(order, len(order) // 10):
        order.insert(draw.randrange(len(order)), item)
    return order


def publish(publisher: MqttConnection, text: bytes) -> None:
    """Until the connection takes it."""
    wait_until(lambda: publisher.publish("waves", text), LIMIT_S)


def wait_a_while(run: Path, draw: random.Random) -> None:
    """Until the journal has grown by a random part of what was published, or a second is over."""
    size, grown, deadline = nbytes(run), 250 * PER_KILL * draw.random(), time.monotonic() + 1.0
    while nbytes(run) < size + grown and time.monotonic() < deadline:
        time.sleep(0.002)


def nbytes(run: Path) -> int:
    return sum(path.stat().st_size for path in (run / "journal").glob("*.journal"))


def strike(folder: Path, kills: int) -> None:
    """Publish, kill, and compare."""
    draw, items, run = random.Random(kills), waves(PER_KILL * (kills + 1), labelled=0.6), folder / "run"
    order = disturbed(items, draw)
    with Broker(folder / "broker", durable=True) as broker:
        place = {"host": "127.0.0.1", "port": broker.port, "longest_pause_s": 1}
        config = small(source={"mqtt": {**place, "topics": ["waves"], "client_id": "stream"}})
        publisher = MqttConnection(parse(MqttConfig, place), "answers.mqtt", lambda _: None)
        with jobs(folder, config) as stream:
            try:
                stream.start()
                wait_until(lambda: "Received SUBSCRIBE" in (broker.folder / "log").read_text(), LIMIT_S)
                for number in range(kills):
                    for item in order[number * len(order) // kills : (number + 1) * len(order) // kills]:
                        publish(publisher, line(item).encode())
                    wait_a_while(run, draw)
                    if number % BROKER_TOO == 0:
                        broker.end(signal.SIGKILL)
                    assert stream.end(signal.SIGKILL) == -signal.SIGKILL, stream.log.read_text()[-3000:]
                    if number % BROKER_TOO == 0:
                        broker.start()
                    stream.start()
                assert publisher.flush(LIMIT_S)
                # mosquitto sends PUBACK before what it received is on its disk: a sender with an outbox sends it again
                publish(publisher, b'{"id": "last", "label": "a"}')
                wait_until(lambda: "label last" in named(journalled(run)), LIMIT_S)
                found = named(journalled(run))
                lost = [item for item in items if name(item) not in found]
                assert len(lost) <= 3 * (1 + kills // BROKER_TOO)
                for item in lost:
                    publish(publisher, line(item).encode())
                wait_until(lambda: len(journalled(run)) > len(items), LIMIT_S)
                assert stream.end(signal.SIGTERM) == 143, stream.log.read_text()[-3000:]
            finally:
                publisher.close()
    items = [*items, LateLabel("last", "a")]
    assert named(journalled(run)) == named(items)
    assert len(journalled(run)) == len(items)
    again = replay(run, config)
    assert again.differing == ()
    assert again.batches in again.compared


def test_a_few_kills_of_process_and_broker(tmp_path: Path) -> None:
    strike(tmp_path, 5)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_process_and_broker(tmp_path: Path) -> None:
    strike(tmp_path, KILLS)
