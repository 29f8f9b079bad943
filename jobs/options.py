"""From a YAML file and `--set` overrides to plain values, ready for `simmatch.config.parse`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from copy import copy
from pathlib import Path
from typing import Any

from simmatch.config import ConfigError
from simmatch.documents import DocumentError, load_yaml, load_yaml_file, quoted


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises
    ------
    ConfigError
        No such file, not YAML, or not a mapping.
    """
    try:
        values = load_yaml_file(path)
    except FileNotFoundError:
        raise ConfigError(f"--config: expected a YAML file, got {path}, which does not exist") from None
    except OSError as error:
        raise ConfigError(f"--config: expected a readable YAML file, got {path}: {error.strerror}") from None
    except DocumentError as error:
        raise ConfigError(f"--config: expected YAML in {path}, got: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else quoted(values)
        raise ConfigError(f"--config: expected a mapping (key: value) in {path}, got {found}")
    return values


def add_set(parser: argparse.ArgumentParser, example: str = "") -> None:
    """The option `--set`, whose assignments `override` applies.

    >>> parser = argparse.ArgumentParser()
    >>> add_set(parser, "seed=1")
    >>> parser.parse_args(["--set", "seed=2", "--set", "data.name=mnist"]).set
    ['seed=2', 'data.name=mnist']
    """
    given = f", e.g. {example}" if example else ""
    text = f"override a key{given}; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `dotted.key=value` assignments; numbers in a key index lists, values are YAML.

    >>> override({"layers": [{"pool": 4}]}, ["layers.0.pool=7", "mesh.channel=2"])
    {'layers': [{'pool': 7}], 'mesh': {'channel': 2}}
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set: expected dotted.key=value, got {quoted(assignment)}")
        try:
            value = load_yaml(text)
        except DocumentError:
            raise ConfigError(f"--set {key}: expected a YAML value, got {quoted(text)}") from None
        _assign(values, key, value)
    return values


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    target: Any = values
    for depth, part in enumerate(path):
        target = _child(target, part, ".".join(path[: depth + 1]))
    if isinstance(target, list):
        target[_index(target, last, key)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"--set {key}: expected a mapping at {'.'.join(path)}, got {quoted(target)}")


def _child(target: Any, part: str, key: str) -> Any:
    """A copy that replaces the child: other places that share it by a YAML anchor stay unchanged."""
    if isinstance(target, list):
        index = _index(target, part, key)
        target[index] = copy(target[index])
        return target[index]
    if not isinstance(target, dict):
        raise ConfigError(f"--set {key}: expected a mapping around it, got {quoted(target)}")
    target[part] = {} if target.get(part) is None else copy(target[part])
    return target[part]


def _index(target: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(target):
        raise ConfigError(f"--set {key}: expected a number from 0 to {len(target) - 1}, got {quoted(part)}")
    return int(part)


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """An `argparse` type: an integer of at least `least`, and of at most `most` if given."""
    expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"

    def integer(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() and len(text) < 100 else -1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return number

    return integer


def amount(text: str) -> float:
    """An `argparse` type: a number of at least 0, below 1e9."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, below 1e9, got {text!r}")
    return value


def add_counts(
    parser: argparse.ArgumentParser,
    name: str,
    metavar: str,
    purpose: str,
    *,
    several: bool = False,
    default: int | None = None,
) -> None:
    """An option `--<name>` for a positive integer, or for `several` of them."""
    parser.add_argument(
        f"--{name}", type=at_least(1), nargs="+" if several else None, default=default, metavar=metavar, help=purpose
    )


def add_parts(parser: argparse.ArgumentParser, parts: Iterable[str]) -> None:
    """An option `--parts` for some of these names, all by default."""
    names = list(parts)
    parser.add_argument(
        "--parts", nargs="+", choices=names, default=names, metavar="PART",
        help=f"what to measure (default: all of {', '.join(names)})",
    )  # fmt: skip
