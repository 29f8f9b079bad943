"""The cost of checkpoints and tracking: `python -m jobs.benchmark overhead`.

The same short run in turns with tracking off, and with a tracking server that accepts connections and never answers;
checkpoints every so many updates. Three figures, each a median over rounds:

    checkpoint share   of the training thread's time that goes into checkpoint calls (copy of the rows, waiting for the
                       shard before)
    tracking share     of the job's time that its controller spends in tracking calls; the training thread makes none
    speed              images per second while the server hangs, over those with tracking off, in the same round
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.tracking.events import MetricsEvent
from cluster.tracking.spool import SPOOL_NAME, Spool
from jobs.benchmarks.timing import Spread
from jobs.options import add_counts, add_set
from jobs.reporting import Report
from simmatch.config import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
EVERY_STEPS = 50
SHORT = ("data.train_images=6000", "data.test_images=500", "model.layers.1.whiten_images=6000", "probe.readout=ridge")
"""Overrides that make the main job one of half a minute; its updates stay what they are."""

OFF, HANGING = "tracking off", "server hangs"
TARGETS = {"checkpoint_share": 0.03, "tracking_share": 0.001}
LIMIT_S = 1200.0


@dataclass(frozen=True)
class Shares:
    """One run: shares of time, and images per second while layers learn."""

    checkpoint_share: float
    tracking_share: float
    images_per_second: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark in addition to the common ones."""
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: fashion_mnist.yaml cut to 6,000 images)")
    add_set(parser)
    add_counts(parser, "every", "N", f"updates between checkpoints (default: {EVERY_STEPS})", default=EVERY_STEPS)


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print, compare with the targets."""
    short = () if options.config else SHORT
    config = options.config or str(CONFIGS / ("digits.yaml" if options.quick else "fashion_mnist.yaml"))
    assignments = [*(() if options.quick else short), f"checkpoint.every_steps={options.every}", *options.set]
    by_way: dict[str, list[Shares]] = {OFF: [], HANGING: []}
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent, report.progress(2 * options.rounds) as step:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ways = {OFF: ["tracking.enabled=false"], HANGING: [f"tracking.uri={uri}", "tracking.flush_s=0"]}
        for number in range(options.rounds):
            for way, more in ways.items():
                step(f"round {number + 1}, {way}")
                by_way[way].append(measure(config, [*assignments, *more]))
                report.row(kind="run", way=way, round=number + 1, **vars(by_way[way][-1]))
    _report_shares(report, by_way)


def measure(config: str, assignments: list[str]) -> Shares:
    """One run, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="simmatch-") as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "jobs.pretrain", "--config", config, "--run-dir", str(run_dir)]
        command += [word for assignment in assignments for word in ("--set", assignment)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if done.returncode != 0:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise ConfigError(f"the run ended with status {done.returncode}: {' '.join(last)}")
        return shares(run_dir)


def shares(run_dir: Path) -> Shares:
    """From the records of a finished run: windows of updates, weighted by their seconds."""
    summary = json.loads((run_dir / "summary.json").read_text())
    seconds = saving = images = 0.0
    for event, _ in Spool(run_dir / SPOOL_NAME).read():
        if isinstance(event, MetricsEvent) and event.layer is not None:
            values = event.values
            took = values["window_s"]
            seconds, saving = seconds + took, saving + took * values["checkpoint_share"]
            images += took * values["images_per_second"]
    return Shares(saving / seconds, summary["tracking_share"], images / seconds)


def _report_shares(report: Report, by_way: dict[str, list[Shares]]) -> None:
    rows: list[list[Any]] = []
    for name, target in TARGETS.items():
        for way, each in by_way.items():
            spread = Spread.of([getattr(one, name) for one in each])
            report.row(kind="share", figure=name, way=way, target=target, **spread.fields(name))
            rows.append([name.replace("_", " "), way, *(f"{100 * v:.3f} %" for v in vars(spread).values()), target])
    ratios = [b.images_per_second / a.images_per_second for a, b in zip(by_way[OFF], by_way[HANGING], strict=True)]
    spread = Spread.of(ratios)
    report.row(kind="speed", **spread.fields("speed_ratio"))
    rows.append(["images per second", f"{HANGING} / {OFF}", *(f"{value:.3f}" for value in vars(spread).values()), 1.0])
    report.table("cost of checkpoints and tracking", ("figure", "", "median", "least", "greatest", "target"), rows)
