"""The layer of the authors' example in their library, `pynsm` 1.0.1, and in ours: one state, one order of images.

50 channels, 6 × 6 patches, images in [0, 1] as they are, SGD at 0.05 and τ = 0.1. Their projection is the ReLU; without
it their iteration does not solve the nonnegative problem at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jobs.benchmarks.problems import Problem
from jobs.reporting import Report
from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.order import epoch_order
from simmatch.data.sources import Dataset, to_unit
from simmatch.files import write_whole
from simmatch.geometry import draw_positions
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.seeding import seeded

CHANNELS, KERNEL = 50, 6
RATE, TAU = 0.05, 0.1
"""The authors' ρ and τ'. One of their steps is one of ours at η = 4ρ/K and τ = 2τ'."""

AUTHORS_ITERATIONS = 40
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

    def authors(self, step: float = 1.0, iterations: int = AUTHORS_ITERATIONS, tau: float = TAU) -> Any:
        """Their module with these weights."""
        import pynsm

        encoder = nn.Conv2d(self.feedforward.shape[1], CHANNELS, KERNEL, bias=False)
        model = pynsm.SimilarityMatching(
            encoder=encoder,
            out_channels=CHANNELS,
            tau=tau,
            iteration_projection=F.relu,
            iteration_lr=step,
            max_iterations=iterations,
        )
        with torch.no_grad():
            encoder.weight.copy_(self.feedforward)
            model.competitor.weight.copy_(self.lateral)
        return model

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


# -- trained weights ---------------------------------------------------------------------------------------------------


def trained_states(lesson: Lesson, after: Sequence[int], report: Report) -> dict[int, State]:
    """Our training's weights after so many images, from the run directory where it holds them already."""
    name = lesson.dataset.name
    recipe = {"data": name, "seed": lesson.seed, "batch_size": lesson.batch_size, "rate": RATE, "tau": TAU}
    folder = report.run_dir / "problems"
    paths = {count: folder / f"{name}-after-{count}.safetensors" for count in sorted(after)}
    stored = {count: _load(path, recipe) for count, path in paths.items()}
    found = {count: state for count, state in stored.items() if state is not None}
    if len(found) == len(paths):
        return found
    layer = lesson.start().own()
    with report.progress(len(paths)) as step:
        for begin, end in pairwise((0, *paths)):
            step(f"weights after {end} images")
            for batch in lesson.batches(begin, end):
                layer.partial_fit(batch)
            found[end] = State(layer.feedforward.clone(), layer.lateral.clone())
            save = partial(save_file, vars(found[end]), metadata={"recipe": json.dumps(recipe)})
            write_whole(paths[end], save)
    return found


def _load(path: Path, recipe: dict[str, Any]) -> State | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if json.loads((file.metadata() or {}).get("recipe", "null")) != recipe:
                return None
            return State(file.get_tensor("feedforward"), file.get_tensor("lateral"))
    except (SafetensorError, json.JSONDecodeError):  # not ours, or damaged: made again
        return None


# -- learning ----------------------------------------------------------------------------------------------------------


class Authors:
    """Their training loop, as in their example: of their module, at rate ρ."""

    def __init__(self, model: Any, rate: float) -> None:
        self.model, self.optimiser = model, torch.optim.SGD(model.parameters(), lr=rate)

    def learn(self, batch: Tensor) -> None:
        y = self.model(batch)
        loss = self.model.loss(batch, y)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def state(self) -> State:
        return State(self.model.encoder.weight.detach(), self.model.competitor.weight.detach())


class Own:
    """Ours, from all positions of an image or from some, drawn anew for every update."""

    def __init__(self, state: State, positions: int | None, rates: Rates) -> None:
        self.layer, self.positions = state.own(LEARNING, rates), positions

    def learn(self, batch: Tensor) -> None:
        if self.positions is None:
            self.layer.partial_fit(batch)
            return
        map_size = self.layer.patch.map_size((batch.shape[2], batch.shape[3]))
        generator = seeded("positions", self.layer.seed, int(self.layer.updates))
        drawn = draw_positions(self.positions, len(batch), map_size, generator)
        self.layer.partial_fit(self.layer.prepare(batch, drawn))

    def state(self) -> State:
        return State(self.layer.feedforward, self.layer.lateral)


def held_out_objective(state: State, images: Tensor) -> float:
    """Relative similarity-matching objective on images not learnt from, activities solved by one and the same solver.

    Whoever learnt the weights: what is judged is what they make of the input once the dynamics are solved. Weights that
    are not finite have the objective infinity.
    """
    if not (state.feedforward.isfinite().all() and state.lateral.isfinite().all()):
        return torch.inf
    layer = state.own(DynamicsConfig(tolerance=OBJECTIVE_TOLERANCE, max_iterations=OBJECTIVE_ITERATIONS))
    y = columns(layer.solve(images).y)
    return layer.objective(images, y, columns=y.shape[1])
