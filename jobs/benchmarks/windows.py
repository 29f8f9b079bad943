"""1-D layers on signals: `python -m jobs.benchmark signals`.

    accuracy  one readout, `fit_ridge`, on the features of `--config` and of its rivals, all from the same windows
    speed     processor time of `partial_fit` of one layer on windows of 256 samples in memory, all positions, one
              thread; and of reading as many windows from the file
    part      share of the time of such updates in each part, as a profiler of torch sees it

Rivals: Gaussian filters of the layer's geometry with ReLU, on the samples (`random`) and on samples whitened as the
layer's (`random, whitened`), pooled and raised to a power as the layer's activities; and magnitudes of the spectrum.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cluster.config import RunConfig
from jobs.benchmarks.timing import Spread
from jobs.options import add_set, at_least, override, read_yaml
from jobs.reporting import Report
from simmatch.config import DynamicsConfig, ModelConfig, PlasticityConfig, parse
from simmatch.data.sources import Dataset, load_dataset
from simmatch.data.staging import Images
from simmatch.fit import Trainer
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.layer_1d import SimilarityMatchingConv1d
from simmatch.model import Stack, pooled
from simmatch.parts import PARTS, UPDATE, timed
from simmatch.profile import Recorder
from simmatch.readout import fit_ridge
from simmatch.seeding import seeded

DEFAULT = Path(__file__).parents[1] / "configs" / "bearings.yaml"
ENCODED = 500
"""Windows that are encoded at a time."""

CHANNELS, LENGTH, KERNEL, STRIDE, BATCH = 64, 256, 32, 8, 64
WARM, UPDATES, PROFILED = 20, 60, 10
"""Updates before those that are timed, those of a round, and those that are profiled."""

TARGET = 5_000
"""Windows per second on one thread."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark in addition to the common ones."""
    parser.add_argument("--config", default=str(DEFAULT), metavar="FILE", help="of the job (default: %(default)s)")
    add_set(parser)
    parser.add_argument("--seeds", type=at_least(1), default=5, metavar="N", help="of weights and filters (default: 5)")


def run(options: argparse.Namespace, report: Report) -> None:
    """Accuracies, then speed."""
    config = parse(RunConfig, override(read_yaml(Path(options.config)), list(options.set)))
    dataset = load_dataset(config.data)
    _accuracies(config.model, dataset, 1 if options.quick else options.seeds, options.seed, report)
    _speed(dataset, options.rounds, report)


# -- accuracy ----------------------------------------------------------------------------------------------------------


def _accuracies(model: ModelConfig, dataset: Dataset, seeds: int, first: int, report: Report) -> None:
    found: dict[str, list[float]] = {}
    with report.progress(seeds) as step:
        for seed in range(first, first + seeds):
            step(f"seed {seed}")
            stack = Stack(model, dataset.source, seed=seed)
            Trainer(stack, dataset.train_images, dataset.train_labels, encode_batch=ENCODED).fit()
            for name, features in rows_of(stack, seed).items():
                accuracy = accuracy_of(features, dataset)
                found.setdefault(name, []).append(accuracy)
                report.row(kind="accuracy", row=name, seed=seed, accuracy=accuracy)
    rows = [
        {"row": name, "accuracy": float(torch.tensor(values).mean()), "min": min(values), "max": max(values)}
        for name, values in found.items()
    ]
    headings = {"row": "features", "accuracy": "accuracy, mean", "min": "least", "max": "greatest"}
    report.rows_table(f"ridge readout, {seeds} seeds, test windows: {len(dataset.test_images):,}", headings, rows)


def rows_of(stack: Stack, seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name → features of windows: of the stack, and of what is compared with its first layer."""
    layer, config = stack.layer(0), stack.config.layers[0]
    drawn = torch.randn(layer.feedforward.shape, generator=seeded("random filters", seed))

    def random(weight: Tensor) -> Callable[[Tensor], Tensor]:
        geometry = layer.patch.convolution
        return lambda x: pooled(
            F.conv2d(x, weight, stride=geometry.strides, padding=geometry.margins).clamp(min=0), config
        ).flatten(1)

    rows = {"similarity matching": stack.features, "random": random(drawn)}
    if layer.whiten:
        rows["random, whitened"] = random((drawn.flatten(1) @ layer.whitening).reshape(drawn.shape))
    return rows | {"spectrum": lambda x: torch.fft.rfft(x).abs().flatten(1)}


def accuracy_of(features: Callable[[Tensor], Tensor], dataset: Dataset) -> float:
    """Of a ridge readout on the test windows."""

    def encoded(images: Images) -> Tensor:
        parts = torch.split(torch.arange(len(images)), ENCODED)
        return torch.cat([features(images[part]) for part in parts])

    readout = fit_ridge(encoded(dataset.train_images), dataset.train_labels)
    right = readout.predict(encoded(dataset.test_images)) == dataset.test_labels
    return float(right.double().mean())


# -- speed -------------------------------------------------------------------------------------------------------------


def _speed(dataset: Dataset, rounds: int, report: Report) -> None:
    torch.set_num_threads(1)
    order = torch.randperm(len(dataset.train_images), generator=seeded("windows", 0))
    batches = [part for part in torch.split(order, BATCH) if len(part) == BATCH][: WARM + UPDATES]
    rows = []
    for exchange in ("gather_state", "every_iteration"):  # the solvers of both: coordinate descent, gradient
        layer = _layer("coordinate_descent" if exchange == "gather_state" else "accelerated", dataset.in_channels)
        signals = [rearrange(dataset.train_images[part], "b c 1 t -> b c t")[..., :LENGTH] for part in batches]
        for x in signals[:WARM]:
            layer.partial_fit(x)
        taken = [[_processor_s(partial(layer.partial_fit, x)) for x in signals[WARM:]] for _ in range(rounds)]
        reading = [_processor_s(partial(dataset.train_images.__getitem__, part)) for part in batches]
        update_s, rate = median(chain(*taken)), Spread.of([BATCH / median(each) for each in taken])
        row = {"solver": layer.dynamics.solver, **rate.fields("windows_per_second")}
        row |= {"update_us": 1e6 * update_s / BATCH, "read_us": 1e6 * median(reading) / BATCH, "target": TARGET}
        report.row(kind="speed", **row)
        rows.append(row | {"part": _parts(layer, signals[-PROFILED:], report)})
    headings = {
        "solver": "solver", "windows_per_second": "windows / s", "update_us": "µs of an update, per window",
        "read_us": "µs to read a window", "part": "share of the time",
    }  # fmt: skip
    report.rows_table("one thread, C = 1, T = 256, k = 32, stride 8, K = 64, batch 64, all positions", headings, rows)


def _layer(solver: str, channels: int) -> SimilarityMatchingConv1d:
    dynamics = parse(DynamicsConfig, {"solver": solver})
    plasticity = PlasticityConfig(lr_decay_steps=100)
    return SimilarityMatchingConv1d(channels, CHANNELS, KERNEL, stride=STRIDE, dynamics=dynamics, plasticity=plasticity)


def _processor_s(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def _parts(layer: SimilarityMatchingConv2d, signals: list[Tensor], report: Report) -> str:
    """The parts of an update that take most, in a few words."""
    recorder = Recorder(torch.device("cpu"))
    recorder.start()
    for x in signals:
        with timed(UPDATE):
            layer.partial_fit(x)
    parts = recorder.stop().parts
    seconds = {name: parts[name].host_s for name in PARTS}
    total = sum(seconds.values())
    shares = {name: each / total for name, each in seconds.items() if each > 0.01 * total}
    report.row(kind="part", solver=layer.dynamics.solver, **shares)
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in sorted(shares.items(), key=lambda each: -each[1]))
