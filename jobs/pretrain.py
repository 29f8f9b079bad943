"""Pre-train a stack of similarity-matching layers: `python -m jobs.pretrain --config FILE`.

Exit status: 0 finished, 1 failed, 2 bad configuration or data (one line, nothing started), 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.checkpoint import CheckpointError, Reader, read_manifest
from cluster.config import RunConfig, public
from cluster.controller import Controller, RunFailed, RunStopped
from cluster.mlflow_model import ModelLogger, load_exported
from cluster.redaction import Redactor, one_line
from cluster.spool import SPOOL_NAME, SpoolBusyError
from cluster.storage import AnyPath
from cluster.summary import Record, summarise, write_json
from cluster.tracking import Status, Tracker
from cluster.training import source_of
from jobs import figures
from jobs.display import JobDisplay, MakeDisplay, make_display
from jobs.mirror import Mirror
from jobs.options import override, read_yaml
from jobs.plan import print_plan
from jobs.ray_session import shut_down_ray, start_ray
from jobs.run_directory import Start, choose
from simmatch.config import ConfigError, parse
from simmatch.data import Dataset, load_dataset, to_unit
from simmatch.documents import dump_yaml
from simmatch.files import make_folder, write_whole
from simmatch.formats import DataError
from simmatch.geometry import PatchConfig
from simmatch.model import layer_inputs, load_model
from simmatch.order import steps_per_epoch

BAD_INPUT = 2
FIGURE_IMAGES = 1000


def main(arguments: list[str] | None = None, make_display: MakeDisplay = make_display) -> int:
    """Parse, build, run. Returns the exit status.

    make_display: where a person, or a program, watches.
    """
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        config = parse(RunConfig, override(read_yaml(Path(options.config)), options.set))
        dataset = check(config)
        if options.dry_run:
            print_plan(console, config, source_of(dataset), len(dataset.train_images))
            return 0
        start = choose(config, options.run_dir, options.resume)
        if start.resume is not None:
            check_checkpoint(config, start.resume)
        tracker = Tracker(start.run_dir, config.tracking, ModelLogger(load_exported))
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return Job(config, dataset, start, tracker, console, make_display).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.pretrain",
        description="Pre-train a stack of similarity-matching layers on Ray, logged to MLflow.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see jobs/configs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, e.g. --set mesh.channel=3 --set model.layers.0.out_channels=32; repeatable",
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="where the run's files go: a folder or s3://bucket/prefix (default: runs/<name>)",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto: continue an unfinished run of this configuration; never: a new run; DIR: a run or a checkpoint",
    )
    parser.add_argument("--dry-run", action="store_true", help="print configuration, mesh and sizes; start nothing")
    return parser


def check(config: RunConfig) -> Dataset:
    """Everything that can be wrong before a process starts; returns the data set.

    Raises
    ------
    ConfigError, DataError
        One line each, naming the key.
    """
    config.place()
    dataset = load_dataset(config.data)
    inputs = layer_inputs(config.model, source_of(dataset))
    for index, layer in enumerate(config.model.layers):
        channels, size = inputs[index]
        kernel = size[0] if layer.kernel_size == "full" else layer.kernel_size
        height, width = PatchConfig(channels, kernel, layer.stride, layer.padding).map_size(size)
        if layer.train.positions is not None and layer.train.positions > height * width:
            raise ConfigError(
                f"model.layers.{index}.train.positions: expected at most {height * width}, the map of "
                f"{height} × {width} activities, got {layer.train.positions}"
            )
        try:
            steps_per_epoch(len(dataset.train_images), layer.train.batch_size, images=layer.train.images)
        except ValueError as error:
            raise ConfigError(f"model.layers.{index}.train.images: {error}") from None
    labelled, available = config.probe.train_images, len(dataset.train_images)
    if labelled is not None and labelled > available:
        raise ConfigError(f"probe.train_images: expected at most {available}, got {labelled}")
    return dataset


def check_checkpoint(config: RunConfig, folder: AnyPath) -> None:
    """Refuse a checkpoint whose tensors do not fit the model; its files have been compared when it was chosen."""
    manifest = read_manifest(folder)
    reader = Reader(folder, manifest)
    for index in range(len(manifest.layers)):
        reader.check_channels(f"layers.{index}.feedforward", config.model.layers[index].out_channels)


class Job:
    """One run in this process: Ray, the controller, the records."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        start: Start,
        tracker: Tracker,
        console: Console,
        make_display: MakeDisplay = make_display,
    ) -> None:
        self._make_display = make_display
        self.config, self.dataset, self.start, self.tracker, self.console = config, dataset, start, tracker, console
        self.run_dir = start.run_dir
        self._hide = Redactor(os.environ)
        patience_s = config.checkpoint.patience_s
        self.mirror = Mirror(start.place, start.run_dir, self._tell, patience_s=patience_s)
        self.started = time.monotonic()
        self.record = Record()
        self._controller: Controller | None = None
        self._signum: int | None = None

    def run(self) -> int:
        """Train, look at the result, record it. Returns the exit status."""
        try:
            make_folder(self.run_dir)
            self.mirror.pull()
            self._describe()
            write_whole(self.run_dir / "config.yaml", dump_yaml(public(self.config)))
            self.mirror.push()
        except SpoolBusyError as error:
            print(f"error: --run-dir: another process works in {self.run_dir}: {error}", file=sys.stderr)
            return BAD_INPUT
        except OSError as error:
            print(f"error: --run-dir: expected a folder that can be written, got {error}", file=sys.stderr)
            return BAD_INPUT
        self._watch_signals()
        status: Status = "FAILED"
        message: str | None = None
        code = 1
        with self._make_display(self.console, self._hide) as display:
            display.note(self.start.note)
            if self.dataset.skipped:
                display.note(f"{self.dataset.skipped} damaged images are left out (data.damaged: skip)")
            try:
                self._train(display)
                status, code = "FINISHED", 0
            except (RunFailed, ConfigError, OSError) as error:
                message, code = str(error), BAD_INPUT if isinstance(error, ConfigError) else 1
            except Interrupted as error:
                status, message, code = "KILLED", str(error), 128 + error.signum
            except RunStopped as error:
                assert self._signum is not None
                status, message, code = "KILLED", f"{Interrupted(self._signum)}; {error}", 128 + self._signum
            finally:
                shut_down_ray()
                self._finish(display, status, message)
        if message is not None:
            print(f"error: {one_line(message)}", file=sys.stderr)
        return code

    def _train(self, display: JobDisplay) -> None:
        group = self.config.cluster
        address = start_ray(self.config.place().world_size * group.cpus_per_rank, group.start_timeout_s)
        self._watch_signals()  # ray.init has put handlers of its own in place
        from cluster.group import WorkerGroup  # imports ray, whose environment is set by now

        display.note(f"ray: {address}; mesh: {self.config.place()}; device: {self.config.device}")
        place, resume, push = self.start.place, self.start.resume, self.mirror.push
        controller = Controller(
            self.config, place, WorkerGroup, self.tracker, display, resume=resume, before_commit=push
        )
        self._controller, self.record = controller, controller.record
        if resume is not None:
            self.record.steps = read_manifest(resume).cursor.step
        self.record.continue_from(self.run_dir / SPOOL_NAME)
        try:
            controller.run()
        finally:
            self._controller, self.config = None, controller.config  # the mesh may have shrunk
        display.note("drawing figures and logging the model")
        self._look()

    def _tell(self, text: str) -> None:
        """A line of the mirror, which works beside the display."""
        self.console.print(self._hide(text), markup=False, highlight=False, soft_wrap=True)

    def _watch_signals(self) -> None:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._interrupt)

    def _interrupt(self, signum: int, _: FrameType | None) -> None:
        """The first signal asks for a last checkpoint where ranks train; the next one, or any elsewhere, ends."""
        if self._signum is None and self._controller is not None and self._controller.stop():
            self._signum = signum
            return
        signal.signal(signum, signal.SIG_IGN)
        raise Interrupted(signum)

    # ------------------------------------------------------------------------------------------- records

    def _describe(self) -> None:
        """What is known before the first step."""
        config, tracker = self.config, self.tracker
        tags = {
            "simmatch.git_commit": _git_commit(),
            "simmatch.world_size": str(config.place().world_size),
            "simmatch.mesh": str(config.place()),
            "simmatch.host": os.uname().nodename,
            "simmatch.device": config.device,
            "simmatch.skipped_images": str(self.dataset.skipped),
        }
        tracker.start(self.run_dir.name, layers=len(config.model.layers), tags=tags)
        values = public(config)
        layers = values["model"].pop("layers")
        tracker.params({key: value for key, value in values.items() if key not in ("tracking", "cluster", "mesh")})
        for index, layer in enumerate(layers):
            tracker.params(layer, layer=index)
        tracker.artifact(self.run_dir / "config.yaml")
        name, images = self.dataset.name, len(self.dataset.train_images)
        tracker.dataset(name, source=name, digest=self.dataset.digest(), num_images=images)

    def _look(self) -> None:
        """Figures and the exported model, once training is over."""
        folder = self.run_dir / "figures"
        model = self.mirror.fetch_model()
        stack = load_model(model)
        images = to_unit(self.dataset.test_images[:FIGURE_IMAGES], stack.dtype)
        for index in range(len(stack.layers)):
            path = folder / f"filters-layer-{index}.png"
            figures.filters(stack, index, images, path)
            self.tracker.figure(path, layer=index)
            self.tracker.figure(path)
        figures.training_curves(self.record.curves, folder / "training-curves.png")
        self.tracker.figure(folder / "training-curves.png")
        self.tracker.model(model, tuple(self.dataset.train_images.shape[1:]))

    def _finish(self, display: JobDisplay, status: Status, message: str | None) -> None:
        """Truthful records, whatever happened."""
        seconds = time.monotonic() - self.started
        message = None if message is None else self._hide(message)
        summary = summarise(
            self.config,
            self.record,
            status=status,
            seconds=seconds,
            run_id=None,
            message=message,
            skipped_images=self.dataset.skipped,
        )
        names = ("accuracy", "accuracy_decode", "images_per_second", "bytes_exchanged", "num_exchanges", "seconds")
        final = {name: float(summary[name]) for name in names if summary[name] is not None}
        self.tracker.metrics(self.record.steps, final)
        self.tracker.finish(status)
        pending = self.tracker.close()
        summary |= {"mlflow_run_id": self.tracker.run_id, "tracking_share": self.tracker.seconds / seconds}
        summary["lost_records"] = self.tracker.lost
        try:
            write_json(self.run_dir / "summary.json", summary)
        except OSError as error:  # what was learnt is in the checkpoints
            display.note(f"summary.json is not written: {error}")
        self.mirror.close()
        if self.tracker.lost:
            display.note(f"{self.tracker.lost} records are lost: the disk of {self.run_dir} was full")
        if pending:
            display.note(
                f"{pending} records have not reached MLflow; send them with: python -m jobs.sync {self.run_dir}"
            )
        if status == "FINISHED":
            self._print(summary)

    def _print(self, summary: dict[str, Any]) -> None:
        table = Table(title=f"{self.config.name}: {summary['steps']} updates in {summary['seconds']:.0f} s")
        for name in ("layer", "objective", "residual", "iterations", "active", "dead"):
            table.add_column(name, justify="right")
        for index, layer in enumerate(summary["layers"]):
            if not layer:  # finished before the checkpoint of another run that this one started from
                continue
            table.add_row(
                str(index),
                f"{layer['objective']:.3f}",
                f"{layer['residual']:.1e}",
                f"{layer['num_iters']:.0f}",
                f"{100 * layer['active_fraction']:.0f} %",
                f"{layer['dead_channels']:.0f}",
            )
        self.console.print(table)
        lines = [f"test accuracy, {summary['probe']} readout on frozen features: {summary['accuracy']:.4f}"]
        if summary["accuracy_decode"] is not None:
            lines.append(f"test accuracy, nearest column of V, no classifier: {summary['accuracy_decode']:.4f}")
        lines.append(f"model, figures, summary: {self.start.place}")
        if self.config.tracking.enabled:
            lines.append(f"MLflow run: {summary['mlflow_run_id']} (make ui)")
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True)


class Interrupted(BaseException):
    """A signal asked the job to end."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"ended by {signal.Signals(signum).name}")


def _git_commit() -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
