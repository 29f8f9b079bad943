"""Compare similarity matching with backpropagation and other local learners: `python -m jobs.evaluate`.

One command, one table: accuracy at every label budget, parameters and operations, corrupted and unseen images. What a
row gave with a seed is kept in the run directory; a second call of the same configuration goes on where the first
stopped.

Exit status: 0 finished, 2 bad input (one line, nothing started), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from threadpoolctl import threadpool_limits

from cluster.redaction import one_line
from cluster.spool import SpoolBusyError
from cluster.tracking import Status, Tracker
from jobs.benchmarks.report import MissingError, hardware
from jobs.evaluation import charts, table
from jobs.evaluation.config import EvaluationConfig, read
from jobs.evaluation.corruptions import draw_corruptions
from jobs.evaluation.features import Features, StackFeatures
from jobs.evaluation.material import Material
from jobs.evaluation.results import Result, Store
from jobs.evaluation.rows import Choices, Row, only, rows_of
from jobs.evaluation.summaries import summarise
from jobs.figures import filters
from jobs.options import read_yaml
from jobs.run_directory import default_root, local_folder
from simmatch.config import ConfigError, parse
from simmatch.data import load_dataset
from simmatch.formats import DataError
from simmatch.model import Stack

BAD_INPUT, INTERRUPTED = 2, 130
DEFAULT = Path(__file__).parent / "configs" / "evaluate_fashion_mnist.yaml"
FIGURE_IMAGES = 500
RESULTS = "results"
FILE_WIDTH = 160


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run. Returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    try:
        config = read(read_yaml(Path(options.config)), options.set, quick=options.quick)
        material = Material.of(load_dataset(config.data), config.held_out)
        other = None
        if config.unseen is not None:
            dataset = load_dataset(config.unseen)
            other = Material.of(dataset, max(1, len(dataset.train_images) // 10))
        check(config, material)
        rows = rows_of(config, material, other)
        if options.rows:
            rows = only(rows, options.rows)
        default = default_root() / f"{config.name}{'-quick' if options.quick else ''}"
        run_dir = local_folder("--run-dir", options.run_dir, default)
        prepare(run_dir, config)
        if options.report and not any((run_dir / RESULTS).glob("*.json")):
            raise ConfigError(f"--report: expected results in {run_dir / RESULTS}, found none")
        tracker = Tracker(run_dir, config.tracking)
        job = Evaluation(config, rows, material, tracker, console, measure=not options.report)
        job.describe()
    except SpoolBusyError as error:
        print(f"error: --run-dir: another process works in {run_dir}: {error}", file=sys.stderr)
        return BAD_INPUT
    except (ConfigError, DataError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    threads = options.threads or os.cpu_count() or 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(limits=threads):
            return job.run()
    finally:
        torch.set_num_threads(before)


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
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch and BLAS (default: all cores)")
    return parser


def check(config: EvaluationConfig, material: Material) -> None:
    """What can be wrong before anything learns.

    Raises
    ------
    ConfigError
        A budget that a class cannot fill, or a stack that does not fit the images.
    """
    least = int(torch.bincount(material.train.labels, minlength=material.source.num_classes).min())
    for index, budget in enumerate(config.budgets):
        if budget > least:
            raise ConfigError(
                f"budgets.{index}: expected at most {least}, the images of the rarest class, got {budget}"
            )
    for name, row in config.stacks.items():
        for model in row.models():
            try:
                Stack(model, material.source)
            except ConfigError as error:
                raise ConfigError(f"stacks.{name}.{error}") from None


def prepare(run_dir: Path, config: EvaluationConfig) -> None:
    """Make the run directory, or refuse one that holds results of another configuration.

    Raises
    ------
    ConfigError
        Names `--run-dir`.
    """
    path = run_dir / "config.yaml"
    values = comparable(config)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            other: Any = filled(yaml.safe_load(path.read_text()), config)
            if other != values:
                ours = {key for key, value in values.items() if not isinstance(other, dict) or other.get(key) != value}
                raise ConfigError(
                    f"--run-dir: expected a new folder or results of this configuration, got {run_dir}, which differs "
                    f"in {', '.join(sorted(ours)) or 'keys of its own'}"
                )
        path.write_text(yaml.safe_dump(values, sort_keys=False))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--run-dir: expected a folder that can be written to, got {run_dir}: {error}") from None


def filled(other: Any, config: EvaluationConfig) -> Any:
    """What an earlier version has compared, with the keys it did not know at their defaults."""
    try:
        return comparable(parse(EvaluationConfig, config.model_dump(mode="json") | dict(other)))
    except (ConfigError, TypeError, ValueError):
        return other


def comparable(config: EvaluationConfig) -> dict[str, Any]:
    """What results depend on, as plain values; rows and seeds may be added to a run."""
    free = {"tracking", "quick", "seeds", "stacks", "rivals", "networks"}
    return config.model_dump(mode="json", exclude=free)


class Evaluation:
    """All rows with all seeds, and what is shown of them.

    measure: measure what is not known yet.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        rows: list[Row],
        material: Material,
        tracker: Tracker,
        console: Console,
        *,
        measure: bool = True,
    ) -> None:
        self.config, self.rows, self.material, self.measure = config, rows, material, measure
        self.tracker, self.console, self.run_dir = tracker, console, tracker.run_dir
        self.store = Store(self.run_dir / RESULTS)
        self.choices = Choices(self.run_dir / "settings.json")
        self.skipped: dict[str, str] = {}

    def describe(self) -> None:
        """Open the record."""
        facts = hardware()
        tags = {f"simmatch.{key}": str(facts[key]) for key in ("cpu", "cores_available", "commit", "torch")}
        self.tracker.start(self.run_dir.name, layers=0, tags=tags)
        self.tracker.params(self.config.model_dump(mode="json", exclude={"tracking", "stacks", "quick"}))

    def run(self) -> int:
        """Measure what is not known yet, print, record. Returns the exit status."""
        started, status, code = time.monotonic(), "FAILED", 1
        try:
            results = self._measure()
            self._show(results)
            status, code = "FINISHED", 0
        except KeyboardInterrupt:
            print("interrupted; what is known so far is kept, the same command goes on", file=sys.stderr)
            status, code = "KILLED", INTERRUPTED
        finally:
            self.tracker.metrics(0, {"seconds": time.monotonic() - started})
            self.tracker.finish(_status(status))
            self.tracker.close()
        return code

    def _measure(self) -> list[Result]:
        """Seed by seed, so that the first whole table is there early; results in the order of the rows."""
        found: dict[tuple[str, int], Result] = {}
        with watching(self.console, len(self.rows) * len(self.config.seeds)) as watch:
            for seed in self.config.seeds:
                for row in self.rows:
                    known = [self.store.load(view, seed) for view in row.views]
                    results = [each for each in known if each is not None]
                    if len(results) < len(known) and self.measure:
                        results = self._one(row, seed, watch)
                    found |= {(each.row, seed): each for each in results}
                    watch.done()
        names = [view for row in self.rows for view in row.views]
        return [found[name, seed] for name in names for seed in self.config.seeds if (name, seed) in found]

    def _one(self, row: Row, seed: int, watch: Watch) -> list[Result]:
        """Measure one row with one seed, and keep it; nothing where something that it needs is missing."""

        def seen(what: str, done: int, total: int) -> None:
            watch.tell(f"{row.name}, seed {seed}: {what}", done, total)

        if row.name in self.skipped:
            return []
        started = time.monotonic()
        try:
            results, learner = row.run(self.choices.of(row, seen), seed, seen)
        except MissingError as error:
            self.skipped[row.name] = str(error)
            watch.note(f"{row.name} is left out: {error}")
            return []
        for result in results:
            self.store.save(result)
            best = " ".join(f"{budget}: {value:.3f}" for budget, value in result.accuracy.items())
            watch.note(f"{result.row}, seed {seed}: {best} · {time.monotonic() - started:.0f} s")
        if seed == self.config.seeds[0]:
            self._draw(row.name, learner)
        return results

    def _draw(self, name: str, learner: Features | None) -> None:
        """Filters of every layer, and an image's way through them."""
        if not isinstance(learner, StackFeatures):
            return
        folder, stack = self._figures(), learner.learner.stack
        images = self.material.test.images
        for index in range(len(stack.layers)):
            path = folder / f"filters-{name}-layer-{index}.png"
            filters(stack, index, images[:FIGURE_IMAGES], path)
            self.tracker.figure(path)
        path = folder / f"activations-{name}.png"
        charts.activation_maps(stack, images[0], path)
        self.tracker.figure(path)

    def _figures(self) -> Path:
        folder = self.run_dir / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def _show(self, results: list[Result]) -> None:
        """The table on the terminal, as markdown, as figures, in MLflow."""
        summaries = summarise(results)
        for each in (table.accuracy_table, table.kernel_table, table.cost_table, table.robustness_table):
            self.console.print(each(summaries))
        text = self.run_dir / "table.md"
        text.write_text(table.markdown(summaries))
        folder = self._figures()
        charts.label_efficiency(summaries, folder / "label-efficiency.png")
        charts.corruption_bars(summaries, folder / "corruptions.png")
        draw_corruptions(_one_of_each(self.material), folder / "corrupted-images.png")
        for name in ("label-efficiency", "corruptions", "corrupted-images"):
            self.tracker.figure(folder / f"{name}.png")
        self.tracker.artifact(text)
        self.tracker.metrics(0, table.metrics(summaries))
        for line in (f"table, figures, results: {self.run_dir}", *self._chosen()):
            self.console.print(line, highlight=False, soft_wrap=True)

    def _chosen(self) -> Iterator[str]:
        for name, why in self.skipped.items():
            yield f"left out: {name}: {why}"


def _one_of_each(material: Material) -> torch.Tensor:
    """The first test image of every class: [classes, C, H, W]."""
    first = [int((material.test.labels == each).nonzero()[0]) for each in torch.unique(material.test.labels)]
    return material.test.images[first]


def _status(name: str) -> Status:
    return "FINISHED" if name == "FINISHED" else "KILLED" if name == "KILLED" else "FAILED"


class Watch:
    """What a person sees while rows are measured: bars in a terminal, a line per row and seed elsewhere."""

    def __init__(self, progress: Progress, console: Console, total: int) -> None:
        self._progress, self._console = progress, console
        self._all = progress.add_task("rows × seeds", total=total)
        self._now = progress.add_task("", total=None)

    def tell(self, what: str, done: int, total: int) -> None:
        self._progress.update(self._now, description=escape(what), completed=min(done, total), total=total)

    def done(self) -> None:
        self._progress.advance(self._all)

    def note(self, text: str) -> None:
        self._console.print(escape(text), highlight=False)


@contextmanager
def watching(console: Console, total: int) -> Iterator[Watch]:
    """Bars for as long as the rows take."""
    columns = (TextColumn("{task.description:<56}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Watch(progress, console, total)


if __name__ == "__main__":
    sys.exit(main())
