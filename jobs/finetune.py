"""Compare LeNets initialised by similarity matching with randomly initialised ones: `python -m jobs.finetune`.

One command, one table for each network: test accuracy at every label budget from random weights, from random or learnt
weights that stay frozen, and fine-tuned from learnt ones; paired differences with 95 % intervals; a figure. Results are
kept in the run directory as they come; the same command continues from there.

Exit status: 0 finished, 1 failed, 2 bad input (one line, nothing started); 130, 143 or 129 after Ctrl-C, SIGTERM or a
closed terminal (trainings that have begun are finished first).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from cluster.cpus import allowed_cpus
from cluster.redaction import one_line
from cluster.tracking.tracker import Tracker
from jobs.display import ProgressBars, load_shown
from jobs.entry_point import BAD_INPUT, run_main
from jobs.evaluation import finetuning_tables as tables
from jobs.evaluation.config import command_parser, overridden
from jobs.evaluation.finetuning import (
    FREE,
    STARTS,
    FinetuneConfig,
    StartName,
    StartResult,
    Trial,
    check,
    chosen_candidate,
    held_bytes,
)
from jobs.evaluation.material import Material
from jobs.evaluation.memory import memory_line
from jobs.evaluation.resume import (
    RESULTS,
    SETTINGS,
    ChosenSettings,
    ResultStore,
    begin,
    check_same,
    has_results,
    read_identity,
    with_defaults,
)
from jobs.evaluation.tables import markdown
from jobs.evaluation.threads import run_in_threads
from jobs.options import at_least, read_yaml
from jobs.recording import open_tracker, run_recorded
from jobs.reporting import save_figure
from jobs.run_directory import default_root, local_folder
from jobs.signals import SignalHandler
from simmatch.config import ConfigError, parse
from simmatch.data.formats import DataError
from simmatch.files import write_whole
from simmatch.memory import machine_bytes

DEFAULT = Path(__file__).parent / "configs" / "finetune_fashion_mnist.yaml"

K = TypeVar("K", bound=tuple[Any, ...])
T = TypeVar("T")


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run. Returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        values = overridden(read_yaml(Path(options.config)), options.set, quick=options.quick)
        config = parse(FinetuneConfig, values)
        material = Material.of(load_shown(console, config.data), config.held_out)
        check(config, material)
        default = default_root() / f"{config.name}{'-quick' if options.quick else ''}"
        run_dir = local_folder("--run-dir", options.run_dir, default)
        definition = identity(run_dir, config)
        threads = options.threads or allowed_cpus()
        told = memory_line(held_bytes(config, material), material, threads=threads, limit=machine_bytes())
        tracker = open_tracker(run_dir, config.tracking)
        job = Finetuning(config, material, tracker, console, threads)
        params = config.model_dump(mode="json", exclude={"tracking", "quick"})
        begin(tracker, definition, params, config.data.title, material)
        console.print(told, highlight=False, soft_wrap=True)
    except (ConfigError, DataError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    with SignalHandler() as signals:
        return job.run(signals)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m jobs.finetune", (__doc__ or "").splitlines()[0], DEFAULT)
    parser.add_argument(
        "--threads",
        type=at_least(1),
        metavar="N",
        help="number of parallel trainings (default: all available CPUs)",
    )
    return parser


def identity(run_dir: Path, config: FinetuneConfig) -> dict[str, Any]:
    """What the results of the directory depend on, to be written by `jobs.evaluation.resume.begin`.

    Raises
    ------
    ConfigError
        The directory cannot be read, or holds results of another configuration; names what differs.
    """
    values = config.comparable()
    if has_results(run_dir):
        check_same(run_dir, values, with_defaults(config, FREE, read_identity(run_dir)))
    return values


def start_results(run_dir: Path) -> ResultStore[StartResult]:
    """A file for each network, budget, seed and start."""
    return ResultStore(run_dir / RESULTS, StartResult, ("network", "labels", "seed", "start"), "{}-{}-{}-{}".format)


class Finetuning:
    """Trains every network from every start with every budget and seed; shows and records the comparison.

    threads: tasks that run at the same time.
    """

    def __init__(
        self, config: FinetuneConfig, material: Material, tracker: Tracker, console: Console, threads: int
    ) -> None:
        self.config, self.material, self.tracker = config, material, tracker
        self.console, self.threads, self.run_dir = console, threads, tracker.run_dir
        self.results = start_results(self.run_dir)
        self.settings = ChosenSettings(self.run_dir)

    def run(self, signals: SignalHandler) -> int:
        """Train what has no result yet, print, record. Returns the exit status."""

        def work() -> None:
            trials = self._pretrain()
            self._choose(trials)
            self._show(trials, self._compare(trials))

        return run_recorded(work, self.tracker, self.console, signals)

    def _pretrain(self) -> dict[tuple[str, int], Trial]:
        """Similarity matching for every network and seed."""
        most = max(budget.seeds for budget in self.config.budgets)
        tasks = {}
        for network, seed in product(self.config.networks, range(most)):
            path = self.run_dir / "filters" / f"{network}-{seed}.safetensors"
            tasks[network, seed] = partial(Trial.of, self.config, network, seed, self.material, path)
        return dict(self._each("similarity matching", tasks, "similarity matching: {}, seed {}"))

    def _choose(self, trials: dict[tuple[str, int], Trial]) -> None:
        """Settings for every network, budget and start that has none yet."""
        tasks = {}
        held_out: dict[tuple[str, int, StartName], dict[int, list[float]]] = {}
        seeds = {budget.labels: min(self.config.tuning_seeds, budget.seeds) for budget in self.config.budgets}
        for network, labels, start in product(self.config.networks, seeds, STARTS):
            if self.settings.known(f"{network}/{labels}/{start}") is None:
                held_out[network, labels, start] = {}
                for seed in range(seeds[labels]):
                    tasks[network, labels, start, seed] = partial(trials[network, seed].tune, labels, start)
        for (network, labels, start, seed), accuracies in self._each(
            "settings", tasks, "settings: {}, {} labels, {}, seed {}"
        ):
            by_seed = held_out[network, labels, start]
            by_seed[seed] = accuracies
            if len(by_seed) == seeds[labels]:
                self.settings.keep(f"{network}/{labels}/{start}", chosen_candidate(list(by_seed.values())))

    def _compare(self, trials: dict[tuple[str, int], Trial]) -> list[StartResult]:
        """Train, and measure on the test images; results are in the order of the tables."""
        results, tasks = {}, {}
        for network, budget in product(self.config.networks, self.config.budgets):
            for seed, start in product(range(budget.seeds), STARTS):
                key = network, budget.labels, seed, start
                results[key] = self.results.load(*key)
                if results[key] is None:
                    settings = self.settings.known(f"{network}/{budget.labels}/{start}")["chosen"]
                    tasks[key] = partial(trials[network, seed].result, budget.labels, start, settings)
        for key, result in self._each("comparison", tasks, "{0}, {1} labels, {3}, seed {2}"):
            self.results.save(result)
            results[key] = result
        return [result for result in results.values() if result is not None]

    def _each(self, name: str, tasks: Mapping[K, Callable[[], T]], words: str) -> Iterator[tuple[K, T]]:
        """(key, result) of the tasks as they come, several at a time; a line at the end.

        words: describes a task, formatted with the values of its key.
        """
        if not tasks:
            return
        started, keys = time.monotonic(), list(tasks)
        with ProgressBars(self.console) as bars:
            bars.update(name, 0, len(tasks))
            for done, (index, result) in enumerate(run_in_threads(list(tasks.values()), self.threads), 1):
                yield keys[index], result
                bars.update(name, done, len(tasks), text=words.format(*keys[index]))
        seconds = time.monotonic() - started
        self.console.print(f"{name}: {len(tasks)} done · {seconds:.0f} s", highlight=False)

    def _show(self, trials: dict[tuple[str, int], Trial], results: list[StartResult]) -> None:
        """The tables on the terminal, as Markdown, the figure, all in MLflow."""
        known = tables.estimates(results)
        agreement = tables.agreement_estimates(
            {
                network: [trial.pretrained.agreements for (name, _), trial in trials.items() if name == network]
                for network in self.config.networks
            }
        )
        shown = [*tables.accuracy_tables(known, self.config.networks), tables.agreement_table(agreement)]
        for table in shown:
            table.show(self.console)
        text, figure = self.run_dir / "table.md", self.run_dir / "figures" / "differences.png"
        write_whole(text, markdown(shown))
        save_figure(tables.difference_figure(known), figure)
        self.tracker.figure(figure)
        self.tracker.artifact(text)
        self.tracker.artifact(self.run_dir / SETTINGS)
        self.tracker.metrics(0, tables.metrics(known, agreement))
        self.console.print(f"table, figure, results: {self.run_dir}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_main(main)
