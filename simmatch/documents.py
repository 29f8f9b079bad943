"""YAML and JSON that somebody else may have written: read within limits, one line for what is wrong.

A configuration names values; it neither builds objects, nor grows when it is read. So aliases may stand for no more
than a document may hold, no key is given twice, and nothing nests deeper than a configuration ever does.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MOST_CHARACTERS = 2**18
"""In a document, aliases written out; some 150 layers."""

MOST_LEVELS = 50
"""Of lists and mappings inside each other."""

LONGEST_VALUE = 200
"""Characters of a value that a message quotes."""


class DocumentError(ValueError):
    """A text that is not what it should be, or too much; one line that names the place."""


def load_yaml(text: str | bytes) -> Any:
    """Plain values of one YAML document, in UTF-8.

    1e-3 is a number, as in YAML 1.2 and everywhere else.

    Raises
    ------
    DocumentError
        Not YAML, a tag that makes objects, a key given twice, or beyond `MOST_CHARACTERS` or `MOST_LEVELS`.

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
    """The same of a file, of which no more is read than a document may hold.

    Raises
    ------
    DocumentError, OSError
    """
    with path.open("rb") as file:
        return load_yaml(file.read(MOST_CHARACTERS + 1))


def dump_yaml(values: Any) -> str:
    """Plain values as text that `load_yaml` reads as the same values, keys in their order."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False)


def dump_json(values: Any) -> str:
    """Plain values as JSON text for a file, keys in their order."""
    return json.dumps(values, indent=1) + "\n"


def load_json(text: str | bytes) -> Any:
    """Plain values of a JSON text.

    Raises
    ------
    DocumentError
        Not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"expected JSON: {shortened(str(error))}") from None


class Loader(yaml.SafeLoader):
    """Safe YAML within limits."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._levels = 0
        self._read = 0
        """Characters and nodes so far, aliases written out."""
        self._sizes: dict[yaml.Node, int] = {}
        """The same of every node that is complete."""
        self._compared: set[yaml.Node] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        mark, alias, before = event.start_mark, isinstance(event, yaml.AliasEvent), self._read
        self._levels += 1
        if self._levels > MOST_LEVELS:
            raise _refused(f"expected at most {MOST_LEVELS} levels, got more", mark)
        node = super().compose_node(parent, index)
        assert node is not None
        self._levels -= 1
        if alias:
            if node not in self._sizes:
                raise _refused("expected an alias of something else, got one inside what it stands for", mark)
            self._read += self._sizes[node]
        else:
            self._read += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self._read > MOST_CHARACTERS:
            raise _refused(f"expected at most {MOST_CHARACTERS} characters with aliases written out, got more", mark)
        if not alias:
            self._sizes[node] = self._read - before
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Before keys are merged in (`<<`), no key may stand there twice."""
        if node not in self._compared:
            self._compared.add(node)
            self._refuse_twins(node)
        super().flatten_mapping(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """No longer than can be shown: 0xfff… may stand for more digits than Python writes."""
        if len(node.value) > LONGEST_VALUE:
            raise _refused(f"expected an integer of at most {LONGEST_VALUE} characters, got more", node.start_mark)
        return int(super().construct_yaml_int(node))

    def _refuse_twins(self, mapping: yaml.MappingNode) -> None:
        first: dict[Hashable, yaml.Node] = {}
        for node, _ in mapping.value:
            merges = node.tag == "tag:yaml.org,2002:merge"
            key = node.value if merges else self.construct_object(node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused as such when the mapping is made
            if first.setdefault(key, node) is not node:
                line = first[key].start_mark.line + 1
                raise _refused(f"expected every key once, got {quoted(key)} of line {line} again", node.start_mark)


class Dumper(yaml.SafeDumper):
    """Writes the text '1e3' in quotes, which `Loader` would take for a number otherwise."""


_EXPONENT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
Loader.add_implicit_resolver(*_EXPONENT)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Dumper.add_implicit_resolver(*_EXPONENT)


def _refused(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def shortened(text: str, most: int = 2 * LONGEST_VALUE) -> str:
    """One line of at most so many characters, its middle left out where there are more; a terminal may print it.

    >>> shortened("abcdefghij", 7), shortened("\\33[2J")
    ('ab...ij', '\\\\x1b[2J')
    """
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


class _Quoted(reprlib.Repr):
    """As `repr`, of whatever size and depth the value is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 4, 10, 10, 10
        self.maxstring = self.maxother = self.maxlong = LONGEST_VALUE

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()
        return repr(value) if bits < LONGEST_VALUE else f"an integer of {bits} bits"


def quoted(value: Any) -> str:
    """A value as a message may hold it: `repr` where that is short.

    >>> quoted("lr"), quoted([["x"] * 1000] * 2)[:24]
    ("'lr'", "[['x', 'x', 'x', 'x', 'x")
    """
    return shortened(_QUOTED.repr(value))


_QUOTED = _Quoted()
