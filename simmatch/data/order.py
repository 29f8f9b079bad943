"""The order in which images are used: a function of seed and epoch only, independent of the number of ranks."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from simmatch.labels import distinct
from simmatch.seeding import seeded

WINDOW = 8
"""Blocks whose images are mixed."""


def epoch_order(
    num_images: int, *, seed: int, epoch: int, images: int | None = None, blocks: Tensor | None = None
) -> Tensor:
    """Indices of the images used in one epoch: a permutation of `range(num_images)`, or its first `images` entries.

    With blocks, such as the shards of a file format, the blocks are permuted, and then the images within each window of
    `WINDOW` blocks. So an epoch reads each block in one go, and no more than a window of them at a time.

    Parameters
    ----------
    num_images: number of images in the data set.
    seed, epoch: determine the permutation.
    images: number of images per epoch; None: all.
    blocks: indices at which blocks begin, and `num_images`: int64 [S + 1]. None: every permutation is equally likely.

    Returns
    -------
    int64 [images].

    >>> epoch_order(1000, seed=0, epoch=3, images=100).shape
    torch.Size([100])
    >>> first = epoch_order(100, seed=0, epoch=0, images=16, blocks=torch.arange(0, 101, 2))
    >>> len(set((first // 2).tolist()))  # eight blocks of two images
    8
    """
    count = _images_per_epoch(num_images, images)
    generator = seeded("order", seed, epoch)
    if blocks is None:
        return torch.randperm(num_images, generator=generator, device="cpu")[:count].clone()
    parts = [torch.arange(start, stop) for start, stop in pairwise(blocks.tolist())]
    turns = torch.randperm(len(parts), generator=generator, device="cpu").tolist()
    mixed, done = [], 0
    while done < count:
        window = torch.cat([parts[turn] for turn in turns[:WINDOW]])
        mixed.append(window[torch.randperm(len(window), generator=generator, device="cpu")])
        turns, done = turns[WINDOW:], done + len(window)
    return torch.cat(mixed)[:count]


def steps_per_epoch(num_images: int, batch_size: int, *, images: int | None = None) -> int:
    """Number of batches in one epoch, including a smaller last one.

    >>> steps_per_epoch(100, batch_size=40)
    3
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    return -(-_images_per_epoch(num_images, images) // batch_size)


class Batches:
    """The batches of all epochs as a sequence: `batches[update]` holds the indices of the images of one update, int64.

    A batch depends only on the arguments and the number of the update, so training can continue from any update. The
    order of the current epoch is cached.

    Parameters
    ----------
    num_images: number of images in the data set.
    batch_size: images per update; the last update of an epoch may have fewer.
    epochs: number of epochs.
    seed: of the order.
    images: number of images per epoch; None: all.
    blocks: as for `epoch_order`.

    >>> batches = Batches(100, 40, epochs=2, seed=0)
    >>> len(batches), batches[0].shape, batches[5].shape, batches.size(5)
    (6, torch.Size([40]), torch.Size([20]), 20)
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        epochs: int,
        seed: int,
        images: int | None = None,
        blocks: Tensor | None = None,
    ) -> None:
        self.per_epoch = steps_per_epoch(num_images, batch_size, images=images)
        self._num_images, self._batch_size, self._epochs = num_images, batch_size, epochs
        self._seed, self._images, self._blocks = seed, images, blocks
        self._per_epoch_images = _images_per_epoch(num_images, images)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.per_epoch * self._epochs

    def size(self, update: int) -> int:
        """Number of images of one update."""
        return min(self._batch_size, self._per_epoch_images - update % self.per_epoch * self._batch_size)

    def __getitem__(self, update: int) -> Tensor:
        if not 0 <= update < len(self):
            raise IndexError(f"expected an update from 0 to {len(self) - 1}, got {update}")
        epoch, within = divmod(update, self.per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(
                self._num_images, seed=self._seed, epoch=epoch, images=self._images, blocks=self._blocks
            )
            self._epoch = epoch
        return self._order[within * self._batch_size :][: self._batch_size]


def stratified_subset(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of `per_class` random examples of every class in `labels` [N]: int64, ascending.

    With the same seed, a smaller subset is contained in a larger one.

    Raises
    ------
    ValueError
        A class has fewer examples.

    >>> stratified_subset(torch.tensor([0, 1, 0, 1, 0, 1]), per_class=2, seed=0).shape
    torch.Size([4])
    """
    if per_class < 1:
        raise ValueError(f"expected per_class of at least 1, got {per_class}")
    chosen = []
    for label, members in _shuffled_classes(labels, seed):
        if len(members) < per_class:
            raise ValueError(f"expected {per_class} examples of class {label}, got {len(members)}")
        chosen.append(members[:per_class])
    return torch.cat(chosen).sort().values


def balanced_subset(labels: Tensor, most: int, seed: int) -> Tensor:
    """Indices of random examples, as many of every class in `labels` [N] as `most` allows: int64, ascending.

    Of a class with fewer examples all are taken. With the same seed, a smaller subset is contained in a larger one.

    Raises
    ------
    ValueError
        There are more classes than `most`.

    >>> balanced_subset(torch.tensor([0, 1, 0, 1, 0, 1, 2]), most=5, seed=0).shape
    torch.Size([5])
    """
    classes = _shuffled_classes(labels, seed)
    sizes = torch.tensor([len(members) for _, members in classes])
    if most < len(classes):
        raise ValueError(f"expected at least {len(classes)} examples, one of each class, got {most}")
    low, high = 1, most  # the largest number per class: at least `low`, at most `high`
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(sizes.clamp(max=middle).sum()) <= most else (low, middle - 1)
    return torch.cat([members[:low] for _, members in classes]).sort().values


def _shuffled_classes(labels: Tensor, seed: int) -> list[tuple[int, Tensor]]:
    """Each class with the indices of its examples in random order."""
    shuffled = torch.randperm(len(labels), generator=seeded("subset", seed), device="cpu")
    labels = labels.cpu()
    return [(label, shuffled[labels[shuffled] == label]) for label in distinct(labels).tolist()]


def _images_per_epoch(num_images: int, images: int | None) -> int:
    if images is not None and not 0 < images <= num_images:
        raise ValueError(f"expected 1 to {num_images} images per epoch, got {images}")
    return num_images if images is None else images
