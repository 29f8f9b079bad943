"""Data sets, and where their files are found.

To add a data set write one function `(name, folder) -> Dataset` and one entry of `DATASETS`. Files are read without
executing anything they contain; whatever is wrong with them is a `DataError` of one line.
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
    """No place that was looked at holds the data set's files."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels as stored; shapes, types and counts are checked when built, values by `without_damage`.

    Raises
    ------
    DataError
        Not images and labels, or counts that differ.
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
    """Images that were left out as damaged."""

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
        """Names everything that is learnt from and judged by: equal for equal images, labels, classes and name."""
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        layout = [(list(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        found = sha256(repr((self.name, self.num_classes, layout)).encode())
        for tensor in tensors:
            found.update(tensor.contiguous().numpy().data)
        return found.hexdigest()[:16]

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
    """The data set without the images that cannot be learnt from, if `config.damaged` is `skip`.

    Raises
    ------
    DataError
        An image's values are not finite or outside [0, 1], or its label is no class: the first is named. Or more of
        them than `config.max_skipped`, or all.
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
    """Which images can be used, [N]."""
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
    """The four IDX files of MNIST or of a data set with its format; images `[N, 1, H, W]`."""
    parts = [read_idx(_stored(folder, file), 3 if "images" in file else 1) for file in _IDX_FILES]
    train, train_labels, test, test_labels = parts
    return Dataset(name, train[:, None], train_labels.long(), test[:, None], test_labels.long(), num_classes=10)


def read_cifar10_folder(name: str, folder: Path) -> Dataset:
    """CIFAR-10, python or binary version, whichever the folder holds; images `[N, 3, 32, 32]`."""
    files = _CIFAR_BIN if _holds(folder, _CIFAR_BIN) else _CIFAR_PY
    *train, (test_images, test_labels) = [read_cifar_batch(folder / file) for file in files]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return Dataset(name, images, labels, test_images, test_labels, num_classes=10)


def read_digits(name: str, folder: Path | None = None) -> Dataset:
    """The 8 × 8 digits inside scikit-learn: `[1437, 1, 8, 8]` and `[360, 1, 8, 8]` in [0, 1], always the same split."""
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
    """How one data set is read and where its files may lie."""

    read: Callable[[str, Path], Dataset]
    """Called with the data set's name and the folder that was found."""
    layouts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(folder below a place, files it must hold), tried in order. Empty: the data set needs no files."""
    system_folder: Path | None = None
    """Where a package of the operating system puts the files."""
    torchvision_class: str | None = None
    """Name in `torchvision.datasets` of the class that downloads it."""
    package: str | None = None
    """Debian's package of it."""


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
    """Find and read a data set.

    The files are looked for in this order, and the first place that holds all of them is read:

    1. `data.root`: if given, nothing else is looked at;
    2. `$SIMMATCH_DATA`;
    3. `/usr/share/datasets/fashion-mnist`, where Debian's `dataset-fashion-mnist` puts them (Fashion-MNIST only);
    4. `data/` in the working directory, which `make data` fills;
    5. with `allow_download` and without `data.root`: torchvision's download into `$SIMMATCH_DATA`, else `data/`.

    In a place, IDX files (plain or gzipped) may lie directly, in `fashion-mnist/`, in
    `usr/share/datasets/fashion-mnist/` or as torchvision leaves them (`FashionMNIST/raw/`); CIFAR-10's directly, in
    `cifar-10-batches-py/` or in `cifar-10-batches-bin/`. `digits` needs no files.

    Raises
    ------
    ConfigError
        An unknown `data.name`, or more images asked for than there are.
    DataNotFoundError
        No place holds the files; the message lists the places and how to get the files.
    DataError
        The files found cannot be used.
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
    """Where a download goes: `$SIMMATCH_DATA`, else `data/` in the working directory."""
    return Path(os.environ.get("SIMMATCH_DATA") or "data")


def download(name: str, root: Path, *, timeout_s: float = 10.0) -> None:
    """Have torchvision download a data set into `root`, in torchvision's layout.

    Raises
    ------
    DataError
        No such download, or it failed; a connection silent for `timeout_s` counts as failed.
    ImportError
        torchvision is not installed; the extra `eval` brings it.
    """
    torchvision_class = _source(name).torchvision_class
    if torchvision_class is None:
        raise DataError(f"{name}: there is no download for it")
    with extra("eval"):
        import torchvision.datasets

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout_s)  # torchvision opens its connections without one
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
    looked_at = []
    for label, place in _places(config, source):
        for below, files in source.layouts:
            folder = place / below
            if _holds(folder, files) and not (below == "" and _is_of_another(folder, config.name)):
                return folder
        looked_at.append(f"{label} ({place}{_lacking(place, source)})")
    remedies = [f"run `make data DATASET={config.name}`", "set data.root or $SIMMATCH_DATA to its folder"]
    if source.package is not None:
        remedies.insert(1, f"install Debian's package {source.package}")
    raise DataNotFoundError(
        f"{config.name}: no files found; looked in {', '.join(looked_at)}; to get it {', '.join(remedies)}"
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
    # os.path rather than Path.is_file: a folder one may not enter does not hold the files, and is no traceback
    return all(os.path.isfile(_stored(folder, file)) for file in files)


def _is_of_another(folder: Path, name: str) -> bool:
    """Whether the folder is named for another data set: Fashion-MNIST's files have the names of MNIST's."""
    others = {other.replace("_", "") for other in DATASETS if other != name}
    parts = folder.absolute().parts[-2:]
    return any("".join(filter(str.isalnum, part)).lower() in others for part in parts)


def _lacking(place: Path, source: Source) -> str:
    """What to say of a place that does not exist, or that holds some of the files."""
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
    """Images of any shape as floats in [0, 1]: uint8 divided by 255, floats only converted to `dtype`."""
    if images.dtype == torch.uint8:
        # divided in at least float32, then rounded once
        return images.to(torch.promote_types(dtype, torch.float32)).div_(255).to(dtype)
    if not images.is_floating_point():
        raise ValueError(f"expected uint8 or floating-point images, got {images.dtype}")
    return images.to(dtype)
