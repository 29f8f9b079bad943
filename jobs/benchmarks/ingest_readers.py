"""Ways to read an epoch of images, each in a process of its own: `python -m jobs.benchmarks.ingest_readers NAME …`.

Prints one JSON object: images per second, and the largest proportional set size of the process and of its children. All
read the same images, batch by batch in the order of `simmatch.data.order`, but for webdataset, which mixes by a buffer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmatch.data.config import DataConfig
from simmatch.data.decoding import ImagePolicy, decode
from simmatch.data.location import Location
from simmatch.data.order import Batches
from simmatch.data.prepared import PreparedData
from simmatch.data.shards import read_labels, read_manifest
from simmatch.data.staging import staged

BATCH = 100

Reader = Callable[[Path, int, int], Iterator[tuple[Tensor, Tensor]]]
"""(folder, images, processes) → batches of (uint8 [n, C, H, W], labels [n])."""

Item = tuple[Tensor, int]


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process: its own memory, and its share of what it has in common with others."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/{pid}/smaps_rollup: expected a line Pss")


def batches(count: int, images: int) -> list[list[int]]:
    """Indices of the batches of an epoch of so many images, out of `count`."""
    order = Batches(count, BATCH, epochs=1, seed=0, images=min(images, count))
    return [order[update].tolist() for update in range(len(order))]


def read_prepared(folder: Path, images: int, processes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This project's: one batch ahead, in a thread."""
    data = PreparedData(Location(folder), DataConfig(path=str(folder)), print)
    source, labels = data.images("train"), data.labels("train")
    order = Batches(len(source), BATCH, epochs=1, seed=0, images=min(images, len(source)))
    chosen = (order[update] for update in range(len(order)))
    for pixels, known in staged(((source[c], labels[c]) for c in chosen), torch.device("cpu"), ahead=True):  # noqa: UP028
        yield pixels, known


class MappedImages(Dataset[Item]):
    """The same shards by `numpy.memmap`, an image at a time."""

    def __init__(self, folder: Path) -> None:
        location = Location(folder)
        manifest = read_manifest(location)
        self.labels = read_labels(location, manifest, "train").tolist()
        shape, shards = tuple(manifest.shape), manifest.train.shards
        self._shards = [np.memmap(folder / s.file, np.uint8, "r", shape=(s.count, *shape)) for s in shards]
        self._ends = np.cumsum([shard.count for shard in shards])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return torch.from_numpy(np.array(self._shards[number][index - first])), self.labels[index]


def read_memmap(folder: Path, images: int, processes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """numpy.memmap and torch's DataLoader."""
    return _loaded(MappedImages(folder), images, processes)


def read_folder(folder: Path, images: int, processes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """torchvision's ImageFolder on JPEG files and torch's DataLoader."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import Compose, Grayscale, PILToTensor

    first = decode(next(folder.glob("*/*.jpg")).read_bytes(), ImagePolicy())
    transform = Compose([Grayscale(), PILToTensor()]) if len(first) == 1 else PILToTensor()
    return _loaded(ImageFolder(str(folder), transform=transform, loader=default_loader), images, processes)


def read_webdataset(folder: Path, images: int, processes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """webdataset on tar files of JPEG; images are mixed within a buffer of 1,000."""
    import webdataset  # type: ignore[import-not-found]

    def item(sample: tuple[bytes, bytes]) -> Item:
        return torch.from_numpy(decode(sample[0], ImagePolicy())), int(sample[1])

    files = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(files, shardshuffle=len(files), workersplitter=webdataset.split_by_worker)
    chosen = data.shuffle(1000).to_tuple("jpg", "cls").map(item)
    done = 0
    for pixels, labels in DataLoader(chosen, batch_size=BATCH, num_workers=min(processes, len(files))):
        yield pixels, labels
        done += len(pixels)
        if done >= images:
            return


def _loaded(data: Any, images: int, processes: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from DataLoader(data, batch_sampler=batches(len(data), images), num_workers=processes)


READERS: dict[str, Reader] = {
    "prepared": read_prepared,
    "memmap": read_memmap,
    "imagefolder": read_folder,
    "webdataset": read_webdataset,
}


def measure(reader: Reader, folder: Path, images: int, processes: int) -> dict[str, float]:
    """Images per second after the first batch, and the largest memory of this process and of its children."""
    done, most, every = 0, 0, max(1, images // BATCH // 10)
    started: float | None = None
    for number, (pixels, _) in enumerate(reader(folder, images, processes)):
        if started is None:
            started = time.perf_counter()
        else:
            done += len(pixels)
        if number % every == 0:
            most = max(most, _memory())
    seconds = time.perf_counter() - (started or 0.0)
    return {"images_per_second": done / seconds, "pss_bytes": max(most, _memory())}


def _memory() -> int:
    total = pss_bytes(os.getpid())
    for child in psutil.Process().children(recursive=True):
        with suppress(OSError, psutil.NoSuchProcess):
            total += pss_bytes(child.pid)
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one reader."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("images", type=int)
    parser.add_argument("processes", type=int)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(json.dumps(measure(READERS[options.reader], options.folder, options.images, options.processes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
