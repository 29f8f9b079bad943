"""What an epoch's input costs: `python -m jobs.benchmark ingest`.

Generated JPEG images are prepared by `jobs.prepare` and read in turns by this project, by `numpy.memmap` with torch's
DataLoader over the same shards, by torchvision's ImageFolder with the DataLoader over the JPEG files, and, if it is
installed, by webdataset over tar files of them. Then a short run of two ranks trains on the prepared images while the
memory of the driver and of its ranks is looked at. Files are read from the page cache where the memory suffices.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from jobs.benchmarks.ingest_readers import pss_bytes
from jobs.benchmarks.timing import Spread
from jobs.options import add_counts
from jobs.reporting import MissingError, Report
from simmatch.extras import extra
from simmatch.files import write_whole

LIMIT_S = 1800.0
"""Longest wait for a process."""

DISTINCT = 256
"""Images that are drawn; the files of a folder hold each of them several times."""

TAR_IMAGES = 5000
"""Images of a tar file."""

MEMORY_LIMIT = 4 * 2**30
"""What driver and ranks of a job may take together."""

LOOK_S = 0.25
"""Between two looks at the memory of the run."""

RUN = """\
name: ingest
data: {path: PATH}
mesh: {channel: 2}
model: {layers: [{out_channels: 4, kernel_size: 8, stride: 8, pool: 1, train: {images: 200}}]}
probe: {readout: ridge, train_images: 200}
tracking: {enabled: false}
"""


@dataclass(frozen=True)
class Way:
    """A way to read: its name in tables, its reader, its kind of files, and processes that read beside the first."""

    name: str
    reader: str
    files: str
    processes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark in addition to the common ones."""
    add_counts(parser, "counts", "N", "numbers of images (default: 20000 100000 400000; quick: 300)", several=True)
    add_counts(parser, "side", "PIXELS", "height and width (default: 96; quick: 24)")
    add_counts(parser, "channels", "N", "1 or 3; 400,000 images of 96 × 96 take 3.7 or 11 GB (default: 1)", default=1)
    add_counts(parser, "epoch", "N", "most images of a timed epoch (default: 20000)", default=20_000)
    add_counts(parser, "processes", "N", "of a DataLoader, beside none (default: 2)", default=2)
    parser.add_argument("--folder", metavar="DIR", help="where images go, and are deleted (default: a temporary one)")
    parser.add_argument("--no-run", action="store_true", help="without the run of two ranks")


def run(options: argparse.Namespace, report: Report) -> None:
    """Generate, prepare, read, train, print."""
    counts = options.counts or ([300] if options.quick else [20_000, 100_000, 400_000])
    side = options.side or (24 if options.quick else 96)
    needed = int(2.5 * max(counts) * side * side * options.channels)
    where = Path(options.folder) if options.folder else Path(tempfile.gettempdir())
    if shutil.disk_usage(where).free < needed:
        raise MissingError(f"--folder: expected {needed / 1e9:.1f} GB free in {where}, got less")
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="simmatch-ingest-", dir=options.folder) as folder:
            _at(count, side, Path(folder), options, report)


def _at(count: int, side: int, folder: Path, options: argparse.Namespace, report: Report) -> None:
    """All measurements at one number of images."""
    write_images(folder / "jpeg", folder / "tar", count, side, options.channels, seed=options.seed)
    config = folder / "run.yaml"
    write_whole(config, RUN.replace("PATH", str(folder / "jpeg")))
    started = time.perf_counter()
    more = ["--set", "data.test_fraction=0.05", "--out", str(folder / "prepared")]
    _process(["jobs.prepare", "--config", str(config), *more])
    prepare_s = time.perf_counter() - started
    ways = [Way("this project", "prepared", "prepared", 0), Way("memmap + DataLoader", "memmap", "prepared", 0)]
    ways += [Way(f"{w.name}, {options.processes} processes", w.reader, w.files, options.processes) for w in ways[1:]]
    ways.append(Way(f"ImageFolder, {options.processes} processes", "imagefolder", "jpeg", options.processes))
    if importlib.util.find_spec("webdataset") is not None:
        ways.append(Way(f"webdataset, {options.processes} processes", "webdataset", "tar", options.processes))
    else:
        report.note("webdataset is not installed, and left out")
    results: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    rounds = 2 if options.quick else options.rounds
    with report.progress(rounds * len(ways)) as step:
        for number in range(rounds):
            for way in ways:
                step(f"{count} images, round {number + 1}, {way.name}")
                results[way.name].append(_read(way, folder / way.files, min(options.epoch, count)))
    memory = {} if options.no_run else _run_memory(config, folder)
    _report(report, count, results, prepare_s, memory)


def _read(way: Way, folder: Path, images: int) -> dict[str, float]:
    command = ["jobs.benchmarks.ingest_readers", way.reader, str(folder), str(images), str(way.processes)]
    result: dict[str, float] = json.loads(_process(command))
    return result


def _process(command: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    _check_ended(command[0], done.returncode, done.stderr)
    return done.stdout


def _check_ended(name: str, status: int, error: str) -> None:
    if status != 0:
        raise MissingError(f"{name} ended with status {status}: {' '.join(error.strip().splitlines()[-1:])}")


def _run_memory(config: Path, folder: Path) -> dict[str, int]:
    """The largest proportional set sizes of the driver and of its ranks in a run on the prepared images."""
    command = [sys.executable, "-m", "jobs.pretrain", "--config", str(config), "--run-dir", str(folder / "run")]
    command += ["--set", f"data.path={folder / 'prepared'}"]
    most: dict[str, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < deadline:
            total = 0
            for name, pid in _members(process.pid):
                try:
                    taken = pss_bytes(pid)
                except (OSError, ValueError):
                    continue
                total += taken
                most[name] = max(most.get(name, 0), taken)
            most["together"] = max(most.get("together", 0), total)
            time.sleep(LOOK_S)
        process.terminate()
        _, error = process.communicate()
    _check_ended("jobs.pretrain", process.returncode, error)
    return most


def _members(driver: int) -> Iterator[tuple[str, int]]:
    """Driver and ranks; Ray's own processes are left out."""
    yield "driver", driver
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    ranks = []
    for child in children:
        try:
            if child.cmdline() and child.cmdline()[0].startswith("ray::Worker"):
                ranks.append(child.pid)
        except psutil.Error:
            continue
    for number, pid in enumerate(sorted(ranks)):
        yield f"rank {number}", pid


def write_images(jpeg: Path, tar: Path, count: int, side: int, channels: int, *, seed: int) -> None:
    """JPEG files of smooth random images in ten folders, and the same files in tar files."""
    with extra("images"):
        from PIL import Image

    generator = np.random.default_rng(seed)
    contents = []
    for _ in range(min(DISTINCT, count)):
        coarse = generator.integers(0, 256, (12, 12, channels), dtype=np.uint8)
        image = Image.fromarray(coarse[..., 0] if channels == 1 else coarse).resize((side, side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        contents.append(buffer.getvalue())
    for label in range(10):
        (jpeg / f"class{label}").mkdir(parents=True)
    tar.mkdir()
    for first in range(0, count, TAR_IMAGES):
        with tarfile.open(tar / f"{first:07d}.tar", "w") as archive:
            for index in range(first, min(first + TAR_IMAGES, count)):
                content, label = contents[index % len(contents)], index % 10
                (jpeg / f"class{label}" / f"{index:07d}.jpg").write_bytes(content)
                for suffix, data in (("jpg", content), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{index:07d}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))


def _report(
    report: Report,
    count: int,
    results: dict[str, list[dict[str, float]]],
    prepare_s: float,
    memory: dict[str, int],
) -> None:
    """Rows and a table for one number of images."""
    rates = {name: [one["images_per_second"] for one in each] for name, each in results.items()}
    own = rates["this project"]
    rows: list[list[Any]] = []
    for name, each in rates.items():
        speedup = Spread.of([a / b for a, b in zip(own, each, strict=True)])
        spread, taken = Spread.of(each), median(one["pss_bytes"] for one in results[name])
        report.row(
            kind="reader", images=count, way=name, pss_bytes=taken,
            **spread.fields("images_per_second"), **speedup.fields("own_speedup"),
        )  # fmt: skip
        rows.append([name, *(f"{v:.0f}" for v in vars(spread).values()), f"{speedup.median:.2f}", f"{taken / 1e6:.0f}"])
    report.table(
        f"{count:,} images: reading an epoch",
        ("", "images/s", "least", "greatest", "this project, times as fast", "memory, MB"),
        rows,
    )
    decoded = next(median(each) for name, each in rates.items() if name.startswith("ImageFolder"))
    saved_s = count / decoded - count / median(own)
    paid = prepare_s / saved_s if saved_s > 0 else None
    report.row(kind="prepare", images=count, seconds=prepare_s, epochs_until_paid=paid)
    report.note(f"prepared in {prepare_s:.1f} s; paid after {paid if paid is None else round(paid, 1)} epochs")
    if memory:
        within = memory["together"] <= MEMORY_LIMIT
        report.row(kind="memory", images=count, limit_bytes=MEMORY_LIMIT, within=within, pss_bytes=memory)
        report.note("memory of a run, MB: " + ", ".join(f"{name} {taken / 1e6:.0f}" for name, taken in memory.items()))
