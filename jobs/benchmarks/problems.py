"""Problems of the dynamics from training: lateral weights M, and drives of images not used in training.

A random M is not representative: how many iterations a solver takes depends on the spectrum of M and on how the drives
lie in it, and both come from learning. So a layer learns, unsupervised, with the geometry and the rates of the first
layer in `jobs/configs/fashion_mnist.yaml` (5 × 5 patches, stride 2, contrast), but without whitening, which is the
harder case: at K = 64 condition 60 instead of 21 after 3,000 images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simmatch.config import ConfigError, DynamicsConfig, PlasticityConfig
from simmatch.data.order import Batches
from simmatch.data.sources import Dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.seeding import seeded
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import Bound, certify_afresh
from simmatch.solvers.dynamics import Dynamics
from simmatch.tensor_files import write_tensors

EXACT = 1e-10
"""Residual of what is taken for y*: at condition 1e4 an error of 1e-6 at most."""


@dataclass(frozen=True)
class Recipe:
    """Everything a problem depends on.

    Attributes
    ----------
    data: name of the data set.
    channels: K.
    images: learnt from, in batches of `batch_size`. The first batches count for nothing: with η/τ = 0.2 M forgets
        its start within 30 updates, and then follows the mean over the last lr_decay_steps and more. With τ = 1
        it would keep 7 % of it then: at K = 64 a condition of 29 instead of 56.
    columns: N, drives kept.
    seed: of the weights, the order of the images, and the columns.
    tolerance: residual that activities are learnt from at.
    """

    data: str
    channels: int
    images: int
    batch_size: int
    columns: int
    seed: int
    kernel_size: int = 5
    stride: int = 2
    padding: int = 2
    lr: float = 0.1
    lr_decay_steps: int = 100
    tau: float = 0.5
    tolerance: float = 1e-3

    def layer(self, in_channels: int) -> SimilarityMatchingConv2d:
        """The layer at its start."""
        return SimilarityMatchingConv2d(
            in_channels,
            self.channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            normalize="contrast",
            # nothing to exchange: the fastest solver; so near y* that M does not depend on which one that is
            dynamics=DynamicsConfig(tolerance=self.tolerance, max_iterations=1000, exchange="gather_state"),
            plasticity=PlasticityConfig(lr=self.lr, lr_decay_steps=self.lr_decay_steps, tau=self.tau),
            seed=self.seed,
        )


@dataclass(frozen=True, eq=False)
class Problem:
    """min over y ≥ 0 of ½ yᵀ(M + εI)y − yᵀd for N columns.

    Attributes
    ----------
    lateral: [K, K], M.
    drive: [K, N], d.
    ridge: ε over the mean of M's diagonal.
    """

    lateral: Tensor
    drive: Tensor
    ridge: float = DynamicsConfig().ridge

    @property
    def channels(self) -> int:
        return self.lateral.shape[0]

    @cached_property
    def bound(self) -> Bound:
        """Certified bound of λmax, as every solver gets it."""
        return certify_afresh(self.lateral, self.rows, ridge=self.ridge)

    @property
    def rows(self) -> Rows:
        return Rows.all(self.channels)

    @cached_property
    def system(self) -> Tensor:
        """M + εI in float64, the matrix that is solved for."""
        return self.lateral.double() + self.bound.ridge * torch.eye(
            self.channels, dtype=torch.float64, device=self.lateral.device
        )

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Of M + εI, ascending, float64."""
        eigenvalues: Tensor = torch.linalg.eigvalsh(self.system)
        return eigenvalues

    @property
    def largest(self) -> float:
        """λmax(M + εI)."""
        return float(self.eigenvalues[-1])

    @property
    def condition(self) -> float:
        return float(self.eigenvalues[-1] / self.eigenvalues[0])

    def first(self, columns: int) -> Problem:
        """The same problem for the first so many columns."""
        return Problem(self.lateral, self.drive[:, :columns].contiguous(), self.ridge)

    def residual(self, y: Tensor) -> Tensor:
        """Relative residual of every column of y [K, N], in float64 and from the formula, not from a solver: [N]."""
        y, drive = y.double(), self.drive.double()
        gradient = self.system @ y - drive
        worst = torch.minimum(self.system.diagonal().unsqueeze(1) * y, gradient).abs().amax(dim=0)
        scale = drive.abs().amax(dim=0)
        # an activity below zero is not a solution, for any gradient
        return torch.where((y < 0).any(dim=0), torch.inf, worst / torch.where(scale > 0, scale, 1.0))

    def exact(self) -> Tensor:
        """y* [K, N] in float64, to a residual of `EXACT`, checked."""
        lateral, drive = self.lateral.double(), self.drive.double()
        config = DynamicsConfig(tolerance=EXACT, max_iterations=200_000, check_every=10, ridge=self.ridge)
        bound = certify_afresh(lateral, self.rows, ridge=config.ridge)
        y = Dynamics(config, self.rows).solve(drive, lateral, bound).y
        reached = float(self.residual(y).amax())
        # ε comes from the mean of a diagonal in float32 there and float64 here: 1e-6 · 1e-7
        assert reached <= 10 * EXACT, f"no solution to compare with: residual {reached:.1e}, expected {EXACT:.0e}"
        return y


def error(y: Tensor, exact: Tensor) -> float:
    """‖y − y*‖ / ‖y*‖ over all columns."""
    return float((y.double() - exact).norm() / exact.norm())


def trained_problem(
    recipe: Recipe, dataset: Dataset, folder: Path, advance: Callable[[int, int], None] = lambda *_: None
) -> Problem:
    """The problem of a recipe: from `folder` if it was solved there before, else trained and kept there.

    Parameters
    ----------
    advance: called with (updates done, total updates).
    """
    path = folder / f"{recipe.data}-{recipe.channels}.safetensors"
    stored = load_tensors(path, asdict(recipe))
    if stored is not None:
        return Problem(stored["lateral"], stored["drive"])
    _check(recipe, dataset)
    problem = _train(recipe, dataset, advance)
    save_tensors(path, {"lateral": problem.lateral, "drive": problem.drive}, asdict(recipe))
    return problem


def save_tensors(path: Path, tensors: dict[str, Tensor], recipe: dict[str, Any]) -> None:
    """Keep what was trained, with everything that it depends on."""
    write_tensors(path, tensors, {"recipe": json.dumps(recipe)})


def load_tensors(path: Path, recipe: dict[str, Any]) -> dict[str, Tensor] | None:
    """What `save_tensors` kept for the very same recipe; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if json.loads((file.metadata() or {}).get("recipe", "null")) != recipe:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, json.JSONDecodeError):  # another program's, or damaged: trained again
        return None


def _check(recipe: Recipe, dataset: Dataset) -> None:
    """Raise ConfigError where the data set has fewer images or columns than asked for."""
    height, width = recipe.layer(dataset.in_channels).patch.map_size(dataset.image_size)
    available = {
        "images": (recipe.images, len(dataset.train_images)),
        "columns": (recipe.columns, len(dataset.test_images) * height * width),
    }
    for name, (value, most) in available.items():
        if value > most:
            raise ConfigError(f"--{name}: expected at most {most} of {recipe.data}, got {value}")


def _train(recipe: Recipe, dataset: Dataset, advance: Callable[[int, int], None]) -> Problem:
    available = len(dataset.train_images)
    layer = recipe.layer(dataset.in_channels)
    batches = Batches(available, recipe.batch_size, epochs=1, seed=recipe.seed, images=recipe.images)
    for step in range(len(batches)):
        advance(step, len(batches))
        chosen = batches[step]
        layer.partial_fit(to_unit(dataset.train_images[chosen]))
    return Problem(layer.lateral.clone(), _drives(layer, recipe, dataset))


def _drives(layer: SimilarityMatchingConv2d, recipe: Recipe, dataset: Dataset) -> Tensor:
    """Drives [K, N] at random positions of random test images."""
    generator = seeded("columns", recipe.seed)
    height, width = layer.patch.map_size(dataset.image_size)
    positions = height * width
    images = min(len(dataset.test_images), 4 * -(-recipe.columns // positions))  # about a quarter of their columns
    chosen = torch.randperm(len(dataset.test_images), generator=generator)[:images]
    drive = layer.drive(to_unit(dataset.test_images[chosen]))
    kept = torch.randperm(drive.shape[1], generator=generator)[: recipe.columns]
    return drive[:, kept].contiguous()
