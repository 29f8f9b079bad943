"""Turns events into MLflow calls, through a client of its own: neither MLflow's global state nor its queue is used.

Layout in MLflow: one parent run per job, one nested child run per layer named `layer 0`, `layer 1`, … Every run
carries the tag `simmatch.run_key`, by which a replay finds it instead of creating another. Metric rows keep the
event's own time, and MLflow stores identical (key, step, timestamp, value) rows once.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from cluster.redaction import Redactor, redact
from cluster.tracking.config import DEFAULT_EXPERIMENT, ExperimentKey
from cluster.tracking.delivery import PROGRESS_NAME, Delivery, RejectedError
from cluster.tracking.events import (
    LARGEST_ARTIFACT,
    ArtifactEvent,
    DatasetEvent,
    Event,
    FinishEvent,
    MetricsEvent,
    ModelEvent,
    ParamsEvent,
    RegisterEvent,
    StartEvent,
    TagsEvent,
    Unreadable,
)
from cluster.tracking.experiments import KIND_TAG, find_experiment, make_experiment, mark_experiment
from cluster.tracking.mlflow_client import artifact_root, mlflow_settings, open_client, translate_errors
from cluster.tracking.mlflow_model import MODEL_KEY_TAG
from cluster.tracking.registry import register
from cluster.tracking.sender import STALLED_S, Sender
from cluster.tracking.spool import Spool
from simmatch.files import open_inside, write_whole
from simmatch.model import MODEL_FILES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

    from cluster.tracking.mlflow_model import ModelLogger

PARENT = "parent"
RUN_KEY_TAG = "simmatch.run_key"
LAYER_TAG = "simmatch.layer"
METRICS_PER_REQUEST = 1000
PAIRS_PER_REQUEST = 100
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
LONGEST_DIGEST = 36
TRAINING_PAGES = "workflowType=machine_learning"
"""In the address of a page of MLflow: the pages for model training."""
TRUNCATED = " … [truncated]"


class MlflowSink:
    """Delivers events with one client.

    Parameters
    ----------
    client
        MLflow's client, bound to the server.
    uri
        Of the server.
    run_dir
        Folder that paths in events start from.
    log_model
        Called for events of kind `model`; None rejects them.
    registry
        URI of the model registry, if it is not the server.
    tell
        Called with a line about a model that was registered.
    """

    def __init__(
        self,
        client: MlflowClient,
        uri: str,
        run_dir: Path,
        log_model: ModelLogger | None,
        *,
        registry: str | None = None,
        tell: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._client, self._uri, self._run_dir, self._log_model = client, uri, run_dir, log_model
        self._registry, self._tell = registry, tell
        self._runs: dict[str, str] = {}
        self._key = ""

    def connect(self, start: Event | Unreadable, runs: dict[str, str]) -> dict[str, str]:
        """Find or make the parent run and one child per layer; returns their ids."""
        if not isinstance(start, StartEvent):
            raise ValueError(f"expected the spool to begin with an event of kind start, got {start.kind!r}")
        self._key = start.run_key
        wanted = [PARENT, *(str(layer) for layer in range(start.layers))]
        if not set(wanted) <= set(runs):
            runs = self._find_or_make_runs(start, wanted)
        self._runs = dict(runs)
        return dict(runs)

    def send(self, events: Sequence[Event | Unreadable]) -> None:
        """Deliver events in order, consecutive metrics in as few requests as the server allows."""
        metrics: list[MetricsEvent] = []
        with translate_errors(self._answers):
            for event in events:
                if isinstance(event, MetricsEvent):
                    metrics.append(event)
                    continue
                self._send_metrics(metrics)
                metrics = []
                self._send_one(event)
            self._send_metrics(metrics)

    def _send_one(self, event: Event | Unreadable) -> None:
        match event:
            case StartEvent():
                self._send_start(event)
            case ParamsEvent():
                self._send_params(event)
            case TagsEvent():
                self._send_tags(self._run_of(event.layer), event.values)
            case ArtifactEvent():
                self._send_artifact(event)
            case DatasetEvent():
                self._send_dataset(event)
            case ModelEvent():
                self._send_model(event)
            case RegisterEvent():
                self._send_registration(event)
            case FinishEvent():
                self._send_finish(event)
            case MetricsEvent():
                self._send_metrics([event])
            case Unreadable():
                raise RejectedError(event.reason)
            case _:
                assert_never(event)

    def _find_or_make_runs(self, start: StartEvent, wanted: Sequence[str]) -> dict[str, str]:
        key = start.run_key
        experiment_id = self._experiment_of(start).experiment_id
        # if a request that came late has made a second run, take the one in use
        candidates = sorted(
            self._client.search_runs([experiment_id], _of_key(key)),
            key=lambda run: (len(run.data.metrics), len(run.data.params), run.info.run_id),
        )
        runs = {run.data.tags.get(LAYER_TAG, PARENT): run.info.run_id for run in candidates}
        for which in wanted:
            if which not in runs:
                tags = {RUN_KEY_TAG: key}
                if which != PARENT:
                    tags |= {LAYER_TAG: which, "mlflow.parentRunId": runs[PARENT]}
                run_name = start.name if which == PARENT else f"layer {which}"
                run = self._client.create_run(experiment_id, start.time_ms, tags, run_name)
                runs[which] = run.info.run_id
        return {which: runs[which] for which in wanted}

    def _experiment_of(self, start: StartEvent) -> Experiment:
        """Found or made; at another server than the recorded one an id means nothing."""
        elsewhere = start.experiment_id is not None and redact(self._uri) != redact(start.uri)
        key = ExperimentKey(start.experiment, None if elsewhere else start.experiment_id)
        if key.id is None and key.name is None:
            key = ExperimentKey(DEFAULT_EXPERIMENT)
        experiment = find_experiment(self._client, key)
        if experiment is None:
            assert key.name is not None
            return make_experiment(self._client, key.name, artifact_root(self._uri))
        if KIND_TAG not in experiment.tags:
            mark_experiment(self._client, experiment)
        return experiment

    def _run_of(self, layer: int | None) -> str:
        which = PARENT if layer is None else str(layer)
        if which not in self._runs:
            raise RejectedError(f"expected a layer below {len(self._runs) - 1}, got {which}")
        return self._runs[which]

    def _send_metrics(self, events: Sequence[MetricsEvent]) -> None:
        from mlflow.entities import Metric

        rows: dict[str, list[Any]] = {}
        for event in events:
            rows.setdefault(self._run_of(event.layer), []).extend(
                Metric(key, value, event.time_ms, event.step) for key, value in event.values.items()
            )
        for run_id, metrics in rows.items():
            for chunk in _chunks(metrics, METRICS_PER_REQUEST):
                self._client.log_batch(run_id, metrics=chunk)

    def _send_start(self, event: StartEvent) -> None:
        if event.attempt > 1:
            for run_id in self._runs.values():
                self._client.update_run(run_id, status="RUNNING")
        self._send_tags(self._runs[PARENT], {**event.tags, "simmatch.attempts": event.attempt})

    def _send_params(self, event: ParamsEvent) -> None:
        from mlflow.entities import Param

        run_id = self._run_of(event.layer)
        values = {key: _shorten(value, LONGEST_PARAM) for key, value in event.values.items()}
        known = self._client.get_run(run_id).data.params  # immutable: only new ones can be added
        fresh = [Param(key, value) for key, value in values.items() if key not in known]
        for chunk in _chunks(fresh, PAIRS_PER_REQUEST):
            self._client.log_batch(run_id, params=chunk)
        changed = sorted(key for key, value in values.items() if known.get(key, value) != value)
        if changed:
            raise RejectedError(f"MLflow does not change parameters once logged: {', '.join(changed)}")

    def _send_tags(self, run_id: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, _shorten(value, LONGEST_TAG)) for key, value in values.items()]
        for chunk in _chunks(tags, PAIRS_PER_REQUEST):
            self._client.log_batch(run_id, tags=chunk)

    def _send_artifact(self, event: ArtifactEvent) -> None:
        with (
            open_inside(self._run_dir, event.path, LARGEST_ARTIFACT) as source,
            tempfile.TemporaryDirectory() as folder,
        ):
            named = Path(folder) / event.name
            write_whole(named, source.read(LARGEST_ARTIFACT))
            self._client.log_artifact(self._run_of(event.layer), str(named), event.folder)

    def _send_dataset(self, event: DatasetEvent) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=event.name,
            digest=event.digest[:LONGEST_DIGEST],
            source_type=event.source_type,
            source=json.dumps({"uri": event.source}),
            profile=json.dumps({"num_images": event.num_images}),
        )
        tags = [InputTag("mlflow.data.context", event.context)]
        self._client.log_inputs(self._runs[PARENT], [DatasetInput(dataset, tags)])

    def _send_model(self, event: ModelEvent) -> None:
        if self._log_model is None:
            raise RejectedError("no way to log a model was given")
        key = event.key or str(event.time_ms)  # which spools of earlier versions use as the key
        for name in MODEL_FILES:
            with suppress(FileNotFoundError):  # `log_model` reports what is missing
                open_inside(self._run_dir, f"{event.path}/{name}").close()
        self._log_model(self._run_dir / event.path, event.input_shape, self._runs[PARENT], key, self._client)
        self._tidy()

    def _send_registration(self, event: RegisterEvent) -> None:
        run = self._client.get_run(self._runs[PARENT])
        outputs = run.outputs.model_outputs if run.outputs else []
        if not outputs:
            raise RejectedError("the run has no logged model")
        models = (self._client.get_logged_model(output.model_id) for output in reversed(outputs))
        model = next((each for each in models if event.key in (None, each.tags.get(MODEL_KEY_TAG))), None)
        if model is None:
            raise RejectedError(f"the run has no logged model of key {event.key}")
        known = self._registry in (None, self._uri)
        link = None if known else self._page(run)
        self._tell(register(self._client, event, model, run_link=link))

    def _page(self, run: Run) -> str:
        """The address of a run's page.

        Without its last part a browser shows what it showed last: GenAI's pages, if it has never shown others.
        """
        info = run.info
        return f"{redact(self._uri)}/#/experiments/{info.experiment_id}/runs/{info.run_id}?{TRAINING_PAGES}"

    def _send_finish(self, event: FinishEvent) -> None:
        parent = self._tidy()
        if self._uri.startswith("http"):
            self._tell(f"page of the run: {self._page(parent)}")
        for run_id in reversed(self._runs.values()):  # the parent last: once it has ended, so have all
            self._client.set_terminated(run_id, event.status, event.time_ms)

    def _tidy(self) -> Run:
        """Remove runs and models that were made twice: by a request that was abandoned, and by its repetition.

        Returns the parent run.
        """
        parent = self._client.get_run(self._runs[PARENT])
        for run in self._client.search_runs([parent.info.experiment_id], _of_key(parent.data.tags[RUN_KEY_TAG])):
            if run.info.run_id not in self._runs.values():
                self._client.delete_run(run.info.run_id)
        if self._log_model is not None:
            self._log_model.tidy(self._runs[PARENT], self._client)
        return parent

    def _answers(self) -> bool:
        """Whether MLflow accepts a sound request for these runs: if not, a refusal says nothing about the event.

        Another server may answer in its place, the runs may be deleted, or the user may have lost the right to write.
        """
        try:
            for run_id in self._runs.values():
                self._client.set_tag(run_id, RUN_KEY_TAG, self._key)
        except Exception:
            return False
        return True


def make_sender(
    spool: Spool,
    uri: str,
    run_dir: Path,
    timeout_s: float,
    log_model: ModelLogger | None,
    *,
    registry: str | None = None,
    stalled_s: float = STALLED_S,
    safe_bytes: Callable[[], float] = lambda: math.inf,
) -> Sender:
    """The sender of a run's spool to one MLflow server and its registry; see `Sender` and `Delivery`."""
    told: list[str] = []
    delivery = Delivery(spool, run_dir / PROGRESS_NAME, redact(uri), Redactor(os.environ), safe_bytes)
    return Sender(
        delivery,
        partial(open_sink, uri, run_dir, log_model, registry=registry, tell=told.append),
        settings=partial(mlflow_settings, uri, timeout_s),
        stalled_s=stalled_s,
        told=told,
    )


@contextmanager
def open_sink(
    uri: str,
    run_dir: Path,
    log_model: ModelLogger | None,
    alive: Callable[[], None] = lambda: None,
    *,
    registry: str | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Iterator[MlflowSink]:
    """A sink for one MLflow server; `alive` is called before each request."""
    with open_client(uri, alive, registry) as client:
        yield MlflowSink(client, uri, run_dir, log_model, registry=registry, tell=tell)


def _of_key(key: str) -> str:
    return f"tags.`{RUN_KEY_TAG}` = '{key}'"


def _shorten(value: Any, limit: int) -> str:
    text = str(value).encode(errors="replace").decode()  # no data base accepts half a surrogate pair
    return text if len(text) <= limit else text[: limit - len(TRUNCATED)] + TRUNCATED


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
