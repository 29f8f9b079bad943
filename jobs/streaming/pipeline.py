"""From batches of the journal to answers: a function of the journal, the configuration and nothing else.

No clock is read and no randomness is used but seeded one, so the same batches give the same bits: after a restart, and
when a journal is replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from jobs.streaming.candidate import NONE, Candidate, Said, input_of, right
from jobs.streaming.config import StreamConfig
from jobs.streaming.intake import Intake, Labelled, Taken, Window
from jobs.streaming.ledger import Batch
from jobs.streaming.outcome import Answer, CandidateMetrics, Metrics, Outcome
from jobs.streaming.pending import Held, Pending, columns
from jobs.streaming.told import Told, silent, spoken
from simmatch.labels import UNLABELLED
from simmatch.model import layer_inputs
from simmatch.online.comparison import Comparison
from simmatch.online.state import joined, part_of


class Pipeline:
    """All that learns from a stream.

    tell: is given lines about ranks: what is waited for, and why they are replaced.

    Attributes
    ----------
    seconds: of processor time for the last batch, by candidate; measured, no part of the state.
    batch: number of the last batch.
    windows: number of windows so far.
    candidates: none before the first window, whose shape they are made for.
    calibrated: whether they are, so that they answer.
    """

    def __init__(self, config: StreamConfig, tell: Callable[[str], None] = lambda _: None) -> None:
        self.config, self._tell = config, tell
        self.batch = self.windows = 0
        self.seconds: dict[str, float] = {}
        names = list(config.candidates)
        self._configs = {name: config.candidate(name) for name in names}
        self._guided = any(layer.label_gain > 0 for each in self._configs.values() for layer in each.model.layers)
        self._columns = columns(names)
        self._pending = Pending(config.labels.horizon, 2 * len(names))
        self.intake = Intake(config.data, self._pending, self._fit)
        self.comparison = Comparison(names, config.champion, config.comparison)
        self.candidates: dict[str, Candidate] = {}
        self.calibrated = False
        self._calibration = _Calibration()
        self._events = 0

    @property
    def champion(self) -> str:
        """The name of the candidate that answers."""
        return self.comparison.champion

    @property
    def champion_candidate(self) -> Candidate | None:
        """The candidate that answers; None before the first window."""
        return self.candidates.get(self.champion)

    def _fit(self, shape: list[int]) -> None:
        for config in self._configs.values():
            layer_inputs(config.model, input_of(shape, 0))

    def apply(self, batch: Batch) -> Outcome:
        """Score a batch, then learn from it."""
        self.seconds = dict.fromkeys(self._configs, 0.0)
        self.batch = batch.number
        taken = self.intake.take(batch)
        told = Told(self._events, self.intake.records, self.intake.time)
        told.new_classes(taken.new_classes)
        told.set_aside(taken.set_aside)
        self._make(taken)
        metrics = {name: CandidateMetrics() for name in self._configs}
        answers = self._step(taken, told, metrics) if self.calibrated else self._wait(taken, told)
        self.windows += len(taken.windows)
        self._events = told.next_index
        every = self.config.recompute_every
        if self.calibrated and every and batch.number % every == 0:
            for name, candidate in self.candidates.items():
                with self._timed(name):
                    candidate.recompute()
        return Outcome(answers, tuple(told.events), tuple(taken.set_aside), self._metrics(taken, metrics))

    def _metrics(self, taken: Taken, candidates: Mapping[str, CandidateMetrics]) -> Metrics:
        late = sum(len(one.held.windows) for one in taken.labelled)
        return Metrics(
            batch=self.batch,
            number=self.intake.records,
            time=self.intake.time,
            records=taken.records,
            windows=len(taken.windows),
            labels=sum(window.label != UNLABELLED for window in taken.windows) + late,
            late=late,
            unused=taken.unused,
            faults=len(taken.set_aside),
            classes=len(self.intake.classes),
            champion=self.champion,
            candidates=dict(candidates),
            came=taken.came,
        )

    def _make(self, taken: Taken) -> None:
        """Make the candidates at the first window, and with `label_gain` at the first class; later, tell them of new
        classes."""
        classes = len(self.intake.classes)
        shape = self.intake.shape
        if not self.candidates and shape is not None and (classes or not self._guided):
            for name, config in self._configs.items():
                self.candidates[name] = Candidate(config, shape, classes, partial(self._note, name))
        elif taken.new_classes:
            for candidate in self.candidates.values():
                candidate.grow(classes)

    def _note(self, name: str, text: str) -> None:
        self._tell(f"{name}: {text}" if len(self._configs) > 1 else text)

    def _wait(self, taken: Taken, told: Told) -> tuple[Answer, ...]:
        """Collect windows until there are enough to calibrate; then learn from all of them."""
        windows, calibration, enough = taken.windows, self._calibration, self.config.data.calibrate
        for one in taken.labelled:
            calibration.label(one)
        if windows:
            calibration.add(windows)
            nothing = torch.full((len(windows), 2 * len(self._configs)), NONE)
            self._hold(windows, calibration.x[-1], nothing)
        note = f"calibrating: {min(calibration.count, enough)} of {enough} windows"
        answers = silent(windows, self.windows + 1, self.champion, note)
        if calibration.count >= enough:
            x, labels = torch.cat(calibration.x), torch.tensor(calibration.labels)
            self._calibration = _Calibration()
            if not self.candidates or not all(candidate.calibrate(x) for candidate in self.candidates.values()):
                return answers
            for name, candidate in self.candidates.items():
                with self._timed(name):
                    candidate.grow(len(self.intake.classes))
                    for rows in torch.split(torch.arange(len(x)), self.config.batch_size):
                        candidate.learn(x[rows], candidate.say(x[rows]), labels[rows])
            told.calibrated(len(x))
            self.calibrated = True
        return answers

    def _step(self, taken: Taken, told: Told, metrics: dict[str, CandidateMetrics]) -> tuple[Answer, ...]:
        """Score the windows of a batch, compare, learn from them, then from labels that came late."""
        windows, champion = taken.windows, self.champion
        late = _Late(taken.labelled) if taken.labelled else None
        x, labels = _stacked(windows)
        rights: dict[str, Tensor] = {}
        said: dict[str, Said] = {}
        for name, candidate in self.candidates.items():
            with self._timed(name):
                judged = []
                if windows:
                    said[name] = candidate.say(x)
                    judged.append(_rights(said[name].predictions, labels))
                if late is not None:
                    judged.append(_rights(late.predictions[:, self._columns[name]], late.labels))
                if not judged:
                    continue
                both = torch.cat(judged)
                rights[name] = both[:, 0]
                drifts = candidate.watch(said.get(name), 1 - both[:, 0])
                told.drifts(name, drifts, windows)
                metrics[name] = _scored(both, said.get(name), candidate)
        answers: tuple[Answer, ...] = ()
        if windows:
            candidate = self.candidates[champion]
            told.novelty(champion, said[champion], candidate.detector.threshold, windows)
            version = candidate.batches
            answers = spoken(windows, self.windows + 1, champion, version, said[champion], self.intake.classes)
        self._compare(rights, told, metrics)
        for name, candidate in self.candidates.items():
            with self._timed(name):
                if windows:
                    candidate.learn(x, said[name], labels)
                if late is not None:
                    candidate.learn_late(late.x, late.labels)
        if windows:
            self._hold(windows, x, torch.cat([said[name].predictions for name in self.candidates], dim=1))
        return answers

    def _compare(self, rights: Mapping[str, Tensor], told: Told, metrics: dict[str, CandidateMetrics]) -> None:
        """Compare the candidates where all of them answered and the label is known."""
        if not rights:
            return
        known = ~torch.stack(list(rights.values())).isnan().any(dim=0)
        if bool(known.any()):
            switch = self.comparison.add({name: one[known] for name, one in rights.items()})
            if switch is not None:
                told.switch(switch)
        for name in self.comparison.challengers if self.comparison.records else ():
            low, high = self.comparison.interval(name)
            metrics[name] = replace(metrics[name], difference=(low, self.comparison.difference(name), high))

    def _hold(self, windows: Sequence[Window], x: Tensor, predictions: Tensor) -> None:
        """Keep the windows without a label, record by record."""
        rows = [index for index, window in enumerate(windows) if window.label == UNLABELLED]
        for number, of_record in groupby(rows, key=lambda index: windows[index].number):
            chosen = list(of_record)
            self._pending.hold(windows[chosen[0]].id, Held(number, x[chosen], predictions[chosen]))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        candidate = self.candidates[name]
        started_s, ranks_s = time.thread_time(), candidate.ranks_s
        yield
        self.seconds[name] += time.thread_time() - started_s + candidate.ranks_s - ranks_s

    def close(self) -> None:
        """End the ranks of the candidates, if there are any."""
        for candidate in self.candidates.values():
            candidate.close()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values, between two batches."""
        parts: dict[str, Any] = {"intake": self.intake, "pending": self._pending, "calibration": self._calibration}
        parts |= {f"candidates.{index}": one for index, one in enumerate(self.candidates.values())}
        states = {part: one.state() for part, one in parts.items()}
        plain = {part: own for part, (_, own) in states.items()}
        plain |= {"batch": self.batch, "windows": self.windows, "events": self._events, "calibrated": self.calibrated}
        tensors = {part: own for part, (own, _) in states.items()}
        return joined(tensors | {"comparison": self.comparison.state()}), plain

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """As it was when the state was taken."""
        self.batch, self.windows, self._events = plain["batch"], plain["windows"], plain["events"]
        self.calibrated = plain["calibrated"]
        self.intake.restore(part_of(tensors, "intake"), plain["intake"])
        self._pending.restore(part_of(tensors, "pending"), plain["pending"])
        self._calibration.restore(part_of(tensors, "calibration"), plain["calibration"])
        self.comparison.restore(part_of(tensors, "comparison"))
        self._make(Taken())
        for index, candidate in enumerate(self.candidates.values()):
            part = f"candidates.{index}"
            candidate.restore(part_of(tensors, part), plain[part])


class _Calibration:
    """The first windows, and the labels of those that have one by now."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.labels: list[int] = []
        self.numbers: list[int] = []

    @property
    def count(self) -> int:
        return len(self.labels)

    def add(self, windows: Sequence[Window]) -> None:
        self.x.append(torch.stack([window.x for window in windows]))
        self.labels += [window.label for window in windows]
        self.numbers += [window.number for window in windows]

    def label(self, one: Labelled) -> None:
        """A label has come for windows that are here."""
        for index, number in enumerate(self.numbers):
            if number == one.held.number:
                self.labels[index] = one.label

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"x": torch.cat(self.x)} if self.x else {}
        return tensors, {"labels": self.labels, "numbers": self.numbers}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        self.x = list(tensors.values())
        self.labels, self.numbers = list(plain["labels"]), list(plain["numbers"])


class _Late:
    """Windows whose labels came late: x [m, C, H, W], labels [m], and what was predicted when they came."""

    def __init__(self, labelled: Sequence[Labelled]) -> None:
        self.x = torch.cat([one.held.windows for one in labelled])
        self.predictions = torch.cat([one.held.predictions for one in labelled])
        counts = torch.tensor([len(one.held.windows) for one in labelled])
        self.labels = torch.tensor([one.label for one in labelled]).repeat_interleave(counts)


def _stacked(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    if not windows:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    return torch.stack([window.x for window in windows]), torch.tensor([window.label for window in windows])


def _rights(predictions: Tensor, labels: Tensor) -> Tensor:
    """For the readout and for V, see `right`: [n, 2]."""
    return torch.stack([right(predictions[:, column], labels) for column in (0, 1)], dim=1)


def _scored(rights: Tensor, said: Said | None, candidate: Candidate) -> CandidateMetrics:
    """Count, and say what one batch says about a candidate; rights [n, 2] of its readout and of its V."""
    answered, of_them = (~rights.isnan()).sum(dim=0).tolist(), rights.nansum(dim=0).int().tolist()
    candidate.answered += answered[0]
    candidate.right += of_them[0]
    counts = {"answered": answered[0], "right": of_them[0], "label_answered": answered[1], "label_right": of_them[1]}
    if said is None:
        return CandidateMetrics(**counts, threshold=candidate.detector.threshold, nbytes=candidate.nbytes)
    return CandidateMetrics(
        **counts,
        novelty=float(said.novelty.nanmean()),
        threshold=candidate.detector.threshold,
        novel=int(said.novel.sum()),
        weight=float(said.weights.mean()),
        signals={name: float(values.mean()) for name, values in said.encoded.signals.items()},
        rate=candidate.stack.learning_rate,
        nbytes=candidate.nbytes,
    )
