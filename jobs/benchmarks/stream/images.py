"""Streams of Fashion-MNIST: classes that arrive in pairs, images that turn, corruptions that change.

The last 10,000 training images are never in a stream: settings are chosen on a stream of the same kind made of them.
Held-out parts are made of test images.

Source of the first: Zenke, Poole & Ganguli, "Continual learning through synaptic intelligence" (2017), for MNIST; here
without a task label at test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jobs.benchmarks.stream.streams import Part, Stream
from jobs.evaluation.corruptions import corrupt
from jobs.evaluation.corruptions_geometry import warp
from simmatch.data.config import DataConfig
from simmatch.data.sources import load_dataset

BATCH = 50
"""Records that are tested together, then learnt from."""

WARM_UP = 2_000
"""Records that are learnt from before anything is scored; after them frozen features stay as they are."""

PILOT, PILOT_HELD_OUT = 10_000, 2_000
"""Training images that no stream shows, and how many of them are held out of the stream that settings are chosen on."""

LENGTH = 3_000
"""Records of a segment of the streams whose classes are all there from the first."""

HELD_OUT = 1_000
"""Test images of each held-out part of these."""

STEPS = 5
"""Segments in which images turn, each by 18°."""

CORRUPTIONS = (None, "shot_noise", "motion_blur", "fog", "stripe", None)
"""One segment each; None: as they are."""

QUICK = 10
"""`--quick`: a tenth of the images."""


@dataclass(frozen=True, eq=False)
class _Images:
    """Images uint8 [N, 1, 28, 28] with labels [N]."""

    x: Tensor
    labels: Tensor

    def take(self, chosen: slice | Tensor) -> _Images:
        return _Images(self.x[chosen], self.labels[chosen])

    def part(self, name: str) -> Part:
        return Part(name, self.x, self.labels)


@dataclass(frozen=True, eq=False)
class _Material:
    """Images of a stream, and those that are held out of it."""

    learnt: _Images
    held_out: _Images

    @classmethod
    def load(cls, *, quick: bool) -> tuple[_Material, _Material]:
        """Of the stream, and of the one that settings are chosen on."""
        dataset = load_dataset(DataConfig(name="fashion_mnist"))
        train, test = (
            _Images(torch.as_tensor(images[:]), labels)
            for images, labels in (
                (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)
            )
        )  # fmt: skip
        few = slice(None, None, QUICK if quick else 1)
        parts = [train.take(slice(-PILOT)), test, train.take(slice(-PILOT, -PILOT_HELD_OUT))]
        learnt, held_out, pilot, pilot_held_out = (
            each.take(few) for each in (*parts, train.take(slice(-PILOT_HELD_OUT, None)))
        )
        return cls(learnt, held_out), cls(pilot, pilot_held_out)


def _made(name: str, make: Callable[[str, _Material], Stream], *, quick: bool) -> Stream:
    stream, pilot = _Material.load(quick=quick)
    return replace(make(name, stream), pilot=make(f"{name}, before it begins", pilot))


def split_fashion_mnist(*, quick: bool = False) -> Stream:
    """Classes 0 and 1, then 2 and 3, …; a record may be of any class met so far.

    Raises
    ------
    DataError
        Fashion-MNIST is missing.
    """
    return _made("Split-Fashion-MNIST", _split, quick=quick)


def _split(name: str, images: _Material) -> Stream:
    def pairs(own: _Images) -> list[Part]:
        return [own.take(own.labels // 2 == pair).part(f"classes {2 * pair}, {2 * pair + 1}") for pair in range(5)]

    segments = pairs(images.learnt)
    warm_up = min(WARM_UP, len(segments[0]) // 2)
    first = _Images(torch.as_tensor(segments[0].x[:]), segments[0].labels)
    segments[0] = first.take(slice(warm_up, None)).part(segments[0].name)
    warm = first.take(slice(warm_up)).part("warm-up")
    return Stream(name, 10, warm, tuple(segments), tuple(pairs(images.held_out)), BATCH, by_final=True)


def rotating_fashion_mnist(*, quick: bool = False) -> Stream:
    """Images that turn from 0° to 90° as the stream goes on; held out are images at the middle of every segment.

    Raises
    ------
    DataError
        Fashion-MNIST is missing.
    """
    return _made("rotating Fashion-MNIST", _rotating, quick=quick)


def _rotating(name: str, images: _Material) -> Stream:
    def segment(own: _Images, number: int, middle: bool) -> Part:
        first, last = (0.5, 0.5) if middle else (0.0, 1.0)
        degrees = 90 / STEPS * (number + torch.linspace(first, last, len(own.labels)))
        return _Images(turned(own.x, degrees), own.labels).part(f"{90 * number // STEPS}–{90 * (number + 1) // STEPS}°")

    return _in_turn(name, images, [segment] * STEPS)


def corrupted_fashion_mnist(*, quick: bool = False) -> Stream:
    """Images as they are, then under one corruption after the other, then as they are again.

    Raises
    ------
    DataError
        Fashion-MNIST is missing.
    """
    return _made("corrupted Fashion-MNIST", _corrupted, quick=quick)


def _corrupted(name: str, images: _Material) -> Stream:
    def segment(own: _Images, number: int, middle: bool) -> Part:
        kind = CORRUPTIONS[number]
        x = own.x if kind is None else _pixels(corrupt(own.x.float() / 255, kind, seed=number))
        title = (kind or ("clean again" if number else "clean")).replace("_", " ")
        return _Images(x, own.labels).part(title)

    return _in_turn(name, images, [segment] * len(CORRUPTIONS))


def _in_turn(name: str, images: _Material, segments: Sequence[Callable[[_Images, int, bool], Part]]) -> Stream:
    """A warm-up of images as they are, then other images for every segment; the held-out images in all of them."""
    learnt, count = images.learnt, len(segments)
    warm_up = min(WARM_UP, len(learnt.labels) // 4)
    length = min(LENGTH, (len(learnt.labels) - warm_up) // count)
    few = images.held_out.take(slice(HELD_OUT))

    def own(number: int) -> _Images:
        return learnt.take(slice(warm_up + number * length, warm_up + (number + 1) * length))

    return Stream(
        name, 10, learnt.take(slice(warm_up)).part("warm-up"),
        tuple(make(own(number), number, False) for number, make in enumerate(segments)),
        tuple(make(few, number, True) for number, make in enumerate(segments)), BATCH,
    )  # fmt: skip


def turned(x: Tensor, degrees: Tensor) -> Tensor:
    """Images uint8 [N, C, H, W], each turned counter-clockwise about its centre by so many degrees [N].

    >>> turned(torch.tensor([[[[0, 255], [0, 0]]]], dtype=torch.uint8), torch.tensor([90.0])).tolist()
    [[[[255, 0], [0, 0]]]]
    """
    angles = torch.deg2rad(degrees.double())
    cosine, sine = angles.cos(), angles.sin()
    rows = torch.stack([cosine, sine], dim=-1), torch.stack([-sine, cosine], dim=-1)
    matrix, still = torch.stack(rows, dim=-2), torch.zeros(1, 2, dtype=torch.float64)
    return _pixels(warp(x.double() / 255, matrix, still))


def _pixels(x: Tensor) -> Tensor:
    return (255 * x.clamp(0, 1)).round().to(torch.uint8)
