"""Records from a file that grows.

Oracle: the lines that were written, in their order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.streaming.records import Delivery, Fault, LateLabel, Position, Record, Source
from jobs.streaming.sources import SourceConfig, open_source
from jobs.streaming.sources.fields import Place, RecordKeys, from_fields, from_json
from simmatch.config import ConfigError, parse

Positions = dict[str, Position]


def opened(file: Path, positions: Positions | None = None, tell: Callable[[str], None] = print, **keys: Any) -> Source:
    config = parse(SourceConfig, {"lines": {"path": str(file), "settle_s": 0.05, **keys}})
    return open_source(config, positions or {}, tell)


def line(number: int) -> str:
    return json.dumps({"id": number, "time": number, "values": [number]}) + "\n"


def ids(deliveries: list[Delivery]) -> list[str]:
    assert not [each.item for each in deliveries if isinstance(each.item, Fault)]
    return [each.item.id for each in deliveries]  # type: ignore[union-attr]


def faults(deliveries: list[Delivery]) -> list[tuple[str, str]]:
    return [(each.item.place, each.item.reason) for each in deliveries if isinstance(each.item, Fault)]


def last(deliveries: list[Delivery]) -> Positions:
    return {each.position["source"]: json.loads(json.dumps(each.position)) for each in deliveries if each.position}


def several(source: Source, count: int) -> list[Delivery]:
    found: list[Delivery] = []
    deadline = time.monotonic() + 20
    while len(found) < count and time.monotonic() < deadline:
        found += source.poll(count - len(found), 0.1)
    return found


def write(file: Path, text: str) -> None:
    with file.open("a") as opened:
        opened.write(text)


def test_lines_are_read_as_they_come(tmp_path: Path) -> None:
    """An incomplete one waits; a file may come later."""
    file = tmp_path / "log.jsonl"
    source = opened(file)
    assert source.poll(9, 0) == []
    write(file, line(0) + line(1) + line(2)[:10])
    assert ids(source.poll(1, 0)) == ["0"]
    assert ids(source.poll(9, 0)) == ["1"]
    assert source.poll(9, 0.1) == []
    write(file, line(2)[10:] + "\r\n\n" + '{"id": "0", "label": "on"}\n')
    found = source.poll(9, 0)
    assert ids(found) == ["2", "0"]
    assert found[1].item == LateLabel("0", "on")
    assert not source.ended


def test_a_source_that_is_not_followed_ends_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(line(0) + line(1).strip())
    source = opened(file, follow=False)
    found = [*source.poll(9, 0), *source.poll(9, 0)]
    assert ids(found) == ["0", "1"]
    assert source.ended


@pytest.mark.parametrize("csv", [False, True])
@pytest.mark.parametrize("stop", range(7))
def test_reading_goes_on_where_it_was(tmp_path: Path, stop: int, csv: bool) -> None:
    """The file grows meanwhile; ids and times by number go on as well."""
    if csv:
        file, keys = tmp_path / "log.csv", {"columns": ["y"], "id_field": None, "time_field": None}
        lines = ["x,y\n", *(f"{number},{number}\n" for number in range(6))]
        expected = [f"log.csv/{number}" for number in range(6)]
    else:
        file, keys, lines = tmp_path / "log.jsonl", {}, [line(number) for number in range(6)]
        expected = list(map(str, range(6)))
    file.write_text("".join(lines[:-2]))
    source = opened(file, **keys)
    begun = source.poll(stop, 0)
    source.poll(1, 0)
    source.close()
    write(file, "".join(lines[-2:]))
    rest = opened(file, last(begun), **keys).poll(9, 0)
    assert ids(begun) + ids(rest) == expected
    assert [each.item.time for each in begun + rest] == [0, 1, 2, 3, 4, 5]  # type: ignore[union-attr]
    assert [each.item.values.tolist() for each in begun + rest] == [[[n]] for n in range(6)]  # type: ignore[union-attr]


@pytest.mark.parametrize("away", [False, True], ids=["running", "away"])
@pytest.mark.parametrize("rotations", [1, 2])
def test_a_file_that_is_renamed_and_made_anew(tmp_path: Path, rotations: int, away: bool) -> None:
    """Once or twice, while the stream runs or while it is away; what was written to the old file last is read first."""
    file, number = tmp_path / "log.jsonl", 3
    file.write_text(line(0) + line(1) + line(2))
    source = opened(file)
    begun = source.poll(2, 0)
    if away:
        source.close()
    for _ in range(rotations):
        for old in (2, 1):
            if (older := Path(f"{file}.{old}")).exists():
                older.rename(f"{file}.{old + 1}")
        file.rename(f"{file}.1")
        time.sleep(0.02)  # times of files tell which is the older one
        file.write_text(line(number) + line(number + 1))
        number += 2
    if away:
        source = opened(file, last(begun))
    assert ids(begun + several(source, number - 2)) == list(map(str, range(number)))
    write(file, line(number))
    assert ids(several(source, 1)) == [str(number)]


def test_a_late_line_of_the_renamed_file_is_read(tmp_path: Path) -> None:
    """Its writer has not yet opened the new one; the last line lacks its end."""
    file = tmp_path / "log.jsonl"
    file.write_text(line(0))
    source = opened(file, settle_s=0.5)
    assert ids(source.poll(9, 0)) == ["0"]
    file.rename(f"{file}.1")
    file.write_text(line(2))
    assert source.poll(9, 0) == []
    write(Path(f"{file}.1"), line(1).strip())
    assert ids(several(source, 2)) == ["1", "2"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_file_that_is_truncated(tmp_path: Path, count: int) -> None:
    """While the stream runs: what follows is read, even where the file has become as long as it was, or longer."""
    file, told = tmp_path / "log.jsonl", list[str]()
    file.write_text(line(0) + line(1))
    source = opened(file, tell=told.append)
    assert ids(source.poll(9, 0)) == ["0", "1"]
    time.sleep(0.02)  # the file is not written twice at one time
    file.write_text("".join(line(number) for number in range(2, 2 + count)))
    assert ids(several(source, count)) == [str(number) for number in range(2, 2 + count)]
    assert told == [f"{file}: was truncated or written anew; reading it from its beginning"]


def test_a_file_that_is_copied_and_truncated_while_the_stream_is_away(tmp_path: Path) -> None:
    """The copy is known by its first bytes."""
    file = tmp_path / "log.jsonl"
    file.write_text("".join(line(number) for number in range(100)))
    source = opened(file)
    begun = source.poll(50, 0)
    source.close()
    (tmp_path / "log.jsonl.1").write_bytes(file.read_bytes())
    file.write_text(line(100))
    assert ids(begun + several(opened(file, last(begun)), 51)) == list(map(str, range(101)))


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    file, told = tmp_path / "log.jsonl", list[str]()
    file.write_text(line(0))
    positions = last(opened(file).poll(9, 0))
    file.unlink()
    file.write_text(line(1))
    assert ids(opened(file, positions, told.append).poll(9, 0)) == ["1"]
    assert "the file that was read up to byte" in told[0]


def test_lines_that_are_no_records_are_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"{\n" + b"\xff\xfe\n" + b"x" * 5000 + b"\n[]\n" + line(0).encode() + b"y" * 5000)
    source = opened(file, max_record_bytes=100)
    found = source.poll(9, 0)
    assert [place for place, _ in faults(found)] == [f"log.jsonl, line {number}" for number in (1, 2, 3, 4)]
    assert [reason for _, reason in faults(found)][1:] == [
        "expected UTF-8, got byte 0xff",
        "expected at most 100 bytes in a line, got 5000",
        "expected a JSON object, got []",
    ]
    assert len(found[2].item.raw) == 100  # type: ignore[union-attr]
    assert ids(found[4:]) == ["0"]
    write(file, "\n" + line(1))
    found = source.poll(9, 0)
    assert faults(found) == [("log.jsonl, line 6", "expected at most 100 bytes in a line, got 5000")]
    assert ids(found[1:]) == ["1"]


def test_a_long_line_takes_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    with file.open("wb") as opened_file:
        opened_file.truncate(50_000_000)
    write(file, "\n" + line(0))
    source = opened(file, max_record_bytes=1000)
    found = several(source, 2)
    assert faults(found) == [("log.jsonl, line 1", "expected at most 1000 bytes in a line, got 50000000")]
    assert ids(found[1:]) == ["0"]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    """Their order may change, and others may come between them, with another line of names."""
    file, keys = tmp_path / "log.csv", {"columns": ["x", "y"], "group_field": "machine"}
    file.write_text('\ufeffid,time,x,y,label,machine\n1,1, 2 ,"3",on,m1\n2,2020-01-01T00:00:00Z,,nan,,\n')
    source = opened(file, **keys)
    assert ids(opened(file, last(source.poll(1, 0)), **keys).poll(9, 0)) == ["2"]
    one, two = (each.item for each in opened(file, **keys).poll(9, 0))
    source.poll(1, 0)
    assert isinstance(one, Record)
    assert isinstance(two, Record)
    assert (one.id, one.time, one.label, one.group, one.values.tolist()) == ("1", 1.0, "on", "m1", [[2.0, 3.0]])
    assert (two.time, two.label, two.group, np.isnan(two.values).all()) == (1577836800.0, None, "", True)
    write(file, "y,id,new,time,x,label\n5,3,0,3,4,\n,1,,,,off\n")
    found = source.poll(9, 0)
    assert [each.item.values.tolist() for each in found[:1]] == [[[4.0, 5.0]]]  # type: ignore[union-attr]
    assert found[1].item == LateLabel("1", "off")
    after = opened(file, last(found), **keys)
    write(file, "7,4,0,4,6,\n")
    assert [each.item.values.tolist() for each in after.poll(9, 0)] == [[[6.0, 7.0]]]  # type: ignore[union-attr]


def test_a_schema_that_changes_is_told_once_and_its_records_are_set_aside(tmp_path: Path) -> None:
    """Until the names are right again; also after a restart."""
    file, told, keys = tmp_path / "log.csv", list[str](), {"columns": ["x"]}
    file.write_text("id,time,x\n1,1,1\n")
    source = opened(file, tell=told.append, **keys)
    begun = source.poll(9, 0)
    file.rename(f"{file}.1")
    file.write_text("id,time,z\n2,2,2\n3,3,3\n")
    found = several(source, 3)
    assert faults(found) == [
        ("log.csv, line 1", "expected columns 'x' in the line of names, got id, time, z"),
        ("log.csv, line 2", "expected a line of names before it, which has all columns, got none"),
        ("log.csv, line 3", "expected a line of names before it, which has all columns, got none"),
    ]
    assert [each.item.raw for each in found] == [b"id,time,z", b"2,2,2", b"3,3,3"]  # type: ignore[union-attr]
    assert len(told) == 1
    write(file, "4,4,4\nid,x,time\n5,5,6\n")
    again = opened(file, last(begun + found), told.append, **keys)
    found = again.poll(9, 0)
    assert len(faults(found)) == 1
    assert ids(found[1:]) == ["5"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1,2", "expected 3 fields, got 2"),
        ('1,1,"2', "expected the fields of one line of CSV, got a quote without its end"),
        ("1,1,two", "x: expected a number, got 'two'"),
        ("1,1,1_0", "x: expected a number, got '1_0'"),
        ("1,soon,1", "time: expected seconds or a date in ISO 8601, got 'soon'"),
        ("1,nan,1", "time: expected seconds or a date in ISO 8601, got 'nan'"),
        (",1,1", "expected a field 'id', got fields 'id', 'time', 'x'"),
    ],
)
def test_rows_that_are_no_records_are_set_aside(tmp_path: Path, row: str, reason: str) -> None:
    file = tmp_path / "log.csv"
    file.write_text(f"id,time,x\n{row}\n7,7,7\n")
    found = opened(file, columns=["x"]).poll(9, 0)
    assert faults(found) == [("log.csv, line 2", reason)]
    assert ids(found[1:]) == ["7"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "expected a field 'id', got no fields"),
        ({"id": "a"}, "time: expected seconds or a date in ISO 8601, got None"),
        ({"id": "a", "time": True}, "time: expected seconds or a date in ISO 8601, got True"),
        ({"id": "a", "time": 1e400}, "time: expected seconds or a date in ISO 8601, got inf"),
        ({"id": "a", "time": 1}, "expected a field 'values', got fields 'id', 'time'"),
        ({"id": "a", "time": 1, "values": []}, "values: expected numbers, got []"),
        ({"id": "a", "time": 1, "values": {"x": 1}}, "values: expected numbers, got {'x': 1}"),
        ({"id": "a", "time": 1, "values": ["1"]}, "values: expected numbers, got ['1']"),
        ({"id": "a", "time": 1, "values": [None, "1"]}, "values: expected numbers, got [None, '1']"),
        ({"id": "a", "time": 1, "values": [True]}, "values: expected numbers, got [True]"),
        ({"id": "a", "time": 1, "values": [10**400]}, "values: expected numbers below 1.8e308, got [an integer"),
        ({"id": "a", "time": 1, "values": [[[256]]]}, "values: expected [C], [T][C], or [C][H][W] of integers from 0"),
        ({"id": "a", "time": 1, "values": [[1], [2, 3]]}, "values: expected lists of one length, got [[1], [2, 3]]"),
        ({"id": "a\x1b[2J", "time": 1, "values": [1]}, "id: expected printable text or an integer, got 'a\\x1b[2J'"),
        ({"id": "\ud800", "time": 1, "values": [1]}, "id: expected printable text or an integer, got "),
        ({"id": "x" * 201, "time": 1, "values": [1]}, "id: expected at most 200 characters, got 201"),
        ({"id": 1.5, "time": 1, "values": [1]}, "id: expected printable text or an integer, got 1.5"),
        (
            {"id": "a", "time": 1, "values": [1], "label": ["x"]},
            "label: expected printable text or an integer, got ['x']",
        ),
    ],
)
def test_objects_that_are_no_records_are_set_aside(fields: dict[str, Any], reason: str) -> None:
    raw = json.dumps(fields).encode()
    fault = from_json(raw, RecordKeys(), Place("here"))
    assert isinstance(fault, Fault)
    assert fault.reason.startswith(reason)
    assert (fault.raw, fault.place) == (raw, "here")


def test_values_of_every_shape() -> None:
    for values, expected in [
        (3, [[3.0]]),
        ([1, None, float("nan")], [[1.0, np.nan, np.nan]]),
        ([[1, 2], [3, 4]], [[1.0, 2.0], [3.0, 4.0]]),
        ([[None], [1]], [[np.nan], [1.0]]),
        ([float("inf")], [[np.inf]]),
    ]:
        record = from_fields({"id": 1, "time": 0, "values": values}, RecordKeys(), Place(""), b"")
        assert isinstance(record, Record)
        assert record.values.dtype == np.float64
        np.testing.assert_array_equal(record.values, np.array(expected))
    image = from_fields({"id": 1, "time": 0, "values": [[[0, 255]]]}, RecordKeys(), Place(""), b"")
    assert isinstance(image, Record)
    assert (image.values.dtype, image.values.shape) == (np.uint8, (1, 1, 2))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "x"]), inner, max_size=2),
    max_leaves=8,
)


@given(fields=st.dictionaries(st.sampled_from(["id", "time", "values", "label", "group", "x"]), JSON), x=st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_object_raises(fields: dict[str, Any], x: bool) -> None:
    """And whatever comes of it can be written down and printed."""
    keys = RecordKeys(columns=("x",)) if x else RecordKeys()
    item = from_json(json.dumps(fields).encode(), keys, Place("here"))
    if isinstance(item, Fault):
        assert item.reason.isprintable()
    else:
        assert item.id.isprintable()
        assert item.id.encode()
    if isinstance(item, Record):
        assert np.isfinite(item.time)
        assert item.values.size > 0


@given(
    noise=st.lists(st.binary(max_size=30).filter(lambda raw: b"\n" not in raw), max_size=8),
    sizes=st.lists(st.integers(1, 60), max_size=30),
    csv=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_good_record_is_lost_among_bad_ones(
    tmp_path_factory: pytest.TempPathFactory, noise: list[bytes], sizes: list[int], csv: bool
) -> None:
    """Lines of any bytes between good ones; the file grows by pieces of any size; the reader is replaced at each."""
    file = tmp_path_factory.mktemp("lines") / ("log.csv" if csv else "log.jsonl")
    good = [f"r{number},{number},1\n" if csv else line(number) for number in range(len(noise) + 1)]
    content = b"id,time,x\n" if csv else b""
    for number, each in enumerate(noise):
        content += good[number].encode() + each + b"\n"
    content += good[-1].encode()
    expected = [f"r{number}" if csv else str(number) for number in range(len(good))]
    file.touch()
    found: list[Delivery] = []
    start = 0
    for size in [*sizes, len(content)]:
        with file.open("ab") as opened_file:
            opened_file.write(content[start : start + size])
        start += size
        source = opened(file, last(found), lambda told: pytest.fail(told), **({"columns": ["x"]} if csv else {}))
        while some := source.poll(2, 0):
            found += some
        source.close()
    records = [each.item.id for each in found if isinstance(each.item, Record)]
    assert [name for name in records if name in expected] == expected
    assert len(found) <= len(content.splitlines()) + content.count(b"\n")


def test_configurations_are_checked() -> None:
    for keys, message in [
        ({"path": ""}, "lines: expected a file as path, got nothing"),
        ({"path": "a.csv"}, "lines: expected the names of the channels as columns, for CSV, got none"),
        ({"path": "a.csv", "columns": []}, "lines.columns: expected a list of at least 1 item"),
        ({"path": "a", "delimiter": "xy"}, "lines: expected one character as delimiter, got 'xy'"),
        ({"path": "a", "follows": True}, "lines.follows: unknown key; "),
        ({"path": "a", "max_record_bytes": 0}, "lines.max_record_bytes: expected greater than 0, got 0"),
    ]:
        with pytest.raises(ConfigError) as error:
            parse(SourceConfig, {"lines": keys})
        assert str(error.value).startswith(message)


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    from jobs.streaming.records import SourceError

    with pytest.raises(SourceError, match="cannot be read: Is a directory"):
        opened(tmp_path).poll(9, 0)
