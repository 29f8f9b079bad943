"""YAML files and `--set`: values, places, and messages that name key, expectation and value."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import RunConfig
from jobs.evaluation.config import EvaluationConfig, overridden
from jobs.evaluation.finetuning import FinetuneConfig
from jobs.options import override, read_yaml
from jobs.streaming.config import parse_stream
from simmatch.config import ConfigError, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("+1.5e2", 150.0),
        (".5e1", 5.0),
        ("-2.e-1", -0.2),
        ("0.25", 0.25),
        ("3", 3),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1e3x", "1e3x"),
        ("'1e-3'", "1e-3"),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1e-3, {a: 2}]", [0.001, {"a": 2}]),
        ("a=b", "a=b"),
    ],
)
def test_values_are_yaml_with_exponents(tmp_path: Path, text: str, value: object) -> None:
    found = override({}, [f"key={text}"])["key"]
    assert found == value
    assert type(found) is type(value)
    (tmp_path / "file.yaml").write_text(f"key: {text}\n")
    assert read_yaml(tmp_path / "file.yaml") == {"key": value}


def test_keys_reach_into_lists_and_make_what_is_missing() -> None:
    values = {"layers": [{"pool": 4}, {"pool": 2, "train": {"epochs": 1}}], "mesh": None}
    override(values, ["layers.0.pool=7", "layers.1.train.epochs=3", "mesh.channel=2", "a.b.c=1", "layers.0.pool=8"])
    assert values == {
        "layers": [{"pool": 8}, {"pool": 2, "train": {"epochs": 3}}],
        "mesh": {"channel": 2},
        "a": {"b": {"c": 1}},
    }
    assert override({"sizes": [1, 2]}, ["sizes.1=5"]) == {"sizes": [1, 5]}
    assert override({"layers": [1]}, ["layers=[]"]) == {"layers": []}


def test_what_an_anchor_shares_is_overridden_where_it_is_named_only(tmp_path: Path) -> None:
    path = tmp_path / "anchors.yaml"
    path.write_text("layers:\n  - &first {pool: 2, train: {lr: 0.1}}\n  - *first\n  - {<<: *first, pool: 3}\n")
    values = override(read_yaml(path), ["layers.1.train.lr=0.2", "layers.1.pool=4"])
    unchanged, train = {"pool": 2, "train": {"lr": 0.1}}, {"lr": 0.1}
    assert values == {"layers": [unchanged, {"pool": 4, "train": {"lr": 0.2}}, {"pool": 3, "train": train}]}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "--set: expected dotted.key=value, got 'seed'"),
        ("=3", "--set: expected dotted.key=value, got '=3'"),
        ("mesh..channel=3", "--set: expected dotted.key=value, got 'mesh..channel=3'"),
        (".seed=3", "--set: expected dotted.key=value, got '.seed=3'"),
        ("seed=[1", "--set seed: expected a YAML value, got '[1'"),
        ("seed=2020-99-99", "--set seed: expected a YAML value, got '2020-99-99'"),
        ("seed=!!python/object/apply:os.getcwd []", "--set seed: expected a YAML value, got '!!python/"),
        ("layers.2.pool=3", "--set layers.2: expected a number from 0 to 1, got '2'"),
        ("layers.-1.pool=3", "--set layers.-1: expected a number from 0 to 1, got '-1'"),
        ("layers.².pool=3", "--set layers.²: expected a number from 0 to 1, got '²'"),
        (f"layers.{'1' * 5000}=3", f"--set layers.{'1' * 5000}: expected a number from 0 to 1, got '1111"),
        ("layers.first=3", "--set layers.first: expected a number from 0 to 1, got 'first'"),
        ("seed.low=3", "--set seed.low: expected a mapping at seed, got 7"),
        ("seed.low.er=3", "--set seed.low: expected a mapping around it, got 7"),
    ],
)
def test_a_malformed_assignment_is_quoted(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override({"layers": [{}, {}], "seed": 7}, [assignment])
    assert str(caught.value).startswith(message)


BOMB = b"a: &a [" + b"1," * 1000 + b"]\nb: &b [" + b"*a," * 1000 + b"]\n"
"""Two million values in 5 kB."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\n", "expected YAML in {path}, got: line 2, column 1: while parsing a flow sequence, expected"),
        (b"\xff\xfe", "expected YAML in {path}, got: 'utf-8' codec"),
        (b"born: 2020-99-99\n", "expected YAML in {path}, got: month must be in 1..12"),
        (b"[" * 5000, "expected YAML in {path}, got: line 1, column 51: expected at most 50 levels"),
        (
            b"a: 1\nb: 2\na: 3\n",
            "expected YAML in {path}, got: line 3, column 1: expected every key once, got 'a' of line 1",
        ),
        (BOMB, "expected YAML in {path}, got: line 2, column "),
        (b"- 1\n- 2\n", "expected a mapping (key: value) in {path}, got [1, 2]"),
        (b"", "expected a mapping (key: value) in {path}, got nothing"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith("--config: " + message.format(path=path))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config: expected a YAML file, got .*none\.yaml, which does not exist"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"--config: expected a readable YAML file, got .*: Is a directory"):
        read_yaml(tmp_path)


def test_every_configuration_here_is_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "jobs" / "configs"
    names = [_name(path) for path in sorted(folder.glob("*.yaml"))]
    assert {"digits", "evaluate_digits", "finetune_digits", "stream", "stream_small"} <= set(names)


def _name(path: Path) -> str:
    """The name of a file's configuration, read by the job that it is for, with its shortcuts too where it has them."""
    kinds: dict[str, type[EvaluationConfig] | type[FinetuneConfig]]
    kinds = {"evaluate": EvaluationConfig, "finetune": FinetuneConfig}
    kind = kinds.get(path.stem.partition("_")[0])
    if path.stem.startswith("stream"):
        return parse_stream(read_yaml(path)).name
    if kind is None:
        return parse(RunConfig, read_yaml(path)).name
    quick = parse(kind, overridden(read_yaml(path), [], quick=True))
    assert parse(kind, overridden(read_yaml(path), [], quick=False)).name == quick.name
    return quick.name
