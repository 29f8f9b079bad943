"""Prepare own images once, for any number of runs: `python -m jobs.prepare --config FILE [--out DIR]`.

Ray tasks decode the images of `data.path`, resize and hash them, and write shards of raw pixels with a manifest. Runs
with `data.path: DIR` read these shards, and need the original files no more. Interrupted and started again, it goes on.

Exit status: 0 prepared, now or before; 1 failed; 2 bad configuration or images (one line); 130, 143, 129 interrupted by
SIGINT, SIGTERM, SIGHUP: what is done is kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config import RunConfig
from cluster.controller import RunFailed
from cluster.cpus import allowed_cpus
from cluster.redaction import one_line
from cluster.text import count, size
from jobs.display import LINE_EVERY_S, PLAIN, ProgressBars
from jobs.entry_point import BAD_INPUT, FAILED, run_main
from jobs.options import add_counts, add_set, override, read_yaml
from jobs.ray_session import shut_down_ray, start_ray
from simmatch.config import ConfigError, parse
from simmatch.data.formats import DataError, errors_name
from simmatch.data.listing import list_samples
from simmatch.data.location import Location
from simmatch.data.preparation import LOCK, finished, place_in_cache, prepare
from simmatch.data.preparing import Part, PartRecord, Plan
from simmatch.data.shards import Manifest
from simmatch.files import locked, make_folder

START_S = 60.0
"""Longest wait for the cluster at the start."""

POLL_S = 0.5
"""Longest time between two looks at the tasks, in which a signal is not noticed."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, prepare. Returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        config = parse(RunConfig, override(read_yaml(Path(options.config)), options.set)).data
        if config.path is None:
            raise ConfigError("data.path: expected own images; a built-in data set needs no preparation")
        to = None if options.out is None else Location(options.out)
        with errors_name("--out"):
            manifest = None if to is None else finished(config, to)
        if manifest is None:
            listing = list_samples(config)
            _say(console, listing.note)
            plan = Plan(config, listing)
            to = to or place_in_cache(plan)
            manifest = finished(config, to) or _prepared(plan, to, options.workers, console)
    except (ConfigError, DataError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except RunFailed as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return FAILED
    _say(console, f"prepared: {_summary(manifest)}")
    _say(console, f"to use it: --set data.path={to}")
    return 0


def _prepared(plan: Plan, to: Location, workers: int | None, console: Console) -> Manifest:
    """Prepare, with progress; one process at a time where the place is a folder."""
    started = time.monotonic()
    try:
        if to.path is not None:
            make_folder(to.path)
    except OSError as error:
        raise ConfigError(f"--out: expected a folder that can be written, got {to}: {error.strerror}") from None
    try:
        with nullcontext() if to.path is None else locked(to.path / LOCK, 0.0):
            address = start_ray(workers or allowed_cpus(), START_S)
            with ProgressBars(console, keep=True, line_every_s=LINE_EVERY_S) as bars:
                bars.note(f"ray: {address}; {count(len(plan), 'shard')} to {to}")

                def progress(done: int, total: int) -> None:
                    rate = done / max(time.monotonic() - started, 1e-9)
                    bars.update("prepare", done, total, details=f"{rate:.0f} images/s")

                return prepare(plan, to, OnRay(workers), progress)
    except TimeoutError:
        raise ConfigError(f"--out: expected a folder that nobody else prepares, got {to}") from None
    except OSError as error:  # such as a full disk
        raise RunFailed(f"{to}: {error.strerror or error}") from error
    finally:
        shut_down_ray()


class OnRay:
    """Makes parts as Ray tasks, of one processor each.

    workers: tasks at a time; None: as many as the cluster has processors.
    """

    def __init__(self, workers: int | None) -> None:
        self._workers = workers

    def __call__(self, parts: Iterator[Part], to: Location) -> Iterator[tuple[int, PartRecord]]:
        """(number, record) of each part as it is done.

        Raises
        ------
        DataError, OSError
            As of `Part.make`.
        RunFailed
            A task that Ray gave up, or a node that wrote to a folder of its own.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        workers = self._workers or max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
        task = ray.remote(num_cpus=1)(_make)
        running: dict[Any, int] = {}
        numbered = enumerate(parts)
        try:
            while True:
                while len(running) < workers and (following := next(numbered, None)) is not None:
                    running[task.remote(following[1], to)] = following[0]
                if not running:
                    return
                for ref in ray.wait(list(running), timeout=POLL_S)[0]:
                    file, record = ray.get(ref)
                    if to.path is not None and record.count and not (to.path / file).exists():
                        raise RunFailed(f"--out: expected a folder that all nodes share, or a URI, got {to}")
                    yield running.pop(ref), record
        except RayTaskError as error:
            if isinstance(error.cause, (DataError, OSError)):
                raise error.cause from error
            raise  # an error of ours, with its traceback
        except RayError as error:
            raise RunFailed(f"Ray: expected tasks to finish, got {error}") from error


def _make(part: Part, to: Location) -> tuple[str, PartRecord]:
    """A part, in a worker process of Ray."""
    return part.file, part.make(to)


def _summary(manifest: Manifest) -> str:
    shards = len(manifest.train.shards) + len(manifest.test.shards)
    images = manifest.train.count + manifest.test.count
    skipped = f", {count(len(manifest.skipped), 'damaged image')} left out" if manifest.skipped else ""
    return (
        f"{manifest.name}: {manifest.train.count:,} training and {manifest.test.count:,} test images "
        f"{manifest.shape}, {size(images * manifest.image_bytes)} in {count(shards, 'shard')}{skipped}"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, **PLAIN)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.prepare",
        description="Decode own images once, on Ray, into shards that any number of runs read.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see jobs/configs; `data` is used")
    add_set(parser, "data.path")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where the shards go: a folder or s3://bucket/prefix (default: the cache of this node, where a run with "
        "the same configuration finds them)",
    )
    add_counts(parser, "workers", "N", "tasks at a time (default: the processors of the cluster)")
    return parser


if __name__ == "__main__":
    run_main(main)
