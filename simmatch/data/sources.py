"""Data sets: images or signals with their labels, built in or the user's own, found, read and checked.

A built-in data set is added in `builtin`, a format of own images in `listing`, one of signals in `recordings`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from simmatch.config import ConfigError
from simmatch.data.builtin import read_builtin, source_of
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.listing import list_samples
from simmatch.data.loading import Loader
from simmatch.data.preparation import plan_if_large, prepared_in_cache
from simmatch.data.prepared import PreparedData, PreparedImages, StoredImages, open_prepared
from simmatch.data.signals import load_signals
from simmatch.data.windows import Windows
from simmatch.model import InputConfig

HASHED = 1024
"""Images that are hashed at a time."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels as stored. The constructor checks shapes, types and counts; `without_damage` checks values.

    Of images only their shape and `images[indices]` are used: they may be those of a prepared data set, which are read
    when they are needed.

    Raises
    ------
    DataError
        The tensors are not images and labels, or their counts differ.

    >>> images, labels = torch.zeros(6, 1, 28, 28, dtype=torch.uint8), torch.arange(6)
    >>> dataset = Dataset("blank", images, labels, images[:2], labels[:2], num_classes=10)
    >>> dataset.in_channels, dataset.image_size, len(dataset.take(slice(4), slice(1)).train_images)
    (1, (28, 28), 4)
    """

    name: str
    train_images: StoredImages
    """`[N, C, H, W]`, uint8, or float32 in [0, 1]; windows of signals `[N, C, 1, T]`, float32."""
    train_labels: Tensor
    """`[N]`, int64; −1 for an unlabelled image, only in own images."""
    test_images: StoredImages
    test_labels: Tensor
    num_classes: int
    """0 where no image has a label."""
    skipped: int = 0
    """Number of damaged images that were left out."""
    notes: tuple[str, ...] = ()
    """Lines that say how own images were understood, and which were left out."""

    def __post_init__(self) -> None:
        _check_split(f"{self.name} train", self.train_images, self.train_labels)
        _check_split(f"{self.name} test", self.test_images, self.test_labels)
        train, test = tuple(self.train_images.shape[1:]), tuple(self.test_images.shape[1:])
        if train != test:
            raise DataError(f"{self.name}: expected test images of the training images' shape {train}, got {test}")

    def take(self, train: Tensor | slice, test: Tensor | slice) -> Dataset:
        """Some of the images, with their labels."""
        return dataclasses.replace(
            self,
            train_images=_some(self.train_images, train),
            train_labels=self.train_labels[train],
            test_images=_some(self.test_images, test),
            test_labels=self.test_labels[test],
        )

    def digest(self) -> str:
        """A hash of the images, labels, number of classes and name: 16 hexadecimal digits, computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        layout = [(list(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        digest = sha256(repr((self.name, self.num_classes, layout)).encode())
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                digest.update(tensor.digest.encode())
                continue
            for block in torch.split(tensor, HASHED):  # no copy of the whole, however the tensor lies in memory
                digest.update(block.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def blocks(self) -> Tensor | None:
        """Indices at which the shards of the training images begin, and N: int64 [S + 1]; None: they are in memory."""
        return self.train_images.blocks if isinstance(self.train_images, PreparedImages) else None

    @property
    def source(self) -> InputConfig:
        """Shape and classes of the images."""
        return InputConfig.of(self.train_images, self.num_classes)

    @property
    def in_channels(self) -> int:
        """C."""
        return self.train_images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.train_images.shape[2], self.train_images.shape[3]


def _some(images: StoredImages, chosen: Tensor | slice) -> StoredImages:
    """Some images; those of a range of a prepared data set, and windows, are not read."""
    if isinstance(images, Windows):
        return images.take(chosen)
    if isinstance(images, PreparedImages) and isinstance(chosen, slice):
        return images.range(chosen)
    return images[chosen]


def _check_split(what: str, images: StoredImages, labels: Tensor) -> None:
    if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32) or 0 in images.shape:
        raise DataError(
            f"{what}: expected uint8 or float32 images [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise DataError(f"{what}: expected int64 labels [N], got {labels.dtype} {tuple(labels.shape)}")
    if len(images) != len(labels):
        raise DataError(f"{what}: expected one label per image, got {len(images)} images and {len(labels)} labels")


def without_damage(dataset: Dataset, config: DataConfig) -> Dataset:
    """Check all values. With `config.damaged` set to `skip`, return the data set without its damaged images.

    An image is damaged if one of its values is not finite or outside [0, 1], or if its label is not a class.

    Raises
    ------
    DataError
        With `damaged: stop`, an image is damaged; the message names the first. With `damaged: skip`, all images are,
        or more than `config.max_skipped`.

    >>> images, labels = torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, -7])
    >>> dataset = Dataset("example", images, labels, images[:2], labels[:2], num_classes=2)
    >>> without_damage(dataset, DataConfig(name="example", damaged="skip")).skipped
    1
    """
    train_images, test_images = dataset.train_images, dataset.test_images
    if not isinstance(train_images, Tensor) or not isinstance(test_images, Tensor):
        return dataset  # checked when it was prepared
    train = _sound(f"{dataset.name} train", train_images, dataset.train_labels, dataset.num_classes, config)
    test = _sound(f"{dataset.name} test", test_images, dataset.test_labels, dataset.num_classes, config)
    skipped = int((~train).sum() + (~test).sum())
    if skipped == 0:
        return dataset
    if skipped > config.max_skipped:
        most = f"data.max_skipped={config.max_skipped}"
        raise DataError(f"{dataset.name}: expected at most {most} damaged images, got {skipped}")
    return dataclasses.replace(dataset.take(train, test), skipped=skipped)


def _sound(what: str, images: Tensor, labels: Tensor, num_classes: int, config: DataConfig) -> Tensor:
    """Which images can be used: bool [N]."""
    labelled = (labels >= 0) & (labels < num_classes)
    sound = labelled
    if images.is_floating_point():
        flat = images.flatten(1)
        sound = labelled & ((flat >= 0) & (flat <= 1)).all(dim=1)  # false for NaN
    if bool(sound.all()) or config.damaged == "skip":
        return sound
    index = int((~sound).nonzero()[0])
    if not labelled[index]:
        raise DataError(f"{what}: expected labels 0 to {num_classes - 1}, got {int(labels[index])} at index {index}")
    position = (~((images[index] >= 0) & (images[index] <= 1))).nonzero()[0].tolist()
    value = images[index][tuple(position)].item()
    raise DataError(f"{what}: expected values in [0, 1], got {value:g} in image {index} at {position}")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def load_dataset(
    config: DataConfig,
    *,
    allow_download: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = _warn,
) -> Dataset:
    """Find, read and check a data set: own images or signals (`data.path`) or a built-in one (`data.name`).

    Own images are decoded one by one, see `simmatch.data.decoding`, and mixed, see `data.split_seed`; `progress` is
    called with the number of images done and of all. Where `data.path` is a prepared data set, or its images would take
    more than `preparation.IN_MEMORY_BYTES`, which are prepared first, images are read when they are needed, see
    `simmatch.data.prepared`; `warn` is told what the reader should know. Of signals
    windows are read when they are needed, see `simmatch.data.windows`. For a built-in data set the first of these
    places that holds all files is used:

    1. `data.root`; if it is given, no other place is searched;
    2. `$SIMMATCH_DATA`;
    3. `/usr/share/datasets/fashion-mnist`, where Debian's `dataset-fashion-mnist` installs them (Fashion-MNIST only);
    4. `data/` in the working directory, which `make data` fills;
    5. with `allow_download` and without `data.root`: torchvision's download into `$SIMMATCH_DATA`, or else `data/`.

    Within a place, IDX files (plain or gzipped) may be in the folder itself, in `fashion-mnist/`, in
    `usr/share/datasets/fashion-mnist/` or where torchvision stores them (`FashionMNIST/raw/`). The files of CIFAR-10
    may be in the folder itself, in `cifar-10-batches-py/` or in `cifar-10-batches-bin/`. `digits` needs no files.

    Raises
    ------
    ConfigError
        `data.name` is unknown, the data set has fewer images than requested, or the configuration does not say how to
        understand what is in `data.path`.
    DataNotFoundError
        No place holds the files; the message lists the places and how to get the files.
    DataError
        The files cannot be used.

    >>> load_dataset(DataConfig(name="digits", train_images=100)).train_images.shape
    torch.Size([100, 1, 8, 8])
    """
    if config.signals:
        return _first_images(_signals(config), config)
    if config.path is not None:
        return _first_images(_own_images(config, progress, warn), config)
    parts = read_builtin(config, allow_download=allow_download)
    dataset = Dataset(config.title, *parts, source_of(config.title).num_classes)
    return _first_images(without_damage(dataset, config), config)


def _own_images(config: DataConfig, progress: Callable[[int, int], None], warn: Callable[[str], None]) -> Dataset:
    if (prepared := open_prepared(config, warn)) is not None:
        return _prepared(prepared)
    listing = list_samples(config)
    if (plan := plan_if_large(config, listing)) is not None:
        return _prepared(PreparedData(prepared_in_cache(plan, warn, progress), config, warn))
    unused = ["data.order: blocks: no effect on images in memory"] if config.order == "blocks" else []
    loader = Loader(config, progress)
    train_images, train_labels = loader.load(listing.train, config.train_images)
    test_images, test_labels = loader.load(listing.test, config.test_images)
    return Dataset(
        config.title,
        train_images,
        train_labels,
        test_images,
        test_labels,
        num_classes=len(listing.classes),
        skipped=len(loader.damaged),
        notes=(listing.note, *loader.notes(), *unused),
    )


def _signals(config: DataConfig) -> Dataset:
    signals = load_signals(config)
    return Dataset(
        config.title,
        signals.train,
        signals.train_labels,
        signals.test,
        signals.test_labels,
        num_classes=len(signals.classes),
        notes=(signals.note,),
    )


def _prepared(prepared: PreparedData) -> Dataset:
    manifest = prepared.manifest
    return Dataset(
        manifest.name,
        prepared.images("train"),
        prepared.labels("train"),
        prepared.images("test"),
        prepared.labels("test"),
        num_classes=len(manifest.classes),
        skipped=len(manifest.skipped),
        notes=(f"{prepared.location}: prepared from {manifest.source}",),
    )


def _first_images(dataset: Dataset, config: DataConfig) -> Dataset:
    for key, images in (("train_images", dataset.train_images), ("test_images", dataset.test_images)):
        count = getattr(config, key)
        if count is not None and count > len(images):
            raise ConfigError(f"data.{key}: expected at most {len(images)}, got {count}")
    return dataset.take(slice(config.train_images), slice(config.test_images))


def to_unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images of any shape as floats in [0, 1]: uint8 is divided by 255, floats are only converted to `dtype`.

    The same bits on every device.

    Raises
    ------
    ValueError
        Images that are neither uint8 nor floating-point.

    >>> to_unit(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    if images.dtype == torch.uint8:
        # divided in float32 or wider, then rounded once; by a tensor: a GPU multiplies by the reciprocal of a number
        wide = images.to(torch.promote_types(dtype, torch.float32))
        return wide.div_(wide.new_full((), 255.0)).to(dtype)
    if not images.is_floating_point():
        raise ValueError(f"expected uint8 or floating-point images, got {images.dtype}")
    return images.to(dtype)
