"""Results of a run: figures, `summary.json` and the table; only then the wait for MLflow.

However that wait ends, the model and its accuracy are on the disk and have been shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.profiles import FOLDER
from cluster.redaction import one_line
from cluster.summary import RunRecord, summarise
from cluster.text import count
from cluster.tracking.events import RunStatus
from cluster.tracking.tracker import Tracker
from jobs.mirror import Mirror
from jobs.profiles import profile_rows, profile_tables, with_earlier
from jobs.recording import outcome_fields, send_records
from jobs.reporting import Table
from jobs.run_directory import RunStart
from simmatch.data.sources import Dataset, to_unit
from simmatch.documents import dump_json
from simmatch.files import write_whole
from simmatch.model import load_model

FIGURE_IMAGES = 1000
METRICS = (
    "accuracy",
    "accuracy_decode",
    "probe_images",
    "images_per_second",
    "bytes_exchanged",
    "num_exchanges",
    "seconds",
)


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: its status, the program's exit status, and one line why, unless it finished."""

    status: RunStatus
    code: int
    message: str | None = None


class RunResults:
    """Draws, writes and sends the results of a run. None of them raises because of a disk, a store or a server.

    Parameters
    ----------
    start: where the run's files are.
    tracker, mirror: where its records go.
    report: shows a line.
    """

    def __init__(
        self, start: RunStart, dataset: Dataset, tracker: Tracker, mirror: Mirror, report: Callable[[str], None]
    ) -> None:
        self.start, self.dataset, self.tracker, self.mirror, self.report = start, dataset, tracker, mirror, report
        self._model: Path | None = None
        self._summary: dict[str, Any] = {}

    def draw_figures(self, record: RunRecord) -> None:
        """Draw figures of the exported model and of training; those that cannot be drawn are left out."""
        try:
            self._model = self.mirror.fetch_model()
            self._draw(self._model, record)
        except Exception as error:  # whatever goes wrong here, the run has finished
            self.report(f"figures are left out: {type(error).__name__}: {one_line(error)}")

    def _draw(self, model: Path, record: RunRecord) -> None:
        from jobs import figures  # matplotlib is not needed before

        folder = self.start.run_dir / "figures"
        stack = load_model(model)
        images = to_unit(self.dataset.test_images[:FIGURE_IMAGES], stack.dtype)
        for index in range(len(stack.layers)):
            path = folder / f"filters-layer-{index}.png"
            figures.filters(stack, index, images, path)
            self.tracker.figure(path, layer=index)
            self.tracker.figure(path)
        figures.training_curves(record.curves, folder / "training-curves.png")
        self.tracker.figure(folder / "training-curves.png")

    def write_profiles(self, record: RunRecord, asked: int) -> list[Table]:
        """Write what ranks have profiled, and log it with their traces; returns it as tables."""
        rows, tables = profile_rows(record), profile_tables(record, asked)
        if not rows and asked:
            self.report("no profile: no update was recorded")
        if not rows:
            return []
        traces = [(row["trace"], row["layer"]) for row in rows if row["trace"]]
        try:
            folder = self.mirror.fetch(FOLDER, [name for name, _ in traces])
            for name, layer in traces:
                self.tracker.artifact(folder / name, FOLDER, layer=layer)
            summary, text = folder / "summary.json", folder / "tables.md"
            write_whole(summary, dump_json(with_earlier(rows, summary)))
            write_whole(text, "\n".join(table.markdown() for table in tables))
            for file in (summary, text):
                self.tracker.artifact(file, FOLDER)
        except OSError as error:  # the tables are still shown
            self.report(f"the profile is not written: {one_line(error)}")
        return tables

    def write_summary(
        self, config: RunConfig, record: RunRecord, outcome: RunOutcome, seconds: float
    ) -> dict[str, Any]:
        """Record how the run ended; returns the summary."""
        tracker = self.tracker
        self._summary = summarise(
            config,
            record,
            status=outcome.status,
            seconds=seconds,
            run_id=tracker.run_id,
            message=outcome.message,
            skipped_images=self.dataset.skipped,
        )
        tracker.metrics(
            record.steps, {name: float(self._summary[name]) for name in METRICS if self._summary[name] is not None}
        )
        if record.readout is not None and record.readout.subset:
            tracker.tags({"probe_subset": record.readout.subset})
        description = description_of(config, self.dataset, self._summary)
        tracker.tags({"mlflow.note.content": description})
        tracker.finish(outcome.status)
        if self._model is not None:
            tracker.model(self._model, tuple(self.dataset.train_images.shape[1:]))
            if outcome.status == "FINISHED":
                tracker.register(
                    data=self.dataset.digest(),
                    probe=probe_of(record),
                    accuracy=self._summary["accuracy"],
                    description=description,
                )
        self._write(tracking_share=tracker.seconds / seconds)
        return self._summary

    def send(self) -> None:
        """Wait for MLflow, and complete the summary."""
        send_records(self.tracker, self.report)
        self._write(**outcome_fields(self.tracker))

    def _write(self, **more: Any) -> None:
        self._summary |= more
        try:
            write_whole(self.start.run_dir / "summary.json", dump_json(self._summary))
        except OSError as error:  # the weights are in the checkpoints
            self.report(f"summary.json is not written: {error}")


def description_of(config: RunConfig, dataset: Dataset, summary: Mapping[str, Any] | None = None) -> str:
    """What MLflow's page says about a run at its head: mesh, data, model, and once it has ended the result."""
    shape = " × ".join(str(size) for size in dataset.train_images.shape[1:])
    layers = ", ".join(str(layer.out_channels) for layer in config.model.layers)
    lines = [
        f"**Mesh** {config.mesh}, device {config.device}",
        f"**Data** {dataset.name}: {len(dataset.train_images):,} training images of {shape}, digest {dataset.digest()}",
        f"**Model** {count(len(config.model.layers), 'layer')} of {layers} channels",
    ]
    if summary is not None:
        parts = [summary["status"].lower()]
        if summary["accuracy"] is not None:
            parts.append(f"test accuracy {summary['accuracy']:.4f} ({summary['probe']} readout)")
        if summary["accuracy_decode"] is not None:
            parts.append(f"{summary['accuracy_decode']:.4f} by the nearest column of V")
        parts.append(f"{count(summary['steps'], 'update')} in {summary['seconds']:.0f} s")
        lines.append(f"**Result** {', '.join(parts)}")
    return "  \n".join(lines)


def probe_of(record: RunRecord) -> str:
    """What the accuracy of a run was measured with."""
    readout = record.readout
    if readout is None:
        return "none"
    subset = f", {readout.subset}" if readout.subset else ""
    return f"{readout.readout} on {count(readout.train_images, 'image')}{subset}"


def table_of(name: str, summary: dict[str, Any]) -> Table:
    """The layers of a summary, for a person."""
    rows = [
        (
            str(index),
            f"{layer['objective']:.3f}",
            f"{layer['residual']:.1e}",
            f"{layer['num_iters']:.0f}",
            f"{100 * layer['active_fraction']:.0f} %",
            f"{layer['dead_channels']:.0f}",
        )
        for index, layer in enumerate(summary["layers"])
        if layer  # empty if it was finished before the checkpoint of another run that this one started from
    ]
    title = f"{name}: {count(summary['steps'], 'update')} in {summary['seconds']:.0f} s"
    return Table(title, ("layer", "objective", "residual", "iterations", "active", "dead"), rows)


def lines_of(summary: dict[str, Any]) -> list[str]:
    """The accuracies of a summary, one line each."""
    readout, decode = summary["accuracy"], summary["accuracy_decode"]
    lines = []
    if readout is not None:
        part = " (fitted on a subset)" if summary["probe_subset"] else ""
        lines.append(f"test accuracy, {summary['probe']} readout on frozen features{part}: {readout:.4f}")
    if decode is not None:
        lines.append(f"test accuracy, nearest column of V, no classifier: {decode:.4f}")
    return lines


def waits_of(summary: dict[str, Any]) -> list[str]:
    """How much of its time each stage waited, in one line; none of a single stage.

    >>> waits_of({"waiting_share": [0.021, 0.304]})
    ['waiting for other ranks while learning: stage 0 2 %, stage 1 30 %']
    """
    shares = summary["waiting_share"]
    if len(shares) == 1:
        return []
    parts = ", ".join(f"stage {stage} {100 * share:.0f} %" for stage, share in enumerate(shares))
    return [f"waiting for other ranks while learning: {parts}"]
