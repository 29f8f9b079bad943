"""Readouts that learn online, on the stream of bearings, its nine faults as classes.

    kinds    ridge and discriminant on features that do not move, at load 0: as many labels as stated, six draws of them
    moving   features that learn at a constant rate through all loads: sums of the readout describe features of their
             time. Nothing forgotten, forgetting, and sums computed anew from a reservoir; beside random filters

No label reaches the features, so each stack learns the stream once, and all readouts but those that are computed anew
see what it encoded then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from jobs.benchmarks.stream.bearings import bearings
from jobs.benchmarks.stream.prequential import run_stream
from jobs.benchmarks.stream.results import spread
from jobs.benchmarks.stream.rows import Features, Fixed, SimilarityMatching, WithReadout
from jobs.benchmarks.stream.signal_rows import BEARINGS_LAYER, RECOMPUTE_EVERY
from jobs.benchmarks.stream.streams import Labelling, Stream
from jobs.benchmarks.windows import rows_of
from jobs.reporting import Report
from simmatch.config import ModelConfig
from simmatch.model import Stack
from simmatch.online.rate import RateConfig
from simmatch.online.readout import ReadoutConfig

SHARES = (0.01, 0.05, 1.0)
"""Of the labels that are given."""

DRAWS = 6
RATE = 0.1

KINDS: Mapping[str, ReadoutConfig] = {
    "ridge, λ = 0.01": ReadoutConfig(kind="ridge", penalty=0.01, initial_penalty=0.0),
    "ridge, λ = 0.001 + 0.1 F / n": ReadoutConfig(kind="ridge"),
    "discriminant, the same λ": ReadoutConfig(),
}

MOVING: Mapping[str, ReadoutConfig] = {
    "nothing forgotten": ReadoutConfig(),
    "forgetting 0.999": ReadoutConfig(forgetting=0.999),
    "forgetting 0.99": ReadoutConfig(forgetting=0.99),
    "computed anew from 500": ReadoutConfig(reservoir=500),
}

Make = Callable[[], WithReadout]


def measure(folder: Path, quick: bool, seeds: Sequence[int], report: Report) -> None:
    """Both, as rows and tables."""
    stream = replace(bearings(folder, "faults", quick=quick), held_out=())
    rest = replace(stream, segments=(stream.segments[0], stream.segments[-1]))
    draws = range(2 if quick else DRAWS)
    with report.progress(len(KINDS) + len(seeds)) as step:
        known, kinds = encoded(rest, random(stream, seeds[0])), dict[str, list[list[float]]]()
        for name, config in KINDS.items():
            step(name)
            kinds[name] = _accuracies(rest, lambda config=config: remembered(known, config), draws)  # type: ignore[misc]
        _show(f"load 0, random filters on whitened windows, {len(draws)} draws of the labels", kinds, report)
        moving: dict[str, list[list[float]]] = {}
        for seed in seeds:
            step(f"features that move, seed {seed}")
            for name, make in _moving(stream, seed).items():
                found = _accuracies(stream, make, [seed])
                moving[name] = [old + new for old, new in zip(moving.get(name, [[]] * len(SHARES)), found, strict=True)]
        _show(f"all loads, features that learn at the rate {RATE:g}, {len(seeds)} seeds", moving, report)


def _show(title: str, found: Mapping[str, list[list[float]]], report: Report) -> None:
    columns = {f"{100 * share:g}": f"{100 * share:g} % of labels" for share in SHARES}
    rows = [
        {"row": row, **{name: spread(each) for name, each in zip(columns, shares, strict=True)}}
        for row, shares in found.items()
    ]
    for row, shares in found.items():
        report.row(kind="readouts", case=title, row=row, accuracies=dict(zip(columns, shares, strict=True)))
    report.rows_table(title, {"row": "readout"} | columns, rows)


def _accuracies(stream: Stream, make: Make, draws: Sequence[int]) -> list[list[float]]:
    """Prequential, of each share of the labels and each draw."""
    return [[run_stream(stream, make(), Labelling(share), draw).accuracy for draw in draws] for share in SHARES]


# -- features ----------------------------------------------------------------------------------------------------------


def encoded(stream: Stream, features: Features) -> list[Tensor]:
    """Features of all batches, the warm-up's first, each before anything is learnt from it."""
    known = []
    for part in (stream.warm_up, *stream.segments):
        for x, labels in part.batches(stream.batch_size):
            known.append(features.encode(x))
            features.learn(x, labels)
    return known


def remembered(known: Sequence[Tensor], config: ReadoutConfig) -> WithReadout:
    """A row that is given what was encoded; a batch is encoded once, in its order."""
    batches = iter(known)
    return WithReadout(Fixed(lambda _: next(batches)), config)


def random(stream: Stream, seed: int) -> Features:
    """Random filters on whitened windows."""
    stack = Stack(BEARINGS_LAYER, stream.source, seed=seed)
    stack.layer(0).calibrate(stream.warm_up.read(slice(None)))
    return Fixed(rows_of(stack, seed)["random, whitened"])


def _moving(stream: Stream, seed: int) -> dict[str, Make]:
    """Row → how it is made."""
    layer = BEARINGS_LAYER.layers[0]
    plasticity = layer.plasticity.model_copy(update={"lr": RATE})
    model = ModelConfig(layers=(layer.model_copy(update={"plasticity": plasticity}),))

    def learning() -> Features:
        return SimilarityMatching(stream, model, seed, RateConfig())

    def known_before(known: Sequence[Tensor], config: ReadoutConfig) -> Make:
        return lambda: remembered(known, config)

    def anew(config: ReadoutConfig) -> Make:
        return lambda: WithReadout(learning(), config, recompute_every=RECOMPUTE_EVERY)

    known = encoded(stream, learning())
    rows = {name: anew(config) if config.reservoir else known_before(known, config) for name, config in MOVING.items()}
    fixed = encoded(stream, random(stream, seed))
    return rows | {"random filters, nothing forgotten": known_before(fixed, ReadoutConfig())}
