"""Replicas and stages against shards and one rank, one thread each: `python -m jobs.benchmark scaling --axes`.

    replicas    the same update of the same layer by two ranks: 1 × 2 (replicas × shards) in `every_iteration` and
                `gather_state`, and 2 × 1 with the solvers that one rank of all channels may use
    stages      the same pass of a stack of two layers, `schedule: together`: two stages against one rank

Every way starts from the same weights and solves to the same tolerance, in turns. The layers of the stack cost about
the same, so that two stages can be nearly twice as fast as one rank; `busy` is the share of the time in which a stage
does not wait for the other. The weights of the pass are compared bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.connections import Traffic
from cluster.mesh import MeshConfig
from jobs.benchmarks import sweep
from jobs.benchmarks.processes import Host, Member, RankGroup
from jobs.benchmarks.sweep import Cell, Sizes
from jobs.benchmarks.timing import Timings, alternate
from jobs.benchmarks.updates import BASELINE, Stopwatch, keep_inputs, modes, sample, trained
from jobs.reporting import Report
from simmatch.config import DynamicsConfig, LayerConfig, ModelConfig, TrainConfig
from simmatch.fit import Trainer
from simmatch.model import InputConfig, Stack
from simmatch.observer import Observer, Pass

FULL = Sizes((128, 1024), (32,), update_seconds=4.0)
QUICK = Sizes((64,), (8,), update_seconds=0.5)

RANKS = 2
BATCH, UPDATES, QUICK_UPDATES = 50, 40, 6
"""Images of a batch of the stack, and updates of a pass."""

STAGES_TARGET = 1.7
"""How many times as fast two stages should be as one rank."""


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure replicas, then stages.

    Raises
    ------
    ConfigError
        Options out of range.
    """
    sizes = sweep.sizes_of(options, FULL, QUICK, RANKS)
    updates = QUICK_UPDATES if options.quick else UPDATES
    images = sample(options.data, max(max(sizes.batches), BATCH * updates), options.seed)
    with report.progress(len(sizes.channels) * (len(sizes.batches) + 1) + 1) as step:
        cells = []
        with (
            RankGroup([Host()], threads=1) as one,
            RankGroup([Host()] * RANKS, threads=1) as shards,
            RankGroup([Host()] * RANKS, threads=1, mesh=MeshConfig(data=RANKS)) as replicas,
        ):
            for channels in sizes.channels:
                step(f"K = {channels}: learning weights")
                weights = trained(one, options.data, channels, options.seed)
                for group in (one, shards, replicas):
                    group.ask(keep_inputs, weights, images[: max(sizes.batches)])
                ways = _ways(one, shards, replicas, options.tolerance)
                shape = channels, images.shape[2] * images.shape[3]
                slowest = next(iter(ways))
                for cell in sweep.cells(
                    ways, slowest, shape, sizes, options, step, min_s=0.05 if options.quick else 0.3
                ):
                    cells.append(cell)
                    _write_cell(cell, options, report)
        _show_cells(cells, report)
        step("stages")
        with (
            RankGroup([Host()], threads=1) as one,
            RankGroup([Host()] * RANKS, threads=1, mesh=MeshConfig(layer=RANKS)) as stages,
        ):
            _stages(one, stages, images[: BATCH * updates], options, report)


# -- replicas of a layer -----------------------------------------------------------------------------------------------


def _ways(
    one: RankGroup, shards: RankGroup, replicas: RankGroup, tolerance: float
) -> dict[str, tuple[RankGroup, DynamicsConfig]]:
    """Name → the group and its dynamics; one rank first, with each solver."""
    configs = modes(tolerance)
    plain = configs[BASELINE]
    by_column = plain.model_copy(update={"solver": configs["gather_state"].solver})
    return {
        f"one rank, {plain.solver}": (one, plain),
        f"one rank, {by_column.solver}": (one, by_column),
        "1 × 2, every_iteration": (shards, plain),
        "1 × 2, gather_state": (shards, configs["gather_state"]),
        f"2 × 1, {plain.solver}": (replicas, plain),
        f"2 × 1, {by_column.solver}": (replicas, by_column),
    }


def _fastest_alone(cell: Cell) -> str:
    """The fastest way of one rank."""
    seconds = cell.compared.timings
    return min(
        (way for way in seconds.seconds if way.startswith("one rank")), key=lambda way: seconds.spread(way).median
    )


def _write_cell(cell: Cell, options: argparse.Namespace, report: Report) -> None:
    alone = _fastest_alone(cell)
    for way in cell.compared.candidates:
        report.row(
            kind="replicas",
            **cell.fields(),
            tolerance=options.tolerance,
            way=way,
            baseline=alone,
            **cell.compared.timings.rate(way, cell.images).fields("images_per_second"),
            **cell.compared.fields(way, alone),
        )


def _show_cells(cells: list[Cell], report: Report) -> None:
    rows: list[list[Any]] = []
    for cell in cells:
        for way in cell.compared.candidates:
            values = cell.compared.fields(way, _fastest_alone(cell))
            rate = cell.compared.timings.rate(way, cell.images).median
            rows.append(
                [f"{cell.channels} · {cell.images} · {way}", values["seconds"], rate, values["ratio"]]
                + [values[name] for name in ("residual", "exchanges", "bytes", "waiting")]
            )
    columns = [
        "K · images · replicas × shards",
        "s/update",
        "images/s",
        "to one rank",
        "residual",
        "exchanges",
        "bytes",
    ]
    report.table("one update of two ranks with one thread each, against one", [*columns, "waiting"], rows)


# -- stages of a stack -------------------------------------------------------------------------------------------------


def stack_of(images: Tensor) -> Stack:
    """Two layers whose updates, with the encoding for the layer above, take about as long as each other."""
    train, height = TrainConfig(batch_size=BATCH), images.shape[2]
    kernel = 5 if height > 16 else 3
    pool = (height - kernel + 1) // 2
    layers = (
        LayerConfig(out_channels=32, kernel_size=kernel, normalize="contrast", pool=pool, train=train),
        LayerConfig(out_channels=SECOND_CHANNELS, kernel_size=3, normalize="contrast", train=train),
    )
    model = ModelConfig(layers=layers, schedule="together")
    return Stack(model, InputConfig.of(images, num_classes=0))


SECOND_CHANNELS = 144
"""Of the stack's second layer: chosen by measurement."""


@dataclass(frozen=True)
class PassSample:
    """A pass as one rank saw it.

    Attributes
    ----------
    seconds: from the common start to the end of its last update; `waited_s` of them for other ranks.
    digests: layer → sha256 of its weights, of those layers that the rank holds.
    """

    seconds: float
    waited_s: float
    digests: dict[int, str]


class _Ended(Exception):
    """Raised after the last update of a pass: what follows is not measured."""


class _LastPass(Observer):
    """Keeps the layers of this rank, and ends where the pass does."""

    layers: dict[int, str]

    def passed(self, done: Pass) -> None:
        if done.number == done.total:
            self.ended = time.perf_counter()
            self.layers = {
                index: hashlib.sha256(layer.feedforward.numpy().tobytes() + layer.lateral.numpy().tobytes()).hexdigest()
                for index, layer in done.layers.items()
            }
            raise _Ended


def learn_stack(member: Member, images: Tensor) -> PassSample:
    """One pass over images [N, C, H, W], from the beginning."""
    observer, traffic = _LastPass(), Traffic(member.mesh)
    trainer = Trainer(stack_of(images), images, mesh=member.mesh, observer=observer)
    everyone = member.mesh.everyone
    everyone.all_gather(torch.zeros(everyone.world_size, 1)).wait()  # all start together
    waited_s, start = traffic.waited_s, time.perf_counter()
    with suppress(_Ended):
        trainer.fit()
    return PassSample(observer.ended - start, traffic.waited_s - waited_s, observer.layers)


class _Passes:
    """A group that makes passes, and the samples of the latest one."""

    def __init__(self, group: RankGroup, images: Tensor, watch: Stopwatch) -> None:
        self._group, self._images, self._watch = group, images, watch
        self.samples: list[PassSample] = []

    def __call__(self) -> None:
        self.samples = self._group.ask(learn_stack, self._images)
        self._watch.total += max(sample.seconds for sample in self.samples)

    @property
    def digests(self) -> dict[int, str]:
        return {layer: digest for sample in self.samples for layer, digest in sample.digests.items()}


def _stages(one: RankGroup, stages: RankGroup, images: Tensor, options: argparse.Namespace, report: Report) -> None:
    watch = Stopwatch()
    ways = {name: _Passes(group, images, watch) for name, group in (("one rank", one), ("two stages", stages))}
    timings: Timings = alternate(ways, options.rounds, clock=watch)
    equal = ways["one rank"].digests == ways["two stages"].digests
    rows = []
    for name, passes in ways.items():
        busy = [1 - sample.waited_s / sample.seconds for sample in passes.samples]
        ratio = timings.speedup(name, "one rank")
        report.row(
            kind="stages",
            way=name,
            updates=len(images) // BATCH,
            images=len(images),
            busy=busy,
            bits_equal=equal,
            target=STAGES_TARGET,
            **timings.spread(name).fields("seconds"),
            **timings.rate(name, len(images)).fields("images_per_second"),
            **ratio.fields("ratio"),
        )
        rate = timings.rate(name, len(images)).median
        shares = ", ".join(f"{100 * share:.0f} %" for share in busy)
        bits = "yes" if equal else "no"
        rows.append([name, timings.spread(name).median, rate, ratio.median, STAGES_TARGET, shares, bits])
    columns = ["way", "s/pass", "images/s", "to one rank", "target", "busy", "bits equal"]
    report.table("a pass of a stack of two layers, one thread each", columns, rows)
