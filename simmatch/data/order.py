"""The order in which images are visited: pure functions of seed, epoch and step, whatever the number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from simmatch.seeding import seeded


def epoch_order(num_images: int, *, seed: int, epoch: int, images: int | None = None) -> Tensor:
    """The indices visited in one epoch, int64 `[images]` (None: all): a pure function of its arguments.

    A permutation of `range(num_images)`, or its first `images` entries.
    """
    count = _images_per_epoch(num_images, images)
    order = torch.randperm(num_images, generator=seeded("order", seed, epoch), device="cpu")
    return order[:count].clone()


def steps_per_epoch(num_images: int, batch_size: int, *, images: int | None = None) -> int:
    """Batches in one epoch, a last partial one counted."""
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    return -(-_images_per_epoch(num_images, images) // batch_size)


class Batches:
    """The batches of all epochs as a sequence: `batches[update]` holds the images of one update, int64.

    Each is a pure function of the arguments and the number of the update, so training goes on anywhere; the order of
    the present epoch is kept.

    >>> len(Batches(100, 40, epochs=2, seed=0))
    6
    """

    def __init__(self, num_images: int, batch_size: int, *, epochs: int, seed: int, images: int | None = None) -> None:
        self.per_epoch = steps_per_epoch(num_images, batch_size, images=images)
        self._num_images, self._batch_size, self._epochs = num_images, batch_size, epochs
        self._seed, self._images = seed, images
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.per_epoch * self._epochs

    def __getitem__(self, update: int) -> Tensor:
        if not 0 <= update < len(self):
            raise IndexError(f"expected an update from 0 to {len(self) - 1}, got {update}")
        epoch, within = divmod(update, self.per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(self._num_images, seed=self._seed, epoch=epoch, images=self._images)
            self._epoch = epoch
        return self._order[within * self._batch_size :][: self._batch_size]


def stratified_subset(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices, ascending int64, of `per_class` random examples of every class in `labels` `[N]`.

    A subset with fewer per class, of the same seed, is contained in one with more.
    """
    if per_class < 1:
        raise ValueError(f"expected per_class of at least 1, got {per_class}")
    shuffled = torch.randperm(len(labels), generator=seeded("subset", seed), device="cpu")
    chosen = []
    labels = labels.cpu()
    for label in sorted(set(labels.tolist())):
        members = shuffled[labels[shuffled] == label]
        if len(members) < per_class:
            raise ValueError(f"expected {per_class} examples of class {label}, got {len(members)}")
        chosen.append(members[:per_class])
    return torch.cat(chosen).sort().values


def _images_per_epoch(num_images: int, images: int | None) -> int:
    if images is not None and not 0 < images <= num_images:
        raise ValueError(f"expected 1 to {num_images} images per epoch, got {images}")
    return num_images if images is None else images
