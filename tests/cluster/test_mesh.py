"""The mesh is arithmetic: a bijection between ranks and coordinates, and messages that name what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import RunConfig
from cluster.mesh import Coordinates, Mesh, MeshConfig
from simmatch.config import ConfigError, parse

extents = st.integers(min_value=1, max_value=7)
meshes = st.builds(Mesh, channel=extents, data=extents, layer=extents)


@given(meshes)
def test_ranks_and_coordinates_are_a_bijection(mesh: Mesh) -> None:
    coordinates = [mesh.coordinates(rank) for rank in range(mesh.world_size)]
    # the oracle is the order of nested loops, data outermost, channel innermost
    nested = [Coordinates(*indices) for indices in product(range(mesh.data), range(mesh.layer), range(mesh.channel))]
    assert coordinates == nested


@given(meshes, st.integers())
def test_a_rank_outside_the_mesh_is_refused_with_the_sizes(mesh: Mesh, rank: int) -> None:
    if 0 <= rank < mesh.world_size:
        at = mesh.coordinates(rank)
        assert (at.data * mesh.layer + at.layer) * mesh.channel + at.channel == rank
        return
    with pytest.raises(ValueError, match=rf"from 0 to {mesh.world_size - 1} .* got {rank}$") as caught:
        mesh.coordinates(rank)
    assert f"data {mesh.data} × layer {mesh.layer} × channel {mesh.channel}" in str(caught.value)


def test_the_configuration_becomes_the_mesh() -> None:
    assert Mesh.from_config(MeshConfig(channel=3)) == Mesh(channel=3, data=1, layer=1)
    assert Mesh.from_config(MeshConfig()).world_size == 1


@pytest.mark.parametrize(
    ("mesh", "key", "got"),
    [
        ({"channel": 0}, "mesh.channel", "0"),
        ({"channel": -2}, "mesh.channel", "-2"),
        ({"channel": 1.5}, "mesh.channel", "1.5"),
        ({"channel": "2"}, "mesh.channel", "'2'"),
        ({"channel": True}, "mesh.channel", "True"),
        ({"data": 2}, "mesh.data", "2"),
        ({"layer": 3}, "mesh.layer", "3"),
        ({"chanel": 2}, "mesh.chanel", "'chanel'"),
    ],
)
def test_a_bad_mesh_is_refused_by_key_expectation_and_value(
    digits_config: Callable[..., RunConfig], mesh: dict[str, object], key: str, got: str
) -> None:
    values = digits_config().model_dump(mode="json") | {"mesh": mesh}
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, values)
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert "expected" in message
    assert f"got {got}" in message
    assert "\n" not in message


def test_more_shards_than_channels_are_refused_with_all_sizes(digits_config: Callable[..., RunConfig]) -> None:
    config = digits_config(channel=10)
    assert config.checked_mesh().world_size == 10  # one channel each is the most
    with pytest.raises(ConfigError) as caught:
        digits_config(channel=11).checked_mesh()
    assert str(caught.value) == ("mesh.channel: expected at most 10, the out_channels of model.layers.0, got 11")


def test_the_narrowest_layer_decides(digits_config: Callable[..., RunConfig]) -> None:
    values = digits_config(channel=5).model_dump(mode="json")
    values["model"]["layers"][1]["out_channels"] = 4
    with pytest.raises(ConfigError, match=r"at most 4, the out_channels of model\.layers\.1, got 5"):
        parse(RunConfig, values).checked_mesh()
