"""One result at any layout of ranks, and its price: `python -m jobs.benchmark exact`.

    job      the same job with `reduce: exact` at several layouts, and killed and continued at another: the sha256 of
             the exported weights of each; `same` says whether it is that of one rank
    update   the same update with `reduce: exact` and `fast`, in turns, on one rank and on several: seconds, and bytes
             that reach a rank; `ratio` is the speed of `fast` over that of `exact`: 1.3 says 30 % longer

The job is `--config` with `exchange: gather_state` in every layer and one thread per rank: a result depends on threads.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from jobs.benchmarks.processes import Host, RankGroup
from jobs.benchmarks.updates import Comparison, compare, keep_inputs, sample, trained
from jobs.options import add_set, at_least, override, read_yaml
from jobs.reporting import Report
from jobs.watched_job import WatchedJob
from simmatch.config import DynamicsConfig, parse

DEFAULT = Path(__file__).parents[1] / "configs" / "digits.yaml"

LAYOUTS: dict[str, dict[str, int]] = {
    "1 rank": {},
    "2 ranks": {"channel": 2},
    "3 ranks": {"channel": 3},
    "4 ranks": {"channel": 4},
    "2 replicas": {"data": 2},
    "2 replicas × 2 ranks": {"data": 2, "channel": 2},
    "2 stages": {"layer": 2},
}
"""Name → extents of the mesh's axes; those that are not named are 1."""

QUICK_LAYOUTS = ("1 rank", "2 ranks")
KILLED, CONTINUED = {"channel": 3}, {"channel": 2}
"""Layouts before and after the driver is killed."""

LISTEN_S = 0.2
WIDTHS, QUICK_WIDTHS = (128, 1024), (128,)
TARGET = 1.3
"""Of the ratio of seconds, at K = 128."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark in addition to the common ones."""
    parser.add_argument("--config", default=str(DEFAULT), metavar="FILE", help="of the job (default: %(default)s)")
    add_set(parser)
    names, widths = ", ".join(LAYOUTS), " ".join(map(str, WIDTHS))
    layouts = f"of the job, from: {names} (default: all, and a job that is killed); without a name: no job"
    parser.add_argument("--layouts", nargs="*", choices=sorted(LAYOUTS), metavar="NAME", help=layouts)
    parser.add_argument("--data", default="fashion_mnist", metavar="NAME", help="of the updates (default: %(default)s)")
    channels = f"of the updates (default: {widths}); without a number: no updates"
    parser.add_argument("--channels", type=at_least(1), nargs="*", metavar="K", help=channels)
    parser.add_argument("--images", type=at_least(1), default=20, metavar="B", help="of an update (default: 20)")
    parser.add_argument("--ranks", type=at_least(2), default=2, metavar="G", help="of the updates (default: 2)")


def run(options: argparse.Namespace, report: Report) -> None:
    """Run the job at every layout, then time updates."""
    layouts = options.layouts if options.layouts is not None else (QUICK_LAYOUTS if options.quick else LAYOUTS)
    widths = options.channels if options.channels is not None else (QUICK_WIDTHS if options.quick else WIDTHS)
    if layouts:
        _jobs(layouts, options, report)
    if widths:
        _prices(widths, options, report)


# -- one digest --------------------------------------------------------------------------------------------------------


def _jobs(names: Iterable[str], options: argparse.Namespace, report: Report) -> None:
    """A row for every layout and, if there is more than one, for the job that is killed."""
    config, command = _job(options)
    stages = len(config.model.layers) if config.model.schedule == "together" else 1
    layouts = {name: LAYOUTS[name] for name in names if LAYOUTS[name].get("layer", 1) <= stages}
    rows: list[dict[str, Any]] = []
    names = [*layouts, *([f"{_text(KILLED)}, killed, then {_text(CONTINUED)}"] if len(layouts) > 1 else [])]
    with report.progress(len(names)) as step:
        for number, name in enumerate(names):
            step(name)
            folder, begun = report.run_dir / f"{report.started.replace(':', '')}-{number}", time.monotonic()
            if name in layouts:
                ended = _to_its_end([*command, *_mesh(layouts[name])], folder, report)
            else:
                killed_at = _killed([*command, *_mesh(KILLED)], folder)
                ended = killed_at is not None and _to_its_end([*command, *_mesh(CONTINUED)], folder, report)
            digest = digest_of(folder) if ended else None
            row = {"layout": name, "seconds": time.monotonic() - begun, "finished": ended, "sha256": digest}
            rows.append(row | {"same": ended and digest == (rows[0] if rows else row)["sha256"]})
            report.row(kind="job", **rows[-1])
    headings = {"layout": "layout", "seconds": "s", "sha256": "sha256 of the exported weights", "same": "same"}
    report.rows_table("reduce: exact", headings, rows)


def digest_of(run_dir: Path) -> str:
    """The sha256 of the exported weights of a run."""
    return hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()


def _job(options: argparse.Namespace) -> tuple[RunConfig, list[str]]:
    """The configuration, and the arguments of `jobs.pretrain` without layout and run directory."""
    path, assignments = Path(options.config).absolute(), ["reduce=exact", "cluster.threads_per_rank=1"]
    layers = len(parse(RunConfig, override(read_yaml(path), list(options.set))).model.layers)
    assignments += [f"model.layers.{index}.dynamics.exchange=gather_state" for index in range(layers)]
    assignments += options.set
    config = parse(RunConfig, override(read_yaml(path), assignments))
    return config, ["--config", str(path), *(word for each in assignments for word in ("--set", each))]


def _mesh(extents: Mapping[str, int]) -> list[str]:
    axes = {"channel": 1, "data": 1, "layer": 1} | dict(extents)
    return [word for axis, extent in axes.items() for word in ("--set", f"mesh.{axis}={extent}")]


def _text(extents: Mapping[str, int]) -> str:
    return next(name for name, layout in LAYOUTS.items() if layout == extents)


def _to_its_end(command: list[str], folder: Path, report: Report) -> bool:
    """Run a job, or continue it. Returns whether it has finished."""
    job = WatchedJob([*command, "--run-dir", str(folder), "--resume", "auto"])
    try:
        while not job.listen(LISTEN_S):
            pass
    finally:
        job.end()
    if job.process.returncode != 0:
        report.note("\n".join(job.lines))
    return job.process.returncode == 0


def _killed(command: list[str], folder: Path) -> int | None:
    """Kill a job's driver once there is a checkpoint. Returns the updates done by then; None: it ended before."""
    job = WatchedJob([*command, "--run-dir", str(folder)])
    try:
        while not job.listen(LISTEN_S):
            if any((folder / "checkpoints").glob("step-*/manifest.json")):
                job.strike("driver-kill", random.Random())
                job.orphans()  # ranks that have lost their driver end by themselves
                return job.step
    finally:
        job.end()
    return None


# -- its price ---------------------------------------------------------------------------------------------------------


def _prices(widths: Sequence[int], options: argparse.Namespace, report: Report) -> None:
    """Rows of updates: `fast` and `exact` on one rank and on several, one thread each."""
    images = sample(options.data, options.images, options.seed)
    dynamics = DynamicsConfig(exchange="gather_state")
    one, many = RankGroup([Host()], threads=1), RankGroup([Host()] * options.ranks, threads=1)
    rows = []
    with one, many, report.progress(len(widths)) as step:
        for channels in widths:
            step(f"K = {channels}")
            weights = trained(one, options.data, channels, options.seed)
            for group, ranks in ((one, 1), (many, options.ranks)):
                group.ask(keep_inputs, weights, images)
                ways = dict.fromkeys(("fast", "exact"), (group, dynamics))
                compared = compare(
                    ways, batch=options.images, seed=options.seed, rounds=options.rounds, min_s=0.3, exact=("exact",)
                )
                for reduce in ways:
                    rows.append(_row(compared, reduce, channels, ranks, options))
                    report.row(kind="update", **rows[-1])
    headings = {
        "channels": "K", "ranks": "ranks", "reduce": "reduce", "seconds": "s/update", "longer": "longer",
        "bytes": "bytes", "distance": "ΔW from fast",
    }  # fmt: skip
    report.rows_table(f"one update of {options.images} images", headings, rows)


def _row(compared: Comparison, reduce: str, channels: int, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    values = compared.fields(reduce, "fast")
    price = {"longer": 1 / values["ratio"], "target": TARGET if channels == WIDTHS[0] and reduce == "exact" else None}
    where = {"channels": channels, "images": options.images, "ranks": ranks, "reduce": reduce}
    return where | values | price
