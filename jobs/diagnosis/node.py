"""What a node says of itself: functions without state that run in a process of that node, or in the driver."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cluster.redaction import one_line
from cluster.shared_folder import copy_nonce
from cluster.storage import AnyPath, check_exclusive
from simmatch.config import ConfigError
from simmatch.data.config import DataConfig
from simmatch.data.feature_cache import program
from simmatch.data.formats import DataError
from simmatch.data.listing import list_samples
from simmatch.data.preparation import finished, place_in_cache, plan_if_large
from simmatch.data.prepared import cache_of, open_prepared
from simmatch.data.sources import Dataset, load_dataset
from simmatch.devices import check_device

DIGITS = 12
"""Of a digest that is shown."""


@dataclass(frozen=True)
class Versions:
    """Of what a rank's results and messages depend on; `none` where it is not installed.

    Attributes
    ----------
    simmatch: digest of its source, as in `simmatch.data.feature_cache`.
    """

    python: str
    ray: str
    torch: str
    mlflow: str
    simmatch: str


def versions() -> Versions:
    """Of this process."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    return Versions(platform.python_version(), of("ray"), torch.__version__, of("mlflow"), program()[:DIGITS])


@dataclass(frozen=True)
class Gpus:
    """What torch can use here.

    Attributes
    ----------
    names: of each device.
    error: why torch can use none; empty where it can.
    torch_cuda: that this torch was built with; None: built without.
    driver: version of NVIDIA's driver; empty where there is none.
    driver_cuda: the newest CUDA that the driver knows, (major, minor); None where there is no driver.
    """

    names: tuple[str, ...]
    error: str
    torch_cuda: str | None
    driver: str
    driver_cuda: tuple[int, int] | None


def gpus() -> Gpus:
    """Of this process. No GPU gets a context of it."""
    try:
        check_device("cuda", touch=False)
        names = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        error = ""
    except (ConfigError, RuntimeError) as failure:
        names, error = (), one_line(failure).rpartition("got 'cuda': ")[2]
    return Gpus(names, error, torch.version.cuda, _driver(), _driver_cuda())


def _driver() -> str:
    with suppress(OSError):
        match = re.search(r"\s(\d+\.[\d.]+)\s", Path("/proc/driver/nvidia/version").read_text())
        return match[1] if match else ""
    return ""


def _driver_cuda() -> tuple[int, int] | None:
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def clock() -> float:
    """Seconds since the epoch."""
    return time.time()


@dataclass(frozen=True)
class Room:
    """Of a disk.

    Attributes
    ----------
    what: what is written there.
    folder: where; it, or the folder that it will be made in, exists.
    """

    what: str
    folder: str
    free_bytes: int
    total_bytes: int


def room(places: Sequence[tuple[str, Path]]) -> list[Room]:
    """Of the disks that these folders are on.

    Raises
    ------
    OSError
    """
    found = []
    for what, folder in places:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usage = shutil.disk_usage(existing)
        found.append(Room(what, str(folder), usage.free, usage.total))
    return found


def room_of_node(data: DataConfig | None) -> list[Room]:
    """Of the cache, and of the folder that Ray writes its logs to and spills objects to."""
    places = []
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        places.append(("Ray's files", Path(ray.get_runtime_context().get_temp_dir())))
    if data is not None:
        places.insert(0, ("cache", cache_of(data)))
    return room(places)


def try_run_dir(run_dir: AnyPath, token: str, number: int) -> tuple[str, str]:
    """Use the run directory as a rank does. Returns why it cannot, and why creating a file there protects nothing; both
    empty where all is well."""
    try:
        error = copy_nonce(run_dir, token, number)
        return (error, "") if error else ("", check_exclusive(run_dir) or "")
    except OSError as failure:
        return one_line(failure), ""


def data_digest(config: DataConfig) -> str:
    """Of this node's data set: as `Dataset.digest`.

    Raises
    ------
    ConfigError, DataError
        As of `load_dataset`.
    """
    dataset = data_of(config)
    if dataset is None:
        raise DataError("not prepared yet")
    return dataset.digest()


def data_of(config: DataConfig) -> Dataset | None:
    """The data set; None where a run would first have to prepare it, for minutes or hours.

    Raises
    ------
    ConfigError, DataError
        As of `load_dataset`.
    """
    own_images = config.path is not None and not config.signals
    if own_images and open_prepared(config, lambda _: None) is None:
        plan = plan_if_large(config, list_samples(config))
        if plan is not None and finished(config, place_in_cache(plan)) is None:
            return None
    return load_dataset(config, warn=lambda _: None)
