"""Records from a folder that files arrive in.

Oracle: what was written there.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.streaming.records import Delivery, Fault, Position, Record, Source
from jobs.streaming.sources import SourceConfig, open_source
from jobs.streaming.sources.folder import KNOWN
from simmatch.config import ConfigError, parse
from simmatch.data.decoding import SUFFIXES

Positions = dict[str, Position]


def opened(
    folder: Path, positions: Positions | None = None, tell: Callable[[str], None] = print, **keys: Any
) -> Source:
    """A source that ends with the files that are there, unless it is followed."""
    config = parse(SourceConfig, {"folder": {"path": str(folder), "follow": False, "settle_s": 0.3, **keys}})
    return open_source(config, positions or {}, tell, period_s=1.0)


def everything(source: Source, most: int = 3) -> list[Delivery]:
    found: list[Delivery] = []
    while not source.ended:
        found += source.poll(most, 0.1)
    return found


def records(deliveries: list[Delivery]) -> list[Record]:
    assert all(isinstance(each.item, Record) for each in deliveries), [each.item for each in deliveries]
    return [each.item for each in deliveries]  # type: ignore[misc]


def last(deliveries: list[Delivery]) -> Positions:
    """The positions as the journal gives them back: the last one of each key, after JSON."""
    return {each.position["source"]: json.loads(json.dumps(each.position)) for each in deliveries if each.position}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each kind."""
    folder = tmp_path / "in"
    for name in ("worn", "new"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "new/a.npy", np.arange(10.0).reshape(5, 2))
    np.savez(folder / "new/b.npz", x=np.arange(3), y=np.arange(4))
    (folder / "new/c.csv").write_text("time,x,y,label\n1,1,2,on\n2,,4,on\n3,5,6,off\n9,7,8,off\n")
    fields = '"x": 1, "y": 2, "values": [1]'
    lines = f'{{"id": "p", "time": 1, {fields}}}\n\n{{"id": "q", "time": 2, {fields}}}'
    (folder / "worn/d.jsonl").write_text(lines)
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(folder / "worn/e.png")
    (folder / "new/notes.txt").write_text("not read")
    (folder / "new/.hidden.npy").write_text("not read")
    for number, file in enumerate(sorted(folder.rglob("*.*"))):
        os.utime(file, (1000 - number, 1000 - number))
    return folder


def test_every_kind_of_file_is_read(folder: Path) -> None:
    found = records(everything(opened(folder, columns=["x", "y"], block=2)))
    expected = [
        ("new/a.npy/0", [[0, 1], [2, 3]], "new", True), ("new/a.npy/2", [[4, 5], [6, 7]], "new", False),
        ("new/a.npy/4", [[8, 9]], "new", False),
        ("new/b.npz/x/0", [[0], [1]], "new", True), ("new/b.npz/x/2", [[2]], "new", False),
        ("new/b.npz/y/0", [[0], [1]], "new", True), ("new/b.npz/y/2", [[2], [3]], "new", False),
        ("new/c.csv/0", [[1, 2], [np.nan, 4]], "on", True), ("new/c.csv/2", [[5, 6]], "off", False),
        ("new/c.csv/3", [[7, 8]], "off", True),  # behind a gap
    ]  # fmt: skip
    for record, (name, values, label, begins) in zip(found, expected, strict=False):
        assert (record.id, record.label, record.begins) == (name, label, begins)
        np.testing.assert_array_equal(record.values, np.array(values, np.float64))
    assert [record.time for record in found[7:10]] == [1.0, 3.0, 9.0]  # its own
    times = [record.time + len(record.values) - 1 for record in found[:7]]
    assert times == sorted(times)
    assert [record.time for record in found[:3]] == [1000.0 - 1, 1001.0, 1003.0]
    assert [(record.id, record.label) for record in found[10:]] == [("p", None), ("q", None), ("worn/e.png", "worn")]
    assert found[-1].values.dtype == np.uint8
    assert found[-1].values.tolist() == np.full((1, 4, 4), 7).tolist()
    assert found[-1].time == found[6].time + 1


def test_a_whole_recording_is_a_record(folder: Path) -> None:
    (folder / "new/c.csv").unlink()
    found = records(everything(opened(folder, block=None, label_pattern="([a-z])[.]")))
    assert [record.id for record in found] == ["new/a.npy", "new/b.npz/x", "new/b.npz/y", "p", "q", "worn/e.png"]
    assert [record.label for record in found] == ["a", "b", "b", None, None, "e"]
    assert found[0].values.shape == (5, 2)


def test_order_is_by_name_or_by_time(folder: Path) -> None:
    found = records(everything(opened(folder, order="time", columns=["y"])))
    assert [record.id for record in found][:2] == ["worn/e.png", "p"]


@pytest.mark.parametrize("stop", range(14))
def test_reading_goes_on_where_it_was(folder: Path, stop: int) -> None:
    """Whatever was acknowledged is not read again, all else is."""
    whole = records(everything(opened(folder, columns=["x", "y"], block=2)))
    source = opened(folder, columns=["x", "y"], block=2)
    begun = source.poll(stop, 0.1)
    source.acknowledge(begun)
    source.poll(3, 0.1)  # in the journal no more
    source.close()
    rest = records(everything(opened(folder, last(begun), columns=["x", "y"], block=2)))
    together = records(begun) + rest
    assert [record.id for record in together] == [record.id for record in whole]
    assert [record.time for record in together] == [record.time for record in whole]


def test_files_that_are_read_are_moved(folder: Path, tmp_path: Path) -> None:
    """Once all of their records are safe, or at the next start."""
    source = opened(folder, done=str(tmp_path / "done"), block=None, columns=["y"], label_pattern=None)
    (folder / "new/c.csv").unlink()
    found = everything(source)
    assert (folder / "new/a.npy").exists()
    source.acknowledge(found[:1])
    assert (tmp_path / "done/new/a.npy").exists()
    assert not (folder / "new/a.npy").exists()
    assert source.needs("new/b.npz")
    assert not source.needs("new/a.npy")
    again = opened(folder, last(found), done=str(tmp_path / "done"), block=None)
    assert everything(again) == []
    assert sorted(path.name for path in (tmp_path / "done").rglob("*.*")) == ["a.npy", "b.npz", "d.jsonl", "e.png"]


def test_files_are_read_when_they_are_complete(tmp_path: Path) -> None:
    """Renamed into place, or unchanged for a while; a folder may come later."""
    folder, told = tmp_path / "in", list[str]()
    source = opened(folder, follow=True, tell=told.append, block=None)
    assert source.poll(9, 0.6) == []
    folder.mkdir()
    np.save(folder / "a.npy.part.npy", np.zeros(3))
    os.rename(folder / "a.npy.part.npy", folder / "a.npy.part")
    half = (b"\x93NUMPY", (folder / "a.npy.part").read_bytes())
    (folder / "b.npy").write_bytes(half[0])
    assert source.poll(9, 0.1) == []
    (folder / "b.npy").write_bytes(half[1])
    os.rename(folder / "a.npy.part", folder / "c.npy")
    found = [*source.poll(9, 20.0)]
    while len(found) < 2:
        found += source.poll(9, 5.0)
    assert [record.id for record in records(found)] == ["b.npy", "c.npy"]
    assert told == [f"source.folder: {folder}/: cannot be read: No such file or directory; it is looked for again"]
    assert source.poll(9, 0.6) == []


def test_lines_that_are_added_to_a_file_are_read(tmp_path: Path) -> None:
    line = '{{"id": {0}, "time": {0}, "values": [{0}]}}\n'.format
    file = tmp_path / "a.jsonl"
    file.write_text(line(1) + line(2))
    positions = last(everything(opened(tmp_path)))
    file.write_text(line(1) + line(2) + line(3))
    found = everything(opened(tmp_path, positions))
    assert [record.id for record in records(found)] == ["3"]
    file.write_text(line(4))
    assert [record.id for record in records(everything(opened(tmp_path, last(found))))] == ["4"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.npy", b"\x93NUMPY", "a.npy: expected an array of numpy: "),
        ("a.npz", b"PK\x03\x04", "a.npz: expected an array of numpy: "),
        ("a.npy", b"", "a.npy: expected an array of numpy: "),
        ("a.npy", b"\x93NUMPY\x01\x00\x10\x00\x00'descr': '<f8', ", "a.npy: expected an array of numpy: "),
        ("a.png", b"\x89PNG\r\n", "a.png: cannot be decoded: not an image in one of the formats "),
        ("a.csv", b"x\n1\n", "a.csv: expected a column time, found x"),
        ("a.csv", b"time,x\n1,one\n", "a.csv: expected numbers in column x, got others"),
        ("a.csv", b"time,x\n2,1\n1,1\n", "a.csv: expected times that ascend in time, got 1 in sample 1 after 2"),
        ("a.jsonl", b"\n\n", "a.jsonl: expected records, found none"),
        ("a.ts", b"@x", "a.ts: "),
    ],
)
def test_a_file_that_cannot_be_read_is_set_aside_and_told_once(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "b.npy", np.zeros(3))
    told: list[str] = []
    if name.endswith(".ts"):
        pytest.importorskip("aeon")
    found = everything(opened(tmp_path, tell=told.append, columns=["x"]))
    assert isinstance(found[0].item, Fault)
    assert found[0].item.reason.startswith(reason)
    assert found[0].item.place == name
    assert [record.id for record in records(found[1:])] == ["b.npy/0"]
    assert told == [f"{found[0].item.reason}; the file is set aside"]
    assert everything(opened(tmp_path, last(found), told.append, columns=["x"])) == []
    assert len(told) == 1


def test_a_file_that_breaks_off_gives_what_it_holds(tmp_path: Path) -> None:
    """An array whose file is shorter than it says."""
    np.save(tmp_path / "a.npy", np.arange(8.0))
    os.truncate(tmp_path / "a.npy", (tmp_path / "a.npy").stat().st_size - 8)
    found = everything(opened(tmp_path, tell=lambda line: None, block=4))
    assert [record.id for record in records(found[:1])] == ["a.npy/0"]
    assert isinstance(found[1].item, Fault)


def test_names_of_any_characters_can_be_ids(tmp_path: Path) -> None:
    for name in (b"a\xff.npy", b"b\x1b[2J.npy", b"c" * 200 + b".npy"):
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    ids = [record.id for record in records(everything(opened(tmp_path, block=None)))]
    assert len(set(ids)) == 3
    assert all(name.isprintable() and len(name) <= 200 and json.dumps(name).isascii() for name in ids)


def test_large_files_and_strange_classes_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / ("x" * 201)).mkdir()
    np.savez(tmp_path / ("x" * 201) / "a.npz", a=np.zeros(3))
    np.savez(tmp_path / "b.npz", a=np.zeros(1000))
    found = everything(opened(tmp_path, tell=lambda line: None, max_file_bytes=4000))
    reasons = [each.item.reason for each in found if isinstance(each.item, Fault)]
    assert reasons[0].startswith("b.npz: expected at most 4,000 bytes, got 8,")
    assert "expected a class of at most 200 printable characters" in reasons[1]


ENDINGS = [ending for ending in KNOWN if not ending.endswith(".ts")]


@given(data=st.data(), name=st.sampled_from(ENDINGS))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_content_of_a_file_raises(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str) -> None:
    """Any bytes, and a good file with some bytes changed or cut off; the next file is read."""
    folder = tmp_path_factory.mktemp("in")
    good = io.BytesIO()
    if name == ".npy":
        np.save(good, np.arange(12.0).reshape(6, 2))
    elif name == ".npz":
        data.draw(st.sampled_from([np.savez, np.savez_compressed]))(good, x=np.arange(12.0))
    elif name in SUFFIXES:
        Image.new("L", (4, 4)).save(good, "PNG")
    elif name.startswith(".csv"):
        text = b"time,x,label\n1,1,a\n2,,b\n"
        good.write(gzip.compress(text) if name.endswith(".gz") else text)
    else:
        good.write(b'{"id": 1, "time": 1, "x": 1}\n')
    content = bytearray(good.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=20))
    (folder / f"a{name}").write_bytes(content)
    np.save(folder / "b.npy", np.zeros((1, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow and pandas, about what is wrong with the content
        found = everything(opened(folder, tell=lambda line: None, columns=["x"], max_file_bytes=10**6))
    assert found[-1].item.id == "b.npy/0"  # type: ignore[union-attr]
    assert len(found) > 1
    assert all(each.position is not None and json.dumps(each.position) for each in found)


def test_a_record_that_is_too_large_is_set_aside(tmp_path: Path) -> None:
    """As a header of 128 bytes can announce."""
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.dtype(np.int8), (2, 2**26)).flush()
    (found,) = everything(opened(tmp_path, tell=lambda line: None))
    assert isinstance(found.item, Fault)
    assert "expected at most 268,435,456 bytes in a record, got 1,073,741,824" in found.item.reason


def test_configurations_are_checked(tmp_path: Path) -> None:
    for keys, message in [
        ({"folder": {"path": ""}}, "folder: expected a folder as path, got nothing"),
        ({"folder": {"path": "a", "order": "size"}}, "folder.order: expected 'name' or 'time', got 'size'"),
        ({"folder": {"path": "a", "label_pattern": "x"}}, "folder.label_pattern: expected a group (…)"),
        ({"folder": {"path": "a"}, "lines": {"path": "b"}}, "configuration: expected one of lines, folder, mqtt, got"),
        ({}, "configuration: expected one of lines, folder, mqtt, got none"),
    ]:
        with pytest.raises(ConfigError) as error:
            parse(SourceConfig, keys)
        assert str(error.value).startswith(message)
