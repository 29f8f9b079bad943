"""Novelty: how well records of a held-out class are told from the others, and what weights do against outliers.

    ROC       a model learns all classes but one. Area under the curve for other records of these classes against those
              of the held-out one; then that class arrives among the others, a tenth of the records, and those of it are
              counted until one is novel
    outliers  some of the records that are learnt from, from the first on, are noise with a drawn label, with and
              without weights; accuracy on clean records

Rivals see the same: an isolation forest on the features, an autoencoder on features and on records, both made from all
records learnt from, in batch. They do not forget, and an autoencoder takes many passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from torch import Generator, Tensor, nn

from jobs.benchmarks.stream.stationary import Draw, images, windows_at
from jobs.benchmarks.stream.watched import BATCH, Watched, Watching
from jobs.reporting import Report
from simmatch.online.novelty import NoveltyConfig
from simmatch.seeding import seeded

LEARNT, TESTED = 5_000, 2_000
"""Records learnt from, and records scored afterwards."""

CLASSES = {"bearings": 9, "images": 10}

OUTLIERS = (0.0, 0.01, 0.05)
"""Shares of the records learnt from."""

SLOPES: Mapping[str, float | None] = {"no weights": None, "slope 1": 1.0, "slope 3": 3.0}
"""How outliers are weighed: `NoveltyConfig.slope`."""

EPOCHS, HIDDEN, CODE = 20, 128, 32
"""Of the autoencoder."""


@dataclass(frozen=True, eq=False)
class Without:
    """Records without those of one class, or only these."""

    draw: Draw
    held_out: int

    def usual(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Records of the other classes."""
        return self._kept(count, generator, novel=False)

    def novel(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Records of the held-out class."""
        return self._kept(count, generator, novel=True)

    def _kept(self, count: int, generator: Generator, *, novel: bool) -> tuple[Tensor, Tensor]:
        parts: list[tuple[Tensor, Tensor]] = []
        while sum(len(labels) for _, labels in parts) < count:
            x, labels = self.draw(2 * count, generator)
            kept = (labels == self.held_out) == novel
            parts.append((x[kept], labels[kept]))
        return torch.cat([x for x, _ in parts])[:count], torch.cat([labels for _, labels in parts])[:count]


def measure(folder: Path, quick: bool, seeds: Sequence[int], report: Report) -> None:
    """Areas and delays, then accuracies among outliers, as rows and tables."""
    draws = {"bearings": windows_at(folder, 0), "images": images(0)}
    for kind, draw in draws.items():
        held_out = range(1 if quick else CLASSES[kind])
        found = [_held_out(kind, Without(draw, each), seed) for each in held_out for seed in seeds]
        rows = []
        for name in found[0][0]:
            areas = [each[name] for each, _ in found]
            rows.append({"data": kind, "score": name, "area": mean(areas), "least": min(areas)})
            report.row(kind="area under ROC", **rows[-1], areas=areas)
        headings = {"score": f"{kind}: score", "area": "area under ROC, mean of classes and seeds", "least": "least"}
        report.rows_table("one class held out", headings, rows)
        figures = {key: mean(each[key] for _, each in found) for key in found[0][1]}
        report.row(kind="novel class", data=kind, **figures, delays=[each["delay"] for _, each in found])
    for kind, draw in draws.items():
        rows = list(_outliers(kind, draw, seeds[:1] if quick else seeds))
        for row in rows:
            report.row(kind="outliers", **row)
        headings = {"share": f"{kind}: outliers", "weights": "weights", "accuracy": "accuracy", "least": "least",
                    "caught": "outliers weighed less", "lost": "others weighed less"}  # fmt: skip
        report.rows_table("outliers while learning", headings, rows)


# -- a class held out --------------------------------------------------------------------------------------------------


def _held_out(kind: str, records: Without, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Area under the ROC curve of each score; and what happened when the held-out class came."""
    generator = seeded("held out", seed, records.held_out)
    learnt = records.usual(LEARNT, generator)
    model = Watched(kind, learnt, seed)
    usual, novel = records.usual(TESTED, generator)[0], records.novel(TESTED // 4, generator)[0]
    areas = {name: area(score(usual), score(novel)) for name, score in _scores(model, learnt[0], seed).items()}
    arrived = [model.see(*_mixed(records, generator)) for _ in range(1_000 // BATCH)]
    flags = torch.cat([seen.novel[-BATCH // 10 :] for seen in arrived])  # each batch ends with the held-out class
    false = torch.cat([seen.novel[: -BATCH // 10] for seen in arrived])
    first = int(flags.int().argmax()) + 1 if bool(flags.any()) else len(flags) + 1
    return areas, {"delay": first, "found": float(flags.double().mean()), "false": float(false.double().mean())}


def _mixed(records: Without, generator: Generator) -> tuple[Tensor, Tensor]:
    """A batch of which the last tenth is of the held-out class, whose labels are not known: any other class's."""
    usual, novel = records.usual(BATCH - BATCH // 10, generator), records.novel(BATCH // 10, generator)
    return torch.cat([usual[0], novel[0]]), torch.cat([usual[1], usual[1][: len(novel[1])]])


def area(usual: Tensor, novel: Tensor) -> float:
    """Area under the ROC curve: the probability that a novel record scores higher than a usual one.

    >>> area(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
    0.875
    """
    ordered = usual.double().sort().values
    below = torch.searchsorted(ordered, novel.double()) + torch.searchsorted(ordered, novel.double(), right=True)
    return float(below.double().mean()) / (2 * len(usual))


def _scores(model: Watched, learnt: Tensor, seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name → novelty of records."""
    from sklearn.ensemble import IsolationForest

    def features(x: Tensor) -> Tensor:
        return torch.cat([model.stack.encode(part).features for part in torch.split(x, 500)])

    def signal(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([model.stack.encode(part).signals[name] for part in torch.split(x, 500)])

    known = features(learnt)
    forest = IsolationForest(n_estimators=200, random_state=seed).fit(known.numpy())
    of_features, of_records = _autoencoder(known, seed), _autoencoder(learnt.flatten(1), seed)
    return {
        "distance to the memory": lambda x: model.detector.score(features(x)),
        "isolation forest": lambda x: -torch.from_numpy(forest.score_samples(features(x).numpy())),
        "autoencoder of the features": lambda x: of_features(features(x)),
        "autoencoder of the records": lambda x: of_records(x.flatten(1)),
        **{name: signal(name) for name in ("objective", "residual", "active")},
    }


def _autoencoder(rows: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """Trained on rows [n, P]; gives the squared error of each row."""
    sizes = (rows.shape[1], HIDDEN, CODE, HIDDEN, rows.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())][:-1]
    network, generator = nn.Sequential(*layers), seeded("autoencoder", seed)
    centre, scale = rows.mean(dim=0), rows.std(dim=0).clamp(min=1e-3 * float(rows.std()))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    scaled = (rows - centre) / scale
    for _ in range(EPOCHS):
        for part in torch.split(torch.randperm(len(rows), generator=generator), 128):
            optimizer.zero_grad()
            (network(scaled[part]) - scaled[part]).square().mean().backward()
            optimizer.step()

    @torch.no_grad()
    def error(given: Tensor) -> Tensor:
        each = (given - centre) / scale
        deviation: Tensor = (network(each) - each).square().mean(dim=1)
        return deviation

    return error


# -- outliers ----------------------------------------------------------------------------------------------------------


def _outliers(kind: str, draw: Draw, seeds: Sequence[int]) -> Iterator[dict[str, object]]:
    for share in OUTLIERS:
        for name, slope in SLOPES.items():
            runs = [_among_outliers(kind, draw, share, slope, seed) for seed in seeds]
            accuracies = [run["accuracy"] for run in runs]
            means = {key: mean(run[key] for run in runs) for key in ("accuracy", "caught", "lost")}
            yield {"data": kind, "share": share, "weights": name, **means, "least": min(accuracies)}


def _among_outliers(kind: str, draw: Draw, share: float, slope: float | None, seed: int) -> dict[str, float]:
    """Accuracy on clean records after learning among outliers, and which of the later half weighed less."""
    generator = seeded("outliers", seed)
    tested = draw(TESTED, generator)
    first, second = (_polluted(draw(LEARNT // 2, generator), share, generator) for _ in range(2))
    watching = Watching(weighted=slope is not None, novelty=NoveltyConfig(slope=slope or 0.0))
    model = Watched(kind, first[:2], seed, watching)
    weights = [
        model.see(second[0][part], second[1][part]).weights for part in torch.split(torch.arange(len(second[1])), BATCH)
    ]
    less, outlying = torch.cat(weights) < 1, second[2]
    errors = torch.cat([model.errors(x, y) for x, y in zip(*(torch.split(each, 500) for each in tested), strict=True)])
    caught = float(less[outlying].double().mean()) if bool(outlying.any()) else 0.0
    return {"accuracy": 1 - float(errors.mean()), "caught": caught, "lost": float(less[~outlying].double().mean())}


def _polluted(records: tuple[Tensor, Tensor], share: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Records of which a share is noise of the same deviation, with a label drawn at random; and which they are."""
    x, labels = records[0].clone(), records[1].clone()
    outlying = torch.rand(len(labels), generator=generator) < share
    noise = x.mean() + x.std() * torch.randn(x.shape, generator=generator)
    x[outlying] = noise[outlying]
    labels[outlying] = torch.randint(int(labels.max()) + 1, labels.shape, generator=generator)[outlying]
    return x, labels, outlying
