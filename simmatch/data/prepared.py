"""Prepared data sets as the trainer reads them: images by their index, from shards that nobody holds whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simmatch.config import ConfigError
from simmatch.data.cache import MOST_OPEN, OpenShards, Readable, ShardCache
from simmatch.data.config import OF_OWN_IMAGES, DataConfig
from simmatch.data.formats import errors_name
from simmatch.data.location import Location
from simmatch.data.order import WINDOW
from simmatch.data.places import absolute, is_folder, is_pattern
from simmatch.data.preparing import policy_of
from simmatch.data.shards import Manifest, Shard, Split, read_labels, read_manifest
from simmatch.data.windows import Windows
from simmatch.documents import quoted, shortened


class PreparedImages:
    """The images of one split: `images[indices]` reads them, and nothing else is held in memory. Threads may share it.

    Parameters
    ----------
    shards: opens the shards.
    files: the shards of the split, in order.
    shape: [C, H, W] of an image.
    digest: of the data set.
    part: the range of images; None: all.

    Attributes
    ----------
    shape: torch.Size([N, C, H, W]); ndim: 4; dtype: torch.uint8.
    blocks: indices at which shards begin, and N: int64 [S + 1].

    >>> import tempfile
    >>> shard = Shard(file="train-00000.bin", count=3, sha256=64 * "0")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, shard.file).write_bytes(bytes(range(12)))
    ...     shards = OpenShards(Location(folder), image_bytes=4)
    ...     images = PreparedImages(shards, [shard], (1, 2, 2), digest="0123456789abcdef")
    ...     len(images), images[torch.tensor([2, 0])].flatten(1)
    (3, tensor([[ 8,  9, 10, 11],
            [ 0,  1,  2,  3]], dtype=torch.uint8))
    """

    ndim, dtype = 4, torch.uint8

    def __init__(
        self,
        shards: OpenShards,
        files: Sequence[Shard],
        shape: Sequence[int],
        *,
        digest: str,
        part: range | None = None,
    ) -> None:
        self._shards, self._files, self._shape, self._digest = shards, files, tuple(shape), digest
        self._starts = np.cumsum([0, *(file.count for file in files)], dtype=np.int64)
        self._part = range(int(self._starts[-1])) if part is None else part
        self.shape = torch.Size((len(self._part), *self._shape))

    def __len__(self) -> int:
        return len(self._part)

    @property
    def blocks(self) -> Tensor:
        starts = np.clip(self._starts, self._part.start, self._part.stop) - self._part.start
        return torch.from_numpy(np.unique(starts))

    @property
    def digest(self) -> str:
        """A hash of the images: of the data set's content, and of the range."""
        return f"{self._digest}:{self._part.start}:{self._part.stop}"

    def range(self, part: slice) -> PreparedImages:
        """Consecutive images, which are not read."""
        chosen = self._part[part]
        if chosen.step != 1:
            raise ValueError(f"expected consecutive images, got {part}")
        return PreparedImages(self._shards, self._files, self._shape, digest=self._digest, part=chosen)

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        """Images with these indices, int64 [n] or a slice, in this order: uint8 [n, C, H, W].

        Raises
        ------
        IndexError
            There are no such images.
        DataError
            A shard cannot be read; the message names it.
        """
        count = len(self)
        chosen = np.arange(count)[indices] if isinstance(indices, slice) else indices.cpu().numpy()
        if chosen.ndim != 1 or chosen.dtype != np.int64:
            raise IndexError(f"expected indices int64 [n], got {chosen.dtype} {list(chosen.shape)}")
        if len(chosen) and not -count <= chosen.min() <= chosen.max() < count:
            lowest, largest = int(chosen.min()), int(chosen.max())
            raise IndexError(f"expected indices {-count} to {count - 1}, got {lowest} to {largest}")
        chosen = np.where(chosen < 0, chosen + count, chosen)
        images = np.empty((len(chosen), *self._shape), dtype=np.uint8)
        self._read(chosen + self._part.start, images)
        return torch.from_numpy(images)

    def _read(self, chosen: np.ndarray, images: np.ndarray) -> None:
        read_rows(lambda shard: self._shards.open(self._files[shard]), self._starts, chosen, images)


def read_rows(opened: Callable[[int], Readable], starts: np.ndarray, chosen: np.ndarray, rows: np.ndarray) -> None:
    """Read rows of one size, which lie in several files one after the other, in the order of the files.

    Rows that are neighbours in a file and here are read at once.

    Parameters
    ----------
    opened: opens file number i.
    starts: [F + 1], ascending: numbers of the first rows of the files, and of all rows.
    chosen: [n], numbers of the rows to read.
    rows: [n, …], filled.

    >>> from simmatch.data.cache import MemoryFile
    >>> file = MemoryFile(memoryview(bytes(range(6))))
    >>> rows = np.empty((2, 3), dtype=np.uint8)
    >>> read_rows(lambda number: file, np.array([0, 2, 4]), np.array([3, 0]), rows)
    >>> rows.tolist()
    [[3, 4, 5], [0, 1, 2]]
    """
    if not len(chosen):
        return
    size, target = rows.nbytes // len(rows), rows.data.cast("B")
    order = np.argsort(chosen, kind="stable")
    ordered = chosen[order]
    file = np.searchsorted(starts, ordered, side="right") - 1
    first = np.flatnonzero((np.diff(ordered) != 1) | (np.diff(order) != 1) | (np.diff(file) != 0)) + 1
    edges = [0, *first.tolist(), len(ordered)]
    targets, numbers = order.tolist(), file.tolist()
    offsets = (ordered - starts[file]).tolist()
    current, source = -1, None
    for start, stop in pairwise(edges):
        if source is None or numbers[start] != current:
            current = numbers[start]
            source = opened(current)
        begin = targets[start] * size
        source.read_into(target[begin : begin + (stop - start) * size], offsets[start] * size)


StoredImages = Tensor | PreparedImages | Windows
"""Images [N, C, H, W], or signals [N, C, 1, T], of which only the shape and `images[indices]` are used."""


def default_cache() -> Path:
    """The folder of the cache without `data.cache_dir`: `$SIMMATCH_CACHE`, or else `simmatch` in the user's cache.

    >>> default_cache().name != ""
    True
    """
    named = os.environ.get("SIMMATCH_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or Path(user, "simmatch")).expanduser().absolute()


def cache_of(config: DataConfig) -> Path:
    """The folder of the cache.

    >>> cache_of(DataConfig(path="pets", cache_dir="/var/cache/images"))
    PosixPath('/var/cache/images')
    """
    return default_cache() if config.cache_dir is None else Path(config.cache_dir).expanduser().absolute()


class PreparedData:
    """A prepared data set: its manifest, labels and images.

    Parameters
    ----------
    location: its folder.
    config: where its shards are cached if they are in an object store, and the order in which they are read.
    warn: told what does not end the run.

    Raises
    ------
    FileNotFoundError
        There is no manifest.
    DataError
        It is damaged.
    ConfigError
        The budget of the cache is too small for the order.

    >>> PreparedData(Location("/nowhere"), DataConfig(path="/nowhere"), warn=print)
    Traceback (most recent call last):
    FileNotFoundError: ...
    """

    def __init__(self, location: Location, config: DataConfig, warn: Callable[[str], None]) -> None:
        self.location = location
        self.manifest = read_manifest(self.location)
        keep, cache = MOST_OPEN, None
        if self.location.path is None:
            keep = _shards_open(self.manifest, config)
            cache = ShardCache(cache_of(config), config.cache_bytes, digest=self.manifest.digest, warn=warn)
        self._shards = OpenShards(self.location, image_bytes=self.manifest.image_bytes, keep=keep, cache=cache)

    def images(self, split: Split) -> PreparedImages:
        """The images of a split."""
        manifest = self.manifest
        files = manifest.files(split).shards
        return PreparedImages(self._shards, files, manifest.shape, digest=manifest.digest)

    def labels(self, split: Split) -> Tensor:
        """The labels of a split: int64 [N]."""
        return read_labels(self.location, self.manifest, split)


def open_prepared(config: DataConfig, warn: Callable[[str], None]) -> PreparedData | None:
    """The prepared data set of `data.path`; None if it is none.

    Raises
    ------
    ConfigError
        It was prepared otherwise than the configuration says.
    DataError
        It is damaged.

    >>> open_prepared(DataConfig(path="/nowhere"), warn=print)
    """
    path = str(config.path)
    with errors_name("data.path"):
        if is_pattern(path) or not is_folder(absolute(path)):
            return None
    try:
        prepared = PreparedData(Location(path), config, warn)
    except FileNotFoundError:
        return None
    policy = policy_of(config)
    for key in OF_OWN_IMAGES:
        given, known = policy[key], prepared.manifest.policy.get(key)
        if getattr(config, key) != DataConfig.model_fields[key].default and given != known:
            where = shortened(path)
            raise ConfigError(f"data.{key}: expected {quoted(known)}, as {where} was prepared, got {quoted(given)}")
    return prepared


def _shards_open(manifest: Manifest, config: DataConfig) -> int:
    """How many shards of an object store a process keeps open; the cache must have room for what is in turn."""
    counts = [shard.count for split in (manifest.train, manifest.test) for shard in split.shards]
    whole, windows = (count * manifest.image_bytes for count in (sum(counts), 2 * WINDOW * max(counts)))
    if config.cache_bytes >= whole:
        return MOST_OPEN
    if config.order != "blocks":
        raise ConfigError(
            f"data.cache_bytes: expected at least {whole}, all of the data, or data.order: blocks, "
            f"got {config.cache_bytes} with data.order: {config.order}"
        )
    if config.cache_bytes < windows:
        raise ConfigError(f"data.cache_bytes: expected at least {windows} for these shards, got {config.cache_bytes}")
    return WINDOW
