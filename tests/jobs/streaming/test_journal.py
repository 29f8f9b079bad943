"""The journal: what was synced is read again, what a crash left unfinished is cut off, damage is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.streaming.entries import FRAME, Boundary, Entry, decode, encode
from jobs.streaming.journal import SYNCED, Journal, JournalError, list_segments, read_entries
from jobs.streaming.ledger import KnownIds, Ledger
from jobs.streaming.records import Fault, LateLabel, Record


def record(number: int, samples: int = 3) -> Record:
    """A record whose values tell its number."""
    return Record(f"r{number}", float(number), np.full((samples, 2), number / 3), "a" if number % 2 else None, "pump")


def entries(count: int) -> Iterator[Entry]:
    """Of all kinds, with positions."""
    for number in range(count):
        position = {"source": "file", "offset": number}
        match number % 5:
            case 3:
                yield Entry(LateLabel(f"r{number - 1}", "b"), position)
            case 4:
                yield Entry(Boundary(number // 5 + 1, "full"))
            case _:
                yield Entry(record(number), position)


def plain(entry: Entry) -> tuple[object, ...]:
    """What can be compared."""
    item = entry.item
    if isinstance(item, Record):
        values = (item.values.dtype, item.values.shape, item.values.tobytes())
        return item.id, item.time, item.label, item.group, item.begins, values, entry.position
    return item, entry.position


OPENED: list[Journal] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Journals that a test leaves open are closed."""
    yield
    while OPENED:
        OPENED.pop().close()


def opened(folder: Path, segment_bytes: int = 600) -> Journal:
    """A journal that can be written."""
    journal = Journal(folder, segment_bytes)
    OPENED.append(journal)
    journal.open()
    return journal


def filled(folder: Path, count: int, segment_bytes: int = 600) -> Journal:
    """A journal of some entries, synced two by two."""
    journal = opened(folder, segment_bytes)
    for number, entry in enumerate(entries(count)):
        journal.append(entry)
        if number % 2:
            journal.sync()
    journal.sync()
    return journal


@given(
    values=st.lists(st.floats(width=64), min_size=2, max_size=6),
    name=st.text(),
    label=st.none() | st.text(),
    group=st.text(),
    begins=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_record_keeps_every_bit(values: list[float], name: str, label: str | None, group: str, begins: bool) -> None:
    array = np.array(values).reshape(-1, 1)
    entry = Entry(Record(name, 1e9 + 1 / 3, array, label, group, begins), {"source": "x", "offset": 3})
    content = encode(entry, number=7)
    again = decode(content[FRAME.size :])
    assert isinstance(again.item, Record)
    assert np.array_equal(again.item.values, array, equal_nan=True)
    assert plain(again)[:5] == plain(entry)[:5]
    assert again.position == entry.position


def test_values_are_stored_in_the_shortest_exact_format() -> None:
    short, long = np.full((1000, 1), 0.1, np.float32).astype(np.float64), np.full((1000, 1), 0.1)
    image = np.zeros((1, 8, 8), np.uint8)
    sizes = [len(encode(Entry(Record("a", 0.0, values)), 0)) for values in (short, long, image)]
    assert 4000 < sizes[0] < 4200
    assert 8000 < sizes[1] < 8200
    assert sizes[2] < 64 + 120
    again = decode(encode(Entry(Record("a", 0.0, image)), 0)[FRAME.size :]).item
    assert isinstance(again, Record)
    assert again.values.dtype == np.uint8
    assert again.values.flags.writeable


def test_bytes_of_a_fault_become_printable() -> None:
    again = decode(encode(Entry(Fault("expected JSON", b"\xff{", "log, line 3")), 0)[FRAME.size :])
    assert again.item == Fault("expected JSON", "\\xff{", "log, line 3")


def test_what_was_written_is_read_again_across_files(tmp_path: Path) -> None:
    journal = filled(tmp_path, 23)
    journal.close()
    again = opened(tmp_path, 600)
    assert again.count == 23
    assert len(list_segments(tmp_path)) > 3
    assert [plain(entry) for _, entry in again.read()] == [plain(entry) for entry in entries(23)]
    assert [number for number, _ in again.read(11)] == list(range(11, 23))
    assert again.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert again.append(Entry(record(23))) == 23


def synced_entries(folder: Path, count: int, later: int) -> tuple[bytes, list[int]]:
    """The one file of a journal of `count` entries that were synced in pairs, and of `later` that a killed process had
    written and not yet synced; and where each entry ends."""
    filled(folder, count, segment_bytes=10_000).close()
    [path] = folder.iterdir()
    content = path.read_bytes()
    every = [encode(entry, number) for number, entry in enumerate(entries(count + later))]
    content += b"".join(every[count:])
    start = list_segments(folder)[0].start
    return content, [start + sum(map(len, every[:number])) for number in range(count + later + 1)]


def test_what_was_not_synced_is_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of them take seconds
    content, ends = synced_entries(tmp_path, 8, later=4)
    [path] = tmp_path.iterdir()
    assert ends[-1] == len(content)
    for size in range(ends[8], len(content) + 1):
        path.write_bytes(content[:size])
        again = opened(tmp_path, 10_000)
        whole = sum(end <= size for end in ends[1:])
        assert (again.count, again.cut_bytes) == (whole, size - ends[whole])
        assert path.stat().st_size == ends[whole]
        again.close()


def test_damage_to_what_was_synced_is_named_and_nothing_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit anywhere, or a cut: these entries were acknowledged, so no source sends them again."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    content, ends = synced_entries(tmp_path, 8, later=2)
    [path] = tmp_path.iterdir()
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(ends[0], ends[8], 7)]
    for damaged in [*flipped, *(content[:size] for size in range(ends[0], ends[8], 7))]:
        path.write_bytes(damaged)
        number = next(number for number in range(8) if content[: ends[number + 1]] != damaged[: ends[number + 1]])
        message = rf"^{path}: expected entry {number} at byte {ends[number]}, got it damaged, where {ends[8]} bytes "
        with pytest.raises(JournalError, match=message):
            opened(tmp_path, 10_000)
        with pytest.raises(JournalError, match=message):
            list(read_entries(list_segments(tmp_path)))
        assert path.read_bytes() == damaged


def test_a_mark_that_is_damaged_says_nothing(tmp_path: Path) -> None:
    content, ends = synced_entries(tmp_path, 8, later=0)
    [path] = tmp_path.iterdir()
    for at in range(ends[0] - SYNCED.size, ends[0]):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert opened(tmp_path, 10_000).count == 8
        assert list_segments(tmp_path)[0].synced == ends[8]  # written anew


def test_after_a_cut_the_next_entries_follow(tmp_path: Path) -> None:
    content, _ = synced_entries(tmp_path, 6, later=1)
    [path] = tmp_path.iterdir()
    path.write_bytes(content[:-3])
    again = opened(tmp_path, 10_000)
    assert again.count == 6
    for entry in list(entries(9))[again.count :]:
        again.append(entry)
    again.sync()
    assert [plain(entry) for _, entry in again.read()] == [plain(entry) for entry in entries(9)]


def test_damage_before_the_last_file_is_named(tmp_path: Path) -> None:
    filled(tmp_path, 23).close()
    path = sorted(tmp_path.iterdir())[1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    again = opened(tmp_path, 600)
    with pytest.raises(JournalError, match=rf"^{path}: expected entry \d+ at byte \d+, got it damaged, "):
        list(again.read())


def test_an_entry_of_another_place_is_no_entry(tmp_path: Path) -> None:
    """As a file system that loses a write and keeps a later one may leave it."""
    filled(tmp_path, 3, segment_bytes=10_000).close()
    [path] = tmp_path.iterdir()
    with path.open("ab") as file:
        file.write(encode(Entry(record(9)), number=9))
    again = opened(tmp_path, 10_000)
    assert again.count == 3


def test_a_file_of_another_stream_is_named(tmp_path: Path) -> None:
    filled(tmp_path / "one", 23).close()
    filled(tmp_path / "other", 23).close()
    name = sorted(path.name for path in (tmp_path / "one").iterdir())[1]
    (tmp_path / "other" / name).replace(tmp_path / "one" / name)
    with pytest.raises(JournalError, match=f"{name}: expected the journal of stream [0-9a-f]+, got that of [0-9a-f]+$"):
        opened(tmp_path / "one")


@pytest.mark.parametrize("failing", ["pwrite", "fsync"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    journal = filled(tmp_path, 5, segment_bytes=10_000)
    [path] = tmp_path.iterdir()
    size = path.stat().st_size
    real = getattr(os, failing)
    pwrite = os.pwrite

    def full(descriptor: int, *rest: Any) -> int:
        if failing == "pwrite":
            content, offset = rest
            pwrite(descriptor, content[:7], offset)  # as much as there was room for
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    for entry in list(entries(9))[5:]:
        journal.append(entry)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            journal.sync()
        assert path.stat().st_size == size
    monkeypatch.setattr(os, failing, real)
    journal.sync()
    assert [plain(entry) for _, entry in journal.read()] == [plain(entry) for entry in entries(9)]


def test_files_that_nothing_needs_are_removed(tmp_path: Path) -> None:
    journal = filled(tmp_path, 23)
    firsts = [segment.first for segment in list_segments(tmp_path)]
    while journal.remove_before(firsts[2] + 1):
        pass
    assert [segment.first for segment in list_segments(tmp_path)] == firsts[2:]
    assert journal.first == firsts[2]
    assert journal.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    with pytest.raises(JournalError, match="expected entry 0 or an earlier one first, they were removed"):
        list(journal.read(0))
    while journal.remove_before(journal.count):
        pass
    assert len(list_segments(tmp_path)) == 1  # the one that is written


def test_the_ledger_ends_batches_and_knows_ids() -> None:
    ledger = Ledger(ids=100, whole=False)
    batches = [batch for number, entry in enumerate(entries(12)) if (batch := ledger.take(number, entry)) is not None]
    assert [(batch.number, [number for number, _ in batch.items]) for batch in batches] == [
        (1, [0, 1, 2, 3]),
        (2, [5, 6, 7, 8]),
    ]
    assert (ledger.size, len(ledger.open)) == (6, 2)  # samples
    assert ledger.positions == {"file": {"source": "file", "offset": 11}}
    assert ledger.knows(record(5))
    assert ledger.knows(LateLabel("r7", "b"))
    assert not ledger.knows(LateLabel("r5", "b"))  # a label is another item than its record
    assert not ledger.knows(record(4))


@given(names=st.lists(st.integers(0, 9)), horizon=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_ids_are_known_within_the_horizon(names: list[int], horizon: int) -> None:
    known = KnownIds(horizon)
    recent: list[int] = []  # the slow way
    for name in names:
        new = name not in recent
        assert known.add(str(name)) is new
        if new:
            recent = [*recent, name][-horizon:]
        again = KnownIds(horizon)
        again.restore(known.state())
        assert all((str(number) in again) is (number in recent) for number in range(10))
