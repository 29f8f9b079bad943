"""The preparation of a whole data set, by whatever workers make its parts; see `preparing` for the parts.

`jobs.prepare` has them made by Ray tasks, and `load_dataset` by threads, into the cache of the node, where own images
would take much memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from hashlib import sha256

import numpy as np

from simmatch.config import ConfigError
from simmatch.data.config import DataConfig
from simmatch.data.decoding import LEAVE_OUT, ImagePolicy
from simmatch.data.formats import DataError
from simmatch.data.listing import Listing
from simmatch.data.location import Location
from simmatch.data.prepared import cache_of
from simmatch.data.preparing import Part, PartRecord, Plan, digest_samples, policy_of
from simmatch.data.shards import Manifest, read_manifest
from simmatch.documents import quoted, shortened
from simmatch.files import locked, make_folder

IN_MEMORY_BYTES = 2**30
"""Own images that take more are prepared when they are loaded; less are held in memory."""

OTHERS_S = 4 * 3600.0
"""Longest wait for another process that prepares the same images in the cache."""

LOCK = "prepare.lock"

Run = Callable[[Iterator[Part], Location], Iterator[tuple[int, PartRecord]]]
"""Makes parts, which it takes in order; yields (number of the part, its record) as they are done."""

Progress = Callable[[int, int], None]


def finished(config: DataConfig, to: Location) -> Manifest | None:
    """The manifest of a finished preparation with this configuration; None if there is none yet.

    Raises
    ------
    ConfigError
        The place holds images that were prepared otherwise.
    DataError
        The manifest is damaged, or images were left out that `data.damaged` does not allow to leave out.

    >>> finished(DataConfig(path="/data/photos"), Location("/nowhere"))
    """
    try:
        manifest = read_manifest(to)
    except FileNotFoundError:
        return None
    expected = policy_of(config)
    for key, value in expected.items():
        if manifest.policy.get(key) != value:
            raise ConfigError(
                f"data.{key}: expected {quoted(manifest.policy.get(key))}, by which {to} was prepared, got "
                f"{quoted(value)}; choose another place, or remove that one"
            )
    _check_damaged([each.reason for each in manifest.skipped], config)
    return manifest


def prepare(plan: Plan, to: Location, run: Run, progress: Progress) -> Manifest:
    """Make the parts that are missing, and commit.

    Parameters
    ----------
    run: makes parts.
    progress: called with the number of images done and of all.

    Raises
    ------
    DataError
        An image is damaged, or more than `data.max_skipped`; images differ in shape; a file cannot be read.
    OSError
        The place cannot be written.

    >>> import os, tempfile
    >>> from pathlib import Path
    >>> from simmatch.data.listing import list_samples
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for index in range(10):
    ...         os.makedirs(f"{folder}/photos/{index % 2}", exist_ok=True)
    ...         _ = Path(f"{folder}/photos/{index % 2}/{index}.pgm").write_bytes(b"P5 1 1 255 " + bytes([index]))
    ...     config = DataConfig(path=f"{folder}/photos", test_fraction=0.2)
    ...     plan = Plan(config, list_samples(config))
    ...     prepare(plan, Location(f"{folder}/prepared"), in_threads, lambda done, total: None).train.count
    8
    """
    records: dict[int, PartRecord] = {}
    damaged: list[str] = []  # in the first parts without a gap: the same message, in whatever order parts are done
    checked = 0
    done, total = 0, len(plan.listing.train) + len(plan.listing.test)
    progress(done, total)
    for number, record in run(plan.parts(), to):
        records[number] = record
        done += record.count + len(record.skipped)
        progress(done, total)
        while checked in records:
            damaged += [each.reason for each in records[checked].skipped]
            checked += 1
        _check_damaged(damaged, plan.config)
    assert sorted(records) == list(range(len(plan))), "every part is made"
    return plan.commit([records[number] for number in range(len(plan))], to)


def _check_damaged(damaged: list[str], config: DataConfig) -> None:
    if damaged and config.damaged == "stop":
        raise DataError(f"{damaged[0]}; {LEAVE_OUT}")
    if len(damaged) > config.max_skipped:
        raise DataError(
            f"{config.title}: expected at most data.max_skipped={config.max_skipped} damaged images, got more; the "
            f"first: {damaged[0]}"
        )


def in_threads(parts: Iterable[Part], to: Location) -> Iterator[tuple[int, PartRecord]]:
    """Make parts in as many threads as this process has processors; decoding leaves Python's lock to the others.

    >>> list(in_threads([], Location("/nowhere")))
    []
    """
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        running: dict[Future[PartRecord], int] = {}
        try:
            for number, part in enumerate(parts):
                running[pool.submit(part.make, to)] = number
                while len(running) > workers:
                    yield from _done(running)
            while running:
                yield from _done(running)
        finally:
            for future in running:
                future.cancel()


def _done(running: dict[Future[PartRecord], int]) -> Iterator[tuple[int, PartRecord]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def plan_if_large(config: DataConfig, listing: Listing) -> Plan | None:
    """The plan of own images that would take more than `IN_MEMORY_BYTES`; None: hold them in memory.

    >>> from types import SimpleNamespace
    >>> listing = SimpleNamespace(train=range(10**6), test=range(10**3))
    >>> plan_if_large(DataConfig(path="/data/photos", size=64, train_images=50_000), listing)
    """
    asked = ((config.train_images, len(listing.train)), (config.test_images, len(listing.test)))
    count = sum(min(most or there, there) for most, there in asked)
    size = ImagePolicy.of(config).size
    if size is not None and count * (config.channels or 3) * size[0] * size[1] <= IN_MEMORY_BYTES:
        return None
    try:
        plan = Plan(config, listing)
    except DataError:  # the loader names what it needs and cannot decode
        return None
    return plan if count * int(np.prod(plan.shape.known)) > IN_MEMORY_BYTES else None


def place_in_cache(plan: Plan) -> Location:
    """Where images are prepared in the cache of the node: it depends on the policy and on `digest_samples`.

    >>> place_in_cache.__name__
    'place_in_cache'
    """
    digest = sha256(json.dumps(policy_of(plan.config)).encode())
    for samples in (plan.listing.train, plan.listing.test):
        digest_samples(digest, samples)
    folder = cache_of(plan.config) / "prepared"
    return Location(folder / f"{_plain(plan.config.title)}-{digest.hexdigest()[:16]}")


def _plain(title: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in title)[:40]


def prepared_in_cache(plan: Plan, note: Callable[[str], None], progress: Progress) -> Location:
    """Prepare own images in the cache of the node, unless that is done; of several processes one does.

    Raises
    ------
    DataError
        As of `prepare`; the cache cannot be written; another process has prepared them for `OTHERS_S`.

    >>> prepared_in_cache.__name__
    'prepared_in_cache'
    """
    config, to = plan.config, place_in_cache(plan)
    assert to.path is not None, "the cache is a folder"
    if finished(config, to) is not None:
        return to
    try:
        make_folder(to.path)
        with locked(to.path / LOCK, OTHERS_S):
            if finished(config, to) is None:
                total = len(plan.listing.train) + len(plan.listing.test)
                note(f"{shortened(str(config.path))}: {total:,} images are prepared once, in {to}; see `jobs.prepare`")
                prepare(plan, to, in_threads, progress)
    except OSError as error:
        raise DataError(f"data.cache_dir: {to}: {error.strerror or error}") from None
    return to
