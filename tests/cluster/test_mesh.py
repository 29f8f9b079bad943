"""The mesh: its size, and messages that name what does not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.config import RunConfig
from cluster.mesh import MeshConfig
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
    config.check_mesh()
    assert config.mesh.world_size == 10  # one channel each is the most
    with pytest.raises(ConfigError) as caught:
        digits_config(channel=11).check_mesh()
    assert str(caught.value) == ("mesh.channel: expected at most 10, the out_channels of model.layers.0, got 11")


def test_the_narrowest_layer_decides(digits_config: Callable[..., RunConfig]) -> None:
    values = digits_config(channel=5).model_dump(mode="json")
    values["model"]["layers"][1]["out_channels"] = 4
    with pytest.raises(ConfigError, match=r"at most 4, the out_channels of model\.layers\.1, got 5"):
        parse(RunConfig, values).check_mesh()
