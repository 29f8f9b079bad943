"""Checks of a run before any of its processes starts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cluster.checkpoints.manifest import read_manifest
from cluster.checkpoints.reader import Reader
from cluster.config import RunConfig
from cluster.storage import AnyPath
from cluster.text import count
from cluster.training import check_data
from jobs.diagnosis.surroundings import RUN_DIR, look_at_room, look_at_run_dir
from jobs.plan_memory import check_whitening
from jobs.ray_session import check_cluster, embeds_ray
from simmatch.config import ConfigError
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.order import steps_per_epoch
from simmatch.data.sources import Dataset, load_dataset
from simmatch.devices import check_device
from simmatch.geometry import PatchConfig
from simmatch.labels import UNLABELLED
from simmatch.memory import machine_bytes
from simmatch.model import layer_inputs
from simmatch.schedule import updates_of_layers


def check(config: RunConfig, load: Callable[[DataConfig], Dataset] = load_dataset) -> Dataset:
    """Everything that can be wrong before a process starts; returns the data set.

    load: reads the data set, and may show its progress.

    Raises
    ------
    ConfigError, DataError
        One line each, naming the key.
    """
    config.check_mesh()
    dataset = load(config.data)
    config.check_mesh(len(dataset.train_images))
    labelled = bool((dataset.train_labels != UNLABELLED).any())
    inputs = layer_inputs(config.model, dataset.source)
    for index, layer in enumerate(config.model.layers):
        if layer.supervised and not labelled:
            raise ConfigError(
                f"model.layers.{index}.supervised: expected false, as no training image of {dataset.name} has a label, "
                "got true"
            )
        channels, size = inputs[index]
        height, width = PatchConfig.of_layer(layer, channels, size).map_size(size)
        if layer.train.positions is not None and layer.train.positions > height * width:
            raise ConfigError(
                f"model.layers.{index}.train.positions: expected at most {height * width}, the map of "
                f"{height} × {width} activities, got {layer.train.positions}"
            )
        try:
            steps_per_epoch(len(dataset.train_images), layer.train.batch_size, images=layer.train.images)
        except ValueError as error:
            raise ConfigError(f"model.layers.{index}.train.images: {error}") from None
    try:
        updates_of_layers(config.model, len(dataset.train_images))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_whitening(config, dataset.source, memory_of_ranks())
    wanted, available = config.probe.train_images, len(dataset.train_images)
    if wanted is not None and wanted > available:
        raise ConfigError(f"probe.train_images: expected at most {available}, got {wanted}")
    return dataset


def memory_of_ranks() -> float | None:
    """Bytes of memory of this machine, where it is to run all ranks; None where a cluster is."""
    if not embeds_ray():
        return None
    return float(machine_bytes())


def check_device_of_ranks(device: str, ranks: int) -> None:
    """Refuse a device that this machine lacks, where it is to run all ranks: a cluster's own nodes check theirs.

    Raises
    ------
    ConfigError
        torch cannot use the device here, or finds fewer GPUs than ranks.
    """
    if not embeds_ray():
        return
    check_device(device, touch=False)
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < ranks:
        raise ConfigError(f"mesh: expected a GPU for each of {count(ranks, 'rank')}, got {gpus} on this machine")


def check_surroundings(config: RunConfig, run_dir: AnyPath, dataset: Dataset) -> list[str]:
    """What a run needs besides itself, before its first file is written: a cluster that answers, a run directory, room
    for it. Returns warnings.

    Raises
    ------
    ConfigError
        Nothing can be written to the run directory, or the token of the cluster is missing or wrong.
    RunFailed
        The cluster does not answer.
    """
    check_cluster(config.cluster.start_timeout_s)
    warnings = []
    for finding in (*look_at_run_dir(run_dir), *look_at_room(config, dataset, run_dir)):
        line = f"{finding.text}; {finding.fix}"
        if finding.check == RUN_DIR and finding.status == "failure":
            raise ConfigError(f"--run-dir: expected a place that can be written to, got {line}")
        if finding.status != "ok":  # a full disk may have room later, and costs checkpoints, not the run
            warnings.append(line)
    return warnings


def check_checkpoint(config: RunConfig, folder: AnyPath, dataset: Dataset) -> None:
    """Refuse a checkpoint of other data, or whose tensors do not fit; its files were verified when it was chosen."""
    manifest = read_manifest(folder)
    try:
        check_data(dataset, manifest.data)
    except DataError as error:
        raise DataError(f"--resume: {folder}: {error}") from None
    reader = Reader(folder, manifest)
    for index in range(len(manifest.layers)):
        reader.check_channels(f"layers.{index}.feedforward", config.model.layers[index].out_channels)
