"""Download a data set unless its files are there already: `python -m jobs.fetch fashion_mnist`.

Two sources are tried: torchvision's download, and on Debian the package with the files, unpacked without installing it
(no root needed). Files are downloaded to a temporary folder and read once before they are moved into place, so an
interrupted download leaves no partial file behind.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cluster.redaction import one_line
from jobs.entry_point import run_main
from simmatch.config import ConfigError
from simmatch.data.builtin import DATASETS, DataNotFoundError, default_root, download
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.sources import Dataset, load_dataset
from simmatch.files import make_folder, write_whole

CONNECT_TIMEOUT_S = 10.0
"""A server that has not answered by then counts as unreachable."""

PACKAGE_TIMEOUT_S = 600.0
"""Longest that one call of the package tools may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 with the files in place, 1 if they cannot be fetched, 2 for an unknown name, or a
    folder that cannot be written."""
    options = _parser().parse_args(arguments)
    config = DataConfig(name=options.name, root=options.root)
    root = Path(options.root).expanduser() if options.root is not None else default_root()
    try:
        print(f"already here: {_summary(load_dataset(config))}")
        return 0
    except ConfigError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except DataNotFoundError:
        print(f"{options.name} is not here yet; fetching it into {root}", flush=True)
    except DataError as error:
        print(f"unusable: {one_line(error)}; fetching it again into {root}", flush=True)
    try:
        make_folder(root)
    except OSError as error:
        print(f"error: --root: expected a folder that can be written, got {root}: {error.strerror}", file=sys.stderr)
        return 2
    try:
        fetch(options.name, root)
        print(f"fetched: {_summary(load_dataset(config))}")
        return 0
    except (DataError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def fetch(name: str, root: Path) -> None:
    """Put the files of a data set under `root`, from the first source that works, and check that they can be read.

    Raises
    ------
    DataError
        No source worked; the message says why for each, and what to do.
    """
    make_folder(root)
    ways: list[tuple[str, Callable[[str, Path], None]]] = [("download", _from_network), ("package", _from_package)]
    failures = []
    for label, way in ways:
        # below `root`, where there is room for a data set
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
            try:
                way(name, Path(temporary))
                load_dataset(DataConfig(name=name, root=temporary))
            except DataError as error:
                failures.append(f"{label}: {error}")
                then = "; trying Debian's package" if way is _from_network and DATASETS[name].package else ""
                print(f"{label} failed: {one_line(error)}{then}", flush=True)
                continue
            _copy_into_place(Path(temporary), root)
            return
    package = DATASETS[name].package
    install = f", or install Debian's package {package}" if package else ""
    raise DataError(
        f"{name} could not be fetched ({'; '.join(failures)}); connect to the network and try again{install}, "
        "or copy its files to a folder and name that in data.root or $SIMMATCH_DATA"
    )


def _from_network(name: str, folder: Path) -> None:
    urls = _mirrors(name)
    if not any(_answers(url, CONNECT_TIMEOUT_S) for url in urls):
        raise DataError(f"no server answers: {', '.join(urls) or 'none is known'}")
    download(name, folder, timeout_s=CONNECT_TIMEOUT_S)


def _mirrors(name: str) -> list[str]:
    """The addresses torchvision takes the files from."""
    import torchvision.datasets

    torchvision_class = DATASETS[name].torchvision_class
    if torchvision_class is None:
        return []
    source = getattr(torchvision.datasets, torchvision_class)
    mirrors = [f"{mirror}{source.resources[0][0]}" for mirror in getattr(source, "mirrors", [])]
    return mirrors or [source.url]


def _answers(url: str, timeout_s: float) -> bool:
    """Whether a server answers in time, with any status.

    Asked in a thread: a timeout of the socket's covers neither the look-up of the name nor a second address.
    """
    answered = threading.Event()
    done = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s):
                answered.set()
        except urllib.error.HTTPError as error:
            error.close()
            answered.set()
        except Exception:  # any other error: no answer
            pass
        finally:
            done.set()

    threading.Thread(target=ask, daemon=True).start()
    done.wait(timeout_s)
    return answered.is_set()


def _from_package(name: str, folder: Path) -> None:
    """Debian's package of the data set."""
    package, system_folder = DATASETS[name].package, DATASETS[name].system_folder
    if package is None:
        raise DataError(f"Debian has no package of {name}")
    assert system_folder is not None, f"{name} names a package but not where it puts its files"
    with tempfile.TemporaryDirectory() as temporary:
        unpack_packages([package], Path(temporary))
        unpacked = Path(temporary, *system_folder.parts[1:])
        if not unpacked.is_dir():
            raise DataError(f"{package} holds no {system_folder}")
        shutil.copytree(unpacked, folder / system_folder.name)


def unpack_packages(packages: Sequence[str], folder: Path) -> None:
    """Download and unpack packages of Debian, with private package lists if the system's lack them. No root is needed,
    and nothing is installed.

    Raises
    ------
    DataError
        There is no such package, no network, or not the tools.
    """
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        raise DataError(f"this system has no {' and no '.join(missing)}")
    with tempfile.TemporaryDirectory() as temporary:
        apt_get = ["apt-get", "-o", f"Acquire::http::Timeout={CONNECT_TIMEOUT_S:.0f}", "-o", "Acquire::Retries=0"]
        try:
            _run([*apt_get, "download", *packages], temporary)
        except DataError as error:
            if "Failed to fetch" in str(error) and "404" not in str(error):
                raise  # the lists are fine, the network is not: fresh lists would only fail more slowly
            apt_get += ["-o", f"Dir::State::Lists={temporary}/lists", "-o", f"Dir::Cache={temporary}/cache"]
            _run([*apt_get, "update"], temporary)
            _run([*apt_get, "download", *packages], temporary)
        archives = sorted(str(path) for path in Path(temporary).glob("*.deb"))
        if len(archives) < len(packages):
            raise DataError(f"apt-get downloaded no {' and no '.join(packages)}")
        for archive in archives:
            _run(["dpkg", "-x", archive, str(folder)], temporary)


def _run(command: list[str], folder: str) -> None:
    """Run a tool of the system's in `folder`; a failure is a `DataError` with the tool's last line."""
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DataError(f"{command[0]} took longer than {PACKAGE_TIMEOUT_S:g} s") from None
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise DataError(f"{command[0]} failed: {lines[-1]}") from None


def _copy_into_place(source: Path, target: Path) -> None:
    """Copy every file below `source` to the same path below `target`, each whole or not at all."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        write_whole(target / path.relative_to(source), partial(shutil.copyfile, path))


def _summary(dataset: Dataset) -> str:
    train, test = tuple(dataset.train_images.shape), tuple(dataset.test_images.shape)
    return f"{dataset.name}, train {train}, test {test}, {dataset.num_classes} classes"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.fetch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help=f"data set: {', '.join(sorted(DATASETS))}")
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="folder to look in and to write to (default: look in all known places, write to $SIMMATCH_DATA, "
        "or data/ without it)",
    )
    return parser


if __name__ == "__main__":
    run_main(main)
