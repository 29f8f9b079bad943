"""The loop of a stream: exactly once, whatever ends the process and wherever; replay gives the same digest."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors import SafetensorError

from jobs.streaming import snapshots
from jobs.streaming.config import StreamConfig
from jobs.streaming.journal import Journal, JournalError
from jobs.streaming.records import Delivery
from jobs.streaming.replay import replay
from jobs.streaming.service import Service
from tests.jobs.streaming.streams import Item, ListSource, Notes, journalled, named, small, waves

FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


class Killed(BaseException):
    """As SIGKILL ends a process: nothing is caught, nothing cleaned up."""


def run(
    config: StreamConfig,
    run_dir: Path,
    source: ListSource,
    point: Callable[[str], None] = lambda _: None,
    tear: random.Random | None = None,
) -> tuple[Service, Notes, list[str]]:
    """One process of a stream. tear: where it is killed, part of what was not synced reaches the disk."""
    journal, notes, told = Journal(run_dir / "journal", config.journal.segment_bytes), Notes(), list[str]()
    try:
        journal.open()
        service = Service(config, run_dir, journal, notes, told.append, point=point)
        service.catch_up()
        service.run(source)
    except Killed:
        if tear is not None and journal._kept and journal._segments:
            content = b"".join(journal._kept)
            with journal._segments[-1].path.open("ab") as file:
                file.write(content[: tear.randrange(len(content) + 1)])
        raise
    finally:
        journal.close()
    return service, notes, told


def test_a_finite_source_is_learnt_and_replayed(tmp_path: Path) -> None:
    config, items = small(), waves(120, labelled=0.5)
    service, notes, told = run(config, tmp_path, ListSource(items, set()))
    assert told == []
    assert named(journalled(tmp_path)) == named(items)
    answers = [answer for outcome in notes.outcomes for answer in outcome.answers]
    assert [answer.id for answer in answers] == [f"r{number}" for number in range(120)]
    assert [answer.window for answer in answers] == list(range(1, 121))
    last = notes.outcomes[-1].metrics
    assert last.number == 120
    assert sum(outcome.metrics.labels for outcome in notes.outcomes) == 120
    mains = [outcome.metrics.candidates["main"] for outcome in notes.outcomes]
    answered, right = sum(one.answered for one in mains), sum(one.right for one in mains)
    assert 60 <= answered <= 100  # all but the first windows, that calibrate
    assert right / answered > 0.8
    found = replay(tmp_path, config)
    assert found.digest == service.state.snapshot(service.journal.stream).digest
    assert found.differing == ()
    assert len(found.compared) == config.snapshot.keep
    again = Notes()
    replay(tmp_path, config, lambda outcome: again.outcomes.append(outcome))
    assert again.outcomes == notes.outcomes


@pytest.mark.parametrize("point", ["append", "sync", "acknowledge", "apply", "snapshot"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_killed_at_any_step_nothing_is_lost_or_learnt_twice(tmp_path: Path, point: str, nth: int) -> None:
    """Killed again and again, at every nth passage of a step."""
    items, acknowledged, draw = waves(100, labelled=0.6), set[int](), random.Random(f"{point} {nth}")
    left = nth

    def kill(name: str) -> None:
        nonlocal left
        left -= name == point
        if left == 0:
            left = nth + kills
            raise Killed

    kills, config = 0, small()
    while True:
        try:
            service, _, _ = run(config, tmp_path, ListSource(items, acknowledged, draw), kill, draw)
            break
        except Killed:
            kills += 1
            assert kills < 60
    assert kills > 0
    check(tmp_path, config, items, service)


def check(run_dir: Path, config: StreamConfig, items: Sequence[Item], service: Service) -> None:
    """The journal is what was sent, each once, and replay gives the state."""
    found = journalled(run_dir)
    assert len(found) == len(items)
    assert named(found) == named(items)
    again = replay(run_dir, config)
    assert again.digest == service.state.snapshot(service.journal.stream).digest
    assert again.differing == ()
    assert again.compared


def test_acknowledged_is_only_what_is_on_the_disk(tmp_path: Path) -> None:
    class Checked(ListSource):
        def acknowledge(self, deliveries: Sequence[object]) -> None:
            super().acknowledge(deliveries)  # type: ignore[arg-type]
            assert len(journalled(tmp_path)) >= len(acknowledged)

    acknowledged: set[int] = set()
    run(small(), tmp_path, Checked(waves(50), acknowledged))
    assert len(acknowledged) == 50


def test_a_full_disk_is_told_once_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, real, fails = waves(40), Journal.sync, iter([True] * 3)

    def sync(journal: Journal) -> None:
        if journal.count > 20 and next(fails, False):
            raise OSError(28, "No space left on device")
        real(journal)

    monkeypatch.setattr(Journal, "sync", sync)
    monkeypatch.setattr("jobs.streaming.service.AGAIN_S", 0.01)
    service, _, told = run(small(), tmp_path, ListSource(items, set()))
    assert told == [
        f"{tmp_path / 'journal'} takes nothing: No space left on device; the source waits until it does",
        f"{tmp_path / 'journal'} is written again",
    ]
    check(tmp_path, small(), items, service)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FULL])
def test_a_disk_too_full_for_a_snapshot_costs_a_longer_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As a full disk is told by the library that writes tensors."""
    config, items, acknowledged = small(), waves(100), set[int]()
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise error

        patched.setattr("simmatch.tensor_files.save_file", full)
        _, _, told = run(config, tmp_path, ListSource(items[:70], acknowledged))
    assert told == [
        f"{tmp_path / 'snapshots'} takes no snapshot: No space left on device; the journal holds all that is needed"
    ]
    assert snapshots.listed(tmp_path / "snapshots") == []
    service, _, _ = run(config, tmp_path, ListSource(items, acknowledged))
    check(tmp_path, config, items, service)


def test_a_damaged_snapshot_costs_the_one_before(tmp_path: Path) -> None:
    config, items, acknowledged = small(), waves(100), set[int]()
    first, _, _ = run(config, tmp_path, ListSource(items[:70], acknowledged))
    newest = snapshots.listed(tmp_path / "snapshots")[-1]
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    service, notes, told = run(config, tmp_path, ListSource(items, acknowledged))
    assert told == [f"{newest}: expected a snapshot of format 1, got content that has changed; an earlier one serves"]
    assert notes.outcomes[0].metrics.batch == first.state.ledger.batches  # applied again
    found = journalled(tmp_path)
    assert named(found) == named(items)
    (newest / "state.safetensors").unlink()
    assert replay(tmp_path, config).digest == service.state.snapshot(service.journal.stream).digest


def test_records_that_are_missing_are_an_error(tmp_path: Path) -> None:
    """The newest file of the journal is gone, or all are: no older snapshot and no new stream takes its place."""
    config, items, acknowledged = small(), waves(100), set[int]()
    run(config, tmp_path, ListSource(items, acknowledged))
    newest = snapshots.listed(tmp_path / "snapshots")[-1]
    files = sorted((tmp_path / "journal").iterdir())
    files[-1].unlink()
    with pytest.raises(JournalError, match=rf"^{newest}: expected a journal of at least \d+ entries, got \d+$"):
        run(config, tmp_path, ListSource(items, acknowledged))
    with pytest.raises(JournalError, match=rf"^{files[-2]}: expected entries of batch \d+, got \d+ last$"):
        replay(tmp_path, config)
    for path in files[:-1]:
        path.unlink()
    with pytest.raises(JournalError, match=rf"^{newest}: expected a snapshot of journal [0-9a-f]+, got that of "):
        run(config, tmp_path, ListSource(items, acknowledged))
    assert list(tmp_path.glob("journal/*")) == []


def test_what_came_twice_is_not_read_again_once_its_id_is_forgotten(tmp_path: Path) -> None:
    """Positions of what was known are in the snapshots, though not in the journal."""
    config, items = small(labels={"ids": 10}), waves(30)
    copies = [*items[:8], *items[:8], *items[8:]]

    class Files(ListSource):
        """Each 8 items are a file, which is read on from its position."""

        def poll(self, limit: int, wait_s: float) -> list[Delivery]:
            found = super().poll(limit, wait_s)
            return [Delivery(each.item, {"source": f"{each.receipt // 8}", "at": each.receipt}) for each in found]

        def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
            pass

    first, _, _ = run(config, tmp_path, Files(copies, set()))
    assert first.duplicates == 8
    journal = Journal(tmp_path / "journal", 4096)
    journal.open()
    again = Service(config, tmp_path, journal, Notes(), print)
    again.catch_up()
    journal.close()
    assert {key: place["at"] for key, place in again.state.ledger.positions.items()} == {
        "0": 7, "1": 15, "2": 23, "3": 31, "4": 37
    }  # fmt: skip


def test_files_of_the_journal_are_removed_behind_snapshots(tmp_path: Path) -> None:
    journal = {"sync_ms": 20.0, "segment_bytes": 4096, "keep": "snapshots"}
    config, items, acknowledged = small(journal=journal), waves(300), set[int]()
    service, _, _ = run(config, tmp_path, ListSource(items, acknowledged))
    assert service.journal.first > 0
    found = replay(tmp_path, config)
    assert found.begun > 0
    assert found.digest == service.state.snapshot(service.journal.stream).digest
    again, notes, _ = run(config, tmp_path, ListSource(waves(310), acknowledged))
    assert again.state.pipeline.intake.records == 310
    assert notes.outcomes[-1].metrics.number == 310


def test_what_has_ended_goes_on(tmp_path: Path) -> None:
    config, items, acknowledged = small(), waves(60), set[int]()
    run(config, tmp_path, ListSource(items[:30], acknowledged))
    digest = replay(tmp_path, config).digest
    service, notes, _ = run(config, tmp_path, ListSource(items[:30], acknowledged))  # nothing has come
    assert notes.outcomes == []
    assert replay(tmp_path, config).digest == digest
    service, _, _ = run(config, tmp_path, ListSource(items, acknowledged))
    check(tmp_path, config, items, service)
