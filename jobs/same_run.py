"""Whether a configuration is that of a run: what a continuation may change, and what earlier versions left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from cluster.checkpoints.manifest import MANIFEST, CheckpointError, read_manifest
from cluster.config import RunConfig
from cluster.storage import AnyPath, find, read
from simmatch.config import ConfigError, parse
from simmatch.documents import DocumentError, listed, load_yaml, quoted

FREE = (
    "cluster",
    "tracking",
    "checkpoint",
    "probe",
    "mesh",
    "device",
    "divergence",
    "log_every",
    "encode_batch",
    "cache_features",
)
"""Keys that may differ between a run and its continuation: they change where and how it learns, not what."""

MOST_NAMED = 5
"""Differing keys in one message."""

RESULT_FREE = tuple(key for key in FREE if key != "probe")
"""The same between a run that has finished and one that asks for its result."""


def check_same(config: RunConfig, run_dir: AnyPath, free: Sequence[str] = FREE) -> tuple[RunConfig, list[str]]:
    """Refuse to continue a run of another configuration; returns the configuration to continue with, and notes.

    free: keys that may differ.

    If `config.yaml` is damaged, the configuration of the newest checkpoint takes its place.
    """
    path = run_dir / "config.yaml"
    try:
        other = load_yaml(read(path))
        content = type(other).__name__
    except DocumentError as error:
        other, content = None, str(error)
    if not isinstance(other, dict):
        for manifest in reversed(find(run_dir / "checkpoints", f"step-*/{MANIFEST}")):
            with suppress(CheckpointError):
                same = check_differences(config, read_manifest(manifest.parent).config, manifest.parent)
                return same, [f"{path} is damaged ({content}): the configuration is that of {manifest.parent.name}"]
        raise ConfigError(f"--resume: expected the configuration of a run in {path} or in a checkpoint, got {content}")
    return check_differences(config, other, run_dir, free), []


def check_differences(config: RunConfig, other: Any, where: AnyPath, free: Sequence[str] = FREE) -> RunConfig:
    """Refuse to continue a run that learns something else; returns the configuration to continue with."""
    if not isinstance(other, dict):
        raise ConfigError(f"--resume: expected the configuration of a run in {where}, got {type(other).__name__}")
    theirs = dict(_flat(_with_defaults(other)))
    config = _with_recorded_tau(config, theirs)
    refuse_differences(config.model_dump(mode="json"), theirs, where, (*free, "name"))
    return config


def refuse_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: AnyPath, free: Sequence[str]) -> None:
    """Raise ConfigError where two configurations differ in other than these keys; the message says in which."""
    ours, theirs = dict(_flat(ours)), dict(_flat(theirs))
    differing = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    differing = [key for key in differing if key.split(".")[0] not in free]
    if differing:
        pairs = [(key, quoted(theirs.get(key)), quoted(ours.get(key))) for key in differing]
        parts = listed([f"{key}: expected {expected}, got {given}" for key, expected, given in pairs], MOST_NAMED, "; ")
        raise ConfigError(
            f"--resume: {where} belongs to another configuration: {parts}; use --resume never or --run-dir"
        )


def _with_recorded_tau(config: RunConfig, recorded: dict[str, Any]) -> RunConfig:
    """Take τ from the recorded run where a layer leaves it to the default, which was 0.5 in earlier versions."""
    layers = list(config.model.layers)
    for index, layer in enumerate(layers):
        tau = recorded.get(f"model.layers.{index}.plasticity.tau")
        if "tau" not in layer.plasticity.model_fields_set and isinstance(tau, float):
            plasticity = layer.plasticity.model_copy(update={"tau": tau})
            layers[index] = layer.model_copy(update={"plasticity": plasticity})
    return config.model_copy(update={"model": config.model.model_copy(update={"layers": tuple(layers)})})


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration of an earlier version with its missing keys filled in; unchanged if it is invalid."""
    try:
        filled: dict[str, Any] = parse(RunConfig, values).model_dump(mode="json")
    except ConfigError:
        return values
    return filled


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}{key}.")
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _flat(value, f"{prefix}{index}.")
    else:
        yield prefix.rstrip("."), values
