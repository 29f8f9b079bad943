"""What people and programs see of a stream: page and history, answers, events, curves and the champion's model.

    Service → Seen.add(outcome) → history → page, report
                                → answers (HTTP, MQTT)
                                → events (webhook, MQTT), MLflow

None of it is part of what the journal determines, and none of it holds up learning: a disk that takes no page, a
receiver or a server that is away cost a line, once. Outcomes that come again after a restart are known by their number.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.redaction import one_line
from jobs.streaming import page
from jobs.streaming.answers import Answers
from jobs.streaming.curves import Curves
from jobs.streaming.events import Events
from jobs.streaming.history import History
from jobs.streaming.outcome import Outcome, Usage
from jobs.streaming.served import Snapshot
from jobs.streaming.totals import Point, Spent
from simmatch.documents import dump_json
from simmatch.files import write_whole
from simmatch.model import save_model

if TYPE_CHECKING:
    from cluster.tracking.tracker import Tracker
    from jobs.streaming.config import StreamConfig
    from jobs.streaming.pipeline import Pipeline

ADDRESS = "answers.json"
"""File of the run directory that says where requests are answered."""

WRITING = 20
"""A page is written at the earliest after so many times the seconds that the last one took."""

QUIET_S = 2.0
"""Without a batch for so long, the stream waits for records."""

MODEL, MODELS, KEPT_MODELS = "model", "models", 10
"""Folders of the run directory for the champion at the end, and for champions that were registered before."""

RUNNING, WAITING = "running", "waiting for records"


class Seen:
    """Is told of every outcome, by the thread that learns, once it follows a pipeline. Call `close` at the end.

    Parameters
    ----------
    tell: is given lines for people, also from other threads.
    tracker: None: nothing goes to MLflow.

    Raises
    ------
    ConfigError
        A token or secret is missing, an address cannot be used, or a broker refuses the user.
    """

    def __init__(
        self,
        run_dir: Path,
        config: StreamConfig,
        tell: Callable[[str], None],
        tracker: Tracker | None = None,
    ) -> None:
        self._run_dir, self._config, self._tell, self._tracker = run_dir, config, tell, tracker
        self._pipeline: Pipeline | None = None
        self.history = History(config.name)
        self.history.load(run_dir)
        self.answers = Answers(config.name, config.answers, data=config.data, state=self._summary, tell=tell)
        try:
            self.events = Events(config.name, run_dir, config.events, tell)
            self._curves = Curves(tracker, run_dir) if tracker is not None else None
        except BaseException:
            self.answers.close()
            raise
        self._state = "starting"
        self._failing: set[str] = set()
        self._duplicates = 0
        self._at, self._processor = time.monotonic(), time.process_time()
        self._written, self._written_batch, self._cost_s = -1e9, self.history.batch, 0.0
        self._try("address of answers", self._write_address)

    def follow(self, pipeline: Pipeline) -> None:
        """The pipeline that outcomes will be of; it is copied between batches, to answer requests."""
        self._pipeline = pipeline

    def add(self, outcome: Outcome, usage: Usage) -> None:
        """A batch was applied; also one that is applied again after a restart."""
        now, processor = time.monotonic(), time.process_time()
        spent = Spent(now - self._at, processor - self._processor, usage.duplicates - self._duplicates)
        self._at, self._processor, self._duplicates = now, processor, usage.duplicates
        fresh = self.history.add(outcome, usage, spent)
        self.answers.add(outcome)
        self.events.add(outcome)
        self._state = RUNNING
        self._offer()
        if not fresh:
            return
        if self._curves is not None:
            self._curves.add(outcome, self._latest, self.history.kept.counts)
        if any(event.kind == "champion" for event in outcome.events):
            texts = [event.text for event in outcome.events if event.kind == "champion"]
            self._try("model", partial(self._register, f"{MODELS}/{outcome.metrics.batch:08d}", texts[-1]))
        due = outcome.metrics.batch - self._written_batch >= self._config.page.every_batches
        if due and now >= self._written + WRITING * self._cost_s:
            self._write()

    def idle(self) -> None:
        """There is nothing to do at the moment: requests get the newest version."""
        self._offer(idle=True)
        if self._state == RUNNING and time.monotonic() >= self._at + QUIET_S:
            self._state = WAITING
            self._write()

    def sync(self) -> None:
        """A snapshot follows: what was added is on the disk, if that takes anything."""
        self._write()
        self._try("file of waiting events", self.events.sync)

    def close(self, state: str, *, model: bool = True) -> None:
        """The job ends: the last page, the champion's model, and what waits is sent for some seconds.

        state: `ended`, or `failed: …`.
        model: whether the champion is between two batches, so that it can be exported.
        """
        self._state = state
        self._write()
        if self._curves is not None:
            self._curves.record(self._latest, self.history.kept.counts)
        if model:
            self._try("model", partial(self._register, MODEL, ""))
        self.events.close()
        self._try("file of waiting events", self.events.sync)
        self.answers.close()
        self._try("address of answers", (self._run_dir / ADDRESS).unlink)

    @property
    def _latest(self) -> Point:
        return self.history.kept.latest or Point()

    def _summary(self) -> dict[str, Any]:
        """What GET /state says."""
        latest = self._latest
        return {
            "state": self._state,
            "batch": latest.batch,
            "records": latest.records,
            "time": latest.time,
            "labels_came": latest.came,
            "labels": latest.labels,
            "faults": latest.faults,
            "classes": latest.classes,
            "champion": latest.champion,
            "accuracy": latest.right / latest.answered if latest.answered else None,
            "events": dict(self.history.kept.counts),
            "not_published": {"answers": self.answers.dropped} | self.events.dropped(),
        }

    def _offer(self, *, idle: bool = False) -> None:
        """The champion as it is now, to those that answer requests."""
        pipeline, served = self._pipeline, self.answers.served.snapshot
        if self.answers.port is None or pipeline is None or not pipeline.calibrated:
            return
        candidate, shape = pipeline.champion_candidate, pipeline.intake.shape
        assert candidate is not None
        assert shape is not None
        if served is not None and served.batch == pipeline.batch:
            return

        def copied() -> Snapshot:
            config = self._config.candidate(pipeline.champion)
            classes, batch = pipeline.intake.classes, pipeline.batch
            return Snapshot(pipeline.champion, config, candidate, batch=batch, classes=classes, shape=shape)

        self.answers.offer(copied, idle=idle)

    def _write(self) -> None:
        """Write history and page."""
        started = time.monotonic()
        self._try("page", self._write_files)
        self._written, self._written_batch = time.monotonic(), self.history.batch
        self._cost_s = self._written - started

    def _write_files(self) -> None:
        self.history.write(self._run_dir, self._state, time.time())
        if self._config.page.enabled:
            write_whole(self._run_dir / page.FILE, page.render(self.history.kept, self._config.page))

    def _write_address(self) -> None:
        if self.answers.url is not None:
            write_whole(self._run_dir / ADDRESS, dump_json({"url": self.answers.url}))

    def _register(self, folder: str, decided: str) -> None:
        """Export the champion, and make it a version of the registered model, if one is configured."""
        pipeline, tracker = self._pipeline, self._tracker
        if pipeline is None or not pipeline.calibrated:
            return
        candidate, shape = pipeline.champion_candidate, pipeline.intake.shape
        assert candidate is not None
        assert shape is not None
        if folder != MODEL and (tracker is None or tracker.config.register is None):
            return
        path = self._run_dir / folder
        save_model(candidate.stack.export(), path)
        if tracker is not None:
            latest = self._latest
            known = latest.candidates.get(pipeline.champion)
            key = tracker.model(path, shape)
            tracker.register(
                data=f"stream {self._config.name}",
                probe="prequential",
                accuracy=known.right / known.answered if known is not None and known.answered else None,
                description=f"{pipeline.champion}, after {latest.records} records",
                key=key,
                decided=decided or f"{pipeline.champion} is the champion of its stream",
            )
        for old in sorted((self._run_dir / MODELS).glob("*"))[:-KEPT_MODELS]:
            shutil.rmtree(old, ignore_errors=True)

    def _try(self, what: str, call: Callable[[], object]) -> None:
        """Do something with the disk; one that takes nothing costs a line, once."""
        try:
            call()
        except FileNotFoundError:
            pass
        except OSError as error:
            if what not in self._failing:
                self._tell(f"{self._run_dir} takes no {what}: {one_line(error)}; the stream goes on")
            self._failing.add(what)
        else:
            self._failing.discard(what)
