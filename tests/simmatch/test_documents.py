"""Untrusted YAML and JSON: the limits, and messages that are one line whatever the content."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from simmatch.config import ConfigError, LayerConfig, PlasticityConfig, TrainConfig, parse
from simmatch.documents import (
    MOST_CHARACTERS,
    DocumentError,
    dump_yaml,
    load_json,
    load_yaml,
    load_yaml_file,
    quoted,
    shortened,
)
from simmatch.model import load_model


def laughs(levels: int, width: int = 9) -> str:
    """`width` ** `levels` words in a few lines: every list holds the one before `width` times."""
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"name: *a{levels - 1}"])


def merges(levels: int) -> str:
    """Every mapping merges the one before twice."""
    lines = ["a0: &a0 {k: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, levels))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(9), "line 6, column 40: expected at most 262144 characters with aliases expanded, got more"),
        (merges(30), "line 15, column 23: expected at most 262144 characters with aliases expanded, got more"),
        ("a: &a [*a]", "line 1, column 8: expected an alias of a complete value, got one inside the value itself"),
        ("[" * 5000, "line 1, column 51: expected at most 50 levels, got more"),
        ("".join(" " * i + "a:\n" for i in range(600)), "line 50, column 50: expected at most 50 levels, got more"),
        ("#" * (MOST_CHARACTERS + 1), "expected at most 262144 characters, got more"),
        ("9" * 100_000, "line 1, column 1: expected an integer of at most 200 characters, got more"),
        ("seed: 0x" + "f" * 5000, "line 1, column 7: expected an integer of at most 200 characters, got more"),
        ("seed: 1\nmesh: {}\nseed: 2", "line 3, column 1: expected every key once, got 'seed' of line 1 again"),
        ("mesh: {channel: 2, channel: 3}", "line 1, column 20: expected every key once, got 'channel' of line 1 again"),
        ("1: a\n0x1: b", "line 2, column 1: expected every key once, got 1 of line 1 again"),
        ("a: &a {k: 1}\nb: {<<: *a, <<: *a}", "line 2, column 13: expected every key once, got '<<' of line 2 again"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("[1]: 2", "line 1, column 1: while constructing a mapping, found unhashable key"),
        ("!!python/object/apply:os.getpid []", "line 1, column 1: could not determine a constructor for the tag"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream"),
        ("2020-99-99", "month must be in 1..12"),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str | bytes, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(DocumentError) as caught:
        load_yaml(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.monotonic() - started < 10  # without limits the first takes minutes


def test_anchors_and_merges_serve_as_before() -> None:
    """Also where a mapping that merges is itself merged before it is made, and gives a key anew."""
    text = """
    base: &base {pool: 2, power: 0.5}
    first: {layer: {deep: &deep {<<: *base, pool: 3}}}
    second: {<<: *deep, power: 1.0}
    again: [*base, *base]
    """
    base = {"pool": 2, "power": 0.5}
    assert load_yaml(text) == {
        "base": base,
        "first": {"layer": {"deep": {"pool": 3, "power": 0.5}}},
        "second": {"pool": 3, "power": 1.0},
        "again": [base, base],
    }


@pytest.mark.parametrize(
    "value", ["1e3", "-.5e-1", 1e-6, 1e300, float("inf"), "null", "2020-01-01", "0x10", "é", ["1e3", {"a": None}]]
)
def test_what_is_written_is_read_as_the_same(value: object, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml({"z": value, "a": 1}))
    assert list(load_yaml_file(path).items()) == [("z", value), ("a", 1)]


def test_of_a_file_without_end_no_more_is_read_than_a_document_may_hold() -> None:
    with pytest.raises(DocumentError, match="at most 262144 characters"):
        load_yaml_file(Path("/dev/zero"))


@pytest.mark.parametrize("text", ["[" * 100_000, "{", b"\xff", "", "1" * 5000])
def test_json_that_is_none(text: str | bytes) -> None:
    with pytest.raises(DocumentError, match=r"^expected JSON: .{10,300}$"):
        load_json(text)


def test_a_message_quotes_little_of_a_value() -> None:
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    for value in (deep, "x" * 10**6, ["y" * 10**6] * 10**4, {i: {i: i} for i in range(10**4)}, 10**10_000):
        assert len(quoted(value)) <= 400
    assert [quoted(value) for value in ("lr", None, 0.5, [1, 2], {"a": 1})] == [
        "'lr'",
        "None",
        "0.5",
        "[1, 2]",
        "{'a': 1}",
    ]
    assert quoted(10**10_000) == "an integer of 33220 bits"
    assert shortened("one\n  two\x1b[2J\u202e") == "one two\\x1b[2J\\u202e"


def test_a_configuration_of_any_size_is_refused_in_a_short_line() -> None:
    heavy = load_yaml(laughs(5))["name"]
    with pytest.raises(ConfigError, match=r"^epochs: expected an integer, got \[\[") as caught:
        parse(TrainConfig, {"epochs": heavy})
    assert len(str(caught.value)) < 500
    with pytest.raises(ConfigError, match=r"got an integer of 40001 bits$"):
        parse(PlasticityConfig, {"lr": 2**40_000})
    many = {f"key{i}": i for i in range(10_000)} | {"k" * 10**6: 1}
    with pytest.raises(ConfigError, match=r"^key0: unknown key; .* and 9981 more") as caught:
        parse(LayerConfig, {"out_channels": 1, "kernel_size": 1, **many})
    assert len(str(caught.value)) < 20_000


def test_an_exported_models_configuration_is_read_so_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(laughs(9))
    with pytest.raises(ConfigError, match=r"config\.yaml: expected YAML, got: line 6, column 40: expected at most"):
        load_model(tmp_path)


def test_pyyaml_itself_is_left_as_it_is() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"
    assert yaml.safe_load("a: 1\na: 2") == {"a": 2}
    assert yaml.safe_dump("1e-3") == "1e-3\n...\n"
