"""Data sets: where their files are searched for, and how they are read and checked.

To add a data set, write a function `(name, folder) -> Dataset` and add an entry to `DATASETS`. No content of a file is
ever executed. Any fault in a file is a `DataError` with a one-line message.
"""

from __future__ import annotations

import dataclasses
import difflib
import http.client
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simmatch.config import ConfigError, DataConfig
from simmatch.data.formats import DataError, read_cifar_batch, read_idx
from simmatch.extras import extra
from simmatch.model import InputConfig


class DataNotFoundError(DataError):
    """The files of a data set are in none of the searched places.

    >>> load_dataset(DataConfig(name="mnist", root="/nowhere"))
    Traceback (most recent call last):
    simmatch.data.sources.DataNotFoundError: mnist: no files found; looked in data.root (/nowhere: no such folder); ...
    """


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels as stored. The constructor checks shapes, types and counts; `without_damage` checks values.

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
    train_images: Tensor
    """`[N, C, H, W]`, uint8, or float32 in [0, 1]."""
    train_labels: Tensor
    """`[N]`, int64."""
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    skipped: int = 0
    """Number of damaged images that were left out."""

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
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )

    def digest(self) -> str:
        """A hash of the images, labels, number of classes and name: 16 hexadecimal digits."""
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        layout = [(list(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        digest = sha256(repr((self.name, self.num_classes, layout)).encode())
        for tensor in tensors:
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]

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


def _check_split(what: str, images: Tensor, labels: Tensor) -> None:
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
    train = _sound(f"{dataset.name} train", dataset.train_images, dataset.train_labels, dataset.num_classes, config)
    test = _sound(f"{dataset.name} test", dataset.test_images, dataset.test_labels, dataset.num_classes, config)
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


# -- readers: (name, folder) -> Dataset --------------------------------------------------------------------------------


def read_mnist_folder(name: str, folder: Path) -> Dataset:
    """Read the four IDX files of MNIST, or of a data set in the same format; images [N, 1, H, W].

    >>> read_mnist_folder("mnist", Path("/nowhere"))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere/train-images-idx3-ubyte: cannot be read: ...
    """
    parts = [read_idx(_stored(folder, file), 3 if "images" in file else 1) for file in _IDX_FILES]
    train, train_labels, test, test_labels = parts
    return Dataset(name, train[:, None], train_labels.long(), test[:, None], test_labels.long(), num_classes=10)


def read_cifar10_folder(name: str, folder: Path) -> Dataset:
    """Read CIFAR-10 in the python or the binary version, whichever the folder holds; images [N, 3, 32, 32].

    >>> read_cifar10_folder("cifar10", Path("/nowhere"))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere/data_batch_1: expected a batch of CIFAR-10: ...
    """
    files = _CIFAR_BIN if _holds(folder, _CIFAR_BIN) else _CIFAR_PY
    *train, (test_images, test_labels) = [read_cifar_batch(folder / file) for file in files]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return Dataset(name, images, labels, test_images, test_labels, num_classes=10)


def read_digits(name: str, folder: Path | None = None) -> Dataset:
    """Read the 8 × 8 digits of scikit-learn, always with the same split; images in [0, 1].

    >>> digits = read_digits("digits")
    >>> digits.train_images.shape, digits.test_images.shape
    (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]))
    """
    with extra("eval"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]  # 17 grey levels, 0 to 16
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=digits.target, random_state=0)
    return Dataset(name, images[train], labels[train], images[test], labels[test], num_classes=10)


_IDX_FILES = tuple(f"{part}-idx{n}-ubyte" for part, n in (
    ("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1)
))  # fmt: skip
_CIFAR_PY = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_CIFAR_BIN = tuple(f"{file}.bin" for file in _CIFAR_PY)


@dataclass(frozen=True)
class Source:
    """How a data set is read, and where its files may be.

    >>> DATASETS["digits"].layouts, DATASETS["mnist"].torchvision_class
    ((), 'MNIST')
    """

    read: Callable[[str, Path], Dataset]
    """Called with the name of the data set and the folder that holds its files."""
    layouts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Pairs of (folder below a searched place, files it must hold), tried in order. Empty: no files are needed."""
    system_folder: Path | None = None
    """Folder in which a package of the operating system installs the files."""
    torchvision_class: str | None = None
    """Name of the class in `torchvision.datasets` that downloads the data set."""
    package: str | None = None
    """Name of the Debian package that installs the files."""


DATASETS: dict[str, Source] = {
    "fashion_mnist": Source(
        read_mnist_folder,
        tuple(
            (folder, _IDX_FILES)
            for folder in ("fashion-mnist", "usr/share/datasets/fashion-mnist", "FashionMNIST/raw", "")
        ),
        system_folder=Path("/usr/share/datasets/fashion-mnist"),
        torchvision_class="FashionMNIST",
        package="dataset-fashion-mnist",
    ),
    "mnist": Source(
        read_mnist_folder,
        tuple((folder, _IDX_FILES) for folder in ("mnist", "MNIST/raw", "")),
        torchvision_class="MNIST",
    ),
    "cifar10": Source(
        read_cifar10_folder,
        (
            ("cifar-10-batches-py", _CIFAR_PY),
            ("cifar-10-batches-bin", _CIFAR_BIN),
            ("", _CIFAR_PY),
            ("", _CIFAR_BIN),
        ),
        torchvision_class="CIFAR10",
    ),
    "digits": Source(read_digits),
}


# -- finding and loading -----------------------------------------------------------------------------------------------


def load_dataset(config: DataConfig, *, allow_download: bool = False) -> Dataset:
    """Find, read and check a data set.

    The first of these places that holds all files is used:

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
        `data.name` is unknown, or the data set has fewer images than requested.
    DataNotFoundError
        No place holds the files; the message lists the places and how to get the files.
    DataError
        The files cannot be used.

    >>> load_dataset(DataConfig(name="digits", train_images=100)).train_images.shape
    torch.Size([100, 1, 8, 8])
    """
    source = _source(config.name)
    if not source.layouts:
        return _first_images(without_damage(source.read(config.name, Path()), config), config)
    try:
        folder = _find(config, source)
    except DataNotFoundError:
        if not allow_download or config.root is not None:
            raise
        download(config.name, default_root())
        folder = _find(config, source)
    return _first_images(without_damage(source.read(config.name, folder), config), config)


def default_root() -> Path:
    """The folder for downloads: `$SIMMATCH_DATA`, or else `data/` in the working directory.

    >>> default_root() == Path(os.environ.get("SIMMATCH_DATA") or "data")
    True
    """
    return Path(os.environ.get("SIMMATCH_DATA") or "data")


def download(name: str, root: Path, *, timeout_s: float = 10.0) -> None:
    """Download a data set with torchvision into `root`, in torchvision's layout.

    Raises
    ------
    DataError
        There is no download for the data set, or it failed, for instance because no data arrived for `timeout_s`.
    ImportError
        torchvision is not installed; it is part of the extra `eval`.

    >>> download("digits", Path("data"))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: digits: there is no download for it
    """
    torchvision_class = _source(name).torchvision_class
    if torchvision_class is None:
        raise DataError(f"{name}: there is no download for it")
    with extra("eval"):
        import torchvision.datasets

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout_s)  # torchvision sets no timeout
    try:
        getattr(torchvision.datasets, torchvision_class)(str(root), download=True)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        raise DataError(f"{name}: torchvision's download failed: {' '.join(str(error).split())}") from None
    finally:
        socket.setdefaulttimeout(previous)


def _source(name: str) -> Source:
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"data.name: expected one of {', '.join(sorted(DATASETS))}, got '{name}'{hint}")
    return DATASETS[name]


def _find(config: DataConfig, source: Source) -> Path:
    """The first folder with all files of one of the source's layouts."""
    searched = []
    for label, place in _places(config, source):
        for below, files in source.layouts:
            folder = place / below
            if _holds(folder, files) and not (below == "" and _is_of_another(folder, config.name)):
                return folder
        searched.append(f"{label} ({place}{_missing_files(place, source)})")
    remedies = [f"run `make data DATASET={config.name}`", "set data.root or $SIMMATCH_DATA to its folder"]
    if source.package is not None:
        remedies.insert(1, f"install Debian's package {source.package}")
    raise DataNotFoundError(
        f"{config.name}: no files found; looked in {', '.join(searched)}; to get it {', '.join(remedies)}"
    )


def _places(config: DataConfig, source: Source) -> list[tuple[str, Path]]:
    if config.root is not None:
        return [("data.root", Path(os.path.expanduser(config.root)))]
    places = [("working directory", Path("data").absolute())]
    if source.system_folder is not None:
        places.insert(0, ("system", source.system_folder))
    if os.environ.get("SIMMATCH_DATA"):
        places.insert(0, ("$SIMMATCH_DATA", Path(os.path.expanduser(os.environ["SIMMATCH_DATA"]))))
    return places


def _stored(folder: Path, file: str) -> Path:
    """The file's path, or that of its gzipped form where only that exists."""
    plain, gzipped = folder / file, folder / f"{file}.gz"
    return gzipped if os.path.isfile(gzipped) and not os.path.isfile(plain) else plain


def _holds(folder: Path, files: tuple[str, ...]) -> bool:
    # os.path instead of Path.is_file, which raises for a folder without permission
    return all(os.path.isfile(_stored(folder, file)) for file in files)


def _is_of_another(folder: Path, name: str) -> bool:
    """Whether the folder is named after another data set: the files of Fashion-MNIST and MNIST have the same names."""
    others = {other.replace("_", "") for other in DATASETS if other != name}
    parts = folder.absolute().parts[-2:]
    return any("".join(filter(str.isalnum, part)).lower() in others for part in parts)


def _missing_files(place: Path, source: Source) -> str:
    """The part of the message for a place that does not exist, or that lacks some of the files."""
    if not os.path.isdir(place):
        return ": no such folder"
    for below, files in source.layouts:
        missing = [file for file in files if not _holds(place / below, (file,))]
        if len(missing) < len(files):
            return f": {below or 'it'} lacks {', '.join(missing)}"
    return ""


def _first_images(dataset: Dataset, config: DataConfig) -> Dataset:
    for key, images in (("train_images", dataset.train_images), ("test_images", dataset.test_images)):
        count = getattr(config, key)
        if count is not None and count > len(images):
            raise ConfigError(f"data.{key}: expected at most {len(images)}, got {count}")
    return dataset.take(slice(config.train_images), slice(config.test_images))


# -- values ------------------------------------------------------------------------------------------------------------


def to_unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images of any shape as floats in [0, 1]: uint8 is divided by 255, floats are only converted to `dtype`.

    Raises
    ------
    ValueError
        Images that are neither uint8 nor floating-point.

    >>> to_unit(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    if images.dtype == torch.uint8:
        # divided in float32 or wider, then rounded once
        return images.to(torch.promote_types(dtype, torch.float32)).div_(255).to(dtype)
    if not images.is_floating_point():
        raise ValueError(f"expected uint8 or floating-point images, got {images.dtype}")
    return images.to(dtype)
