"""What a rank monitors of its own training: growth of the weights, the objective, and a layer's metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cluster.checkpoints.shard_writer import ShardWriter
from cluster.connections import Traffic
from cluster.messages import LayerMetrics, LayerWarning, Outbox
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.measurement import Measurement
from simmatch.objective import divergence_warning
from simmatch.sharding.mesh import Mesh

EXPLOSION = 1e6
"""Growth of the bound of λmax(M), since update `SETTLED` of the layer, that counts as divergence."""

SETTLED = 10


class TrainingFault(RuntimeError):
    """Training cannot go on; the message names layer, step and rank.

    Attributes
    ----------
    diverged: values became NaN or infinite, or exploded.
    """

    def __init__(self, message: str, *, diverged: bool = False) -> None:
        self.diverged = diverged
        super().__init__(message)


class GrowthMonitor:
    """Monitors the bound of λmax(M) of one layer, which is the same on all ranks.

    usual: the bound that growth is measured from, once known; checkpoints keep it, so that growth over several
        attempts is noticed as well.
    """

    def __init__(self, layer: int, usual: float | None = None) -> None:
        self._layer, self.usual = layer, usual

    def check(self, update: int, bound: float) -> None:
        """After an update, the first being 0.

        Raises
        ------
        TrainingFault
            The bound has grown by more than `EXPLOSION` since the layer has settled.
        """
        if self.usual is None or update < SETTLED:
            self.usual = bound
        if bound > EXPLOSION * self.usual > 0:
            raise TrainingFault(
                f"layer {self._layer}, step {update + 1}: the lateral weights explode: bound of their largest "
                f"eigenvalue {bound:.1e}, was {self.usual:.1e}",
                diverged=True,
            )


class ObjectiveMonitor:
    """Monitors the relative objective of one layer, which is the same on all ranks; warns once."""

    def __init__(self, index: int, layer: SimilarityMatchingConv2d, report: Outbox) -> None:
        self._index, self._layer, self._report, self._warned = index, layer, report, False

    def check(self, objective: float) -> None:
        """After an update that was measured."""
        updates = int(self._layer.updates)
        complaint = divergence_warning(self._layer.plasticity, updates, above_one=objective > 1)
        if complaint is not None and not self._warned:
            self._warned = True
            self._report.send(LayerWarning(f"layer {self._index}, step {updates}: {complaint}"))


class MetricsWindow:
    """The updates of one layer between two metrics: throughput, and the shares of this rank's time spent waiting for
    other ranks and on checkpoints."""

    def __init__(self, layer: int, traffic: Traffic, mesh: Mesh, writer: ShardWriter) -> None:
        self._layer, self._images, self._traffic, self._writer = layer, 0, traffic, writer
        self._started, self._waited_s, self._saving_s = time.monotonic(), traffic.waited_s, writer.seconds
        self._ranks = mesh.everyone.world_size // mesh.stages

    def count(self, images: int) -> None:
        self._images += images

    def close(self, layer: SimilarityMatchingConv2d, measurement: Measurement, images: int) -> LayerMetrics:
        """Metrics at the end of this window; the next one begins.

        measurement: of the latest update; images: see `LayerMetrics`.
        """
        traffic, now = self._traffic, time.monotonic()
        seconds = max(now - self._started, 1e-9)
        metrics = LayerMetrics(
            layer=self._layer,
            update=int(layer.updates),
            images=images,
            objective=measurement.objective,
            residual=measurement.residual,
            num_iters=float(measurement.num_iters),
            active_fraction=measurement.active_fraction,
            dead_channels=float(layer.dead_channels),
            revived_channels=float(layer.revived),
            images_per_second=self._images / seconds,
            window_s=seconds,
            waiting_share=(traffic.waited_s - self._waited_s) / seconds,
            checkpoint_share=(self._writer.seconds - self._saving_s) / seconds,
            bytes_exchanged=float(traffic.bytes_exchanged * self._ranks),
            num_exchanges=float(traffic.num_exchanges),
        )
        self._images, self._started = 0, now
        self._waited_s, self._saving_s = traffic.waited_s, self._writer.seconds
        return metrics


@dataclass
class Monitors:
    """What monitors one layer while it learns.

    Attributes
    ----------
    layer: this rank's rows of it.
    updates: made so far.
    latest: its latest metrics.
    """

    layer: SimilarityMatchingConv2d
    growth: GrowthMonitor
    window: MetricsWindow
    objective: ObjectiveMonitor
    updates: int
    latest: LayerMetrics | None = None
