"""The program that every rank runs: layer after layer, learn on the own rows, then encode for the layer above.

Phases of communication, all through the injected exchange:

    learn     by rows: every iteration of the dynamics gathers activities; by columns (`gather_state`): every update
              gathers the weights and scatters the statistics; every update gathers 4 K values for the bound of M
    finish    the layer's rows are gathered once, so that every rank can encode alone
    encode    none; the cached result is gathered where a layer or a readout needs all of it

All decisions depend on the configuration or on gathered bytes only, so ranks cannot drift apart.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from cluster.checkpoints.committer import MODEL
from cluster.checkpoints.manifest import Cursor, LayerState, read_manifest
from cluster.checkpoints.reader import Reader, load_into
from cluster.checkpoints.shard_writer import ShardWriter, Snapshot, write_shard
from cluster.collectives import PeerTimeout
from cluster.config import RunConfig
from cluster.cpus import all_cpus
from cluster.features import FeatureStore
from cluster.inputs import LayerInputs
from cluster.limits import run_with_timeout
from cluster.lone_work import lone_work
from cluster.mesh import Mesh
from cluster.messages import LayerMetrics, ModelExported, Progress, ReadoutScored, Reporter, TrainingWarning
from cluster.redaction import one_line
from cluster.sharding import SHARDED, gather_layer, replicated_state, shard_state, sum_over_ranks, take_rows
from cluster.storage import AnyPath, copy_whole, retry
from cluster.watch import Growth, Objective, TrainingFault, Window
from simmatch.config import LayerConfig
from simmatch.data.formats import DataError
from simmatch.data.order import Batches
from simmatch.data.sources import Dataset, load_dataset
from simmatch.geometry import Patches
from simmatch.labels import one_hot
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.measurement import measure
from simmatch.model import MODEL_FILES, InputConfig, Stack, layer_inputs, pooled, readable, save_model
from simmatch.readout import accuracy, decode, fit_readout
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.rows import split_rows
from simmatch.solvers.bound import SharedFault

PART_OF_LIMITS = 0.25
"""Pause between two signs of life in long work, over the limit on an exchange and on standing still."""


@dataclass(frozen=True)
class Assignment:
    """What a rank is told before it starts; nothing changes it.

    Attributes
    ----------
    run_dir: folder that all ranks reach, or a URI's.
    resume: folder of the checkpoint to continue from, or None.
    generation: how many groups came before this one.
    token: of this group alone, in the names of its shards.
    data: digest of the data set that every rank must find on its node; None: whatever it finds.
    """

    config: RunConfig
    run_dir: AnyPath
    rank: int
    generation: int = 0
    resume: AnyPath | None = None
    token: str = ""
    data: str | None = None


class Stopped(Exception):
    """The controller asked; everything learnt so far is in a checkpoint, on all ranks of the same step."""


def source_of(dataset: Dataset) -> InputConfig:
    """Shape and classes of a data set's images."""
    height, width = dataset.image_size
    return InputConfig(in_channels=dataset.in_channels, height=height, width=width, num_classes=dataset.num_classes)


def check_data(dataset: Dataset, expected: str | None) -> None:
    """Refuse a data set that is not the one with this digest; None accepts any.

    Raises
    ------
    DataError
        Names this node: every rank loads the files of its own.
    """
    if expected is not None and (found := dataset.digest()) != expected:
        counts = f"{len(dataset.train_images)} + {len(dataset.test_images)} images, {dataset.skipped} damaged left out"
        host = socket.gethostname()
        raise DataError(f"{dataset.name} on {host}: expected the data of this run, {expected}, got {found}: {counts}")


class Training:
    """One rank's run.

    Parameters
    ----------
    assignment: configuration and place.
    exchange: the way to the other ranks.
    report: the way to the controller.
    device: where tensors live.
    """

    def __init__(self, assignment: Assignment, exchange: Exchange, report: Reporter, device: torch.device) -> None:
        self.assignment, self.exchange, self.report, self.device = assignment, exchange, report, device
        self.config = assignment.config
        self.dtype = getattr(torch, self.config.dtype)
        self.coordinates = Mesh.from_config(self.config.mesh).coordinates(assignment.rank)
        self.dataset = load_dataset(self.config.data)
        check_data(self.dataset, assignment.data)
        self.source = source_of(self.dataset)
        self.stack = Stack(self.config.model, self.source, seed=self.config.seed, dtype=self.dtype, device=device)
        self.reader: Reader | None = None
        if assignment.resume is not None:
            self.reader = self._reader(assignment.resume)
        self.step = 0
        self.images = 0 if self.reader is None else self.reader.manifest.cursor.images
        self.writer = ShardWriter(
            assignment.run_dir,
            assignment.rank,
            exchange.world_size,
            report,
            patience_s=self.config.checkpoint.patience_s,
            write=partial(write_shard, token=assignment.token),
        )

    def run(self) -> None:
        """Everything: learn and encode layer by layer, export, read out."""
        train, test = self._store(self.dataset.train_images), self._store(self.dataset.test_images)
        scores: list[Tensor] = []
        for index, config in enumerate(self.config.model.layers):
            layer = self._layer(index, config)
            self._learn(index, config, layer, train)
            gather_layer(layer, self.stack.layer(index))
            self._encode(index, train, test, scores)
        # first: what was learnt is worth more than how well it reads
        self._lone_work(self._export if self.assignment.rank == 0 else None, self.exchange)
        self._read_out(train, test, scores)
        self.writer.close()

    def _reader(self, folder: AnyPath) -> Reader:
        patience_s = self.config.checkpoint.patience_s
        return Reader(folder, retry(lambda: read_manifest(folder), patience_s), patience_s=patience_s)

    def _export(self) -> None:
        """The model, under a name of this group alone: which group's it is that is published, the controller knows."""
        token = self.assignment.token
        name = f"{MODEL}-{token}" if token else MODEL
        target = self.assignment.run_dir / name
        with tempfile.TemporaryDirectory(prefix="simmatch-") as folder:
            local = target if isinstance(target, Path) else Path(folder)
            # a disk that is slow, or a folder that hangs, is no standstill before this limit
            run_with_timeout(
                self.config.cluster.stall_timeout_s, f"export to {local}", partial(save_model, self.stack, local)
            )
            if local is not target:
                for file in MODEL_FILES:
                    copy = partial(copy_whole, local / file, target / file)
                    retry(copy, self.config.checkpoint.patience_s)
        if token:
            self.report.send(ModelExported(name))

    def _store(self, images: Tensor) -> FeatureStore:
        model = self.config.model
        return FeatureStore(
            images,
            self.exchange,
            batch=self.config.encode_batch,
            dtype=self.dtype,
            device=self.device,
            kept={
                index: partial(readable, config=model.layers[index], pool=model.feature_pool)
                for index in model.feature_layers()
            },
        )

    # ------------------------------------------------------------------------------------------- a layer

    def _layer(self, index: int, config: LayerConfig) -> SimilarityMatchingConv2d:
        """This rank's shard of a layer: fresh, or as the checkpoint has it."""
        channels, size = layer_inputs(self.config.model, self.source)[index]
        rows = split_rows(config.out_channels, self.config.mesh.channel)[self.coordinates.channel]
        layer = SimilarityMatchingConv2d.from_config(
            config,
            channels,
            size,
            num_classes=self.source.num_classes,
            seed=self.config.seed + index,
            dtype=self.dtype,
            device=self.device,
            rows=rows,
            exchange=self.exchange,
        )
        if self.reader is not None and index < len(self.reader.manifest.layers):
            prefix = f"layers.{index}"
            for name, target in replicated_state(layer).items():
                load_into(target, self.reader.whole(f"{prefix}.{name}"), name, self.reader.folder)
            for name, target in shard_state(layer).items():
                load_into(target, self.reader.rows(f"{prefix}.{name}", rows), name, self.reader.folder)
        return layer

    def _learn(self, index: int, config: LayerConfig, layer: SimilarityMatchingConv2d, train: FeatureStore) -> None:
        """All updates of one layer that are not done yet."""
        learn, log_every = config.train, self.config.log_every
        batches = Batches(
            train.count, learn.batch_size, epochs=learn.epochs, seed=self.config.seed, images=learn.images
        )
        total, start = len(batches), int(layer.updates)
        self.step += start
        if start == total:
            return
        cache = self.config.cache_features
        inputs = LayerInputs(
            index,
            config,
            layer,
            train,
            stack=self.stack,
            report=self.report,
            cache=cache,
            lone_work=partial(self._lone_work, exchange=self.exchange),
        )
        window, growth = Window(index, self.exchange, self.writer), Growth(index, self._usual(index))
        watched = Objective(index, layer, self.report)
        latest: LayerMetrics | None = None
        for update in range(start, total):
            chosen = batches[update]
            labels = self.dataset.train_labels[chosen].to(self.device) if config.supervised else None
            patches, solution = self.update(index, layer, inputs, chosen, labels)
            self.step += 1
            growth.check(update, layer.bound.value)
            self.images += len(chosen)
            window.count(len(chosen))
            due = (update + 1) % log_every == 0
            if due or update + 1 == total:
                latest = window.close(layer, measure(layer, patches, solution, labels), self.images)
                watched.check(latest.objective)
                self.report.send(latest)
            self.report.progress(Progress("learn", update + 1, total, layer=index, step=self.step, metrics=latest))
            stop = due and self._all_stop()
            needed = update + 1 == total or stop
            if needed or self.step % self.config.checkpoint.every_steps == 0:
                self._save(index, layer, growth.usual, needed=needed)
            if stop:
                self.writer.close()
                raise Stopped

    def _lone_work(self, work: Callable[[], None] | None, exchange: Exchange) -> None:
        """Work of one rank of those that meet in the exchange, see `lone_work`."""
        limits = self.config.cluster
        pause_s = PART_OF_LIMITS * min(limits.collective_timeout_s, limits.stall_timeout_s)
        lone_work(work, exchange, self.report, device=self.device, pause_s=pause_s)

    def _all_stop(self) -> bool:
        """Whether any rank has been asked to stop: one gathered value, so that all find the same at the same step."""
        asked = torch.zeros(self.exchange.world_size, 1, device=self.device)
        asked[self.exchange.rank] = float(self.report.stopping)
        self.exchange.all_gather(asked).wait()
        return bool(asked.any())

    def update(
        self, index: int, layer: SimilarityMatchingConv2d, inputs: LayerInputs, chosen: Tensor, labels: Tensor | None
    ) -> tuple[Patches, Any]:
        """One update of one layer."""
        step = int(layer.updates) + 1  # all ranks name the same step, whoever noticed first
        try:
            patches = inputs.batch(chosen)
            return patches, layer.partial_fit(patches, labels)
        except PeerTimeout:
            raise
        except Exception as fault:
            what = str(fault) if isinstance(fault, SharedFault) else f"{type(fault).__name__}: {fault}"
            diverged = isinstance(fault, SharedFault) and fault.kind.startswith("non-finite")
            raise TrainingFault(f"layer {index}, step {step}: {what}", diverged=diverged) from fault

    def _usual(self, index: int) -> float | None:
        """The bound that a layer's growth was measured from before the checkpoint."""
        states = [] if self.reader is None else self.reader.manifest.layers
        return states[index].usual if index < len(states) else None

    def _save(self, index: int, layer: SimilarityMatchingConv2d, usual: float | None, *, needed: bool) -> None:
        """This rank's shard of a checkpoint; the controller commits it once all ranks have reported theirs."""
        cursor = Cursor(step=self.step, layer=index, updates=int(layer.updates), images=self.images)
        self.writer.submit(cursor, partial(self._snapshot, index, layer, usual), needed=needed)

    def _snapshot(self, index: int, layer: SimilarityMatchingConv2d, usual: float | None) -> Snapshot:
        """All layers so far. What may change while it is written, the layer that learns, is copied."""
        found = Snapshot({}, {}, [])
        for number in range(index + 1):
            source = layer if number == index else self.stack.layer(number)
            rows = split_rows(source.out_channels, self.config.mesh.channel)[self.coordinates.channel]
            tensors = {name: getattr(source, name) for name in SHARDED}
            if number < index:
                tensors = {name: take_rows(tensor, rows) for name, tensor in tensors.items()}
            found.rows.update(dict.fromkeys((f"layers.{number}.{name}" for name in tensors), rows))
            if self.assignment.rank == 0:
                tensors |= replicated_state(source)
            for name, tensor in tensors.items():
                found.tensors[f"layers.{number}.{name}"] = tensor.to("cpu", copy=number == index)
            reference = usual if number == index else None
            found.layers.append(LayerState(usual=reference))
        return found

    # ------------------------------------------------------------------------------------------- encoding

    def _encode(self, index: int, train: FeatureStore, test: FeatureStore, scores: list[Tensor]) -> None:
        """Replace the images of both stores by the pooled, label-free activity of layer `index`.

        On the way the label weights settle to the length of label-free activity, once, and read the test images.
        """
        layer, config = self.stack.layer(index), self.config.model.layers[index]
        last = index == len(self.stack.layers) - 1
        settled = self.reader is not None and index < self.reader.manifest.cursor.layer  # before it was written
        done, total, started = 0, train.count + test.count, time.monotonic()

        def seen(count: int) -> None:
            nonlocal done
            done += count
            rate = done / (time.monotonic() - started)
            self.report.progress(Progress("encode", done, total, layer=index, images_per_second=rate))

        yz = torch.zeros_like(layer.label)
        zz = yz.new_zeros(layer.num_classes, layer.num_classes)

        def learn_label(x: Tensor, images: slice) -> Tensor:
            activities = layer(x)
            if config.supervised and not settled:
                z = one_hot(self.dataset.train_labels[images], layer.num_classes, layer.label)
                yz.add_(reduce(activities, "b k h w -> k b", "mean") @ z.T)
                zz.add_(z @ z.T)
            return pooled(activities, config)

        def read_label(x: Tensor, _: slice) -> Tensor:
            activities = layer(x)
            if config.supervised and last:
                scores.append(decode(reduce(activities, "b k h w -> b k", "mean"), layer.label))
            return pooled(activities, config)

        train.advance(learn_label, seen)
        if config.supervised and not settled:
            layer.settle_label(sum_over_ranks(yz, self.exchange), sum_over_ranks(zz, self.exchange))
        test.advance(read_label, seen)

    def _read_out(self, train: FeatureStore, test: FeatureStore, scores: list[Tensor]) -> None:
        """Accuracy of the readouts on the test images, by rank 0 while the others wait; of those that can be made."""
        probe = self.config.probe
        count = min(probe.train_images or train.count, train.count)
        self.report.progress(Progress("readout", 0, 1))
        results: dict[str, float] = {}
        if scores:
            found = torch.cat(list(test.gather_parts(scores)))
            results["accuracy_decode"] = accuracy(found.cpu(), self.dataset.test_labels)
        train_features, test_features = self._collect(train, count), self._collect(test, test.count)
        if train_features is not None and test_features is not None:

            def fit() -> None:
                with all_cpus():
                    readout = fit_readout(probe.readout, train_features, self.dataset.train_labels[:count])
                    score = readout.score(test_features.numpy(), self.dataset.test_labels.numpy())
                    results["accuracy"] = float(score)

            try:
                self._lone_work(fit, IDENTITY)
            except Exception as error:  # such as labels of one class only: everything is learnt and exported by now
                why = f"{type(error).__name__}: {error}"
                self.report.send(TrainingWarning(f"the {probe.readout} readout is left out: {one_line(why)}"))
            self.report.send(ReadoutScored(probe.readout, count, **results))
        self.report.progress(Progress("readout", 1, 1))

    def _collect(self, store: FeatureStore, count: int) -> Tensor | None:
        """Features [count, F] on rank 0; the other ranks only contribute."""
        parts, seen = [], 0
        for part in store.features():
            seen += len(part)
            if self.assignment.rank == 0:
                parts.append(part.cpu())
            if seen >= count:
                break
        return torch.cat(parts)[:count] if parts else None
