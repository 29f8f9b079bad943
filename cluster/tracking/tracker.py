"""Tracking, as the controller sees it: every call makes an event, queues it for the run's spool and returns at once.

    Tracker → event (`events`) → line of the spool (`spool_writer`, `spool`)
            → event, in batches (`delivery`, run by `sender`) → MLflow (`mlflow_sink`)

Training never waits for the server; one that is away or slow only costs delay. Events that are unsent when the job ends
are sent by `python -m jobs.sync RUN_DIR`. A disk that is full or gone costs records, not the run.

These calls are the controller's, in the job's own process. Ranks train in other processes and never come here: they
hand events to the controller, see `cluster.messages`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.holder import user_name
from cluster.redaction import Redactor
from cluster.tracking.config import TrackingConfig, check_model_name, resolve_experiment, resolve_registry, resolve_uri
from cluster.tracking.events import (
    ArtifactEvent,
    DatasetEvent,
    Event,
    FinishEvent,
    MetricsEvent,
    ModelEvent,
    ParamsEvent,
    RegisterEvent,
    RunStatus,
    StartEvent,
    TagsEvent,
    flatten,
)
from cluster.tracking.mlflow_sink import PARENT, make_sender
from cluster.tracking.spool import SPOOL_NAME, Spool
from cluster.tracking.spool_writer import SpoolWriter

if TYPE_CHECKING:
    from cluster.tracking.mlflow_model import ModelLogger

HURRY_S = 2.0
"""After `hurry`, a request under way may take so long to end; a store on this machine needs less."""

POLL_S = 0.1
START_S = 60.0
"""Longest wait for the first event to be on the disk."""


class Tracker:
    """Records one run. Calls queue an event for the spool and return; none raises because of MLflow.

    Parameters
    ----------
    run_dir
        The run's folder; the spool and its offset lie in it.
    config
        Where to send. A URI that MLflow cannot use is refused here, before anything starts.
    log_model
        Logs an exported model, see `cluster.tracking.mlflow_model`; None leaves models out of MLflow.
    held
        Whether events are sent only once another machine can find them, see `release`.
    owned
        Whether the run is still this process's; asked before every request. Events of a run that is not are not sent.

    Raises
    ------
    ConfigError
        `tracking.uri`, `tracking.experiment` or `tracking.register` is malformed, or `$MLFLOW_REGISTRY_URI`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        log_model: ModelLogger | None = None,
        *,
        held: bool = False,
        owned: Callable[[], bool] = lambda: True,
    ) -> None:
        self.run_dir = run_dir.absolute()
        self._owned = owned
        self.config = config
        self._redact = Redactor(os.environ)
        self.uri = resolve_uri(config, self.run_dir)
        """Where events go; may hold credentials. `redact` it before showing it."""
        self._experiment = resolve_experiment(config)
        self.seconds = 0.0
        """Spent by the controller in calls that record something."""
        self.unsent = 0
        """Events left for `jobs.sync`; known once `close` has returned."""
        check_model_name(config)
        self._spool = Spool(self.run_dir / SPOOL_NAME)
        self._sender = make_sender(
            self._spool,
            self.uri,
            self.run_dir,
            config.timeout_s,
            log_model,
            registry=resolve_registry(self.uri),
            safe_bytes=self._safe_bytes,
        )
        self._writer = SpoolWriter(self._spool, self._sender.wake)
        self._released_bytes = 0 if held else sys.maxsize
        self._thread: threading.Thread | None = None
        self._hurried = False

    def start(self, name: str, *, layers: int, tags: Mapping[str, Any] | None = None) -> None:
        """Open the spool and begin a run, or continue the run that it already holds.

        Parameters
        ----------
        name
            Name of the parent run.
        layers
            Number of child runs, named `layer 0` and on.
        tags
            Tags of the parent run. `simmatch.attempts` is counted here.

        Raises
        ------
        OSError
            The run's folder cannot be written. Later calls do not raise.
        """
        self._spool.open()
        self._writer.start()
        starts = [event for event, _ in self._spool.read() if isinstance(event, StartEvent)]
        self._append(
            StartEvent,
            run_key=starts[0].run_key if starts else uuid.uuid4().hex,
            attempt=len(starts) + 1,
            name=name,
            experiment=self._experiment.name,
            experiment_id=self._experiment.id,
            layers=layers,
            uri=self.uri,
            tags={"mlflow.user": user_name() or "unknown", **(tags or {})},
        )
        if not self._writer.flush(START_S):
            raise self._writer.error or TimeoutError(f"{self._spool.path}: nothing was written within {START_S:g} s")
        self._sender.delivery.load()
        if self.config.enabled:
            self._thread = threading.Thread(target=self._sender.run, name="tracking-sender", daemon=True)
            self._thread.start()

    def announce_to(self, tell: Callable[[str], None]) -> None:
        """Report to `tell` that MLflow accepts no records, once per reason, and that it accepts them again.

        It is called from the thread that sends, with lines without credentials; earlier ones come at once.
        """
        self._sender.notices.listen(tell)
        self._writer.announce_to(tell)

    def flush(self, limit_s: float) -> bool:
        """Wait until all events so far are on the disk, or refused by it; returns whether they are there."""
        return self._writer.flush(limit_s)

    def release(self, size_bytes: int) -> None:
        """Another machine can find so much of the spool, see `held`."""
        self._released_bytes = size_bytes
        self._sender.wake()

    def _safe_bytes(self) -> float:
        return min(self._writer.synced_bytes, self._released_bytes) if self._owned() else 0

    def params(self, values: Mapping[str, Any], layer: int | None = None) -> None:
        """Parameters of the run, or of a layer; nested values get dotted names."""
        self._append(ParamsEvent, values=dict(flatten(values)), layer=layer)

    def metrics(
        self, step: int, values: Mapping[str, float], layer: int | None = None, time_s: float | None = None
    ) -> None:
        """Metrics at a step; `time_s` is the Unix time they were measured at, now if None."""
        numbers = {key: float(value) for key, value in values.items()}
        self._append(MetricsEvent, time_s, step=int(step), values=numbers, layer=layer)

    def tags(self, values: Mapping[str, Any], layer: int | None = None) -> None:
        """Facts that may change during the run, such as the world size."""
        self._append(TagsEvent, values=dict(values), layer=layer)

    def figure(self, path: Path, layer: int | None = None) -> None:
        """An image file, shown under `figures/`."""
        self.artifact(path, "figures", layer=layer)

    def artifact(self, path: Path, folder: str | None = None, *, layer: int | None = None) -> None:
        """A file, with the content that it has when it is sent."""
        self._append(ArtifactEvent, path=self._portable(path), folder=folder, name=path.name, layer=layer)

    def dataset(self, name: str, *, source: str, digest: str, num_images: int) -> None:
        """The training data as an input of the run."""
        self._append(DatasetEvent, name=name, source=source, digest=digest, num_images=num_images)

    def model(self, path: Path, input_shape: Sequence[int]) -> str:
        """The exported model's folder, and the shape [C, H, W] of one image; the same weights are logged once. Returns
        the model's key.

        Call it after `finish`: tracing a model takes seconds, and if the wait ends meanwhile, the run has ended in
        MLflow all the same.
        """
        key = _digest(path)
        self._append(ModelEvent, path=self._portable(path), input_shape=list(input_shape), key=key)
        return key

    def register(
        self,
        *,
        data: str,
        probe: str,
        accuracy: float | None,
        description: str = "",
        key: str | None = None,
        decided: str = "",
    ) -> None:
        """Make a logged model a version of the registered model that `tracking.register` names, if it does.

        data, probe: digest of the data set, and what the accuracy was measured with: only equal ones are compared.
        key: of the logged model, as `model` returns it; None: the latest.
        decided: why it is the champion, where that is decided already.
        """
        if (name := self.config.register) is not None:
            self._append(
                RegisterEvent,
                name=name,
                data=data,
                probe=probe,
                accuracy=accuracy,
                description=description,
                key=key,
                decided=decided,
            )

    def finish(self, status: RunStatus) -> None:
        """The end of the run and of its layers; it is on the disk when this returns, unless that takes `timeout_s`."""
        self._append(FinishEvent, status=status)
        self._writer.flush(self.config.timeout_s)

    def close(self) -> int:
        """Wait until all events are sent; returns how many are left for `jobs.sync`.

        It takes at most `flush_s` and one `timeout_s`, whatever the server does; after `hurry`, `HURRY_S`. A folder
        that hangs takes one more `timeout_s`.
        """
        whole = self._writer.close(self.config.timeout_s)
        if self._thread is not None:
            self._sender.close(self.config.flush_s)
            self._wait(self._thread, self.config.flush_s + self.config.timeout_s)
            self._sender.abandon()
            self._thread = None
            self.unsent = self._sender.delivery.pending() if whole else 0  # a folder that hangs is not read again
        if whole:
            self._spool.close()
        return self.unsent

    def abandon(self) -> None:
        """End at once, without sending or recording anything more: the run is another process's now."""
        self._sender.abandon()
        self._sender.close(0.0)
        self._thread = None
        self._writer.drop()
        if self._writer.close(self.config.timeout_s):
            self._spool.close()

    def hurry(self) -> None:
        """End the wait of `close`, begun or to come. May be called from a signal handler."""
        self._hurried = True

    def _wait(self, thread: threading.Thread, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while thread.is_alive() and not self._hurried and time.monotonic() < deadline:
            thread.join(POLL_S)
        if self._hurried:
            self._sender.close(0.0)
            thread.join(HURRY_S)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the parent run; None until the server has given one."""
        return self._sender.delivery.progress.runs.get(PARENT)

    @property
    def reason(self) -> str:
        """Why events are unsent: the error of the latest attempt, without credentials."""
        return self._sender.reason

    @property
    def refused(self) -> tuple[int, list[str]]:
        """Events that MLflow rejected: how many, and the latest as lines `kind: reason`, without credentials."""
        return self._sender.delivery.rejected, list(self._sender.delivery.refusals)

    @property
    def told(self) -> Sequence[str]:
        """Lines about what was sent: the registered version, and whether it is the champion."""
        return self._sender.told

    @property
    def lost(self) -> int:
        """Events that never reach the spool, because the disk was full, or hung, for too long."""
        return self._writer.lost

    def _append(self, kind: type[Event], time_s: float | None = None, **fields: Any) -> None:
        started = time.monotonic()
        time_ms = round(1000 * (time.time() if time_s is None else time_s))
        if kind is not MetricsEvent:  # which holds numbers and names only, and is by far the most frequent
            fields = self._redact.all(fields)
        # checked where it is read: an unsound event is refused there, and must not stop the run here
        self._writer.put(kind.model_construct(time_ms=time_ms, **fields))
        self.seconds += time.monotonic() - started

    def _portable(self, path: Path) -> str:
        """Relative to the run directory if it lies inside, so that a moved directory can still be sent."""
        path = path.absolute()
        return str(path.relative_to(self.run_dir) if path.is_relative_to(self.run_dir) else path)


def _digest(folder: Path) -> str:
    """Digest of the files of a folder and their names; files that cannot be read are left out."""
    digest = hashlib.sha256()
    with suppress(OSError):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}\0".encode(errors="replace") + path.read_bytes())
    return digest.hexdigest()
