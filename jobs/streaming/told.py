"""Events and answers of one batch, as they are told to people and programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue
from torch import Tensor

from cluster.text import count
from jobs.streaming.candidate import Said
from jobs.streaming.intake import Window
from jobs.streaming.outcome import Answer, Event, EventKind, SetAside
from simmatch.online.comparison import Switch
from simmatch.online.drift import Drift


class Told:
    """Collects the events of a batch.

    Parameters
    ----------
    index: number of the next event of the stream.
    number, time: of the newest record, for events that belong to no other.
    """

    def __init__(self, index: int, number: int, time: float) -> None:
        self.events: list[Event] = []
        self._index, self._number, self._time = index, number, time

    @property
    def next_index(self) -> int:
        return self._index + len(self.events)

    def new_classes(self, classes: Sequence[tuple[str, int, float]]) -> None:
        """Classes that appeared: name, and number and time of the record."""
        for name, number, time in classes:
            self._add("class", f"new class {name!r}", {"label": name}, number, time)

    def set_aside(self, faults: Sequence[SetAside]) -> None:
        """What was set aside: one event."""
        if faults:
            first = faults[0]
            what = f"{count(len(faults), 'record')} set aside, the first: {first.reason}"
            where = f" ({first.id or first.place})" if first.id or first.place else ""
            fields: dict[str, JsonValue] = {"id": first.id, "reason": first.reason, "place": first.place}
            self._add("fault", what + where, fields | {"total": len(faults)})

    def calibrated(self, windows: int) -> None:
        """The stacks are calibrated."""
        self._add("calibrated", f"calibrated on {count(windows, 'window')}", {"windows": windows})

    def drifts(self, candidate: str, drifts: Sequence[Drift], windows: Sequence[Window]) -> None:
        """Changes that a candidate found; `Drift.number` counts the windows of the batch."""
        for drift in drifts:
            fields: dict[str, JsonValue] = {
                "candidate": candidate,
                "signal": drift.signal,
                "before": drift.before,
                "after": drift.after,
            }
            text = f"drift of {drift.signal} in {candidate}: {drift.before:.3g} before, {drift.after:.3g} after"
            if drift.number < len(windows):
                at = windows[drift.number]
                self._add("drift", text, fields, at.number, at.time)
            else:
                self._add("drift", text, fields)

    def novelty(self, candidate: str, said: Said, threshold: float | None, windows: Sequence[Window]) -> None:
        """Windows far outside: one event."""
        novel = int(said.novel.sum())
        if novel == 0:
            return
        worst = int(said.novelty.where(said.novel, -1).argmax())
        window, largest = windows[worst], float(said.novelty[worst])
        text = f"{novel} of {count(len(windows), 'window')} novel, most of all {window.id!r}: {largest:.3g}"
        text += "" if threshold is None else f" (threshold {threshold:.3g})"
        fields: dict[str, JsonValue] = {"candidate": candidate, "windows": novel, "of": len(windows)}
        fields |= {"largest": largest, "threshold": threshold, "id": window.id}
        self._add("novelty", text, fields, window.number, window.time)

    def switch(self, switch: Switch) -> None:
        """Another candidate answers from the next batch on."""
        low, high = switch.interval
        interval = f"{low:+.3f} to {high:+.3f}"
        text = f"{switch.after} answers in place of {switch.before}: its accuracy is higher by {interval}"
        fields: dict[str, JsonValue] = {"before": switch.before, "after": switch.after}
        self._add("champion", text, fields | {"low": low, "high": high})

    def _add(
        self,
        kind: EventKind,
        text: str,
        fields: Mapping[str, JsonValue],
        number: int | None = None,
        time: float | None = None,
    ) -> None:
        at = self._number if number is None else number, self._time if time is None else time
        self.events.append(Event(self.next_index, kind, *at, text, fields))


def silent(windows: Sequence[Window], first: int, candidate: str, note: str) -> tuple[Answer, ...]:
    """Answers without scores, from window number `first` on; `note` says why."""
    return tuple(
        Answer(each.id, each.number, each.time, first + index, each.group, candidate, version=0, note=note)
        for index, each in enumerate(windows)
    )


def spoken(
    windows: Sequence[Window], first: int, candidate: str, version: int, said: Said, classes: Sequence[str]
) -> tuple[Answer, ...]:
    """Answers of a candidate that had learnt from `version` batches."""
    novelty, novel = said.novelty.tolist(), said.novel.tolist()
    scores = [()] * len(windows) if said.scores is None else said.scores.tolist()
    best = said.predictions[:, 0].tolist()
    note = "" if said.scores is not None else "fewer than two classes so far"
    return tuple(
        Answer(
            each.id,
            each.number,
            each.time,
            first + index,
            each.group,
            candidate,
            version,
            label=None if said.scores is None else classes[best[index]],
            scores=dict(zip(classes, scores[index], strict=False)),
            novelty=novelty[index],
            novel=novel[index],
            features=_row(said.encoded.features, index),
            note=note,
        )
        for index, each in enumerate(windows)
    )


def _row(features: Tensor, index: int) -> Tensor:
    return features[index]
