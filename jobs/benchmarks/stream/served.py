"""A stream as a user runs it, to be measured from outside: `python -m jobs.stream` in a process of its own.

It reads a file of lines of JSON that grows, keeps journal and snapshots, and answers over HTTP. Records are those of
`jobs.streaming.example`.
"""

from __future__ import annotations

import http.client
import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from jobs.benchmarks.processes import environment_of
from jobs.reporting import MissingError
from jobs.streaming.config import StreamConfig, parse_stream
from jobs.streaming.example import records
from jobs.streaming.seen import ADDRESS
from simmatch.documents import DocumentError, dump_yaml, load_json
from simmatch.files import make_folder, write_whole

LOOK_S = 0.02
LIMIT_S = 300.0
"""A stream that has made no progress for so long is given up."""


class Client:
    """Asks over one connection, opened at the first request.

    Parameters
    ----------
    url: of the port, http://HOST:PORT.
    token: that it expects.

    Attributes
    ----------
    work_s: processor time of the latest answer, as the port says; 0 of a refusal.
    """

    def __init__(self, url: str, token: str, timeout_s: float = 30.0) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._link = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
        self._headers = {"Authorization": f"Bearer {token}"}
        self.work_s = 0.0

    def close(self) -> None:
        """End the connection; the next request opens another."""
        self._link.close()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and content of the answer."""
        self._link.request(method, path, None if body is None else json.dumps(body), self._headers)
        answer = self._link.getresponse()
        content = load_json(answer.read())
        self.work_s = float(answer.headers.get("Server-Timing", "work;dur=0").rpartition("=")[2]) / 1000
        return answer.status, content


class StreamProcess:
    """Runs a stream. A context manager: no process is left afterwards.

    Parameters
    ----------
    folder: of its files, empty or new.
    values: of the configuration; source, answers and all that depends on a clock are set here.
    most: records that will be appended at most; half-way they change.
    seed: of the records.

    Attributes
    ----------
    run_dir: of the stream; token: that its port expects.
    appended, json_bytes: records so far, and the bytes of their lines.
    appended_s: of `time.perf_counter`, when the latest began to be written.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any], most: int, seed: int) -> None:
        make_folder(folder)
        self.run_dir, self._file, self._log = folder / "run", folder / "records.jsonl", folder / "log"
        self._path, self.token = folder / "stream.yaml", secrets.token_hex(16)
        fixed = {
            "source": {"lines": {"path": str(self._file)}},
            "answers": {"http": {"share": 1.0}},
            "max_wait_s": 600.0,  # all batches are full, however busy the machine is
            "tracking": {"enabled": False},
        }
        self.config: StreamConfig = parse_stream({**values, **fixed})
        write_whole(self._path, dump_yaml(self.config.model_dump(mode="json")))
        self._records = records(most, seed)
        self.appended = self.json_bytes = 0
        self.appended_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> StreamProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.kill()

    def start(self) -> None:
        """Start the process; returns as soon as it listens."""
        (self.run_dir / ADDRESS).unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.stream", "--config", str(self._path), "--run-dir", str(self.run_dir)],
                env=environment_of(self.config.threads) | {"SIMMATCH_ANSWERS_TOKEN": self.token},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait((self.run_dir / ADDRESS).exists, lambda: 0)

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def client(self) -> Client:
        """Of its port."""
        return Client(self.url, self.token)

    @property
    def url(self) -> str:
        """Of its port."""
        return str(load_json((self.run_dir / ADDRESS).read_bytes())["url"])

    def state(self) -> dict[str, Any]:
        """What GET /state says; nothing while it does not listen."""
        try:
            with closing(self.client()) as client:
                _, content = client.ask("GET", "/state")
        except (OSError, http.client.HTTPException, DocumentError):
            return {}
        return dict(content)

    def append(self, count: int) -> None:
        """Add records to the file, all at once; whole batches, as no batch ends before it is full."""
        assert count % self.config.batch_size == 0, count
        text = "".join(json.dumps(record) + "\n" for record in islice(self._records, count)).encode()
        self.appended, self.json_bytes = self.appended + count, self.json_bytes + len(text)
        self.appended_s = time.perf_counter()
        with self._file.open("ab") as file:
            file.write(text)

    def wait_learnt(self) -> None:
        """Until all records are learnt."""
        self._wait(lambda: self._records_learnt() >= self.appended, self._records_learnt)

    def wait_served(self, batch: int) -> None:
        """Until requests are answered by the version of a batch."""
        self._wait(lambda: ((self.state().get("served") or {}).get("batch", -1)) >= batch, lambda: 0)

    def processor_s(self) -> float:
        """Processor time of the process since it was started."""
        times = self._known().cpu_times()
        return float(times.user + times.system)

    def memory_bytes(self) -> tuple[int, int]:
        """Resident memory of the process, and what of it is not of files such as libraries."""
        known = self._known().memory_info()
        return int(known.rss), int(known.rss - known.shared)

    def _known(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def _records_learnt(self) -> int:
        return int(self.state().get("records", 0))

    def _wait(self, condition: Callable[[], bool], progress: Callable[[], int]) -> None:
        assert self._process is not None
        deadline, known = time.monotonic() + LIMIT_S, 0
        while not condition():
            time.sleep(LOOK_S)
            if self._process.poll() is not None:
                last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
                raise MissingError(f"the stream ended with status {self._process.returncode}: {' '.join(last)}")
            if time.monotonic() > deadline:
                if (now := progress()) <= known:
                    raise MissingError(f"the stream made no progress for {LIMIT_S:g} s, see {self._log}")
                deadline, known = time.monotonic() + LIMIT_S, now
