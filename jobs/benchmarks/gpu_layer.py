"""One layer on a GPU: updates in a row, and encoding; and what every part of the GPU benchmark shares."""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.benchmarks.timing import Spread, Timings, alternate
from jobs.reporting import Report
from simmatch.captured import Updates, new_graph
from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.config import DataConfig
from simmatch.data.order import Batches
from simmatch.data.sources import Dataset, load_dataset, to_unit
from simmatch.devices import check_device
from simmatch.features import FeatureStore
from simmatch.geometry import Patches
from simmatch.inputs import LayerInputs, Staged
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.measurement import measure
from simmatch.parts import timed
from simmatch.profile import Recorder
from simmatch.sharding.mesh import Mesh
from simmatch.solvers.dynamics import Solution

Row = dict[str, Any]


@dataclass(frozen=True)
class GpuPlan:
    """What one call measures, and on what."""

    device: torch.device
    root: str | None
    channels: tuple[int, ...]
    wide: tuple[int, ...]
    values: int
    updates: int
    batch: int
    images: int
    rounds: int
    seed: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> GpuPlan:
        quick = options.quick
        return cls(
            device=check_device(options.device),
            root=options.root,
            channels=tuple(options.channels or ((32,) if quick else (64, 128, 256, 512))),
            wide=tuple(options.wide or ((32,) if quick else (256, 1024, 2048))),
            values=2**15 if quick else 2**26,
            updates=5 if quick else 500,
            batch=10 if quick else 100,
            images=40 if quick else 60_000,
            rounds=options.rounds,
            seed=options.seed,
        )

    def dataset(self, name: str) -> Dataset:
        return load_dataset(DataConfig(name=name, root=self.root))

    def now(self) -> float:
        """Seconds on the clock, once the device has finished its queue."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, candidates: dict[str, Callable[[], object]]) -> Timings:
        return alternate(candidates, self.rounds, clock=self.now)


def batch(dataset: Dataset, update: int, size: int, plan: GpuPlan) -> Tensor:
    """Images of one update, on the device."""
    count = len(dataset.train_images)
    whole = count // size * size  # no smaller last batch
    chosen = Batches(count, size, epochs=update * size // whole + 1, seed=plan.seed, images=whole)[update]
    return to_unit(dataset.train_images[chosen].to(plan.device))


# -- updates and encoding ----------------------------------------------------------------------------------------------


WAYS = ("raised", "recorded", "captured")
"""How updates run: the host waits for the device in each; it looks at recorded faults; updates are replayed."""

LOOK_EVERY = 10
"""Updates between two looks at faults, residuals and the objective."""


def measure_updates(plan: GpuPlan, report: Report) -> None:
    """Updates in a row with their input and metrics: K = 128, 7 × 7, batches of 100 images × 196 positions."""
    dataset = plan.dataset("fashion_mnist")
    modes: dict[str, Row] = {
        "alone": {},
        "gather_state": {"dynamics": DynamicsConfig(exchange="gather_state"), "mesh": Mesh()},
        "every_iteration": {"mesh": Mesh()},
    }
    for mode, changes in modes.items():
        # the iterations of the last are decided by the host
        slow = mode == "every_iteration"
        for way in WAYS[:1] if slow else WAYS:
            updates = max(5, plan.updates // (20 if slow else 1))
            with LayerAtWork(first_layer(plan, **changes), dataset, plan, way) as work:
                report.row(kind="updates", mode=mode, way=way, updates=updates, **times_of(work, updates, plan))


def times_of(work: LayerAtWork, updates: int, plan: GpuPlan) -> Row:
    """Seconds of updates and of their input; waits of the host in updates without a look; parts of one update."""
    few = min(20, updates)
    work.some(few)
    seconds = []
    for _ in range(5):
        started = plan.now()
        work.some(updates // 5)
        seconds.append((plan.now() - started) / (updates // 5))
    row: Row = Spread.of(seconds).fields("seconds_per_update")
    started = plan.now()
    for _ in range(few):
        work.inputs.prepare(next(work.batches))
    row["seconds_of_input"] = (plan.now() - started) / few
    unobserved = partial(work.some, LOOK_EVERY - 1, look=False)
    if plan.device.type == "cuda":
        row["waits"] = synchronisations(unobserved)
    return row | profile(partial(work.some, 1, look=False), plan)


def first_layer(plan: GpuPlan, **changes: Any) -> SimilarityMatchingConv2d:
    """128 channels of 7 × 7 on grey images."""
    rates = PlasticityConfig(lr=0.1, lr_decay_steps=100)
    return SimilarityMatchingConv2d(1, 128, 7, normalize="contrast", plasticity=rates, **changes).to(plan.device)


class LayerAtWork:
    """A layer that learns from batches of images at 196 positions of each, by the parts of the trainer."""

    def __init__(self, layer: SimilarityMatchingConv2d, dataset: Dataset, plan: GpuPlan, way: str) -> None:
        images, recorded = dataset.train_images, way != "raised"
        store = FeatureStore(images, layer.mesh.everyone, batch=500, dtype=torch.float32, device=plan.device)
        whole = len(images) // plan.batch * plan.batch  # no smaller last batch
        order = Batches(len(images), plan.batch, epochs=1000, seed=plan.seed, images=whole)
        self.layer, self.updates = layer, 0
        self.inputs = LayerInputs(
            layer,
            store,
            size=(images.shape[2], images.shape[3]),
            positions=196,
            below=None,
            on_progress=lambda done: None,
        )
        self.batches = self.inputs.staged(order)

        def make(batch: Staged) -> tuple[Patches, Solution]:
            with timed("input"):
                patches = self.inputs.prepare(batch)
            return patches, layer.partial_fit(patches, recorded=recorded)

        self.make = Updates(make, new_graph(plan.device) if way == "captured" else None, layer.mesh.learning)

    def some(self, count: int, *, look: bool = True) -> None:
        """Make some updates; with a `look`, raise faults and measure every tenth."""
        for _ in range(count):
            with timed("input"):
                batch = next(self.batches)
            patches, solution = self.make(batch)
            self.updates += 1
            if look and self.updates % LOOK_EVERY == 0:
                self.layer.raise_faults()
                measure(self.layer, patches, solution)

    def __enter__(self) -> LayerAtWork:
        return self

    def __exit__(self, *_: object) -> None:
        self.batches.close()
        self.make.close()


def synchronisations(action: Callable[[], object]) -> dict[str, int]:
    """How often the host waits for the device, and where."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = (one for one in caught if "synchronizing CUDA operation" in str(one.message))
    return dict(Counter(f"{one.filename.rpartition('/')[2]}:{one.lineno}" for one in waits).most_common())


def profile(action: Callable[[], object], plan: GpuPlan) -> Row:
    """Milliseconds of every part of one update, on the host and on the device; and the longest kernels."""
    recorder = Recorder(plan.device)
    recorder.start()
    with timed("update"):
        action()
        with timed("waiting"):
            plan.now()
    trace = recorder.stop()
    return {
        "host_ms": {name: 1e3 * time.host_s for name, time in trace.parts.items() if time.host_s},
        "device_ms": {name: 1e3 * time.device_s for name, time in trace.parts.items() if time.device_s},
        "kernels": trace.kernels,
    }


def measure_encoding(plan: GpuPlan, report: Report) -> None:
    """60,000 images, K = 128, 7 × 7, stride 1: to residual 1e-2, and with the fixed iterations of evaluation."""
    dataset, layer = plan.dataset("fashion_mnist"), first_layer(plan)
    for update in range(150 if plan.device.type == "cuda" else 2):
        layer.partial_fit(batch(dataset, update, 20, plan))
    images = dataset.train_images[: plan.images].to(plan.device)

    def encode(fixed: bool) -> None:
        for part in torch.split(images, 2000):
            x = to_unit(part)
            F.adaptive_avg_pool2d(layer(x) if fixed else layer.solve(x).y, 4)

    timings = plan.timed({"to 1e-2": partial(encode, False), "fixed iterations": partial(encode, True)})
    for way in timings.seconds:
        columns = plan.images * 22 * 22
        report.row(kind="encode", way=way, images=plan.images, columns=columns, **timings.spread(way).fields("seconds"))
