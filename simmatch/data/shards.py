"""The format of a prepared data set: images of one shape as uint8 shards, labels, and a manifest, the commit.

    FOLDER/
        train-00000.bin, …    raw uint8 [n, C, H, W], as `numpy.memmap` reads them
        test-00000.bin, …
        train-labels.bin      int64 [N], little-endian; −1 where unknown
        test-labels.bin
        prepared.json         the manifest, absent until all of them are whole

Nothing in these files is executed, and nothing outside the folder is read, whatever a manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from simmatch.config import ConfigError, Frozen, parse
from simmatch.data.formats import DataError
from simmatch.data.location import Location
from simmatch.documents import DocumentError, dump_json, load_json, quoted

FORMAT = 1
MANIFEST = "prepared.json"
SHARD_BYTES = 2**26
"""Bytes of a shard; the last one of a split, or one with images left out, has fewer."""

MOST_MANIFEST_BYTES, MOST_SHARD_BYTES, MOST_IMAGES = 2**28, 2**31, 2**40
"""Largest manifest, shard and number of images of a split that are accepted."""

Split = Literal["train", "test"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(gt=0, le=2**31)]


class Shard(Frozen):
    """A file of images.

    >>> parse(Shard, {"file": "../train-00000.bin", "count": 3, "sha256": 64 * "0"})
    Traceback (most recent call last):
    simmatch.config.ConfigError: file: expected ... got '../train-00000.bin'
    """

    file: Annotated[str, Field(pattern=r"^(train|test)-\d{5,9}\.bin$")]
    count: Count
    """Number of images."""
    sha256: Digest


class SplitFiles(Frozen):
    """The files of one split, in the order of its images.

    >>> shard = Shard(file="train-00000.bin", count=3, sha256=64 * "0")
    >>> SplitFiles(shards=[shard, shard], labels_sha256=64 * "0").count
    6
    """

    shards: Annotated[list[Shard], Field(min_length=1, max_length=10**6)]
    labels_sha256: Digest

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(shard.count for shard in self.shards)


class Skipped(Frozen):
    """A damaged image that was left out: what it is called in its source, and what is wrong with it.

    >>> Skipped(key="cats/7.jpg", reason="truncated").key
    'cats/7.jpg'
    """

    key: str
    reason: str


class Manifest(Frozen):
    """What a prepared data set holds.

    >>> shard = Shard(file="train-00000.bin", count=3, sha256=64 * "0")
    >>> train = SplitFiles(shards=[shard], labels_sha256=64 * "0")
    >>> test = SplitFiles(shards=[shard.model_copy(update={"file": "test-00000.bin"})], labels_sha256=64 * "0")
    >>> Manifest(name="pets", shape=[1, 8, 8], classes=["cat", "dog"], train=train, test=test).image_bytes
    64
    """

    format: Literal[1] = 1
    name: str
    """Name of the data set."""
    shape: Annotated[list[Annotated[int, Field(gt=0, le=2**16)]], Field(min_length=3, max_length=3)]
    """[C, H, W]."""
    classes: Annotated[list[str], Field(max_length=10**6)]
    """Names of the classes 0, 1, …; none where no image has a label."""
    train: SplitFiles
    test: SplitFiles
    skipped: list[Skipped] = Field(default_factory=list)
    source: str = ""
    """Where the images came from."""
    policy: dict[str, Any] = Field(default_factory=dict)
    """How they were decoded and resized."""

    @field_validator("shape")
    @classmethod
    def _shape_fits(cls, shape: list[int]) -> list[int]:
        if shape[0] * shape[1] * shape[2] > MOST_SHARD_BYTES:
            raise ValueError(f"expected at most {MOST_SHARD_BYTES} bytes per image, got {shape}")
        return shape

    @field_validator("train", "test")
    @classmethod
    def _count_fits(cls, split: SplitFiles, info: ValidationInfo) -> SplitFiles:
        if split.count > MOST_IMAGES:
            raise ValueError(f"expected at most {MOST_IMAGES} images, got {split.count}")
        channels, height, width = info.data.get("shape", (0, 0, 0))
        if max(shard.count for shard in split.shards) * channels * height * width > MOST_SHARD_BYTES:
            raise ValueError(f"expected at most {MOST_SHARD_BYTES} bytes per shard, got more")
        if any(not shard.file.startswith(f"{info.field_name}-") for shard in split.shards):
            raise ValueError(f"expected shards named {info.field_name}-…, got another name")
        return split

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        channels, height, width = self.shape
        return channels * height * width

    @property
    def digest(self) -> str:
        """A hash of shape, classes, images, labels and split: 16 hexadecimal digits."""
        splits = [[[[s.count, s.sha256] for s in part.shards], part.labels_sha256] for part in (self.train, self.test)]
        return sha256(json.dumps([self.shape, self.classes, splits]).encode()).hexdigest()[:16]

    def files(self, split: Split) -> SplitFiles:
        """The files of one split."""
        return self.train if split == "train" else self.test

    def content(self) -> str:
        """The text of the file."""
        return dump_json({"digest": self.digest, **self.model_dump(mode="json")})


def images_per_shard(shape: Sequence[int]) -> int:
    """Number of images [C, H, W] in a full shard.

    >>> images_per_shard((3, 96, 96))
    2427
    """
    return max(1, SHARD_BYTES // int(np.prod(shape)))


def shard_file(split: Split, number: int) -> str:
    """Name of a shard.

    >>> shard_file("train", 7)
    'train-00007.bin'
    """
    return f"{split}-{number:05d}.bin"


def labels_file(split: Split) -> str:
    """Name of the file of labels.

    >>> labels_file("test")
    'test-labels.bin'
    """
    return f"{split}-labels.bin"


def labels_content(labels: Sequence[int]) -> bytes:
    """The content of a file of labels.

    >>> labels_content([3, -1])[:9]
    b'\\x03\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\xff'
    """
    return np.asarray(labels, dtype="<i8").tobytes()


def read_manifest(location: Location) -> Manifest:
    """The manifest of a prepared data set.

    Raises
    ------
    FileNotFoundError
        There is none.
    DataError
        It is damaged, or of a later version.

    >>> read_manifest(Location("/nowhere"))
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    path = f"{location}/{MANIFEST}"
    try:
        values = load_json(location.read(MANIFEST, MOST_MANIFEST_BYTES))
    except DocumentError as error:
        raise DataError(f"{path}: expected the manifest of a prepared data set, {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected the manifest of a prepared data set, got {type(values).__name__}")
    if values.get("format") != FORMAT:
        raise DataError(f"{path}: expected format {FORMAT}, got {quoted(values.get('format'))}")
    digest = values.pop("digest", None)
    try:
        manifest = parse(Manifest, values)
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from None
    if digest != manifest.digest:
        raise DataError(f"{path}: expected digest {manifest.digest}, that of its content, got {quoted(digest)}")
    return manifest


def read_labels(location: Location, manifest: Manifest, split: Split) -> Tensor:
    """The labels of one split: int64 [N].

    Raises
    ------
    DataError
        They are missing, are not those of the manifest, or are not classes.

    >>> shard = Shard(file="train-00000.bin", count=3, sha256=64 * "0")
    >>> train = SplitFiles(shards=[shard], labels_sha256=64 * "0")
    >>> test = SplitFiles(shards=[shard.model_copy(update={"file": "test-00000.bin"})], labels_sha256=64 * "0")
    >>> manifest = Manifest(name="pets", shape=[1, 8, 8], classes=["cat", "dog"], train=train, test=test)
    >>> read_labels(Location("/nowhere"), manifest, "train")
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere/train-labels.bin: expected 3 labels, found no such file
    """
    files, path = manifest.files(split), f"{location}/{labels_file(split)}"
    size = 8 * files.count
    try:
        content = location.read(labels_file(split), size)
    except FileNotFoundError:
        raise DataError(f"{path}: expected {files.count} labels, found no such file") from None
    if len(content) != size or sha256(content).hexdigest() != files.labels_sha256:
        raise DataError(f"{path}: expected the {files.count} labels of the manifest, got others")
    labels = torch.from_numpy(np.frombuffer(content, dtype="<i8").astype(np.int64))
    if int(labels.min()) < -1 or int(labels.max()) >= len(manifest.classes):
        raise DataError(f"{path}: expected labels -1 to {len(manifest.classes) - 1}, got others")
    return labels
