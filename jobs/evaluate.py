"""Compare similarity matching with backpropagation and other local learners: `python -m jobs.evaluate`.

One command, one table: accuracy at every label budget, parameters and operations, corrupted and unseen images. What a
row gave with a seed is kept in the run directory; a second call of the same configuration goes on where the first
stopped.

Exit status: 0 finished, 1 failed, 2 bad input (one line, nothing started), 130, 143 or 129: told to end (Ctrl-C,
SIGTERM, a closed terminal).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from cluster.controller import RunFailed
from cluster.cpus import allowed_cpus
from cluster.redaction import one_line
from cluster.tracking.events import RunStatus
from cluster.tracking.spool import SpoolBusyError
from cluster.tracking.tracker import Tracker
from jobs.ending import Ending
from jobs.evaluation import charts, table
from jobs.evaluation.config import EvaluationConfig, read
from jobs.evaluation.corruptions import draw_corruptions
from jobs.evaluation.identity import SETTINGS, identity
from jobs.evaluation.lenet import LEAST_SIDE
from jobs.evaluation.material import Material, digest_of
from jobs.evaluation.measuring import Outcome, Unit, load, perform
from jobs.evaluation.record import begin
from jobs.evaluation.results import Store
from jobs.evaluation.rows import Choices, Row, only, rows_of
from jobs.evaluation.side_by_side import side_by_side
from jobs.evaluation.summaries import Summary, summarise
from jobs.evaluation.together import threads_of
from jobs.evaluation.watch import Watch, watching
from jobs.options import at_least, read_yaml
from jobs.program import run_program
from jobs.ray_session import shut_down_ray
from jobs.recording import send_records
from jobs.run_directory import default_root, local_folder
from simmatch.config import ConfigError
from simmatch.data.formats import DataError
from simmatch.files import write_whole
from simmatch.geometry import PatchConfig
from simmatch.model import Stack

FAILED, BAD_INPUT = 1, 2
DEFAULT = Path(__file__).parent / "configs" / "evaluate_fashion_mnist.yaml"
RESULTS, TABLE = "results", "table.md"
DESCRIPTION = "mlflow.note.content"
"""The tag that MLflow's page shows as a run's description, set as markdown."""
FILE_WIDTH = 160


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run. Returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    try:
        config = read(read_yaml(Path(options.config)), options.set, quick=options.quick)
        material, other = load(config)
        check(config, material)
        rows = rows_of(config, material, other)
        if options.rows:
            rows = only(rows, options.rows)
        default = default_root() / f"{config.name}{'-quick' if options.quick else ''}"
        run_dir = local_folder("--run-dir", options.run_dir, default)
        values = identity(run_dir, config, rows)
        if options.report:
            if not any((run_dir / RESULTS).glob("*.json")):
                raise ConfigError(f"--report: expected results in {run_dir / RESULTS}, found none")
            Report(config, rows, material, run_dir, console).show()
            return 0
        tracker = Tracker(run_dir, config.tracking)
        crew = Crew(options.workers, options.threads or max(1, allowed_cpus() // options.workers))
        job = Evaluation(config, rows, material, tracker, console, crew, digest_of(material, other))
        params = config.model_dump(mode="json", exclude={"tracking", "stacks", "quick"})
        begin(tracker, values, params, config.data.name, material, other)
    except SpoolBusyError as error:
        print(f"error: --run-dir: another process works in {run_dir}: {error}", file=sys.stderr)
        return BAD_INPUT
    except (ConfigError, DataError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    with Ending() as ending, threads_of(crew.threads):
        return job.run(ending)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=str(DEFAULT), metavar="FILE", help="YAML file (default: %(default)s)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, e.g. --set seeds=[0]; repeatable",
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="measure and show only these rows (default: all)")
    parser.add_argument("--run-dir", metavar="DIR", help="where results and figures go (default: runs/<name>)")
    parser.add_argument("--quick", action="store_true", help="the same rows on fewer images: minutes, rougher figures")
    parser.add_argument("--report", action="store_true", help="show what is known so far, measure nothing")
    parser.add_argument(
        "--workers",
        type=at_least(1),
        default=1,
        metavar="N",
        help="rows and seeds measured side by side, as Ray tasks on the cluster of RAY_ADDRESS or on this machine "
        "(default: 1, without Ray)",
    )
    parser.add_argument(
        "--threads",
        type=at_least(1),
        metavar="N",
        help="threads for each of them (default: the CPUs that it may use, shared)",
    )
    return parser


@dataclass(frozen=True)
class Crew:
    """Units measured at a time, and the threads of each."""

    workers: int
    threads: int


def check(config: EvaluationConfig, material: Material) -> None:
    """What can be wrong before anything learns.

    Raises
    ------
    ConfigError
        A budget that a class cannot fill, or a learner that does not fit the images.
    """
    least = int(torch.bincount(material.train.labels, minlength=material.source.num_classes).min())
    for index, budget in enumerate(config.budgets):
        if budget > least:
            raise ConfigError(
                f"budgets.{index}: expected at most {least}, the images of the rarest class, got {budget}"
            )
    source, shape = material.source, config.shape
    height, width = source.image_size
    if config.networks and min(height, width) < LEAST_SIDE:
        raise ConfigError(f"networks: expected images of at least {LEAST_SIDE} × {LEAST_SIDE}, got {height} × {width}")
    try:
        PatchConfig(source.in_channels, shape.kernel_size, shape.stride, shape.padding).map_size(source.image_size)
    except ValueError as error:
        raise ConfigError(f"shape.{error}") from None
    for name, row in config.stacks.items():
        for model in row.models():
            try:
                Stack(model, material.source)
            except ConfigError as error:
                raise ConfigError(f"stacks.{name}.{error}") from None


class Report:
    """What is known of rows, for a person."""

    def __init__(
        self, config: EvaluationConfig, rows: list[Row], material: Material, run_dir: Path, console: Console
    ) -> None:
        self.config, self.rows, self.material, self.run_dir, self.console = config, rows, material, run_dir, console
        self.store = Store(run_dir / RESULTS)

    def show(self) -> tuple[list[Summary], list[Path]]:
        """The table on the terminal, as markdown and as figures; returns what it is made of, and the figures."""
        names = [view for row in self.rows for view in row.views]
        known = [self.store.load(name, seed) for name in names for seed in self.config.seeds]
        summaries = summarise([each for each in known if each is not None])
        for each in (table.accuracy_table, table.kernel_table, table.cost_table, table.robustness_table):
            self.console.print(each(summaries))
        write_whole(self.run_dir / TABLE, table.markdown(summaries))
        folder = self.run_dir / "figures"
        charts.label_efficiency(summaries, folder / "label-efficiency.png")
        charts.corruption_bars(summaries, folder / "corruptions.png")
        draw_corruptions(_one_of_each(self.material), folder / "corrupted-images.png")
        self.console.print(f"table, figures, results: {self.run_dir}", highlight=False, soft_wrap=True)
        drawn = [folder / f"{name}.png" for name in ("label-efficiency", "corruptions", "corrupted-images")]
        return summaries, drawn


class Evaluation:
    """All rows with all seeds: measured where they are not known yet, kept, shown and recorded."""

    def __init__(
        self,
        config: EvaluationConfig,
        rows: list[Row],
        material: Material,
        tracker: Tracker,
        console: Console,
        crew: Crew,
        data: str,
    ) -> None:
        self.config, self.rows, self.material, self.crew, self.data = config, rows, material, crew, data
        self.tracker, self.console, self.run_dir = tracker, console, tracker.run_dir
        self.report = Report(config, rows, material, self.run_dir, console)
        self.store = self.report.store
        self.choices = Choices(self.run_dir / SETTINGS)
        self.skipped: dict[str, str] = {}

    def run(self, ending: Ending) -> int:
        """Measure what is not known yet, print, record. Returns the exit status."""
        tell = partial(self.console.print, highlight=False, soft_wrap=True, markup=False)
        self.tracker.announce_to(tell)
        started, status, code = time.monotonic(), "FAILED", FAILED
        try:
            self._measure(self.crew)
            self._show()
            status, code = "FINISHED", 0
        except KeyboardInterrupt:
            print("interrupted; what is known so far is kept, the same command goes on", file=sys.stderr)
            status, code = "KILLED", ending.status
        except (RunFailed, ConfigError) as error:
            print(f"error: {one_line(error)}; what is known so far is kept", file=sys.stderr)
            code = BAD_INPUT if isinstance(error, ConfigError) else FAILED
        finally:
            ending.instead = self.tracker.hurry
            self.tracker.metrics(0, {"seconds": time.monotonic() - started})
            self.tracker.finish(_status(status))
            send_records(self.tracker, tell)
        return code

    def _missing(self) -> list[Unit]:
        """What is to be done, seed by seed, so that the first whole table is there early."""
        found = []
        for seed in self.config.seeds:
            for row in self.rows:
                if all(self.store.load(view, seed) is not None for view in row.views):
                    continue
                settings = Unit(row.name, None)
                if self.choices.known(row.name) is None and settings not in found:
                    found.append(settings)
                found.append(Unit(row.name, seed))
        return found

    def _measure(self, crew: Crew) -> None:
        """Do what is missing, and keep what comes of it."""
        units = self._missing()
        alone = crew.workers == 1 or not units
        with watching(self.console, len(units)) as watch:
            if alone:
                work = self._in_turn(units, watch)
            else:
                work = side_by_side(
                    self.config,
                    units,
                    self.choices,
                    watch,
                    workers=crew.workers,
                    threads=crew.threads,
                    data=self.data,
                )
            try:
                for unit, outcome in work:
                    self._keep(unit, outcome, watch)
            finally:
                if not alone:
                    shut_down_ray()

    def _in_turn(self, units: list[Unit], watch: Watch) -> Iterator[tuple[Unit, Outcome]]:
        """One after the other, in this process."""
        for unit in units:
            if unit.row not in self.skipped:
                draw, chosen = unit.seed == self.config.seeds[0], self.choices.known(unit.row)
                yield unit, perform(self.rows, unit, chosen, self.material, partial(watch.tell, str(unit)), draw=draw)
                watch.ended(str(unit))

    def _keep(self, unit: Unit, outcome: Outcome, watch: Watch) -> None:
        """Settings, results and figures of a unit."""
        watch.done()
        if outcome.missing is not None:
            self.skipped[unit.row] = outcome.missing
            watch.note(f"{unit.row} is left out: {outcome.missing}")
        elif unit.seed is None:
            self.choices.keep(unit.row, outcome.chosen)
            watch.note(f"{unit}: {outcome.chosen} · {outcome.seconds:.0f} s")
        for name, content in outcome.figures.items():  # before results: a unit with results is not done again
            path = self.run_dir / "figures" / name
            write_whole(path, content)
            self.tracker.figure(path)
        for result in outcome.results:
            self.store.save(result)
            found = {"nearest column of V": result.decode} if result.decode is not None else result.accuracy
            best = " ".join(f"{budget}: {value:.3f}" for budget, value in found.items())
            watch.note(f"{result.row}, seed {result.seed}: {best} · {outcome.seconds:.0f} s")

    def _show(self) -> None:
        """The table for a person, and in MLflow."""
        summaries, drawn = self.report.show()
        for path in drawn:
            self.tracker.figure(path)
        self.tracker.artifact(self.run_dir / TABLE)
        self.tracker.tags({DESCRIPTION: table.description(summaries)})
        self.tracker.metrics(0, table.metrics(summaries))
        for name, why in self.skipped.items():
            self.console.print(f"left out: {name}: {why}", highlight=False, soft_wrap=True)


def _one_of_each(material: Material) -> torch.Tensor:
    """The first test image of every class: [classes, C, H, W]."""
    first = [int((material.test.labels == each).nonzero()[0]) for each in torch.unique(material.test.labels)]
    return material.test.images[first]


def _status(name: str) -> RunStatus:
    return "FINISHED" if name == "FINISHED" else "KILLED" if name == "KILLED" else "FAILED"


if __name__ == "__main__":
    run_program(main)
