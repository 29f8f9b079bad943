"""Other ways on a GPU: the plain loop of the dynamics, captured or compiled; `pynsm`'s loop; other dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.benchmarks.problems import Problem
from simmatch.config import DynamicsConfig
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.plasticity import Weights
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import Bound
from simmatch.solvers.dynamics import Dynamics
from simmatch.solvers.tile import Folded, nesterov

State = tuple[Tensor, Tensor, Tensor]
Block = Callable[[Tensor, State], State]


def torch_loop(lateral: Tensor, bound: Bound, config: DynamicsConfig) -> Block:
    """(s d, (y, w_prev, k)) → the state four iterations later, restart included: as in `simmatch.solvers.tile`."""
    folded = Folded.from_lateral(lateral, bound, config, Rows.all(len(lateral)))
    matrix, step = folded.matrix, folded.step

    def block(drive: Tensor, state: State) -> State:
        y, w_prev, k = state
        bias = drive * step
        for iteration in range(4):
            w = torch.addmm(bias, matrix, y)
            following = torch.lerp(w_prev, w, nesterov(k, torch.empty_like(k)) + 1.0).clamp(min=0.0)
            k = k + 1.0
            if iteration == 3:
                k = torch.where(((y - w) * (following - y)).sum(dim=0) > 0, 0.0, k)
            w_prev, y = w, following
        return y, w_prev, k

    return block


def begin(drive: Tensor) -> State:
    return torch.zeros_like(drive), torch.zeros_like(drive), torch.zeros_like(drive[0])


class GraphLoop:
    """The plain loop for a number of iterations, captured once for a tile and replayed for every tile.

    Attributes
    ----------
    y: [K, N], what the last run found.
    """

    def __init__(self, block: Block, drive: Tensor, iterations: int, width: int) -> None:
        self._drive, self._width = drive, min(width, drive.shape[1])
        self._input = drive[:, : self._width].contiguous()
        self.y = torch.empty_like(drive)
        blocks = -(-iterations // 4)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block(self._input, begin(self._input))
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            state = begin(self._input)
            for _ in range(blocks):
                state = block(self._input, state)
            self._output = state[0]

    def run(self) -> None:
        columns = self._drive.shape[1]
        for first in range(0, columns, self._width):
            first = min(first, columns - self._width)  # the last tile overlaps
            where = slice(first, first + self._width)
            self._input.copy_(self._drive[:, where])
            self._graph.replay()
            self.y[:, where].copy_(self._output)


def compiled_loop(block: Block) -> Callable[[Tensor, int], Tensor]:
    """The same through torch.compile."""
    compiled = torch.compile(block)

    def solve(drive: Tensor, iterations: int) -> Tensor:
        state = begin(drive)
        for _ in range(-(-iterations // 4)):
            state = compiled(drive, state)
        return state[0]

    return solve


@dataclass(frozen=True)
class AuthorsLoop:
    """`pynsm`'s loop: projected gradient through automatic differentiation, at its best certain step 1.9/λmax."""

    lateral: Tensor
    step: float

    @classmethod
    def of(cls, problem: Problem) -> AuthorsLoop | None:
        """None where `pynsm` is not installed."""
        try:
            import pynsm  # noqa: F401
        except ImportError:
            return None
        return cls(problem.lateral, 1.9 / problem.bound.value)

    def iterations_needed(self, problem: Problem, tolerance: float) -> int:
        """Iterations of projected gradient until the residual is reached; ours counts them as theirs does."""
        config = DynamicsConfig(
            solver="projected_gradient", step=self.step, tolerance=tolerance, max_iterations=5000, tile_columns=2**14
        )
        return Dynamics(config, problem.rows).solve(problem.drive, self.lateral, problem.bound, alone=False).num_iters

    def solve(self, drive: Tensor, iterations: int) -> Tensor:
        """[K, N] → y [K, N], the columns as an image of K channels."""
        import pynsm

        encoder: Any = torch.nn.Identity()
        model = pynsm.SimilarityMatching(
            encoder=encoder, out_channels=len(drive), iteration_projection=F.relu,
            iteration_lr=self.step, max_iterations=iterations,
        ).to(drive.device)  # fmt: skip
        with torch.no_grad():
            model.competitor.weight.copy_(self.lateral)
        with torch.enable_grad():
            found: Tensor = model(drive.reshape(1, len(drive), 1, -1)).detach()
        return found.reshape(drive.shape)


PASSES = 10
"""Of Lloyd's iteration."""

THRESHOLD = 0.25
"""Of an exemplar's answer, in standard deviations of a white direction; as `jobs.evaluation.rivals.random_filters`."""


@dataclass(frozen=True)
class Dictionary:
    """Filters on the whitened patches of a layer, and what is made of their products.

    Attributes
    ----------
    filters: [R, P]; code: products [R, N] → features [K, N].
    """

    filters: Tensor
    code: Callable[[Tensor], Tensor]

    @classmethod
    def exemplars(cls, patches: Tensor, channels: int) -> Dictionary:
        """Patches drawn from the data [n, P], of norm 1: max(0, a · x̃ − θ)."""
        return cls(F.normalize(patches[:channels], dim=1), lambda columns: columns.sub_(THRESHOLD).clamp_(min=0.0))

    @classmethod
    def k_means(cls, patches: Tensor, channels: int) -> Dictionary:
        """Lloyd's iteration from exemplars, and the triangle max(0, mean_j z_j − z_k), z_k = ‖x̃ − c_k‖."""
        centroids = patches[:channels].clone()
        for _ in range(PASSES):
            nearest = torch.cat([torch.cdist(part, centroids).argmin(dim=1) for part in torch.split(patches, 2**14)])
            sums = torch.zeros_like(centroids).index_add_(0, nearest, patches)
            counts = torch.bincount(nearest, minlength=channels).unsqueeze(1)
            centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        constant = centroids.square().sum(dim=1, keepdim=True)

        def triangle(columns: Tensor) -> Tensor:
            squares = columns[:channels].add_(constant).add_(columns[channels:].square().sum(dim=0))
            z = squares.clamp_(min=0.0).sqrt_()
            return torch.sub(z.mean(dim=0), z, out=z).clamp_(min=0.0)

        return cls(torch.cat([-2 * centroids, torch.eye(patches.shape[1], device=patches.device)]), triangle)

    def maps(self, layer: SimilarityMatchingConv2d, images: Tensor) -> Tensor:
        """Features [B, K, H', W'], on the patches as the layer sees them."""
        prepared = layer.prepare(images)
        filters = self.filters.view(-1, *layer.feedforward.shape[1:])
        columns = self.code(layer.drive(prepared, weights=Weights(filters, layer.lateral, layer.label)))
        return columns.view(len(columns), len(images), *prepared.map_size).transpose(0, 1)
