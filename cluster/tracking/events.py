"""The events of a run, one frozen class for each kind, and the JSON lines that they become in a spool.

Somebody else may have written to a run directory: a line counts only if it has the fields, types and sizes of its kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, InstanceOf, JsonValue, field_validator

from simmatch.config import ConfigError, Frozen, PositiveInt, parse
from simmatch.documents import DocumentError, load_json
from simmatch.files import path_parts

MOST_LAYERS = 1000
MOST_VALUES = 10**8
"""In one image of an exported model."""
LONGEST_NAME, LONGEST_TEXT = 255, 10_000
LARGEST_ARTIFACT = 2**28
"""Bytes of a file that is sent."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)


def _inside(path: str) -> str:
    path_parts(path)
    return path


def _plain(name: str) -> str:
    if len(path_parts(name)) > 1 or len(name) > LONGEST_NAME:
        raise ValueError(f"expected a plain name, got {name[:200]!r}")
    return name


def _short(text: str) -> str:
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"expected at most {LONGEST_TEXT} characters, got {len(text)}")
    return text


Text = Annotated[InstanceOf[str], AfterValidator(_short)]
"""May hold half a surrogate pair, as a file name that is not UTF-8 does; pydantic's own text may not."""
Layer = Annotated[int, Field(ge=0, lt=MOST_LAYERS)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Value = Annotated[float, Field(strict=False)]
"""`nan` and `inf` are stored as text."""
Inside = Annotated[InstanceOf[str], AfterValidator(_inside)]
Name = Annotated[InstanceOf[str], AfterValidator(_plain)]
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class _Event(Frozen):
    model_config = ConfigDict(extra="ignore")  # later versions may add fields

    kind: str
    time_ms: Number


class StartEvent(_Event):
    """An attempt begins."""

    kind: Literal["start"] = "start"
    run_key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    attempt: PositiveInt
    name: Text
    experiment: Text | None
    """Its name; None where only the id was given."""
    experiment_id: Text | None = None
    layers: Annotated[int, Field(ge=0, le=MOST_LAYERS)]
    uri: Text
    tags: dict[Text, JsonValue]


class _Pairs(_Event):
    values: dict[Text, JsonValue]
    layer: Layer | None = None


class ParamsEvent(_Pairs):
    """Parameters of the run, or of a layer."""

    kind: Literal["params"] = "params"


class TagsEvent(_Pairs):
    """Tags of the run, or of a layer."""

    kind: Literal["tags"] = "tags"


class MetricsEvent(_Event):
    """Metrics at a step."""

    kind: Literal["metrics"] = "metrics"
    step: Number
    values: dict[Text, Value]
    layer: Layer | None = None


class ArtifactEvent(_Event):
    """A file of the run directory, and its name at the server."""

    kind: Literal["artifact"] = "artifact"
    path: Inside
    folder: Inside | None = None
    name: Name
    layer: Layer | None = None


class DatasetEvent(_Event):
    """The images of a run."""

    kind: Literal["dataset"] = "dataset"
    name: Text
    source: Text
    digest: Text
    num_images: Number
    context: Text = "training"
    source_type: Text = "local"


class ModelEvent(_Event):
    """The folder of the exported model."""

    kind: Literal["model"] = "model"
    path: Inside
    input_shape: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    key: Text | None = None
    """The same however often one model is recorded; None in spools of earlier versions."""

    @field_validator("input_shape")
    @classmethod
    def _fits(cls, shape: list[int]) -> list[int]:
        channels, height, width = shape
        if channels * height * width > MOST_VALUES:
            raise ValueError(f"expected an image of at most {MOST_VALUES} values, got {channels} × {height} × {width}")
        return shape


class RegisterEvent(_Event):
    """The run's logged model becomes a version of a registered model."""

    kind: Literal["register"] = "register"
    name: Annotated[str, Field(pattern=r"^\w[\w .-]{0,199}$")]
    data: Text
    """Digest of the data set."""
    probe: Text
    """What the accuracy was measured with."""
    accuracy: Annotated[float, Field(ge=0, le=1)] | None
    description: Text = ""
    key: Text | None = None
    """Of the logged model, see `ModelEvent`; None: the one that was logged last."""
    decided: Text = ""
    """Why this model is the champion, where that is decided already; empty: the accuracies decide."""


class FinishEvent(_Event):
    """An attempt ends."""

    kind: Literal["finish"] = "finish"
    status: RunStatus


@dataclass(frozen=True)
class Unreadable:
    """A line that is no event, as a failing disk or another program may leave: its kind, and what is wrong with it."""

    kind: str
    reason: str


Event = (
    StartEvent
    | ParamsEvent
    | MetricsEvent
    | TagsEvent
    | ArtifactEvent
    | DatasetEvent
    | ModelEvent
    | RegisterEvent
    | FinishEvent
)

KINDS: dict[str, type[Event]] = {kind.model_fields["kind"].default: kind for kind in get_args(Event)}


def parse_event(values: Mapping[str, Any]) -> Event:
    """An event from the values of its line.

    Raises
    ------
    ConfigError
        One line that names the field, what was expected and what was given.
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {str(kind)[:40]!r}")
    event: Event = parse(KINDS[kind], values)
    return event


def event_of(line: bytes) -> Event | Unreadable:
    """The event that a line of a spool holds."""
    try:
        values = load_json(line)
    except DocumentError as error:
        return Unreadable("unreadable", str(error))
    if not isinstance(values, dict):
        return Unreadable("unreadable", f"expected a JSON object, got {type(values).__name__}")
    try:
        return parse_event(values)
    except ConfigError as error:
        return Unreadable(str(values.get("kind")), str(error))


def line_of(event: Event) -> bytes:
    """The line of an event. Numbers that JSON cannot express (nan, inf) are written as text."""
    values = dict(event)
    try:
        text = _ENCODER.encode(values)
    except ValueError:
        text = _ENCODER.encode(_finite(values))
    # half a surrogate pair, as in a file name that is not UTF-8, becomes its escape in JSON
    return text.encode(errors="backslashreplace") + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters under dotted names.

    >>> dict(flatten({"layers": [{"pool": 4}, {"pool": None}], "mesh": [2, 1]}))
    {'layers.0.pool': '4', 'layers.1.pool': 'None', 'mesh': '[2, 1]'}
    """
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            yield name, json.dumps(value, default=str)
        else:
            yield name, str(value)
