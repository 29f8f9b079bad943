"""The shards of a prepared data set, part by part: images are decoded once, and written as `prepared` reads them.

    plan      the images in the order of the shards: parts of as many images as fit into one
    parts     each is read, decoded, hashed and written by itself, by any number of workers, in any order
    commit    the labels and the manifest, when all parts are there

The shards depend on the images and the configuration alone. A part leaves a record, `parts/train-00007.json`, with the
names of its images; a preparation that was interrupted goes on with the parts that are missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
from pydantic import Field

from simmatch.config import ConfigError, Frozen, parse
from simmatch.data.config import OF_OWN_IMAGES, DataConfig
from simmatch.data.decoding import LEAVE_OUT, ImagePolicy
from simmatch.data.formats import DataError
from simmatch.data.listing import Listing
from simmatch.data.loading import Shape, decoded
from simmatch.data.location import Location
from simmatch.data.places import absolute, ask
from simmatch.data.samples import Integers, Samples
from simmatch.data.shards import (
    MANIFEST,
    Manifest,
    Shard,
    Skipped,
    Split,
    SplitFiles,
    images_per_shard,
    labels_content,
    labels_file,
    shard_file,
)
from simmatch.documents import DocumentError, dump_json, load_json
from simmatch.remote import is_remote

RUN = 128
"""Neighbours in a file of several images that stay neighbours until the images of a shard are mixed, so that the files
need not be read in random order; image files are mixed one by one."""

MOST_RECORD_BYTES = 2**28
"""Largest record of a part that is accepted."""

POLICY = ("path", *OF_OWN_IMAGES)
"""Keys of `DataConfig` on which the shards depend."""


class PartRecord(Frozen):
    """What became of a part.

    >>> PartRecord(identity="0", sha256=64 * "0", labels=[1], keys=["a.jpg"]).count
    1
    """

    identity: str
    """Of the part, see `Part.identity`."""
    sha256: str
    """Of its shard."""
    labels: list[int]
    """Of its images, in the order of the shard."""
    keys: list[str]
    """Names of the images."""
    skipped: list[Skipped] = Field(default_factory=list)
    """Damaged images that were left out."""

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one shard; can be pickled.

    >>> from simmatch.data.folders import Folder
    >>> from simmatch.data.samples import Names
    >>> samples = Samples(Folder("/data"), Names.of([b"a.png"]), np.zeros((1, 0), int), np.zeros(1, int))
    >>> Part("train", 7, samples, np.zeros(1, int), ImagePolicy(), Shape()).file
    'train-00007.bin'
    """

    split: Split
    number: int
    samples: Samples
    """In the order in which they are read fastest."""
    order: Integers
    """Index in `samples` of each image of the shard: [n]."""
    policy: ImagePolicy
    shape: Shape
    """Of every image."""

    @property
    def file(self) -> str:
        """Name of the shard."""
        return shard_file(self.split, self.number)

    @property
    def record(self) -> str:
        """Name of the record."""
        return f"parts/{self.split}-{self.number:05d}.json"

    def identity(self) -> str:
        """A hash of everything that determines the shard; files count as in `digest_samples`."""
        digest = sha256(repr((self.samples.origin, self.policy, self.shape.known)).encode())
        digest.update(np.ascontiguousarray(self.order, dtype="<i8").data)
        digest_samples(digest, self.samples)
        return digest.hexdigest()[:32]

    def make(self, to: Location) -> PartRecord:
        """Read, decode and write the images, unless that is done.

        Raises
        ------
        DataError
            A file cannot be read, or an image has another shape. A damaged image is left out, whatever `data.damaged`.
        OSError
            The shard cannot be written.
        """
        identity = self.identity()
        if (done := self._done(to, identity)) is not None:
            return done
        samples, row = self.samples, np.argsort(self.order)
        images = np.empty((len(samples), *self.shape.known), dtype=np.uint8)
        damaged: dict[int, str] = {}
        for index, (name, pixels) in enumerate(decoded(samples, self.policy)):
            if isinstance(pixels, DataError):
                damaged[int(row[index])] = str(pixels)
            else:
                self.shape.check(name, pixels)
                images[row[index]] = pixels
        sound = np.setdiff1d(np.arange(len(samples)), list(damaged))
        content = (images[sound] if damaged else images).tobytes()
        ordered = samples.take(self.order)
        kept = ordered.take(sound)
        if len(kept):
            to.write(self.file, content)
        record = PartRecord(
            identity=identity,
            sha256=sha256(content).hexdigest(),
            labels=kept.labels.tolist(),
            keys=[_text(key) for key in kept.keys],
            skipped=[Skipped(key=_text(ordered.keys[each]), reason=damaged[each]) for each in sorted(damaged)],
        )
        to.write(self.record, dump_json(record.model_dump(mode="json")))
        return record

    def _done(self, to: Location, identity: str) -> PartRecord | None:
        """The record of a part that is done, and whose shard is what it says."""
        try:
            record = parse(PartRecord, load_json(to.read(self.record, MOST_RECORD_BYTES)))
            if record.identity != identity:
                return None
            if record.count == 0:  # all are damaged, so there is no shard
                return record
            content = to.read(self.file, len(self.samples) * int(np.prod(self.shape.known)))
            return record if sha256(content).hexdigest() == record.sha256 else None
        except (FileNotFoundError, DocumentError, ConfigError, DataError):
            return None


def digest_samples(digest: Any, samples: Samples) -> None:
    """Add images to a hash: their names, places and labels, and size and time of change of each file of this machine.

    Files behind a URI are not asked for theirs.

    >>> from simmatch.data.folders import Folder
    >>> from simmatch.data.samples import Names
    >>> samples = Samples(Folder("s3://bucket"), Names.of([b"a.png"]), np.zeros((1, 0), int), np.zeros(1, int))
    >>> digest = sha256()
    >>> digest_samples(digest, samples)
    >>> digest.digest() == sha256().digest()
    False
    """
    digest.update(json.dumps(list(samples.keys)).encode())
    for values in (samples.locations, samples.labels):
        digest.update(np.ascontiguousarray(values, dtype="<i8").data)
    for file in samples.origin.files_of(samples.keys):
        if not is_remote(file):
            status = ask(file, partial(os.stat, file), remote=False)
            digest.update(b"%d %d " % (status.st_size, status.st_mtime_ns))


def _text(key: str) -> str:
    """A name as JSON can hold it, whatever bytes a file system has for it."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def mixed(samples: Samples, seed: int) -> Integers:
    """The order of images in shards: a random one that depends on their names and the seed: [N].

    >>> from simmatch.data.folders import Folder
    >>> from simmatch.data.samples import Names
    >>> names = Names.of([b"%03d.png" % index for index in range(100)])
    >>> samples = Samples(Folder("/data"), names, np.zeros((100, 0), int), np.zeros(100, int))
    >>> sorted(mixed(samples, seed=0).tolist()) == list(range(100))
    True
    """
    if samples.locations.shape[1] == 0:  # a file for each image
        return samples.mixed(seed)
    starts = np.arange(0, len(samples), RUN)
    runs = starts[samples.take(starts).mixed(seed)]
    return np.concatenate([np.arange(start, min(start + RUN, len(samples))) for start in runs.tolist()])


def policy_of(config: DataConfig) -> dict[str, Any]:
    """The part of a configuration on which the shards depend, as plain values.

    >>> policy_of(DataConfig(path="/data/photos", size=96))["size"]
    96
    """
    values: dict[str, Any] = config.model_dump(mode="json", include=set(POLICY))
    return values | {key: absolute(values[key]) for key in ("path", "test_path") if values[key] is not None}


class Plan:
    """The parts of a data set; all images have the shape of the first training image that can be decoded.

    Parameters
    ----------
    config: of the data.
    listing: the images.

    Raises
    ------
    DataError
        No image can be decoded, or the first cannot and `data.damaged` is `stop`.

    >>> import os, tempfile
    >>> from pathlib import Path
    >>> from simmatch.data.listing import list_samples
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for index in range(10):
    ...         os.makedirs(f"{folder}/photos/{index % 2}", exist_ok=True)
    ...         _ = Path(f"{folder}/photos/{index % 2}/{index}.pgm").write_bytes(b"P5 1 1 255 " + bytes([index]))
    ...     config = DataConfig(path=f"{folder}/photos", test_fraction=0.2)
    ...     plan, to = Plan(config, list_samples(config)), Location(f"{folder}/prepared")
    ...     manifest = plan.commit([part.make(to) for part in plan.parts()], to)
    >>> len(plan), manifest.train.count, manifest.test.count, manifest.shape
    (2, 8, 2, [1, 1, 1])
    """

    def __init__(self, config: DataConfig, listing: Listing) -> None:
        self.config, self.listing, self.shape = config, listing, Shape()
        damaged = None
        for name, pixels in decoded(listing.train[: config.max_skipped + 1], ImagePolicy.of(config)):
            if not isinstance(pixels, DataError):
                self.shape.check(name, pixels)
                break
            damaged = damaged or pixels
            if config.damaged == "stop":
                break
        if self.shape.shape is None:
            assert damaged is not None, "a list has an image"
            raise DataError(f"{damaged}; {LEAVE_OUT}") if config.damaged == "stop" else damaged
        self.most = images_per_shard(self.shape.known)
        """Images of a part."""

    def __len__(self) -> int:
        return self._parts(self.listing.train) + self._parts(self.listing.test)

    def _parts(self, samples: Samples) -> int:
        return -(-len(samples) // self.most)

    def parts(self) -> Iterator[Part]:
        """All parts, those of the training images first."""
        policy, seed = ImagePolicy.of(self.config), self.config.split_seed
        splits: tuple[tuple[Split, Samples], ...] = (("train", self.listing.train), ("test", self.listing.test))
        for split, samples in splits:
            order = mixed(samples, seed)
            for number, start in enumerate(range(0, len(samples), self.most)):
                part = samples.take(np.sort(order[start : start + self.most]))
                yield Part(split, number, part, part.mixed(seed), policy, self.shape)

    def commit(self, records: Sequence[PartRecord], to: Location) -> Manifest:
        """Write the labels and the manifest, given the records of all parts in order.

        Raises
        ------
        DataError
            All images of a split are damaged.
        OSError
            They cannot be written.
        """
        first_test = self._parts(self.listing.train)
        manifest = Manifest(
            name=self.config.title,
            shape=list(self.shape.known),
            classes=list(self.listing.classes),
            train=self._split("train", records[:first_test], to),
            test=self._split("test", records[first_test:], to),
            skipped=[skipped for record in records for skipped in record.skipped],
            source=self.listing.note,
            policy=policy_of(self.config),
        )
        to.write(MANIFEST, manifest.content())
        return manifest

    def _split(self, split: Split, records: Sequence[PartRecord], to: Location) -> SplitFiles:
        numbered = [(number, record) for number, record in enumerate(records) if record.count]
        if not numbered:
            raise DataError(f"{self.config.title}: expected {split} images that can be decoded, got none")
        content = labels_content([label for _, record in numbered for label in record.labels])
        to.write(labels_file(split), content)
        shards = [Shard(file=shard_file(split, number), count=r.count, sha256=r.sha256) for number, r in numbered]
        return SplitFiles(shards=shards, labels_sha256=sha256(content).hexdigest())
