"""Sizes of the plan against layers that are built, and bytes against exchanges that are made."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from cluster.allocation import Allocation
from cluster.config import RunConfig
from cluster.messages import Outbox, ShardWritten
from cluster.network import LOOPBACK
from cluster.training import Assignment, Training
from jobs.plan import plan_layers, print_plan
from jobs.plan_layout import placement_lines, volumes
from jobs.plan_memory import check_whitening, plan_disk, plan_memory
from simmatch.config import ConfigError, Reduce, parse
from simmatch.data.sources import Dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import Stack, layer_inputs, save_model
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import split_rows
from tests.exchanges import ThreadExchange, meshes, of_type, results, run_meshes, run_owners
from tests.live_bytes import LiveBytes

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize("channel", [1, 2, 3])
def test_sizes_are_those_of_the_layers(make_config: MakeConfig, digits: Dataset, channel: int) -> None:
    config = make_config(f"mesh.channel={channel}", "model.layers.0.stride=2", "model.layers.0.pool=3")
    source = digits.source
    plans = plan_layers(config, source, len(digits.train_images))
    stack = Stack(config.model, source)
    images = to_unit(digits.train_images[:2])
    for index, plan in enumerate(plans):
        layer, size = config.model.layers[index], layer_inputs(config.model, source)[index]
        below = stack.below(images, index)
        assert plan.input == tuple(below.shape[1:])
        assert plan.output == tuple(stack.layer(index)(below).shape[1:])
        assert plan.columns == layer.train.batch_size * plan.output[1] * plan.output[2]
        rows = split_rows(layer.out_channels, channel)[0]
        shard = SimilarityMatchingConv2d.from_config(layer, *size, num_classes=10, seed=0, rows=rows)
        assert plan.rows == shard.feedforward.shape[0]
        assert plan.parameters == sum(tensor.numel() for tensor in (shard.feedforward, shard.lateral, shard.label))
    assert plans[0].cache_bytes == 0
    cached = stack.below(images, 1)
    assert plans[1].cache_bytes == cached[0].numel() * cached.element_size() * len(digits.train_images)


def test_double_precision_holds_and_moves_twice_as_much(make_config: MakeConfig, digits: Dataset) -> None:
    singles, doubles = (
        plan_layers(make_config(f"dtype={dtype}"), digits.source, 1437) for dtype in ("float32", "float64")
    )
    for single, double in zip(singles, doubles, strict=True):
        for name, value in asdict(single).items():
            assert asdict(double)[name] == (2 * value if name.endswith("_bytes") else value)


def test_nothing_is_cached_where_caching_is_off(make_config: MakeConfig, digits: Dataset) -> None:
    plans = plan_layers(make_config("cache_features=false", "mesh.channel=1"), digits.source, 1437)
    assert [(plan.cache_bytes, plan.exchange_bytes) for plan in plans] == [(0, 0), (0, 0)]


# -- memory ------------------------------------------------------------------------------------------------------------


def measured_peak(exchange: Exchange, config: RunConfig, run_dir: Path) -> int:
    """Bytes of tensors that a rank holds at its most until its last layer is encoded."""
    with LiveBytes() as live, torch.no_grad():
        assignment = Assignment(config, run_dir, exchange.rank)
        Training(assignment, Mesh.of_owners(exchange), Outbox(exchange.rank), torch.device("cpu")).trainer.fit()
    return live.peak


@pytest.mark.parametrize(
    ("channel", "changes"),
    [
        (1, ()),
        (1, ("model.layers.1.out_channels=256", "model.layers.0.pool=4")),
        (1, ("model.layers.0.train.positions=9", "cache_features=false")),
        (2, ()),
        (2, ("model.layers.0.dynamics.exchange=gather_state", "model.layers.1.dynamics.exchange=gather_state")),
        (2, ("model.layers.0.whiten_images=1000", "encode_batch=50")),
    ],
)
def test_memory_is_that_of_a_run_within_a_factor(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, channel: int, changes: tuple[str, ...]
) -> None:
    """Rank 0, from its start to the end of the last layer: between 0.7 and 2 times what its tensors need."""
    brief = [f"model.layers.{layer}.train.images=150" for layer in range(2)]
    config = make_config(f"mesh.channel={channel}", *brief, *changes)
    phases = plan_memory(config, digits.source, len(digits.train_images))
    planned = max(phase.total for phase in phases if phase.phase != "readout") + digits.train_images.nbytes
    if channel == 1:
        measured = measured_peak(IDENTITY, config, tmp_path)
    else:
        measured, _ = results(run_owners(channel, lambda exchange: measured_peak(exchange, config, tmp_path)))
    assert 0.7 < planned / measured < 2.0, (planned, measured, phases)


@pytest.mark.parametrize(
    ("channels", "memory_bytes", "expected"),
    [
        (
            2048,
            1e15,
            "model.layers.1.whiten: expected patches of at most 32,766 values, got 32,768 values, whose whitening "
            "needs 42.9 GB and about 2 hours of a processor; lower pool or out_channels of the layer below, or the "
            "kernel",
        ),
        (
            128,
            100e6,
            "expected patches of at most what 100 MB hold, got 2,048 values, whose whitening needs 168 MB and",
        ),
        (128, 200e6, None),
        (2047, None, None),
    ],
)
def test_a_whitening_that_cannot_be_solved_is_refused(
    make_config: MakeConfig, digits: Dataset, channels: int, memory_bytes: float | None, expected: str | None
) -> None:
    config = make_config(f"model.layers.0.out_channels={channels}", "model.layers.0.pool=4", "mesh.channel=1")
    if expected is None:
        check_whitening(config, digits.source, memory_bytes)
        return
    with pytest.raises(ConfigError) as caught:
        check_whitening(config, digits.source, memory_bytes)
    assert expected in str(caught.value)


def test_bytes_on_the_disk_are_those_of_a_run(make_config: MakeConfig, digits: Dataset, tmp_path: Path) -> None:
    """Within 5 %: files have headers, and counters."""
    brief = [f"model.layers.{layer}.train.images=150" for layer in range(2)]
    config = make_config("mesh.channel=1", "model.layers.1.out_channels=256", *brief)
    plan = plan_disk(config, digits.source)
    outbox = Outbox()
    training = Training(Assignment(config, tmp_path, 0), Mesh(), outbox, torch.device("cpu"))
    training.trainer.fit()
    training.writer.close()
    written = of_type(outbox.messages, ShardWritten)
    constants = {constant.sha256: constant for message in written for constant in message.constants}
    assert sum(constant.size_bytes or 0 for constant in constants.values()) == pytest.approx(plan.constants, rel=0.05)
    assert max(message.shard.size_bytes or 0 for message in written) == pytest.approx(plan.checkpoint, rel=0.05)
    save_model(training.stack, tmp_path / "model")
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) == pytest.approx(plan.model, rel=0.05)


class Counting:
    """An exchange that counts the bytes which reach this rank."""

    def __init__(self, inner: ThreadExchange) -> None:
        self.inner, self.rank, self.world_size, self.asynchronous = inner, inner.rank, inner.world_size, False
        self.received = 0
        self.waited_s = 0.0

    def all_gather(self, gathered: torch.Tensor):
        self.received += gathered.nbytes - gathered[0].nbytes
        return self.inner.all_gather(gathered)

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor):
        self.received += received.nbytes - received[0].nbytes
        return self.inner.all_to_all(received, sent)


@pytest.mark.parametrize("channel", [2, 3])
@pytest.mark.parametrize("mode", ["every_iteration", "block"])
@pytest.mark.parametrize("dtype", ["null", "bfloat16"])
def test_bytes_of_an_iteration_are_those_that_arrive(
    make_config: MakeConfig, digits: Dataset, channel: int, mode: str, dtype: str
) -> None:
    """A solve of one iteration more receives exactly what the plan says, on the rank with the most rows."""
    config = make_config(
        f"mesh.channel={channel}",
        "model.layers.0.train.batch_size=3",
        "model.layers.0.dynamics.tile_columns=48",
        f"model.layers.0.dynamics.exchange={mode}",
        f"model.layers.0.dynamics.exchange_dtype={dtype}",
    )
    plan = plan_layers(config, digits.source, 1437)[0]
    images = to_unit(digits.train_images[:3])

    def received(iterations: int) -> int:
        values = config.model.layers[0].model_dump()
        values["dynamics"] |= {"tolerance": 0.0, "max_iterations": iterations}
        layer = parse(type(config.model.layers[0]), values)

        def owner(exchange: ThreadExchange) -> int:
            counting = Counting(exchange)
            rows = split_rows(layer.out_channels, channel)[exchange.rank]
            shard = SimilarityMatchingConv2d.from_config(
                layer, 1, (8, 8), num_classes=10, rows=rows, mesh=Mesh.of_owners(counting)
            )
            with torch.no_grad():
                shard.solve(images)
            return counting.received

        return results(run_owners(channel, owner))[0]

    assert received(12) - received(11) == plan.exchange_bytes
    assert received(11) - received(4) == 7 * plan.exchange_bytes


@pytest.mark.parametrize("channel", [2, 3])
def test_bytes_of_an_update_are_those_that_arrive(make_config: MakeConfig, digits: Dataset, channel: int) -> None:
    """Of a supervised layer, whose labels travel too; beside them only the bound of the new M, 4 K values."""
    config = make_config(f"mesh.channel={channel}", "model.layers.1.dynamics.exchange=gather_state")
    plan = plan_layers(config, digits.source, 1437)[1]
    layer, (channels, extent) = config.model.layers[1], layer_inputs(config.model, digits.source)[1]
    images, labels = torch.rand(5, channels, *extent), digits.train_labels[:5]
    rows = split_rows(layer.out_channels, channel)

    def owner(exchange: ThreadExchange) -> int:
        counting = Counting(exchange)
        own = rows[exchange.rank]
        shard = SimilarityMatchingConv2d.from_config(
            layer, channels, extent, num_classes=10, rows=own, mesh=Mesh.of_owners(counting)
        )
        shard.calibrate(images)
        shard.partial_fit(images, labels)
        before = counting.received
        shard.partial_fit(images, labels)
        return counting.received - before

    bound_bytes = 4 * (channel - 1) * (4 * rows[0].padded + 2)
    assert results(run_owners(channel, owner))[0] == plan.exchange_bytes + bound_bytes


@pytest.mark.parametrize("reduce", ["fast", "exact"])
@pytest.mark.parametrize("replicas", [2, 3])
def test_bytes_between_replicas_are_those_that_arrive(
    make_config: MakeConfig, digits: Dataset, replicas: int, reduce: Reduce
) -> None:
    modes = [f"model.layers.{index}.dynamics.exchange=gather_state" for index in range(2)]
    config = make_config("mesh.channel=1", f"mesh.data={replicas}", f"reduce={reduce}", *modes)
    layer, (channels, extent) = config.model.layers[1], layer_inputs(config.model, digits.source)[1]
    images, labels = torch.rand(6, channels, *extent), digits.train_labels[:6]

    def received(mesh: Mesh) -> int:
        replica = SimilarityMatchingConv2d.from_config(
            layer, channels, extent, num_classes=10, mesh=mesh, reduce=reduce
        )
        replica.calibrate(images)
        assert isinstance(mesh.replicas, ThreadExchange)
        before = mesh.replicas.bytes_exchanged
        replica.partial_fit(images, labels)
        return mesh.replicas.bytes_exchanged - before

    planned = {volume.what: volume.received for volume in volumes(config, digits.source)}
    assert set(results(run_meshes(meshes(replicas), received))) == {planned["statistics of layer 1"]}


def test_drawn_positions_are_fewer_columns(make_config: MakeConfig, digits: Dataset) -> None:
    plan = plan_layers(make_config("model.layers.0.train.positions=7"), digits.source, 1437)[0]
    assert plan.columns == 7 * make_config().model.layers[0].train.batch_size


@pytest.mark.parametrize("terminal", [False, True])
def test_the_text_holds_configuration_mesh_and_table(make_config: MakeConfig, digits: Dataset, terminal: bool) -> None:
    config = make_config("data.root=/" + "long/" * 30)
    out = io.StringIO()
    print_plan(Console(file=out, width=80, force_terminal=terminal, no_color=True), config, digits)
    text = out.getvalue()
    above, _, below = text.partition("mesh: ")
    if not terminal:  # a log can be read back as it is, and nothing in its table is cut
        assert parse(RunConfig, yaml.safe_load(above)) == config
        assert "…" not in text
        assert not set(text) & set(map(chr, (*range(10), *range(11, 32), 127)))
        for word in ("parameters", "activations", "every iteration", "8 of 16", "16×8×8", "10,560", "1.47 MB"):
            assert word in below
    assert below.startswith("data 1 × layer 1 × channel 2, 2 ranks on cpu")


def test_where_ranks_will_run_is_told_as_far_as_it_is_known(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All on this machine, which has eight GPUs and a pod's share of the CPUs; or on a cluster that is not asked."""
    held = Allocation("node-a", LOOPBACK, 6, 64, "control group", 32 * 10**9, tuple("01234567"), "lo")
    monkeypatch.setattr("jobs.plan_layout.allocation", lambda interface, address: held)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert placement_lines(make_config("device=cuda", "cluster.threads_per_rank=4", "mesh.channel=2")) == [
        "placement: 0, 1 on node-a (127.0.0.1), GPUs 0, 1, 6 CPUs (of 64, by its control group), 32 GB",
        "threads: 4 threads for each rank",
        "node-a (127.0.0.1): 6 CPUs (of 64, by its control group) for 2 ranks, fewer than cluster.threads_per_rank=4 "
        "for each: slower, same bits; cluster.threads_per_rank=3 for a new run",
        "mesh: data 1 × layer 1 × channel 2; 6 GPUs are idle; mesh.data: 4 or mesh.channel: 8 would use them",
    ]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    (line,) = placement_lines(make_config("device=cuda"))
    assert line.startswith("placement: shown when the run starts")


def test_what_the_cache_cannot_hold_is_told(make_config: MakeConfig, digits: Dataset) -> None:
    def text(*overrides: str) -> str:
        out = io.StringIO()
        print_plan(Console(file=out), make_config(*overrides), digits)
        (line,) = [line for line in out.getvalue().splitlines() if line.startswith("node cache: ")]
        return line

    assert text().endswith("of encoded images")
    small = text("data.cache_bytes=1000000")
    assert small.startswith("node cache: 1 MB of each node's disk, for ")
    assert small.endswith(
        "; more than data.cache_bytes: layers that are not read any more make room, and what then still "
        "does not fit stays in memory"
    )


def test_a_password_is_not_printed(make_config: MakeConfig, digits: Dataset) -> None:
    out = io.StringIO()
    config = make_config("tracking.uri=https://ada:secret@mlflow.example")
    print_plan(Console(file=out), config, digits)
    assert "uri: https://***@mlflow.example\n" in out.getvalue()
    assert "secret" not in out.getvalue()
