"""The same stream on several ranks, as threads: the bits of one (`reduce: exact`), or those of one up to rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simmatch import ModelConfig
from simmatch.config import Reduce
from simmatch.labels import UNLABELLED
from simmatch.online.rate import RateConfig
from simmatch.online.stack import OnlineStack
from simmatch.online.state import State, digest
from simmatch.sharding.mesh import Mesh
from tests.exchanges import meshes, results, run_meshes
from tests.simmatch.online.test_stack import IMAGES, SIGNALS, model_of, online_of, records

SHAPES = ((1, 3), (2, 2))
"""Replicas and owners."""


def learnt(model: ModelConfig, height: int, reduce: Reduce, dtype: torch.dtype) -> Callable[[Mesh], State]:
    """A program for one rank: a stream with weights, labels that come late, a class that comes later, a drift, and a
    start anew from a state in the midst of it. The result: its state, and what it says of a last batch."""
    x, labels = records(height, 40 if height == 1 else 6)
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(4)).to(dtype)
    first = labels.where(labels < 3, UNLABELLED)

    def program(mesh: Mesh) -> State:
        rate = RateConfig(kind="after_drift", decay_steps=5)

        def fresh() -> OnlineStack:
            return online_of(model, x, mesh=mesh, reduce=reduce, rate=rate, dtype=dtype, classes=3)

        online = fresh()
        online.calibrate(x)
        for number, chosen in enumerate(torch.arange(120).split(20)):
            encoded = online.encode(x[chosen])
            online.learn(encoded, (first if number < 3 else labels)[chosen], weights[chosen] if number % 2 else None)
            if number == 2:
                online.learn_labels(online.encode(x[3:17]), first[3:17])
                online.grow(4)
                online.raise_rate()
                state = online.state()
                online = fresh()
                online.restore(state)
        encoded = online.encode(x[120:])
        said = {"features": encoded.features, **encoded.signals}
        if encoded.label_scores is not None:
            said["scores"] = encoded.label_scores
        exported = {f"exported.{name}": tensor for name, tensor in online.export().state_dict().items()}
        return {**online.state(), **said, **exported}

    return program


CASES = {
    "frozen below": (SIGNALS, (0, 2, 3), 1),
    "images": (IMAGES, (0, 1), 6),
}


@pytest.mark.parametrize(("layers", "starts", "height"), CASES.values(), ids=CASES)
def test_exact_sums_give_the_bits_of_one_rank(
    layers: list[dict[str, object]], starts: tuple[int, ...], height: int
) -> None:
    frozen = starts == (0, 2, 3)
    model = model_of(layers, starts, exchange="gather_state", freeze_below=frozen)
    program = learnt(model, height, "exact", torch.float32)
    (alone,) = results(run_meshes(meshes(), program))
    for replicas, owners in SHAPES:
        for state in results(run_meshes(meshes(replicas, 1, owners), program)):
            assert {name: digest({"": each}) for name, each in state.items()} == {
                name: digest({"": each}) for name, each in alone.items()
            }


@pytest.mark.parametrize("exchange", ["every_iteration", "gather_state"])
def test_other_sums_give_one_rank_up_to_rounding(exchange: str) -> None:
    """In float64. Columns stop where the residual is below 1e-9 of the drive: the order of sums moves a stop by an
    iteration now and then, so 1e-6 of the largest value."""
    layers = [{**layer, "dynamics": {"tolerance": 1e-9, "max_iterations": 2000}} for layer in SIGNALS]
    program = learnt(model_of(layers, (0, 1, 2), exchange=exchange), 1, "fast", torch.float64)
    (alone,) = results(run_meshes(meshes(), program))
    for replicas, owners in SHAPES:
        states = results(run_meshes(meshes(replicas, 1, owners), program))
        assert len({digest(state) for state in states}) == 1
        assert_close(states[0], alone)


def assert_close(found: State, expected: State) -> None:
    for name, value in expected.items():
        if name.endswith("perron"):  # any gives a valid bound
            continue
        finite = torch.nan_to_num(value.double())
        scale = float(finite.abs().amax()) if value.numel() else 0.0
        other = torch.nan_to_num(found[name].double())
        torch.testing.assert_close(other, finite, rtol=0, atol=1e-6 * scale, msg=name)


def test_ranks_end_with_the_same_error() -> None:
    x, _ = records(1, 40)

    def program(mesh: Mesh) -> Tensor:
        online = online_of(model_of(SIGNALS[:1]), x, mesh=mesh)
        online.calibrate(x)
        return online.encode(x[:5] * torch.nan).features

    for outcome in run_meshes(meshes(1, 1, 2), program):
        assert isinstance(outcome, RuntimeError)
        assert "non-finite" in str(outcome)
