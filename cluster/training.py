"""The program that every rank runs: `simmatch.fit` with checkpoints, a way to stop, reports and an export.

Phases of communication, all through the injected mesh:

    learn     by rows: every iteration of the dynamics gathers activities; by columns (`gather_state`): every update
              gathers the weights and scatters the statistics; every update gathers 4 K values for the bound of M
    finish    the layer's rows are gathered once, so that every rank can encode alone
    encode    none; a node receives the blocks of encoded images that others have made before a layer learns from them

All decisions depend on the configuration or on gathered bytes only, so ranks cannot drift apart.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cluster.checkpoints.committer import MODEL
from cluster.checkpoints.manifest import Cursor, LayerState, Manifest, read_manifest
from cluster.checkpoints.reader import Reader
from cluster.checkpoints.shard_writer import ShardWriter, write_shard
from cluster.checkpoints.state import restore_layer, take_snapshot
from cluster.collectives import PeerTimeout
from cluster.config import RunConfig
from cluster.connections import Traffic
from cluster.messages import FeaturesFound, ModelExported, NodeWarning, Outbox, Progress
from cluster.monitors import GrowthMonitor, MetricsWindow, Monitors, ObjectiveMonitor, TrainingFault
from cluster.one_rank import on_one_rank
from cluster.profiles import TraceWriter
from cluster.read_out import read_out
from cluster.storage import AnyPath, copy_whole
from cluster.timeouts import run_with_timeout
from simmatch.chunks import Chunks
from simmatch.data.feature_cache import FeatureCache
from simmatch.data.formats import DataError
from simmatch.data.prepared import cache_of
from simmatch.data.sources import Dataset, load_dataset
from simmatch.devices import arithmetic
from simmatch.features import FeatureStore
from simmatch.fit import Trainer
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.memory import Lever, MemoryWatch
from simmatch.model import MODEL_FILES, Stack, readout_input, save_model
from simmatch.observer import Observer, Pass, Phase, Update
from simmatch.profile import Profile
from simmatch.remote import retry
from simmatch.schedule import updates_of_layers
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.state import gather_from_ranks

PART_OF_LIMITS = 0.25
"""Pause between two signs of life in long work, over the limit on an exchange and on standing still."""


@dataclass(frozen=True)
class Assignment:
    """What one rank has to do.

    Attributes
    ----------
    run_dir: a folder that all ranks can reach, or a URI.
    resume: folder of the checkpoint to continue from, or None.
    generation: number of groups before this one.
    token: part of the names of this group's shards, unique to the group.
    data: digest of the data set that every rank must find on its node; None: any data set.
    profile: number of updates of every layer to profile; 0: none.
    """

    config: RunConfig
    run_dir: AnyPath
    rank: int
    generation: int = 0
    resume: AnyPath | None = None
    token: str = ""
    data: str | None = None
    profile: int = 0


class Stopped(Exception):
    """Raised on all ranks at the same step, because the controller asked; a checkpoint holds all that is learnt."""


def check_data(dataset: Dataset, expected: str | None) -> None:
    """Check the digest of a data set; None accepts any.

    Raises
    ------
    DataError
        Another digest; the message names this node, because every rank loads the files of its own.
    """
    if expected is not None and (digest := dataset.digest()) != expected:
        counts = f"{len(dataset.train_images)} + {len(dataset.test_images)} images, {dataset.skipped} damaged left out"
        host = socket.gethostname()
        raise DataError(f"{dataset.name} on {host}: expected the data of this run, {expected}, got {digest}: {counts}")


class Training(Observer):
    """Everything that one rank does in a run.

    Parameters
    ----------
    assignment: the configuration, this rank's place in the group, and the run directory.
    mesh: connects to the other ranks.
    report: messages to the controller.
    device: of all tensors.
    """

    def __init__(self, assignment: Assignment, mesh: Mesh, report: Outbox, device: torch.device) -> None:
        self.assignment, self.mesh, self.report, self.device = assignment, mesh, report, device
        self.traffic = Traffic(mesh)
        self.config = config = assignment.config
        self.dataset = load_dataset(config.data, warn=self._warn)
        check_data(self.dataset, assignment.data)
        dtype = getattr(torch, config.dtype)
        self.stack = Stack(config.model, self.dataset.source, seed=config.seed, dtype=dtype, device=device)
        self.reader = None if assignment.resume is None else self._reader(assignment.resume)
        done = None if self.reader is None else self.reader.manifest.cursor
        if self.reader is not None and config.reduce == "exact":
            self._tell_of_others(self.reader.manifest, arithmetic(device))
        self.step, self.images = 0, 0 if done is None else done.images
        self.trainer = Trainer(
            self.stack,
            self.dataset.train_images,
            self.dataset.train_labels if self.dataset.num_classes else None,
            blocks=self.dataset.blocks if config.data.order == "blocks" else None,
            mesh=mesh,
            observer=self,
            settled=0 if done is None else done.layer,
            encode_batch=config.encode_batch,
            encode_last=self.keeps(len(config.model.layers) - 1),
            cache=config.cache_features,
            feature_cache=FeatureCache(
                cache_of(config.data), config.data.cache_bytes, data=self.dataset.digest(), warn=self._warn
            ),
            reduce=config.reduce,
            measure_every=config.log_every,
        )
        self._monitors: dict[int, Monitors] = {}
        self._columns = config.mesh.ranks(stage=mesh.stage)
        self._owners = config.mesh.ranks(stage=mesh.stage, replica=config.mesh.place(assignment.rank).replica)
        self.together = config.model.schedule == "together"
        self._updates = updates_of_layers(config.model, len(self.dataset.train_images))
        report.leads = mesh.columns.rank == 0
        self._features: dict[int, Chunks] = {}  # of the layers whose output a readout uses
        self.writer = ShardWriter(
            assignment.run_dir,
            assignment.rank,
            mesh.everyone.world_size,
            report,
            patience_s=config.checkpoint.patience_s,
            write=partial(write_shard, token=assignment.token, arithmetic=arithmetic(device)),
        )
        patience_s = config.checkpoint.patience_s
        self.traces = TraceWriter(assignment.run_dir, assignment.rank, report, patience_s=patience_s)
        self.profile = Profile(assignment.profile, self.traces.submit) if assignment.profile else Observer()

    def run(self) -> None:
        """Train the stack, export the model, and measure the accuracy of readouts."""
        self.trainer.fit()
        # before the readouts: the model is worth more than its accuracy
        self.on_one_rank(self._export if self.assignment.rank == 0 else None)
        with MemoryWatch(self.device) as memory:
            memory.begin("reading out", Lever("encode_batch", self.config.encode_batch), otherwise="use more ranks")
            read_out(
                self.config,
                self.stack,
                self.dataset,
                self._readout_inputs(),
                FeatureStore(
                    self.dataset.test_images,
                    self.mesh.everyone,
                    batch=self.config.encode_batch,
                    dtype=self.stack.dtype,
                    device=self.device,
                ),
                report=self.report,
                on_one_rank=self.on_one_rank,
            )
        self._close()

    def _readout_inputs(self) -> Iterator[tuple[slice, Tensor]]:
        """Of every block of this rank, the images, and the input of a readout: as many blocks on every rank."""
        model = self.config.model
        for part in self.trainer.store.parts:
            images = torch.arange(part.start, part.stop)
            passed = {index: features[images].to(self.device) for index, features in self._features.items()}
            yield (
                part,
                torch.cat(
                    [readout_input(each, model.layers[index], model.feature_pool) for index, each in passed.items()],
                    dim=1,
                ),
            )

    def _close(self) -> None:
        """Wait for the files that are written beside training."""
        self.traces.close()
        self.writer.close()

    def _warn(self, text: str) -> None:
        """Of this rank's node."""
        self.report.send(NodeWarning(text))

    def _reader(self, folder: AnyPath) -> Reader:
        patience_s = self.config.checkpoint.patience_s
        return Reader(folder, retry(lambda: read_manifest(folder), patience_s), patience_s=patience_s)

    def _tell_of_others(self, manifest: Manifest, here: str) -> None:
        """Warn where what was learnt so far has been computed by other processors or versions than those here."""
        others = {str(shard.arithmetic) for shard in manifest.shards if shard.arithmetic not in (None, here)}
        if others:
            found = f"the checkpoint was computed by {', '.join(sorted(others))}, not by {here}"
            self.report.send(NodeWarning(f"{socket.gethostname()}: reduce: exact: {found}; last bits may differ"))

    def _export(self) -> None:
        """Write the model into a folder of this group; the controller decides which group's model is published."""
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

    # ------------------------------------------------------------------------------------------- the observer's part

    def restore(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        if self.reader is not None:
            restore_layer(layer, index, self.reader)
        if not self.together:
            self.step += int(layer.updates)
        elif self.reader is not None:
            self.step = self.reader.manifest.cursor.step

    def started(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        self.profile.started(index, layer)
        states = [] if self.reader is None else self.reader.manifest.layers
        self._monitors[index] = Monitors(
            layer=layer,
            growth=GrowthMonitor(index, states[index].usual if index < len(states) else None),
            window=MetricsWindow(index, self.traffic, self.mesh, self.writer),
            objective=ObjectiveMonitor(index, layer, self.report),
            updates=int(layer.updates),
        )

    @contextmanager
    def updating(self, index: int, layer: SimilarityMatchingConv2d) -> Iterator[None]:
        with self._named(index), self.profile.updating(index, layer):
            yield

    @contextmanager
    def encoding(self, index: int, layer: SimilarityMatchingConv2d) -> Iterator[None]:
        ranks = self._owners if layer.sharing.solves is self.mesh.owners else self._columns
        with self._named(index, ranks), self.profile.encoding(index, layer):
            yield

    @contextmanager
    def _named(self, index: int, ranks: Sequence[int] | None = None) -> Iterator[None]:
        """Errors name layer, step, and those of `ranks` that have a fault; None: of all that learn the layer."""
        try:
            yield
        except PeerTimeout:
            raise
        except SharedFault as fault:
            # all ranks name the same step, whoever noticed first; a recorded fault is from one since the last look
            step = fault.update or self._updates_of(index) + 1
            what = str(SharedFault(fault.kind, [(ranks or self._columns)[rank] for rank in fault.ranks]))
            diverged = fault.kind.startswith("non-finite")
            raise TrainingFault(f"layer {index}, step {step}: {what}", diverged=diverged) from fault
        except Exception as fault:
            what = f"{type(fault).__name__}: {fault}"
            raise TrainingFault(f"layer {index}, step {self._updates_of(index) + 1}: {what}") from fault

    def _updates_of(self, index: int) -> int:
        return self._monitors[index].updates if index in self._monitors else 0

    def updated(self, update: Update) -> None:
        self.profile.updated(update)
        index, number, of = update.index, update.number, self._monitors[update.index]
        if not self.together:
            self.step += 1
            self.images += update.images
        of.updates = number
        images = self.images + (self._learnt_from(update.images) if self.together else 0)
        if update.looked:  # else reading the bound would wait for the device
            of.growth.check(number - 1, update.layer.bound.value)
        of.window.count(update.images)
        if update.measurement is not None:
            of.latest = of.window.close(update.layer, update.measurement, images)
            of.objective.check(of.latest.objective)
            self.report.send(of.latest)
        if self.together:
            return
        latest = () if of.latest is None else (of.latest,)
        progress = Progress("learn", number, update.total, layer=index, step=self.step, metrics=latest)
        self.report.progress(progress)
        stop = self._asked_to_stop(number, self.mesh.everyone)
        cursor = Cursor(step=self.step, layer=index, updates=number, images=self.images)
        self._end_of_step(cursor, {index: update.layer}, last=number == update.total, stop=stop, learnt=index)

    def stop_after(self, number: int) -> bool:
        return self._asked_to_stop(number, self.mesh.columns)

    def passed(self, done: Pass) -> None:
        self.images += self._learnt_from(done.images)
        self.step = done.number
        self.report.progress(Progress("learn", done.number, done.total, step=done.number))
        cursor = Cursor(step=done.number, layer=0, updates=done.number, images=self.images)
        self._end_of_step(cursor, done.layers, last=done.number == done.total, stop=done.stop)

    def _learnt_from(self, images: int) -> int:
        """Images of a batch times the layers that learn from it, in the next update of the pass."""
        return images * sum(self.step + 1 in updates for updates in self._updates)

    def _end_of_step(
        self,
        cursor: Cursor,
        layers: Mapping[int, SimilarityMatchingConv2d],
        *,
        last: bool,
        stop: bool,
        learnt: int = 0,
    ) -> None:
        """Write a checkpoint where one is due, and end where the ranks have agreed to.

        layers: those that this rank has rows of; learnt: number of layers that have learnt before.
        """
        if last or stop or cursor.step % self.config.checkpoint.every_steps == 0:
            for index, layer in layers.items():
                with self._named(index):
                    layer.raise_faults()  # a checkpoint holds no update after a fault
            if self.mesh.replicas.rank == 0:
                states = {index: LayerState(usual=self._usual(index)) for index in layers}
                first = self.mesh.owners.rank == 0
                take = partial(take_snapshot, self.stack, layers, states, first=first, learnt=learnt)
                self.writer.submit(cursor, take, needed=last or stop)
        if stop:
            self._close()
            raise Stopped

    def _usual(self, index: int) -> float | None:
        """The bound that a layer's growth is measured from: also of a layer that has not gone on since a restart."""
        if index in self._monitors:
            return self._monitors[index].growth.usual
        states = [] if self.reader is None else self.reader.manifest.layers
        return states[index].usual if index < len(states) else None

    def keeps(self, index: int) -> bool:
        return index in self.config.model.feature_layers()

    def advanced(self, index: int, features: Chunks) -> None:
        if self.keeps(index):
            self._features[index] = features
        if features.found:
            self.report.send(FeaturesFound(index, features.found, features.count))

    def progress(self, phase: Phase, done: int, total: int, layer: int, images_per_second: float | None = None) -> None:
        self.report.progress(Progress(phase, done, total, layer=layer, images_per_second=images_per_second))

    def on_one_rank(self, work: Callable[[], None] | None, ranks: Exchange | None = None) -> None:
        """See `cluster.one_rank`."""
        limits = self.config.cluster
        pause_s = PART_OF_LIMITS * min(limits.collective_timeout_s, limits.stall_timeout_s)
        on_one_rank(work, ranks or self.mesh.everyone, self.report, device=self.device, pause_s=pause_s)

    def _asked_to_stop(self, number: int, among: Exchange) -> bool:
        """Whether learning is to stop with this update, as any of some ranks has been asked to: one gathered value, at
        every `log_every` updates, so that all stop at the same."""
        if number % self.config.log_every:
            return False
        asked = torch.full((1,), float(self.report.stopping), device=self.device)
        return bool(gather_from_ranks(asked, among).any())
