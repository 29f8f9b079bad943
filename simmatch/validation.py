"""Messages for invalid configurations: pydantic's errors as one line of the form `key: expected …, got …`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from simmatch.documents import quoted, shortened

MOST_FAULTS = 20
"""Maximum number of faults listed in one message."""


ONE_OF = "expected one of "
UNKNOWN_KEY = f": unknown key; {ONE_OF}"


def one_line(cls: type[BaseModel], error: ValidationError) -> str:
    """The errors from building a `cls`, as one line.

    >>> class Mesh(BaseModel):
    ...     channel: int
    >>> try:
    ...     Mesh(channel="two")
    ... except ValidationError as error:
    ...     print(one_line(Mesh, error))
    channel: expected an integer, unable to parse string as an integer, got 'two'
    """
    faults = _of_their_own(error.errors(include_url=False))
    lines = _merged(_known_keys_once([_describe(cls, fault) for fault in faults[:MOST_FAULTS]]))
    more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
    return "; ".join([*lines, *more])


def _of_their_own(faults: Sequence[Any]) -> list[Any]:
    """Without the fault that a list is too short where one of its items is wrong: pydantic counts the others only."""
    inside = {fault["loc"][:depth] for fault in faults for depth in range(len(fault["loc"]))}
    return [fault for fault in faults if fault["type"] != "too_short" or fault["loc"] not in inside]


def _known_keys_once(lines: list[str]) -> list[str]:
    """With the keys that a mapping knows after its first unknown key only."""
    listed: set[str] = set()
    kept = []
    for line in lines:
        key, unknown, rest = line.partition(UNKNOWN_KEY)
        known, _, given = rest.partition("; got ")
        kept.append(f"{key}{UNKNOWN_KEY.removesuffix(ONE_OF)}got {given}" if unknown and known in listed else line)
        listed.add(known)
    return kept


def _merged(lines: list[str]) -> list[str]:
    """One line per key if a value matches none of several alternatives: 'expected an integer or 'full', got …'."""
    merged: dict[tuple[str, str], str] = {}
    for line in lines:
        key, _, rest = line.partition(": expected ")
        expected, _, given = rest.rpartition(", got ")
        fault = (key, given)
        merged[fault] = f"{merged[fault]} or {expected}" if fault in merged and expected else expected or line
    return [f"{key}: expected {text}, got {given}" if given else text for (key, given), text in merged.items()]


WORDING = {
    "^Input should be ": "",
    "^(String|Tuple|List) should (match|have)": r"\1 to \2",
    "^Tuple to have at least": "a list of at least",
    "^String to match pattern": "text that matches",
    " after validation, not 0": "",
    "a valid integer": "an integer",
    "a valid (list|tuple)": "a list",
    "a valid dictionary": "a mapping (key: value)",
    "a valid ": "a ",
}
"""Patterns in pydantic's messages, and their replacements in ours, after 'expected'."""


def _describe(cls: type[BaseModel], fault: Any) -> str:
    """One of pydantic's errors as `key: expected …, got …`."""
    # the location contains the member of a union that pydantic tried ('int', 'literal[...]'), which is not a key
    given, kind = fault.get("input"), fault["type"]
    unknown = fault["loc"][-1:] if kind == "extra_forbidden" else ()  # may be any text
    around = fault["loc"][: len(fault["loc"]) - len(unknown)]
    location = [*(part for part in around if isinstance(part, int) or _is_key(str(part))), *unknown]
    key = ".".join(map(_shown, location)) or "configuration"
    if kind == "extra_forbidden":
        known = sorted(_known_keys(cls, location[:-1]))
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        return f"{key}{UNKNOWN_KEY}{', '.join(known)}; got '{_shown(location[-1])}'{hint}"
    if kind == "missing":
        return f"{key}: expected a value, got nothing"
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {shortened(message)}"
    for pydantics, ours in WORDING.items():
        message = re.sub(pydantics, ours, message)
    return f"{key}: expected {message}, got {quoted(given)}"


def _shown(part: Any) -> str:
    """A key as it can be printed on one line."""
    return shortened(str(part))


def _is_key(part: str) -> bool:
    return part.isidentifier() and part not in {"int", "float", "str", "bool", "none"}


def _known_keys(cls: type[BaseModel], path: list[Any]) -> Iterator[str]:
    """The keys that `cls` knows at a dotted path."""
    for part in path:
        if isinstance(part, int):
            continue
        field = cls.model_fields.get(str(part))
        inner = _inner_model(field.annotation) if field else None
        if inner is None:
            return
        cls = inner
    yield from cls.model_fields


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The configuration class inside an annotation such as `tuple[LayerConfig, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = _inner_model(argument)
        if inner is not None:
            return inner
    return None
