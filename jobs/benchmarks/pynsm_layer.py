"""The layer of the authors' example in their library, `pynsm` 1.0.1, and in ours: one state, one order of images.

50 channels, 6 × 6 patches, images in [0, 1] as they are, SGD at 0.05 and τ = 0.1. Their projection is the ReLU; without
it their iteration does not solve the nonnegative problem at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from jobs.benchmarks.problems import Problem, load_tensors, save_tensors
from jobs.pynsm import CHANNELS, ITERATIONS, RATE, TAU, PynsmTraining, convolution, similarity_matching
from jobs.reporting import Report
from simmatch.config import ConfigError, DynamicsConfig, PlasticityConfig
from simmatch.data.order import epoch_order
from simmatch.data.sources import Dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d

KERNEL = 6
"""Side of the example's patches."""

SAFE_STEP = 0.2
"""Of their iteration, below 2/λmax up to λmax = 10: at larger rates than the published ones M comes near it."""

LEARNING = DynamicsConfig(tolerance=1e-3, max_iterations=2000)
"""Ours while learning: plain images make M so ill-conditioned that at 1e-2 the objective jumps by a factor of ten."""

OBJECTIVE_TOLERANCE, OBJECTIVE_ITERATIONS = 1e-4, 50_000


@dataclass(frozen=True)
class Rates:
    """η and τ of our rules, and what they are in the authors' units."""

    lr: float
    tau: float
    step: float = SAFE_STEP

    @property
    def authors_rate(self) -> float:
        """ρ."""
        return self.lr * CHANNELS / 4

    @property
    def authors_tau(self) -> float:
        """τ'."""
        return self.tau / 2


PUBLISHED = Rates(lr=4 * RATE / CHANNELS, tau=2 * TAU, step=1.0)


# -- both sides --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class State:
    """W [K, C, k, k] and M [K, K]."""

    feedforward: Tensor
    lateral: Tensor

    @classmethod
    def initial(cls, in_channels: int, seed: int) -> State:
        """As the authors' example begins: torch's own convolution, and M = I."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weight = nn.Conv2d(in_channels, CHANNELS, KERNEL, bias=False).weight
        return cls(weight.detach().clone(), torch.eye(CHANNELS))

    def authors(self, step: float = 1.0, iterations: int = ITERATIONS, tau: float = TAU) -> Any:
        """Their module with these weights."""
        return similarity_matching(
            convolution(self.feedforward), self.lateral, step=step, iterations=iterations, tau=tau
        )

    def own(self, dynamics: DynamicsConfig | None = None, rates: Rates = PUBLISHED) -> SimilarityMatchingConv2d:
        """Our layer with these weights."""
        layer = SimilarityMatchingConv2d(
            self.feedforward.shape[1],
            CHANNELS,
            KERNEL,
            dynamics=one_device(dynamics or DynamicsConfig()),
            plasticity=PlasticityConfig(lr=rates.lr, tau=rates.tau),
        )
        layer.feedforward.copy_(self.feedforward)
        layer.lateral.copy_(self.lateral)
        layer.recertify()
        return layer

    def problem(self, images: Tensor) -> Problem:
        """The columns of these images; without ε, which the authors' library does not have."""
        return Problem(self.lateral, self.own().drive(images), ridge=0.0)


def one_device(dynamics: DynamicsConfig) -> DynamicsConfig:
    """As a user has it who does not shard channels: nothing is exchanged within the dynamics."""
    return dynamics.model_copy(update={"exchange": "gather_state"})


def columns(maps: Tensor) -> Tensor:
    """[B, K, H, W] → [K, N]."""
    return rearrange(maps, "b k h w -> k (b h w)")


@dataclass(frozen=True, eq=False)
class Lesson:
    """The images that both learn from, in the order of a seed."""

    dataset: Dataset
    batch_size: int
    seed: int

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """Images first … last − 1 in that order, a batch at a time, in [0, 1]."""
        images = self.dataset.train_images
        order = epoch_order(len(images), seed=self.seed, epoch=0)
        for start in range(first, last, self.batch_size):
            yield to_unit(images[order[start : min(start + self.batch_size, last)]])

    def start(self) -> State:
        """The state before the first of them."""
        return State.initial(self.dataset.in_channels, self.seed)


@dataclass(frozen=True)
class PynsmPlan:
    """What one call measures."""

    after: tuple[int, ...]
    images: int
    train_images: int
    objective_images: int
    positions: int
    batch_size: int
    rounds: int
    seed: int

    def lesson(self, dataset: Dataset) -> Lesson:
        return Lesson(dataset, self.batch_size, self.seed)

    @classmethod
    def of(cls, options: argparse.Namespace, dataset: Dataset) -> PynsmPlan:
        """Sizes from the options, checked against the data set."""
        quick, batch_size = options.quick, options.batch_size
        train_images = options.train_images or (1000 if quick else 20_000)
        least = batch_size * options.rounds
        positions = (dataset.image_size[0] - KERNEL + 1) * (dataset.image_size[1] - KERNEL + 1)
        plan = cls(
            after=tuple(sorted(options.after or ((500, 1000) if quick else (5000, 20_000, 60_000)))),
            images=options.images or (20 if quick else 200),
            train_images=train_images,
            objective_images=5 if quick else 20,
            positions=options.positions,
            batch_size=batch_size,
            rounds=options.rounds,
            seed=options.seed,
        )
        limits = {
            "after": (plan.after[-1], 1, len(dataset.train_images)),
            "images": (plan.images, 1, len(dataset.test_images)),
            "batch-size": (batch_size, 1, len(dataset.train_images)),
            "train-images": (train_images, least, len(dataset.train_images)),
            "positions": (plan.positions, 1, positions),
        }
        for name, (value, fewest, most) in limits.items():
            if not fewest <= value <= most:
                raise ConfigError(f"--{name}: expected {fewest} to {most}, got {value}")
        return plan


# -- trained weights ---------------------------------------------------------------------------------------------------


def trained_states(lesson: Lesson, after: Sequence[int], report: Report) -> dict[int, State]:
    """Our training's weights after so many images, from the run directory where it holds them already."""
    name = lesson.dataset.name
    recipe = {"data": name, "seed": lesson.seed, "batch_size": lesson.batch_size, "rate": RATE, "tau": TAU}
    folder = report.run_dir / "problems"
    paths = {count: folder / f"{name}-after-{count}.safetensors" for count in sorted(after)}
    stored = {count: load_tensors(path, recipe) for count, path in paths.items()}
    states = {count: State(**tensors) for count, tensors in stored.items() if tensors is not None}
    if len(states) == len(paths):
        return states
    layer = lesson.start().own()
    with report.progress(len(paths)) as step:
        for begin, end in pairwise((0, *paths)):
            step(f"weights after {end} images")
            for batch in lesson.batches(begin, end):
                layer.partial_fit(batch)
            states[end] = State(layer.feedforward.clone(), layer.lateral.clone())
            save_tensors(paths[end], vars(states[end]), recipe)
    return states


# -- learning ----------------------------------------------------------------------------------------------------------


class AuthorsTraining(PynsmTraining):
    """Their training."""

    def state(self) -> State:
        return State(self.feedforward, self.lateral)


class OwnTraining:
    """Ours, from all positions of an image, or from a new sample of them in every update."""

    def __init__(self, state: State, positions: int | None, rates: Rates) -> None:
        self.layer, self.positions = state.own(LEARNING, rates), positions

    def learn(self, batch: Tensor) -> None:
        """One update on images [B, C, H, W]."""
        self.layer.partial_fit(self.layer.prepare(batch, self.positions))

    def state(self) -> State:
        return State(self.layer.feedforward, self.layer.lateral)


def held_out_objective(state: State, images: Tensor) -> float:
    """Relative similarity-matching objective on held-out images, with activities of one and the same solver.

    Both sides' weights are judged by the exact solution of the dynamics. Weights that are not finite have the
    objective infinity.
    """
    if not (state.feedforward.isfinite().all() and state.lateral.isfinite().all()):
        return torch.inf
    layer = state.own(DynamicsConfig(tolerance=OBJECTIVE_TOLERANCE, max_iterations=OBJECTIVE_ITERATIONS))
    y = columns(layer.solve(images).y)
    return layer.objective(images, y, columns=y.shape[1])
