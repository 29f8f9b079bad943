"""The mesh: its size, and messages that name what does not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.config import RunConfig
from cluster.mesh import MeshConfig, Place
from simmatch.config import ConfigError, parse


def test_the_world_size_and_the_text_of_a_mesh() -> None:
    assert MeshConfig().world_size == 1
    assert MeshConfig(channel=3).world_size == 3
    assert str(MeshConfig(channel=3)) == "data 1 × layer 1 × channel 3"


@pytest.mark.parametrize(
    ("mesh", "key", "got"),
    [
        ({"channel": 0}, "mesh.channel", "0"),
        ({"channel": -2}, "mesh.channel", "-2"),
        ({"channel": 1.5}, "mesh.channel", "1.5"),
        ({"channel": "2"}, "mesh.channel", "'2'"),
        ({"channel": True}, "mesh.channel", "True"),
        ({"data": 0}, "mesh.data", "0"),
        ({"layer": 1.5}, "mesh.layer", "1.5"),
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


def test_ranks_are_numbered_by_stage_replica_and_owner() -> None:
    """Every rank has one place; neighbours in rank are owners that wait for each other, then replicas."""
    mesh = MeshConfig(data=2, layer=3, channel=4)
    places = [mesh.place(rank) for rank in range(mesh.world_size)]
    assert places == [Place(replica, stage, owner) for stage in range(3) for replica in range(2) for owner in range(4)]
    assert [mesh.rank(place) for place in places] == list(range(24))
    assert mesh.ranks(replica=1, stage=2) == (20, 21, 22, 23)
    assert mesh.ranks(stage=0, owner=1) == (1, 5)
    assert mesh.ranks(stage=1) == (8, 9, 10, 11, 12, 13, 14, 15)  # by replica, then owner


def fits(config: RunConfig, images: int | None = None) -> str | None:
    """What is wrong with its mesh, if anything."""
    try:
        config.mesh.check(config.model, images)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("mesh", "images", "expected"),
    [
        ({"channel": 10, "layer": 2, "data": 20}, None, None),  # the most of each
        ({"channel": 11}, None, "mesh.channel: expected at most 10, the out_channels of model.layers.0, got 11"),
        (  # replicas can take the place of shards, where that is as many ranks
            {"channel": 20, "layer": 2},
            None,
            "mesh.channel: expected at most 10, the out_channels of model.layers.0, got 20; "
            "the nearest mesh that fits is data 2 × layer 2 × channel 10",
        ),
        (
            {"channel": 12, "data": 2, "layer": 3},
            None,
            "mesh.layer: expected at most 2, the number of layers, got 3; "
            "the nearest mesh that fits is data 4 × layer 2 × channel 6",
        ),
        (
            {"data": 21},
            None,
            "mesh.data: expected at most 20, the images of a batch of model.layers.0, got 21; "
            "the nearest mesh that fits is data 20 × layer 1 × channel 1",
        ),
        (
            {"data": 9, "channel": 2},
            8,
            "mesh.data: expected at most 8, the images of a batch of model.layers.0, got 9; "
            "the nearest mesh that fits is data 8 × layer 1 × channel 2",
        ),
    ],
)
def test_what_does_not_fit_is_named_by_axis_and_layer(
    digits_config: Callable[..., RunConfig], mesh: dict[str, int], images: int | None, expected: str | None
) -> None:
    model = digits_config().model.model_dump(mode="json") | {"schedule": "together"}
    model["layers"][1]["train"] = model["layers"][0]["train"]  # they learn from the same batches
    found = fits(digits_config(mesh=mesh, model=model), images)
    assert found is None if expected is None else str(found).startswith(expected)
    assert "\n" not in str(found)


def test_stages_need_layers_that_learn_together(digits_config: Callable[..., RunConfig]) -> None:
    assert fits(digits_config(mesh={"layer": 2, "channel": 2})) == (
        "mesh.layer: expected at most 1, as layers learn one after the other (model.schedule: greedy), got 2; "
        "the nearest mesh that fits is data 1 × layer 1 × channel 2"
    )


def test_a_solver_of_all_channels_takes_no_shards(digits_config: Callable[..., RunConfig]) -> None:
    values = digits_config(2).model_dump(mode="json")
    dynamics = values["model"]["layers"][1]["dynamics"] | {"solver": "coordinate_descent"}
    values["model"]["layers"][1]["dynamics"] = dynamics
    config = parse(RunConfig, values)
    assert str(fits(config)).startswith(
        "model.layers.1.dynamics.solver: expected auto or accelerated with mesh.channel=2"
    )
    values["mesh"] = {"data": 2}
    assert fits(parse(RunConfig, values)) is None  # every replica has all channels


def test_a_group_shrinks_along_its_shards_only(digits_config: Callable[..., RunConfig]) -> None:
    config = digits_config(2, cluster={"min_shards": 1})
    config.check_mesh()
    for axis in ("data", "layer"):
        other = config.model_copy(update={"mesh": config.mesh.model_copy(update={axis: 2})})
        with pytest.raises(ConfigError, match=f"^(cluster.min_shards|mesh.{axis}): expected"):
            other.check_mesh()


def test_more_shards_than_channels_are_refused_with_all_sizes(digits_config: Callable[..., RunConfig]) -> None:
    config = digits_config(channel=10)
    config.check_mesh()
    assert config.mesh.world_size == 10  # one channel each is the most
    with pytest.raises(ConfigError) as caught:
        digits_config(channel=11).check_mesh()
    message = str(caught.value)
    assert message.startswith("mesh.channel: expected at most 10, the out_channels of model.layers.0, got 11")


def test_the_narrowest_layer_decides(digits_config: Callable[..., RunConfig]) -> None:
    values = digits_config(channel=5).model_dump(mode="json")
    values["model"]["layers"][1]["out_channels"] = 4
    with pytest.raises(ConfigError, match=r"at most 4, the out_channels of model\.layers\.1, got 5"):
        parse(RunConfig, values).check_mesh()
