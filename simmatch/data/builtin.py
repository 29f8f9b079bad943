"""The built-in data sets: where their files are searched for, how they are read, where they can be downloaded.

To add one, write a function `(folder) -> (training images, their labels, test images, their labels)` and add an entry
to `DATASETS`. No content of a file is ever executed. Any fault in a file is a `DataError` with a one-line message.
"""

from __future__ import annotations

import difflib
import http.client
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simmatch.config import ConfigError
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError, read_cifar_batch, read_idx
from simmatch.extras import extra

Splits = tuple[Tensor, Tensor, Tensor, Tensor]
"""Training images [N, C, H, W], their labels [N], test images, their labels."""


class DataNotFoundError(DataError):
    """The files of a data set are in none of the searched places.

    >>> read_builtin(DataConfig(name="mnist", root="/nowhere"))
    Traceback (most recent call last):
    simmatch.data.builtin.DataNotFoundError: mnist: no files found; looked in data.root (/nowhere: no such folder); ...
    """


def read_builtin(config: DataConfig, *, allow_download: bool = False) -> Splits:
    """Find and read a built-in data set; parameters and errors as for `simmatch.data.sources.load_dataset`.

    >>> [len(part) for part in read_builtin(DataConfig(name="digits"))]
    [1437, 1437, 360, 360]
    """
    assert config.name is not None, "a built-in data set has a name"
    source = source_of(config.name)
    if not source.layouts:
        return source.read(Path())
    try:
        folder = _find(config, source)
    except DataNotFoundError:
        if not allow_download or config.root is not None:
            raise
        download(config.name, default_root())
        folder = _find(config, source)
    return source.read(folder)


# -- readers: (folder) -> Splits ---------------------------------------------------------------------------------------


def read_mnist_folder(folder: Path) -> Splits:
    """Read the four IDX files of MNIST, or of a data set in the same format; images [N, 1, H, W].

    >>> read_mnist_folder(Path("/nowhere"))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere/train-images-idx3-ubyte: cannot be read: ...
    """
    parts = [read_idx(_stored(folder, file), 3 if "images" in file else 1) for file in _IDX_FILES]
    train, train_labels, test, test_labels = parts
    return train[:, None], train_labels.long(), test[:, None], test_labels.long()


def read_cifar10_folder(folder: Path) -> Splits:
    """Read CIFAR-10 in the python or the binary version, whichever the folder holds; images [N, 3, 32, 32].

    >>> read_cifar10_folder(Path("/nowhere"))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere/data_batch_1: expected a batch of CIFAR-10: ...
    """
    files = _CIFAR_BIN if _holds(folder, _CIFAR_BIN) else _CIFAR_PY
    *train, (test_images, test_labels) = [read_cifar_batch(folder / file) for file in files]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return images, labels, test_images, test_labels


def read_digits(folder: Path | None = None) -> Splits:
    """Read the 8 × 8 digits of scikit-learn, always with the same split; images in [0, 1].

    >>> train, _, test, _ = read_digits()
    >>> train.shape, test.shape
    (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]))
    """
    with extra("eval"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]  # 17 grey levels, 0 to 16
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=digits.target, random_state=0)
    return images[train], labels[train], images[test], labels[test]


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

    read: Callable[[Path], Splits]
    """Called with the folder that holds the files."""
    layouts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Pairs of (folder below a searched place, files it must hold), tried in order. Empty: no files are needed."""
    system_folder: Path | None = None
    """Folder in which a package of the operating system installs the files."""
    torchvision_class: str | None = None
    """Name of the class in `torchvision.datasets` that downloads the data set."""
    package: str | None = None
    """Name of the Debian package that installs the files."""
    num_classes: int = 10
    """Number of classes of the labels."""


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
    torchvision_class = source_of(name).torchvision_class
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


def source_of(name: str) -> Source:
    """The entry of `DATASETS`.

    Raises
    ------
    ConfigError
        There is none of this name.

    >>> source_of("minst")
    Traceback (most recent call last):
    simmatch.config.ConfigError: data.name: expected one of ..., got 'minst'; did you mean 'mnist'?
    """
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
            if _holds(folder, files) and not (below == "" and _is_of_another(folder, str(config.name))):
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
