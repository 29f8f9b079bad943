"""Configuration of a run: the method's (`simmatch.config`) and what surrounds it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.mesh import MeshConfig
from cluster.policy import Divergence
from cluster.redaction import redact
from cluster.tracking.config import TrackingConfig
from simmatch.config import ConfigError, Frozen, ModelConfig, NonNegativeInt, PositiveFloat, PositiveInt, Reduce
from simmatch.data.config import DataConfig


class CheckpointConfig(Frozen):
    """When shards are written."""

    every_steps: PositiveInt = 200
    """Updates between two checkpoints; one more is written after every layer."""

    keep: PositiveInt = 2
    """Newest checkpoints kept; besides, the newest one of an earlier layer."""

    patience_s: PositiveFloat = 60.0
    """Shards are written while training continues. Longest wait, when a checkpoint is due, for the one before; after
    that the new one is skipped."""


class ProbeConfig(Frozen):
    """What is measured on the frozen features at the end."""

    readout: Literal["ridge", "logistic", "knn"] = "logistic"
    """The readout trained on the features of the training images."""

    train_images: PositiveInt | None = None
    """The number of labelled images it is trained on, the first of the data set. None: all."""

    max_feature_bytes: PositiveInt = 4 * 10**9
    """Most bytes of features that rank 0 collects to fit `logistic` or `knn`; the fit takes a few times as much memory.
    If the training images have more, a random subset is used, with as many images of every class as fit. `ridge` is
    exact for any number of images: it collects features only if images are fewer than features."""


class GroupConfig(Frozen):
    """The Ray actors, their waits and their network."""

    threads_per_rank: PositiveInt | None = None
    """torch threads of an actor; another number changes the last bits. None: determined when the run begins, and kept
    from then on: the CPUs that a host allows (affinity, control groups) divided by its ranks, the smallest over all
    hosts, at least 1."""

    cpus_per_rank: PositiveInt = 1
    """CPUs that Ray reserves for an actor."""

    interface: str | None = None
    """Network interface of the exchanges, such as eth0; they carry no authentication. None: loopback while all
    actors share one machine, else the interface of Ray's own node address. Where a node's environment sets
    GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, or a file of nccl's the latter, gloo or nccl uses that."""

    placement_timeout_s: PositiveFloat = 1800.0
    """Longest wait for room: for nodes that an autoscaler starts or that join late, or for other jobs to end. It costs
    no restart: one request stays pending all the time, and what it waits for is shown."""

    start_timeout_s: PositiveFloat = 120.0
    """Longest wait for actors, once there is room for them, to start and join."""

    heartbeat_s: PositiveFloat = 30.0
    """A rank that has not answered the controller for this long is lost."""

    collective_timeout_s: PositiveFloat = 120.0
    """Longest wait inside one exchange; longer than the heartbeat, so that the controller is the first to know. nccl's
    own limit, which ends the waiting ranks, is twice as long."""

    stall_timeout_s: PositiveFloat = 900.0
    """A rank whose training thread has made no progress for this long (no update, no exchange, no batch encoded, no
    processor time in a calibration or in fitting a readout) is lost, even if its process answers."""

    poll_s: PositiveFloat = 0.5
    """Pause between two rounds of the controller."""

    grace_s: PositiveFloat = 20.0
    """When the job is asked to end (SIGTERM, SIGINT): longest wait for a last checkpoint, which ranks write at the next
    `log_every` updates. `ray job stop` kills after 3 s, or RAY_JOB_STOP_WAIT_TIME_S of the runtime environment."""

    max_restarts: NonNegativeInt = 3
    """Most new groups in a row, after lost ranks, without a new checkpoint between them. A new group continues from
    the newest checkpoint; every new checkpoint resets the count."""

    max_preemptions: NonNegativeInt | None = None
    """Most new groups in a row, after nodes that were taken away (drained by Ray, or ended by SIGTERM), without a new
    checkpoint between them; they do not count as restarts. None: any number."""

    backoff_s: PositiveFloat = 1.0
    """Pause before the second new group in a row, twice as long before each further one, a minute at most."""

    min_shards: PositiveInt | None = None
    """Where a lost node does not come back within `start_timeout_s`: the smallest number of channel shards to continue
    with. None: wait for `placement_timeout_s`."""

    grow_after_s: PositiveFloat = 60.0
    """A group that has become smaller grows again once there has been room for so long, without a change: at an update
    at which all ranks write a checkpoint, and not before it has written one of its own. Twice as long after a larger
    group that did not come up, and so on."""

    def check_mesh(self, mesh: MeshConfig) -> None:
        """Raise ConfigError where the smallest group allowed does not fit the mesh."""
        least = self.min_shards
        if least is not None and (mesh.data, mesh.layer) != (1, 1):
            raise ConfigError(
                f"cluster.min_shards: expected none with {mesh}, since only a group of shards (mesh.data=1 and "
                f"mesh.layer=1) can become smaller, got {least}"
            )
        if least is not None and least > mesh.channel:
            raise ConfigError(f"cluster.min_shards: expected at most mesh.channel={mesh.channel}, got {least}")


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Of a run: it is part of paths."""


class RunConfig(Frozen):
    """Everything about one run; `jobs/configs/*.yaml` hold examples."""

    name: Name
    """Names the run and its default folder, runs/<name>."""

    seed: NonNegativeInt = 0
    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda` gives every rank one whole GPU."""

    dtype: Literal["float32", "float64"] = "float32"
    """float32 means float32: TF32 is switched off."""

    data: DataConfig
    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    cluster: GroupConfig = GroupConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    probe: ProbeConfig = ProbeConfig()
    tracking: TrackingConfig = TrackingConfig()

    reduce: Reduce = "fast"
    """How sums over ranks are made. `fast`: floats, equal up to rounding at another number of ranks. `exact`: the same
    weights, bit by bit, at any number of ranks, replicas and stages, on machines of one type of CPU or GPU with as many
    threads per rank, and the same `encode_batch`. It needs `exchange: gather_state` in every layer."""

    divergence: Divergence = "stop"
    """Where weights or activities become NaN or infinite, or explode: end, or continue once from the newest checkpoint
    at half of all learning rates. The newest checkpoint is from before either way."""

    encode_batch: PositiveInt = 500
    """Images per batch and rank where layers only encode, and of one file of encoded images."""

    cache_features: bool = True
    """With `schedule: greedy`: have the encoded input of a layer on each node's disk while the layer learns, instead of
    encoding each batch again; up to 1 GiB of it on a GPU. `--dry-run` prints the size."""

    log_every: PositiveInt = 10
    """Updates between two records of a layer's metrics."""

    def check_mesh(self, images: int | None = None) -> None:
        """Raise ConfigError where the mesh does not fit the model's layers, the smallest group allowed, or the number
        of training images, where it is known; or layers cannot be summed as `reduce` asks."""
        self.model.check_reduce(self.reduce)
        self.mesh.check(self.model, images)
        self.cluster.check_mesh(self.mesh)

    def at_rate(self, factor: float) -> RunConfig:
        """The same with all learning rates multiplied."""
        layers = tuple(
            layer.model_copy(
                update={"plasticity": layer.plasticity.model_copy(update={"lr": factor * layer.plasticity.lr})}
            )
            for layer in self.model.layers
        )
        return self.model_copy(update={"model": self.model.model_copy(update={"layers": layers})})


def public(config: RunConfig) -> dict[str, Any]:
    """Plain values of a configuration as they may be written down: no credentials in a tracking URI."""
    values: dict[str, Any] = config.model_dump(mode="json")
    if config.tracking.uri is not None:
        values["tracking"]["uri"] = redact(config.tracking.uri)
    return values
