"""Learning beside `pynsm`: the same images in the same order from the same state, both sides at the same few rates.

The measure is the held-out objective, as a function of training images and of seconds. A round of the clock is the next
part of the training of each, so that other load on the machine slows all of them.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch

from jobs.benchmarks.pynsm_layer import (
    PUBLISHED,
    AuthorsTraining,
    OwnTraining,
    PynsmPlan,
    Rates,
    State,
    held_out_objective,
)
from jobs.benchmarks.timing import Timings, alternate
from jobs.reporting import Report
from simmatch.data.sources import Dataset, to_unit

RATES = (PUBLISHED, Rates(lr=0.02, tau=1.0), Rates(lr=0.1, tau=1.0), Rates(lr=0.3, tau=1.0))
"""Tried by both sides."""

MARKS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 400, 600)
"""Batches after which the objective is computed; the batches between two of them are a timed round."""

AFTER = (1000, 5000, 20_000)
"""Images after which the best objective of each side is reported, and below `REACHED` the fewest seconds."""

REACHED = (0.1, 0.014)

SOME = "simmatch, some positions"

Row = dict[str, Any]
Key = tuple[str, Rates]
"""Who learns, and how fast."""

Curve = list[tuple[int, float, float, float]]
"""Images learnt from, seconds of learning, objective, λmax."""


def edges(train_images: int, batch_size: int) -> list[int]:
    """Images after which both sides are compared: marks, reported numbers and the end, in whole batches before it.

    >>> edges(1050, 100)
    [0, 100, 200, 300, 400, 500, 700, 1000, 1050]
    """
    marks = {mark * batch_size for mark in MARKS} | {-(-images // batch_size) * batch_size for images in AFTER}
    return [0, *sorted(mark for mark in marks if mark < train_images), train_images]


def learners(start: State, positions: int) -> dict[Key, AuthorsTraining | OwnTraining]:
    """Everyone who is timed, from the same state."""
    sides: dict[Key, AuthorsTraining | OwnTraining] = {}
    for rates in RATES:
        sides["pynsm", rates] = AuthorsTraining(start.authors(rates.step, tau=rates.authors_tau), rates.authors_rate)
        sides["simmatch", rates] = OwnTraining(start, None, rates)
        sides[SOME, rates] = OwnTraining(start, positions, rates)
    return sides


def measure_training(plan: PynsmPlan, dataset: Dataset, report: Report) -> list[Row]:
    """Objective and time of both sides at all rates, and the best of each."""
    curves, timings = learn(plan, dataset, report)
    rows = []
    for key, curve in curves.items():
        for images, seconds, objective, _ in curve:
            report.row(kind="learning", **_fields(key), images=images, seconds=seconds, objective=objective)
        rows.append(_row(key, curve, timings) | {"positions": plan.positions if key[0] == SOME else None})
        report.row(kind="training", **rows[-1])
    _tables(rows, curves, plan, report)
    published = [row for row in rows if (row["lr"], row["tau"]) == (PUBLISHED.lr, PUBLISHED.tau)]
    return [row | {"label": f"train\n{row['trainer']}"} for row in published if row["trainer"] != "pynsm"]


def learn(plan: PynsmPlan, dataset: Dataset, report: Report) -> tuple[dict[Key, Curve], Timings]:
    """What each has made of the held-out images on its way, and what it took."""
    lesson = plan.lesson(dataset)
    held_out = to_unit(dataset.test_images[: plan.objective_images])
    everyone, spare = (learners(lesson.start(), plan.positions) for _ in range(2))
    marks = edges(plan.train_images, plan.batch_size)
    parts = {key: pairwise(marks) for key in everyone}
    states: dict[Key, list[tuple[float, float]]] = {key: [] for key in everyone}

    def advance(key: Key) -> None:
        for batch in lesson.batches(*next(parts[key])):
            everyone[key].learn(batch)

    first = next(lesson.batches(0, plan.batch_size))
    with report.progress(len(marks)) as step:

        def look() -> None:
            step(f"training on {plan.train_images} images")
            for key, learner in everyone.items():
                state = learner.state()
                states[key].append((held_out_objective(state, held_out), _largest(state)))

        timings = alternate(
            {_name(*key): partial(advance, key) for key in everyone},
            len(marks) - 1,
            warm_up={_name(*key): partial(learner.learn, first) for key, learner in spare.items()},
            after_round=look,  # the first time before anything was learnt
        )
    curves = {}
    for key, by_mark in states.items():
        seconds = accumulate(timings.seconds[_name(*key)], initial=0.0)
        curves[key] = [(*where, *state) for where, state in zip(zip(marks, seconds, strict=True), by_mark, strict=True)]
    return curves, timings


def _name(trainer: str, rates: Rates) -> str:
    return f"{trainer}, η {rates.lr:g}, τ {rates.tau:g}"


def _fields(key: Key) -> Row:
    return {"trainer": key[0], "lr": key[1].lr, "tau": key[1].tau}


def _largest(state: State) -> float:
    """λmax(M); infinity where M is not finite."""
    finite = bool(state.lateral.isfinite().all())
    return float(torch.linalg.eigvalsh(state.lateral.double())[-1]) if finite else torch.inf


def _row(key: Key, curve: Curve, timings: Timings) -> Row:
    """One learner after its training."""
    name, rival = _name(*key), _name("pynsm", key[1])
    images, total, objective, largest = curve[-1]
    return {
        **_fields(key),
        "pynsm_step": key[1].step if key[0] == "pynsm" else None,
        "images": images,
        "objective_before": curve[0][2],
        "objective": objective,
        "largest_eigenvalue": largest,
        "images_per_second": images / total,
        "speedup_total": sum(timings.seconds[rival]) / total,
        **timings.speedup(name, rival).fields("speedup"),
    }


def after(curve: Curve, images: int) -> float:
    """Objective once at least so many images were learnt from; NaN for fewer in all."""
    return next((objective for seen, _, objective, _ in curve if seen >= images), torch.nan)


def seconds_to(curve: Curve, objective: float) -> float:
    """Seconds of learning until the objective was first that low; infinity if it never was."""
    return next((seconds for _, seconds, reached, _ in curve if reached <= objective), torch.inf)


def _tables(rows: list[Row], curves: dict[Key, Curve], plan: PynsmPlan, report: Report) -> None:
    """All learners at all rates, and each side at the rates that are best for each figure."""
    summaries = {f"after {images}": partial(after, images=images) for images in AFTER if images <= plan.train_images}
    summaries |= {f"s to {objective:g}": partial(seconds_to, objective=objective) for objective in REACHED}
    headings = {
        "trainer": "", "lr": "η", "tau": "τ", **{what: what for what in summaries}, "objective": "in the end",
        "images_per_second": "images/s", "largest_eigenvalue": "λmax", "speedup_total": "×, whole run",
        "speedup": "×, median round", "speedup_min": "min", "speedup_max": "max",
    }  # fmt: skip
    report.rows_table(
        f"Training on {plan.train_images} images: objective held out and seconds of learning, at every rate",
        headings,
        [
            row | {what: figure(curve) for what, figure in summaries.items()}
            for row, curve in zip(rows, curves.values(), strict=True)
        ],
    )
    best = []
    for trainer in dict.fromkeys(name for name, _ in curves):
        own = {rates: curve for (name, rates), curve in curves.items() if name == trainer}
        for what, figure in summaries.items():
            rates = min(own, key=lambda rates: figure(own[rates]))
            best.append({"trainer": trainer, "figure": what, "value": figure(own[rates])} | _fields((trainer, rates)))
            report.row(kind="best", **best[-1])
    headings = {"trainer": "", "figure": "figure", "value": "value", "lr": "η", "tau": "τ"}
    report.rows_table("Each at the best of its rates for the figure", headings, best)
