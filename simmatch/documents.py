"""Reading of untrusted YAML and JSON within limits, with one-line error messages, and writing of both.

A configuration holds plain values only: it builds no objects. The expansion of aliases counts towards the size limit,
duplicate keys are an error, and the depth of nesting is limited.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

MOST_CHARACTERS = 2**18
"""Maximum size of a document, with aliases expanded; enough for about 150 layers."""

MOST_LEVELS = 50
"""Maximum depth of nested lists and mappings."""

LONGEST_VALUE = 200
"""Maximum number of characters of a value quoted in a message."""


class DocumentError(ValueError):
    """A document is malformed or too large. The one-line message gives the position.

    >>> load_json("{")
    Traceback (most recent call last):
    simmatch.documents.DocumentError: expected JSON: Expecting property name enclosed in double quotes: ...
    """


def load_yaml(text: str | bytes) -> Any:
    """Read the plain values of one YAML document in UTF-8; 1e-3 is a number, as in YAML 1.2.

    Raises
    ------
    DocumentError
        The text is not YAML, has a tag that builds objects, has a duplicate key, or exceeds `MOST_CHARACTERS` or
        `MOST_LEVELS`.

    >>> load_yaml("lr: 1e-3")
    {'lr': 0.001}
    >>> load_yaml("seed: 1\\nseed: 2")
    Traceback (most recent call last):
    simmatch.documents.DocumentError: line 2, column 1: expected every key once, got 'seed' of line 1 again
    """
    if len(text) > MOST_CHARACTERS:
        raise DocumentError(f"expected at most {MOST_CHARACTERS} characters, got more")
    try:
        return yaml.load(text.decode() if isinstance(text, bytes) else text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        words = ", ".join(filter(None, (error.context, error.problem)))
        raise DocumentError(f"{place}{shortened(words)}") from None
    except (yaml.YAMLError, ValueError) as error:  # such as the 99th of a month
        raise DocumentError(shortened(str(error))) from None


def load_yaml_file(path: Path) -> Any:
    """Read a YAML file as `load_yaml` does; at most `MOST_CHARACTERS` are read.

    Raises
    ------
    DocumentError
        As for `load_yaml`.
    OSError
        The file cannot be read.

    >>> load_yaml_file(Path("missing.yaml"))
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'missing.yaml'
    """
    with path.open("rb") as file:
        return load_yaml(file.read(MOST_CHARACTERS + 1))


def dump_yaml(values: Any) -> str:
    """Write plain values as YAML that `load_yaml` reads back unchanged; keys keep their order.

    >>> dump_yaml({"name": "1e3", "lr": 0.001})
    "name: '1e3'\\nlr: 0.001\\n"
    """
    return yaml.dump(values, Dumper=Dumper, sort_keys=False)


def dump_json(values: Any) -> str:
    """Write plain values as JSON text for a file; keys keep their order.

    >>> dump_json({"steps": 3})
    '{\\n "steps": 3\\n}\\n'
    """
    return json.dumps(values, indent=1) + "\n"


def load_json(text: str | bytes) -> Any:
    """Read the plain values of a JSON text.

    Raises
    ------
    DocumentError
        The text is not JSON, or is nested too deeply.

    >>> load_json('{"steps": 3}')
    {'steps': 3}
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"expected JSON: {shortened(str(error))}") from None


class Loader(yaml.SafeLoader):
    """Loader of plain YAML values with the limits of this module.

    >>> yaml.load("[1, 2]", Loader)
    [1, 2]
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._levels = 0
        self._read = 0
        """Characters and nodes so far, with aliases expanded."""
        self._sizes: dict[yaml.Node, int] = {}
        """Characters and nodes of every complete node."""
        self._compared: set[yaml.Node] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        mark, alias, before = event.start_mark, isinstance(event, yaml.AliasEvent), self._read
        self._levels += 1
        if self._levels > MOST_LEVELS:
            raise _limit_error(f"expected at most {MOST_LEVELS} levels, got more", mark)
        node = super().compose_node(parent, index)
        assert node is not None
        self._levels -= 1
        if alias:
            if node not in self._sizes:
                raise _limit_error("expected an alias of a complete value, got one inside the value itself", mark)
            self._read += self._sizes[node]
        else:
            self._read += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self._read > MOST_CHARACTERS:
            raise _limit_error(f"expected at most {MOST_CHARACTERS} characters with aliases expanded, got more", mark)
        if not alias:
            self._sizes[node] = self._read - before
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Check for duplicate keys before other mappings are merged in (`<<`)."""
        if node not in self._compared:
            self._compared.add(node)
            self._check_duplicates(node)
        super().flatten_mapping(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Limit the length of an integer: Python refuses to print integers with very many digits, such as 0xfff…"""
        if len(node.value) > LONGEST_VALUE:
            raise _limit_error(f"expected an integer of at most {LONGEST_VALUE} characters, got more", node.start_mark)
        return int(super().construct_yaml_int(node))

    def _check_duplicates(self, mapping: yaml.MappingNode) -> None:
        first: dict[Hashable, yaml.Node] = {}
        for node, _ in mapping.value:
            merges = node.tag == "tag:yaml.org,2002:merge"
            key = node.value if merges else self.construct_object(node, deep=True)
            if not isinstance(key, Hashable):
                continue  # an error when the mapping is constructed
            if first.setdefault(key, node) is not node:
                line = first[key].start_mark.line + 1
                raise _limit_error(f"expected every key once, got {quoted(key)} of line {line} again", node.start_mark)


class Dumper(yaml.SafeDumper):
    """Dumper that quotes text such as '1e3', which `Loader` would otherwise read as a number.

    >>> yaml.dump("1e3", Dumper=Dumper)
    "'1e3'\\n"
    """


_EXPONENT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
Loader.add_implicit_resolver(*_EXPONENT)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Dumper.add_implicit_resolver(*_EXPONENT)


def _limit_error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def shortened(text: str, most: int = 2 * LONGEST_VALUE) -> str:
    """Text as one printable line of at most `most` characters; the middle of a longer text is replaced by dots.

    >>> shortened("abcdefghij", 7), shortened("\\33[2J")
    ('ab...ij', '\\\\x1b[2J')
    """
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def listed(items: Sequence[object], most: int, separator: str = ", ") -> str:
    """The first `most` items in one line, and how many more there are.

    >>> listed("ab", 2), listed("abcde", 2), listed("abcde", 2, "; ")
    ('a, b', 'a, b and 3 more', 'a; b; and 3 more')
    """
    more = len(items) - most
    join = " " if separator == ", " else separator
    return separator.join(map(str, items[:most])) + (f"{join}and {more} more" if more > 0 else "")


class _Quoted(reprlib.Repr):
    """`repr` with a limit on size and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 4, 10, 10, 10
        self.maxstring = self.maxother = self.maxlong = LONGEST_VALUE

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()
        return repr(value) if bits < LONGEST_VALUE else f"an integer of {bits} bits"


def quoted(value: Any) -> str:
    """A value for use in a message: its `repr`, shortened.

    >>> quoted("lr"), quoted([["x"] * 1000] * 2)[:24]
    ("'lr'", "[['x', 'x', 'x', 'x', 'x")
    """
    return shortened(_QUOTED.repr(value))


_QUOTED = _Quoted()
