"""Outcomes of a made-up stream, for what shows them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from jobs.streaming.outcome import Answer, CandidateMetrics, Event, EventKind, Metrics, Outcome, Usage

NAMES = ("online", "frozen", "random filters")


def outcomes(
    batches: int, size: int = 32, names: Sequence[str] = NAMES, text: str = "", part: range | None = None
) -> Iterator[tuple[Outcome, Usage]]:
    """So many batches, or a part of them: a quarter of the windows has labels; four drifts; a switch after a sixth.

    text: appended to every text that comes from outside.
    """
    index, quarter = 0, max(1, batches // 4)
    for batch in range(1, batches + 1):
        generator = random.Random(batch)
        number, time = batch * size, 1.7e9 + 3.2 * batch
        events: list[Event] = []

        def add(
            kind: EventKind,
            what: str,
            number: int = number,
            time: float = time,
            events: list[Event] = events,
            **fields: str | float,
        ) -> None:
            nonlocal index
            events.append(Event(index, kind, number, time, what + text, fields))
            index += 1

        since = batch % quarter
        if since == quarter // 12:
            add("drift", "drift of objective: 0.81 before, 1.22 after", candidate=names[0], signal="objective")
        if since == 1:
            add("novelty", "29 of 32 windows novel", candidate=names[0], windows=29)
        switched = math.ceil(batches / 6)
        if batch == switched:
            add("champion", f"{names[0]} answers in place of {names[-2]}", before=names[-2], after=names[0])
        champion, labelled = names[-2] if batch < switched else names[0], size // 4
        chances = [0.95 - 0.25 * math.exp(-20 * since / batches), 0.9 - 0.08 * (4 * batch // batches), 0.8]
        candidates, seconds = {}, {}
        for place, name in enumerate(names):
            right = sum(generator.random() < chances[place % 3] for _ in range(labelled))
            far = since < batches / 60
            candidates[name] = CandidateMetrics(
                answered=labelled,
                right=right,
                novelty=generator.gauss(1.0, 0.1) + (1.2 if far else 0.0),
                threshold=1.8,
                novel=3 * far,
                rate=0.01,
                difference=None if name == champion else (-0.08, -0.05, -0.02),
                nbytes=120_000 * (place + 1),
            )
            seconds[name] = 0.004 * (place + 1)
        metrics = Metrics(
            batch, number, time, size, size, labelled, labelled // 4, 0, int(batch % 50 == 0), 10, champion, candidates
        )
        answer = Answer(f"record {number}{text}", number, time, number, "", champion, batch - 1, label="a")
        usage = Usage(seconds, 0.02, abs(generator.gauss(0.3, 0.2)), 9000 * batch, 2 * batch)
        if part is None or batch in part:
            yield Outcome((answer,), tuple(events), (), metrics), usage
