"""Compare similarity matching with backpropagation and other local learners: `python -m jobs.evaluate`.

One command, one table: accuracy at every label budget, parameters and operations, corrupted images and another data
set. The results of each row and seed are kept in the run directory; the same command continues from there.

Exit status: 0 finished, 1 failed, 2 bad input (one line, nothing started); 130, 143 or 129 after Ctrl-C, SIGTERM or a
closed terminal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from cluster.cpus import allowed_cpus
from cluster.redaction import one_line
from cluster.tracking.tracker import Tracker
from jobs.display import ProgressBars, load_shown
from jobs.entry_point import BAD_INPUT, run_main
from jobs.evaluation import charts, tables
from jobs.evaluation.config import EvaluationConfig, command_parser, read
from jobs.evaluation.corruptions import draw_corruptions
from jobs.evaluation.lenet import LEAST_SIDE
from jobs.evaluation.material import Material, digest_of
from jobs.evaluation.memory import memory_line
from jobs.evaluation.ray_units import run_side_by_side
from jobs.evaluation.results import estimates
from jobs.evaluation.resume import RESULTS, ChosenSettings, begin, identity, row_results
from jobs.evaluation.rows import Row, only, rows_of
from jobs.evaluation.threads import limited_threads
from jobs.evaluation.units import Unit, UnitResult, load, run_unit
from jobs.options import at_least, read_yaml
from jobs.preflight import memory_of_ranks
from jobs.ray_session import shut_down_ray
from jobs.recording import open_tracker, run_recorded
from jobs.reporting import save_figure
from jobs.run_directory import default_root, local_folder
from jobs.signals import SignalHandler
from simmatch.config import ConfigError
from simmatch.data.formats import DataError
from simmatch.files import write_whole
from simmatch.geometry import PatchConfig
from simmatch.memory import machine_bytes
from simmatch.model import Stack
from simmatch.schedule import updates_of_layers

DEFAULT = Path(__file__).parent / "configs" / "evaluate_fashion_mnist.yaml"
TABLE = "table.md"
DESCRIPTION = "mlflow.note.content"
"""The tag that MLflow's page shows as a run's description, as Markdown."""
ALL = "rows × seeds"
"""Name of the bar for all of the work."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run. Returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        config = read(read_yaml(Path(options.config)), options.set, quick=options.quick)
        material, other = load(config, partial(load_shown, console))
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
            show(config, rows, material, run_dir, console)
            return 0
        limit = machine_bytes() if options.workers == 1 else memory_of_ranks()
        held = {row.name: row.held_bytes() for row in rows}
        told = memory_line(held, material, other, limit=limit, workers=options.workers)
        tracker = open_tracker(run_dir, config.tracking)
        threads = options.threads or max(1, allowed_cpus() // options.workers)
        job = Evaluation(config, rows, material, tracker, console)
        params = config.model_dump(mode="json", exclude={"tracking", "stacks", "quick"})
        begin(tracker, values, params, config.data.title, material, other)
        console.print(told, highlight=False, soft_wrap=True)
    except (ConfigError, DataError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    with SignalHandler() as signals, limited_threads(threads):
        return job.run(signals, options.workers, threads, digest_of(material, other))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m jobs.evaluate", (__doc__ or "").splitlines()[0], DEFAULT)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="measure and show only these rows (default: all)")
    parser.add_argument("--report", action="store_true", help="show the results so far without measuring")
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
        help="threads per worker (default: the available CPUs divided among workers)",
    )
    return parser


def check(config: EvaluationConfig, material: Material) -> None:
    """Check what can be checked before anything learns.

    Raises
    ------
    ConfigError
        A budget that a class cannot fill, or a learner that does not fit the images.
    """
    material.check_budgets({f"budgets.{index}": budget for index, budget in enumerate(config.budgets)})
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
                updates_of_layers(model, len(material.train))
            except ValueError as error:
                raise ConfigError(f"stacks.{name}.{error}") from None


def show(
    config: EvaluationConfig, rows: list[Row], material: Material, run_dir: Path, console: Console
) -> tuple[pd.DataFrame, list[Path]]:
    """The known results on the terminal, as Markdown and as figures; returns their estimates and the figures' paths."""
    store = row_results(run_dir)
    known = [store.load(view, seed) for row in rows for view in row.views for seed in config.seeds]
    values = estimates([result for result in known if result is not None])
    shown = tables.comparison_tables(values)
    for table in shown:
        table.show(console)
    write_whole(run_dir / TABLE, tables.markdown(shown))
    names = ("label-efficiency", "corruptions", "corrupted-images")
    paths = [run_dir / "figures" / f"{name}.png" for name in names]
    save_figure(charts.label_efficiency_figure(values), paths[0])
    save_figure(charts.corruption_figure(values), paths[1])
    draw_corruptions(_one_of_each(material), paths[2])
    console.print(f"table, figures, results: {run_dir}", highlight=False, soft_wrap=True)
    return values, paths


class Evaluation:
    """Measures every row with every seed, unless its results are known already; keeps, shows and records them."""

    def __init__(
        self, config: EvaluationConfig, rows: list[Row], material: Material, tracker: Tracker, console: Console
    ) -> None:
        self.config, self.rows, self.material = config, rows, material
        self.tracker, self.console, self.run_dir = tracker, console, tracker.run_dir
        self.store = row_results(self.run_dir)
        self.settings = ChosenSettings(self.run_dir)
        self.left_out: dict[str, str] = {}

    def run(self, signals: SignalHandler, workers: int, threads: int, digest: str) -> int:
        """Measure what is not known yet, print, record. Returns the exit status.

        Parameters
        ----------
        workers: units measured at the same time; threads: of each.
        digest: of the data, see `digest_of`.
        """

        def work() -> None:
            self._measure(workers, threads, digest)
            self._show()

        return run_recorded(work, self.tracker, self.console, signals)

    def _missing(self) -> list[Unit]:
        """What is to be done, seed by seed, so that a whole table of one seed is there early."""
        units: list[Unit] = []
        for seed in self.config.seeds:
            for row in self.rows:
                if all(self.store.load(view, seed) is not None for view in row.views):
                    continue
                choice = Unit(row.name, None)
                if self.settings.known(row.name) is None and choice not in units:
                    units.append(choice)
                units.append(Unit(row.name, seed))
        return units

    def _measure(self, workers: int, threads: int, digest: str) -> None:
        """Do what is missing, and keep its results."""
        units = self._missing()
        alone = workers == 1 or not units
        with ProgressBars(self.console) as bars:
            bars.update(ALL, 0, len(units))
            if alone:
                work = self._one_after_the_other(units, bars)
            else:
                work = run_side_by_side(
                    self.config, units, self.settings, bars, workers=workers, threads=threads, digest=digest
                )
            try:
                for done, (unit, outcome) in enumerate(work, 1):
                    bars.update(ALL, done, len(units))
                    self._keep(unit, outcome, bars)
            finally:
                if not alone:
                    shut_down_ray()

    def _one_after_the_other(self, units: list[Unit], bars: ProgressBars) -> Iterator[tuple[Unit, UnitResult]]:
        """In this process."""
        for unit in units:
            if unit.row in self.left_out:
                continue
            name = str(unit)

            def on_progress(what: str, done: int, total: int, name: str = name) -> None:
                bars.update(name, done, total, text=f"{name}: {what}")

            draw, chosen = unit.seed == self.config.seeds[0], self.settings.known(unit.row)
            yield unit, run_unit(self.rows, unit, chosen, self.material, on_progress, draw=draw)
            bars.remove(name)

    def _keep(self, unit: Unit, outcome: UnitResult, bars: ProgressBars) -> None:
        """Settings, results and figures of a unit."""
        if outcome.missing is not None:
            self.left_out[unit.row] = outcome.missing
            bars.note(f"{unit.row} is left out: {outcome.missing}")
        elif unit.seed is None:
            self.settings.keep(unit.row, outcome.chosen)
            bars.note(f"{unit}: {outcome.chosen} · {outcome.seconds:.0f} s")
        for name, content in outcome.figures.items():  # before results: a unit with results is not done again
            path = self.run_dir / "figures" / name
            write_whole(path, content)
            self.tracker.figure(path)
        for result in outcome.results:
            self.store.save(result)
            accuracy = {"nearest column of V": result.decode} if result.decode is not None else result.accuracy
            words = " ".join(f"{budget}: {value:.3f}" for budget, value in accuracy.items())
            bars.note(f"{result.row}, seed {result.seed}: {words} · {outcome.seconds:.0f} s")

    def _show(self) -> None:
        """The tables for a person, and in MLflow."""
        values, figures = show(self.config, self.rows, self.material, self.run_dir, self.console)
        for path in figures:
            self.tracker.figure(path)
        self.tracker.artifact(self.run_dir / TABLE)
        self.tracker.tags({DESCRIPTION: tables.markdown(tables.accuracy_tables(values))})
        self.tracker.metrics(0, tables.metrics(values))
        for name, why in self.left_out.items():
            self.console.print(f"left out: {name}: {why}", highlight=False, soft_wrap=True)


def _one_of_each(material: Material) -> torch.Tensor:
    """The first test image of every class: [classes, C, H, W]."""
    labels = material.test.labels
    first = [int((labels == each).nonzero()[0]) for each in torch.unique(labels)]
    return material.test.images[torch.tensor(first)]


if __name__ == "__main__":
    run_main(main)
