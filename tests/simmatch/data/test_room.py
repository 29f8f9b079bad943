"""Room in a cache folder: the sum of its files is kept, so that a file costs the same however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from simmatch.data.room import FEATURES, IN_USE, Room


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("features/*/*.bin"))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each look at all files."""
    real, looks = Room._files, list[int]()

    def counted(room: Room) -> Iterator[tuple[float, int, Path]]:
        looks.append(1)
        return real(room)

    monkeypatch.setattr(Room, "_files", counted)
    return looks


def fill(room: Room, numbers: range, *, key: str = "key", ahead: int = 0) -> list[bool]:
    """Write files of 10 bytes."""
    folder = room.folder / FEATURES / key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / IN_USE).touch()

    def write(number: int) -> None:
        (folder / f"{number:06d}.bin").write_bytes(bytes(10))

    return [room.make(10, lambda number=number: write(number), ahead=ahead) for number in numbers]  # type: ignore[misc]


def test_processes_share_one_sum_and_look_at_all_files_once(tmp_path: Path, looks: list[int]) -> None:
    one, other = Room(tmp_path, 1000), Room(tmp_path, 1000)  # as of two processes
    for start in range(0, 60, 20):
        assert all(fill(one, range(start, start + 10)) + fill(other, range(start + 10, start + 20)))
    assert len(looks) == 2
    assert sizes(tmp_path) == int((tmp_path / "room.lock").read_text()) == 600


def test_a_sum_that_is_wrong_or_missing_is_found_out(tmp_path: Path, looks: list[int]) -> None:
    """Files that somebody removed; a lock file that is new; a write that failed."""
    room = Room(tmp_path, 1000)
    fill(room, range(100))
    for path in tmp_path.glob("features/key/00009*.bin"):
        path.unlink()
    assert fill(room, range(90, 95)) == [True] * 5
    assert len(list(tmp_path.glob("features/key/*.bin"))) == 95  # none was removed for them
    (tmp_path / "room.lock").unlink()
    assert fill(room, range(95, 96)) == [True]
    assert len(looks) == 3

    def fails() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        room.make(10, fails)
    assert sizes(tmp_path) == int((tmp_path / "room.lock").read_text()) == 960


def test_a_full_cache_is_not_looked_at_for_every_file(tmp_path: Path, looks: list[int]) -> None:
    """Room is made for five files at once, a twentieth of the budget; never more than the budget is taken."""
    room = Room(tmp_path, 1000)
    fill(room, range(100), key="old")
    looks.clear()
    assert all(fill(room, range(60), key="new", ahead=160))
    assert len(looks) == 10
    assert len(list(tmp_path.glob("features/new/*.bin"))) == 60
    assert sizes(tmp_path) <= 1000
