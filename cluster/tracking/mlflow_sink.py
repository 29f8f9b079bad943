"""Turns events into MLflow calls, through a client of its own: no fluent state, no queue of MLflow's.

Layout in MLflow: one parent run per job, one nested child run per layer named `layer 0`, `layer 1`, … Every run
carries the tag `simmatch.run_key`, by which a replay finds it instead of making another. Metric rows keep the
event's own time, and MLflow stores identical (key, step, timestamp, value) rows once.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from cluster.tracking.events import LARGEST_ARTIFACT, checked, open_inside
from cluster.tracking.sender import RejectedError, RunsLostError
from cluster.tracking.spool import Event
from simmatch.model import MODEL_FILES

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT = "parent"
RUN_KEY_TAG = "simmatch.run_key"
LAYER_TAG = "simmatch.layer"
METRICS_PER_REQUEST = 1000
PAIRS_PER_REQUEST = 100
LONGEST_VALUE = {"params": 6000, "tags": 5000}
LONGEST_DIGEST = 36
TRUNCATED = " … [truncated]"
# what MLflow answers to a request that will be as wrong tomorrow; anything else may pass
FINAL_ERROR_CODES = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"}
)
# the same of an upload, as HTTP status: no such place, or too large a file
FINAL_STATUS = frozenset({400, 404, 405, 411, 413, 414, 415, 501})
# begins the message of MLflow's client where the refusal was no JSON
NOT_JSON = "API request to endpoint"
# what an event comes to that is not as it should be, or an answer that is none of MLflow's
DOUBTFUL_ERRORS = (AttributeError, KeyError, TypeError, ValueError)


class LogModel(Protocol):
    """Logs exported models to a run."""

    def __call__(self, path: Path, input_shape: Sequence[int], run_id: str, key: str, client: MlflowClient) -> None:
        """Log one; raises RejectedError if the model itself is at fault."""

    def tidy(self, run_id: str, client: MlflowClient) -> None:
        """Remove what requests have left behind that arrived after their client had given them up."""


class MlflowSink:
    """Delivers events with one client.

    Parameters
    ----------
    client
        MLflow's client, bound to the server.
    run_dir
        Folder that relative paths in events start from.
    artifact_root
        Folder for the artifacts of experiments made here; None leaves it to the server.
    log_model
        Called for events of kind `model`; None rejects them.
    """

    def __init__(
        self, client: MlflowClient, run_dir: Path, artifact_root: Path | None, log_model: LogModel | None
    ) -> None:
        self._client = client
        self._run_dir = run_dir
        self._artifact_root = artifact_root
        self._log_model = log_model
        self._runs: dict[str, str] = {}
        self._key = ""
        self._handlers: dict[str, Callable[[Event], None]] = {
            "start": self._on_start,
            "params": self._on_params,
            "tags": self._on_tags,
            "artifact": self._on_artifact,
            "dataset": self._on_dataset,
            "model": self._on_model,
            "finish": self._on_finish,
        }

    def connect(self, start: Event, runs: dict[str, str]) -> dict[str, str]:
        """Find or make the parent run and one child per layer; returns their ids."""
        if start.get("kind") != "start":
            raise ValueError(f"expected the spool to begin with an event of kind start, got {start.get('kind')!r}")
        start = checked(start)
        self._key = start["run_key"]
        wanted = [PARENT, *(str(layer) for layer in range(start["layers"]))]
        if not set(wanted) <= set(runs):
            runs = self._find_or_make_runs(start, wanted)
        self._runs = dict(runs)
        return dict(runs)

    def send(self, events: Sequence[Event]) -> None:
        """Deliver events in order, consecutive metrics in as few requests as the server allows."""
        metrics: list[Event] = []
        with _translate_errors(self._answers):
            for event in map(_checked, events):
                if event["kind"] == "metrics":
                    metrics.append(event)
                    continue
                self._send_metrics(metrics)
                metrics = []
                self._handlers[event["kind"]](event)
            self._send_metrics(metrics)

    def _find_or_make_runs(self, start: Event, wanted: Sequence[str]) -> dict[str, str]:
        key, name = start["run_key"], start["experiment"]
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            location = (self._artifact_root / _folder_name(name)).as_uri() if self._artifact_root else None
            experiment_id = self._client.create_experiment(name, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        # of several, which a request that came late may have made, the one in use
        found = sorted(
            self._client.search_runs([experiment_id], _of_key(key)),
            key=lambda run: (len(run.data.metrics), len(run.data.params), run.info.run_id),
        )
        runs = {run.data.tags.get(LAYER_TAG, PARENT): run.info.run_id for run in found}
        for which in wanted:
            if which not in runs:
                tags = {RUN_KEY_TAG: key}
                if which != PARENT:
                    tags |= {LAYER_TAG: which, "mlflow.parentRunId": runs[PARENT]}
                run_name = start["name"] if which == PARENT else f"layer {which}"
                run = self._client.create_run(experiment_id, start["time_ms"], tags, run_name)
                runs[which] = run.info.run_id
        return {which: runs[which] for which in wanted}

    def _run_of(self, event: Event) -> str:
        layer = event.get("layer")
        which = PARENT if layer is None else str(layer)
        if which not in self._runs:
            raise RejectedError(f"expected a layer below {len(self._runs) - 1}, got {which}")
        return self._runs[which]

    def _send_metrics(self, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric

        rows: dict[str, list[Any]] = {}
        for event in events:
            rows.setdefault(self._run_of(event), []).extend(
                Metric(key, value, event["time_ms"], event["step"]) for key, value in event["values"].items()
            )
        for run_id, metrics in rows.items():
            for chunk in _chunks(metrics, METRICS_PER_REQUEST):
                self._client.log_batch(run_id, metrics=chunk)

    def _on_start(self, event: Event) -> None:
        if event["attempt"] > 1:
            for run_id in self._runs.values():
                self._client.update_run(run_id, status="RUNNING")
        self._send_tags(self._runs[PARENT], {**event["tags"], "simmatch.attempts": event["attempt"]})

    def _on_params(self, event: Event) -> None:
        from mlflow.entities import Param

        run_id = self._run_of(event)
        values = {key: _shorten(value, LONGEST_VALUE["params"]) for key, value in event["values"].items()}
        known = self._client.get_run(run_id).data.params  # immutable: only new ones can be added
        fresh = [Param(key, value) for key, value in values.items() if key not in known]
        for chunk in _chunks(fresh, PAIRS_PER_REQUEST):
            self._client.log_batch(run_id, params=chunk)
        changed = sorted(key for key, value in values.items() if known.get(key, value) != value)
        if changed:
            raise RejectedError(f"MLflow does not change parameters once logged: {', '.join(changed)}")

    def _on_tags(self, event: Event) -> None:
        self._send_tags(self._run_of(event), event["values"])

    def _send_tags(self, run_id: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, _shorten(value, LONGEST_VALUE["tags"])) for key, value in values.items()]
        for chunk in _chunks(tags, PAIRS_PER_REQUEST):
            self._client.log_batch(run_id, tags=chunk)

    def _on_artifact(self, event: Event) -> None:
        with (
            open_inside(self._run_dir, event["path"], LARGEST_ARTIFACT) as source,
            tempfile.TemporaryDirectory() as folder,
        ):
            named = Path(folder) / event["name"]
            named.write_bytes(source.read(LARGEST_ARTIFACT))
            self._client.log_artifact(self._run_of(event), str(named), event["folder"])

    def _on_dataset(self, event: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=event["name"],
            digest=event["digest"][:LONGEST_DIGEST],
            source_type=event["source_type"],
            source=json.dumps({"uri": event["source"]}),
            profile=json.dumps({"num_images": event["num_images"]}),
        )
        tags = [InputTag("mlflow.data.context", event["context"])]
        self._client.log_inputs(self._run_of(event), [DatasetInput(dataset, tags)])

    def _on_model(self, event: Event) -> None:
        if self._log_model is None:
            raise RejectedError("no way to log a model was given")
        path, key = self._run_dir / event["path"], str(event["key"] or event["time_ms"])  # once, runs had no other
        for name in MODEL_FILES:
            with suppress(FileNotFoundError):  # the model's to tell
                open_inside(self._run_dir, f"{event['path']}/{name}").close()
        self._log_model(path, event["input_shape"], self._runs[PARENT], key, self._client)
        self._tidy()

    def _on_finish(self, event: Event) -> None:
        self._tidy()
        for run_id in reversed(self._runs.values()):  # the parent last: once it has ended, all have
            self._client.set_terminated(run_id, event["status"], event["time_ms"])

    def _tidy(self) -> None:
        """Remove runs and models that were made twice: by a request that was given up, and by the one in its place."""
        parent = self._client.get_run(self._runs[PARENT])
        for run in self._client.search_runs([parent.info.experiment_id], _of_key(parent.data.tags[RUN_KEY_TAG])):
            if run.info.run_id not in self._runs.values():
                self._client.delete_run(run.info.run_id)
        if self._log_model is not None:
            self._log_model.tidy(self._runs[PARENT], self._client)

    def _answers(self) -> bool:
        """Whether MLflow takes what is right of these runs: if not, a refusal says nothing about the event.

        Something else may stand in its place, the runs may have been deleted, the user may write no more.
        """
        try:
            for run_id in self._runs.values():
                self._client.set_tag(run_id, RUN_KEY_TAG, self._key)
        except Exception:
            return False
        return True


@contextmanager
def _translate_errors(answers: Callable[[], bool]) -> Iterator[None]:
    """Tell apart what can never work, what needs a fresh start and what may work later (left as it is).

    A gateway whose server is away may say 400 or 404 as well: a refusal counts where MLflow `answers`, and stays
    doubtful where it came with a page of text, as MLflow's own do not.
    """
    from mlflow.exceptions import MlflowException
    from requests import HTTPError, RequestException

    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise RejectedError(f"{type(error).__name__}: {error}") from error
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise RunsLostError(str(error)) from error
        if error.error_code in FINAL_ERROR_CODES and answers():
            raise RejectedError(str(error), certain=not str(error).startswith(NOT_JSON)) from error
        raise
    except RequestException as error:
        status = error.response.status_code if isinstance(error, HTTPError) and error.response is not None else None
        if status in FINAL_STATUS and answers():
            raise RejectedError(str(error), certain=False) from error
        raise
    except DOUBTFUL_ERRORS as error:
        if answers():
            raise RejectedError(f"{type(error).__name__}: {error}") from error
        raise


def _checked(event: Event) -> Event:
    try:
        return checked(event)
    except ValueError as error:
        raise RejectedError(str(error)) from None


def _folder_name(experiment: str) -> str:
    """An experiment's name as that of one folder, whatever it is."""
    dots = not experiment.strip(".")
    return experiment.replace(".", "%2E") if dots else quote(experiment, safe=" ", errors="replace")


def _of_key(key: str) -> str:
    return f"tags.`{RUN_KEY_TAG}` = '{key}'"


def _shorten(value: Any, limit: int) -> str:
    text = str(value).encode(errors="replace").decode()  # no data base takes half a surrogate pair
    return text if len(text) <= limit else text[: limit - len(TRUNCATED)] + TRUNCATED


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
