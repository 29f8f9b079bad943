"""The measured unit of the sharded benchmarks: one learning update of a layer, asked of a group of processes.

Every update starts from the same weights and sees the same images, so that all repetitions are the same work, and
counts of exchanges and bytes are the same numbers each time. Restoring the weights and the ranks' common start lie
outside of the measured seconds.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor

from cluster.connections import Traffic
from jobs.benchmarks.problems import Recipe
from jobs.benchmarks.processes import Member, RankGroup
from jobs.benchmarks.timing import Timings, alternate
from simmatch.config import ConfigError, DynamicsConfig, Reduce, parse
from simmatch.data.config import DataConfig
from simmatch.data.order import epoch_order
from simmatch.data.sources import load_dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.rows import split_rows

KERNEL, PADDING = 5, 2
"""Of the measured layer, at stride 1: as many columns per image as the image has pixels."""

BASELINE = "every_iteration"
"""The exchange that all others are compared with; on one rank there is nothing to exchange."""


TRAIN_UPDATES, TRAIN_IMAGES, TRAIN_LOAD = 40, 16, 8192
"""Updates of the weights before anything is measured, and the images of each: as many as there are, or fewer so that
images × channels stay below the last."""


def exchanges() -> tuple[str, ...]:
    """The exchange modes that a configuration may name."""
    return get_args(DynamicsConfig.model_fields["exchange"].annotation)


def modes(tolerance: float) -> dict[str, DynamicsConfig]:
    """Every exchange mode with the solver that it takes on a CPU.

    Raises
    ------
    ConfigError
        A tolerance below 0.
    """
    configs = {}
    for mode in exchanges():
        config = parse(DynamicsConfig, {"exchange": mode, "tolerance": tolerance})
        solver = config.solver_on("cpu", alone=mode == "gather_state")
        configs[mode] = config.model_copy(update={"solver": solver})
    return configs


# -- in the processes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One update as one rank saw it.

    Attributes
    ----------
    seconds: from the common start to the end of the update on this rank; `waited_s` of them blocked in an exchange.
    exchanges, bytes: exchanges started, and bytes that came from the other ranks.
    iterations, residual: of the dynamics; the residual of the worst column.
    """

    seconds: float
    waited_s: float
    exchanges: int
    bytes: int
    iterations: int
    residual: float


@dataclass(frozen=True)
class LayerUnderTest:
    """A rank's shard of a layer, the state that every update starts from, and the batch that it sees."""

    layer: SimilarityMatchingConv2d
    state: dict[str, Tensor]
    images: Tensor


def train(member: Member, recipe: Recipe, images: Tensor) -> dict[str, Tensor]:
    """Weights of a layer of this recipe after one pass over images [B, C, H, W]: an untrained M is the identity."""
    layer = recipe.layer(images.shape[1])
    for start in range(0, len(images), recipe.batch_size):
        layer.partial_fit(images[start : start + recipe.batch_size])
    return {"feedforward": layer.feedforward, "lateral": layer.lateral, "perron": layer.perron}


def keep_inputs(member: Member, weights: dict[str, Tensor], images: Tensor) -> None:
    """Keep full weights, and images for all batches, for the layers to come."""
    member.kept["weights"], member.kept["images"] = weights, images


def set_up(member: Member, name: str, dynamics: DynamicsConfig, batch: int, seed: int, reduce: Reduce = "fast") -> None:
    """Build this rank's shard of the held weights, to learn from the first `batch` held images."""
    weights, images = member.kept["weights"], member.kept["images"]
    layer = _build(member, len(weights["feedforward"]), images.shape[1], dynamics, seed, reduce)
    own = slice(layer.rows.start, layer.rows.stop)
    layer.feedforward.copy_(weights["feedforward"][own])
    layer.lateral.copy_(weights["lateral"][own])
    layer.perron.copy_(weights["perron"])
    layer.recertify()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    member.kept[name] = LayerUnderTest(layer, state, images[:batch])


def update(member: Member, name: str) -> Sample:
    """One update from the state that was set up."""
    bench: LayerUnderTest = member.kept[name]
    exchange, traffic = member.exchange, Traffic(member.mesh)
    bench.layer.load_state_dict(bench.state)
    bench.layer.certify()  # all ranks together, as an update does
    exchange.all_gather(torch.zeros(exchange.world_size, 1)).wait()  # all start together
    before = (traffic.num_exchanges, traffic.bytes_exchanged, traffic.waited_s)
    start = time.perf_counter()
    solution = bench.layer.partial_fit(bench.images)
    seconds = time.perf_counter() - start
    return Sample(
        seconds=seconds,
        waited_s=traffic.waited_s - before[2],
        exchanges=traffic.num_exchanges - before[0],
        bytes=traffic.bytes_exchanged - before[1],
        iterations=solution.num_iters,
        residual=float(solution.residual.amax()) if solution.residual.numel() else 0.0,
    )


def weight_change(member: Member, name: str) -> Tensor:
    """What the last update changed in the own rows of W: [K_g, C, k, k]; none of them on any replica but the first."""
    bench: LayerUnderTest = member.kept[name]
    change = bench.layer.feedforward - bench.state["feedforward"]
    return change if member.mesh.replicas.rank == 0 else change[:0]


def discard(member: Member, name: str) -> None:
    """Forget a layer that was set up."""
    del member.kept[name]


def _build(
    member: Member, channels: int, in_channels: int, dynamics: DynamicsConfig, seed: int, reduce: Reduce
) -> SimilarityMatchingConv2d:
    owners = member.mesh.owners
    return SimilarityMatchingConv2d(
        in_channels,
        channels,
        KERNEL,
        padding=PADDING,
        normalize="contrast",
        dynamics=dynamics,
        seed=seed,
        rows=split_rows(channels, owners.world_size)[owners.rank],
        mesh=member.mesh,
        reduce=reduce,
    )


# -- in the caller -----------------------------------------------------------------------------------------------------


SETTLE_S = 0.02
"""Pause before another group's turn: OpenMP's threads go on spinning for some milliseconds after their last loop."""


class Stopwatch:
    """A clock that shows the seconds the ranks have measured, so that the caller's own time does not count.

    Attributes
    ----------
    total: seconds so far.
    last: the group that measured last.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.last: RankGroup | None = None

    def __call__(self) -> float:
        return self.total


@dataclass
class Candidate:
    """One way to make the update: a group of processes and a configuration of the dynamics.

    Attributes
    ----------
    samples: of every update so far, one `Sample` per rank.
    """

    name: str
    group: RankGroup
    dynamics: DynamicsConfig
    watch: Stopwatch
    samples: list[list[Sample]] = field(default_factory=list)

    def __call__(self) -> None:
        """One update; the last rank to end it counts."""
        if self.watch.last is not self.group:
            time.sleep(SETTLE_S)
            self.watch.last = self.group
        samples: list[Sample] = self.group.ask(update, self.name)
        self.samples.append(samples)
        self.watch.total += max(sample.seconds for sample in samples)

    def fields(self) -> dict[str, Any]:
        """Counts of one update, and what the seconds went into, for a row.

        `counts_repeat`: whether all updates had the same numbers of exchanges and bytes, as they should.
        """
        last = self.samples[-1]
        counts = {tuple((sample.exchanges, sample.bytes) for sample in samples) for samples in self.samples}
        shares = [median(sample.waited_s / sample.seconds for sample in samples) for samples in self.samples[1:]]
        return {
            "exchanges": last[0].exchanges,
            "bytes_per_rank": [sample.bytes for sample in last],
            "bytes": sum(sample.bytes for sample in last),
            "counts_repeat": len(counts) == 1,
            "waiting": median(shares),
            "iterations": max(sample.iterations for sample in last),
            "residual": max(sample.residual for sample in last),
        }


@dataclass(frozen=True)
class Comparison:
    """Candidates that took turns at the same update.

    Attributes
    ----------
    timings: seconds per update.
    change: candidate → ΔW [K, C, k, k] of its last update.
    """

    timings: Timings
    candidates: dict[str, Candidate]
    change: dict[str, Tensor]

    def fields(self, name: str, baseline: str) -> dict[str, Any]:
        """A candidate's part of a row: seconds, ratio to the baseline, counts, and how far its ΔW is from there."""
        reference = self.change[baseline]
        distance = (self.change[name] - reference).norm() / reference.norm().clamp(min=1e-30)
        return {
            **self.timings.spread(name).fields("seconds"),
            **self.timings.speedup(name, baseline).fields("ratio"),
            **self.candidates[name].fields(),
            "distance": float(distance),
        }


def compare(
    ways: Mapping[str, tuple[RankGroup, DynamicsConfig]],
    *,
    batch: int,
    seed: int,
    rounds: int,
    min_s: float,
    exact: Collection[str] = (),
) -> Comparison:
    """Let several ways make the same update in turns, round by round. The groups must hold the same weights.

    exact: names of the ways with `reduce: exact`.
    """
    watch = Stopwatch()
    candidates = {name: Candidate(name, group, dynamics, watch) for name, (group, dynamics) in ways.items()}
    for candidate in candidates.values():
        reduce = "exact" if candidate.name in exact else "fast"
        candidate.group.ask(set_up, candidate.name, candidate.dynamics, batch, seed, reduce)
    timings = alternate(candidates, rounds, min_s=min_s, clock=watch)
    change = {}
    for candidate in candidates.values():
        change[candidate.name] = torch.cat(candidate.group.ask(weight_change, candidate.name))
        candidate.group.ask(discard, candidate.name)
    return Comparison(timings, candidates, change)


def images_within(group: RankGroup, dynamics: DynamicsConfig, *, seed: int, limit_s: float) -> int:
    """How many images an update may have for one way to make it in `limit_s`, judged by an update of one image."""
    group.ask(set_up, "one image", dynamics, 1, seed)
    taken = min(max(sample.seconds for sample in group.ask(update, "one image")) for _ in range(3))
    group.ask(discard, "one image")
    return max(1, int(limit_s / taken))


def sample(name: str, count: int, seed: int) -> Tensor:
    """The first training images in the order of the first epoch: [count, C, H, W] in [0, 1]."""
    stored = load_dataset(DataConfig(name=name)).train_images
    if count > len(stored):
        raise ConfigError(f"--batches: expected at most {len(stored)} images of {name}, got {count}")
    return to_unit(stored[epoch_order(len(stored), seed=seed, epoch=0, images=count)])


def trained(group: RankGroup, data: str, channels: int, seed: int) -> dict[str, Tensor]:
    """Weights of a layer after a short training, see `jobs.benchmarks.problems`; every rank trains the whole layer."""
    batch = max(1, min(TRAIN_IMAGES, TRAIN_LOAD // channels))
    recipe = Recipe(data, channels, TRAIN_UPDATES * batch, batch, columns=0, seed=seed)
    weights: dict[str, Tensor] = group.ask(train, recipe, sample(data, recipe.images, seed))[0]
    return weights
