"""What may stand in a spool, kind by kind, and which files an event may mean.

A run directory may have been written to by others: a line is taken for what it says only where it has the fields, types
and sizes of its kind, and a file only where it lies in the run directory, reached through no link.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import AfterValidator, ConfigDict, Field, InstanceOf, JsonValue, field_validator

from cluster.tracking.spool import Event
from simmatch.config import ConfigError, Frozen, PositiveInt, parse

MOST_LAYERS = 1000
MOST_VALUES = 10**8
"""In one image of an exported model."""
LONGEST_NAME, LONGEST_TEXT = 255, 10_000
LARGEST_ARTIFACT = 2**28
"""Bytes of a file that is sent."""


def parts_of(place: str) -> list[str]:
    """Names on the way from the run directory to a place in it.

    Raises
    ------
    ValueError
        It lies elsewhere.
    """
    parts = place.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"expected a place in the run directory, got {place[:200]!r}")
    return parts


def _inside(place: str) -> str:
    parts_of(place)
    return place


def _plain(name: str) -> str:
    if len(parts_of(name)) > 1 or len(name) > LONGEST_NAME:
        raise ValueError(f"expected a plain name, got {name[:200]!r}")
    return name


def _short(text: str) -> str:
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"expected at most {LONGEST_TEXT} characters, got {len(text)}")
    return text


Text = Annotated[InstanceOf[str], AfterValidator(_short)]
"""May hold half a surrogate pair, as the name of a file that is no UTF-8 does; pydantic's own text may not."""
Layer = Annotated[int, Field(ge=0, lt=MOST_LAYERS)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Value = Annotated[float, Field(strict=False)]
"""`nan` and `inf` stand in a spool as text."""
Inside = Annotated[InstanceOf[str], AfterValidator(_inside)]
Name = Annotated[InstanceOf[str], AfterValidator(_plain)]


class _Event(Frozen):
    model_config = ConfigDict(extra="ignore")  # what later versions add

    kind: str
    time_ms: Number


class Start(_Event):
    """An attempt begins."""

    run_key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    attempt: PositiveInt
    name: Text
    experiment: Text
    layers: Annotated[int, Field(ge=0, le=MOST_LAYERS)]
    uri: Text
    tags: dict[Text, JsonValue]


class Pairs(_Event):
    """Parameters or tags, of the run or of a layer."""

    values: dict[Text, JsonValue]
    layer: Layer | None = None


class Metrics(_Event):
    """Numbers at a step."""

    step: Number
    values: dict[Text, Value]
    layer: Layer | None = None


class Artifact(_Event):
    """A file of the run directory, and what it is called at the server."""

    path: Inside
    folder: Inside | None = None
    name: Name
    layer: Layer | None = None


class DataSet(_Event):
    """The images of a run."""

    name: Text
    source: Text
    digest: Text
    num_images: Number
    context: Text
    source_type: Text


class Model(_Event):
    """The folder of the exported model."""

    path: Inside
    input_shape: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    key: Text | None = None
    """Of one model, however often it is recorded; earlier versions had none."""

    @field_validator("input_shape")
    @classmethod
    def _fits(cls, shape: list[int]) -> list[int]:
        channels, height, width = shape
        if channels * height * width > MOST_VALUES:
            raise ValueError(f"expected an image of at most {MOST_VALUES} values, got {channels} × {height} × {width}")
        return shape


class Finish(_Event):
    """An attempt ends."""

    status: Literal["FINISHED", "FAILED", "KILLED"]


KINDS: dict[str, type[_Event]] = {
    "start": Start,
    "params": Pairs,
    "metrics": Metrics,
    "tags": Pairs,
    "artifact": Artifact,
    "dataset": DataSet,
    "model": Model,
    "finish": Finish,
}


def checked(event: Event) -> Event:
    """A line of a spool as its kind is: only the fields that belong to it, those left out at their defaults.

    Raises
    ------
    ConfigError
        One line that names the field, what was expected and what was given.
    """
    kind = event.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {str(kind)[:40]!r}")
    return parse(KINDS[kind], event).model_dump()


def sound(event: Event, kind: str) -> Event | None:
    """The same of an event of one kind; None for others, and for what is not as it should be."""
    if event.get("kind") == kind:
        with suppress(ConfigError):
            return checked(event)
    return None


def open_inside(run_dir: Path, place: str, most_bytes: int | None = None) -> BinaryIO:
    """A file of the run directory, opened for reading; no link is followed on the way.

    Raises
    ------
    ValueError
        It lies elsewhere, is a link or reached through one, is no file, or is larger than that.
    OSError
        There is none, or it cannot be read.
    """
    *folders, name = parts_of(place)
    opened = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part, flags in [*((folder, os.O_DIRECTORY) for folder in folders), (name, os.O_NONBLOCK)]:
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | flags, dir_fd=opened)
            os.close(opened)
            opened = inner
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"expected a file, got something else at {place!r}")
        if most_bytes is not None and found.st_size > most_bytes:
            raise ValueError(f"expected at most {most_bytes} bytes, got {found.st_size} in {place!r}")
    except BaseException as error:
        os.close(opened)
        if isinstance(error, OSError) and _through_a_link(run_dir, place):
            raise ValueError(
                f"expected a file of the run directory, got {place!r}, which leads through a link"
            ) from None
        raise
    return os.fdopen(opened, "rb")


def _through_a_link(run_dir: Path, place: str) -> bool:
    parts = place.split("/")
    return any((run_dir / "/".join(parts[: depth + 1])).is_symlink() for depth in range(len(parts)))
