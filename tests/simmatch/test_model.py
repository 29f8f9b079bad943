"""The stack: its own forward by hand, its file, its refusals, its export."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

import simmatch
from simmatch.config import ConfigError, DynamicsConfig, LayerConfig, ModelConfig, parse
from simmatch.data.sources import Dataset, to_unit
from simmatch.model import InputConfig, Outputs, Stack, layer_inputs, load_model, save_model

SOURCE = InputConfig(in_channels=1, height=8, width=8, num_classes=10)
ENCODING = DynamicsConfig(encode_iterations=12)


def model_config(features: str = "last") -> ModelConfig:
    first = LayerConfig(
        out_channels=6, kernel_size=3, padding=1, normalize="contrast", whiten=True, pool=4, dynamics=ENCODING
    )
    second = LayerConfig(
        out_channels=9, kernel_size="full", whiten=True, supervised=True, label_gain=5.0, dynamics=ENCODING
    )
    return ModelConfig(layers=(first, second), features=features)


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> Stack:
    stack = Stack(model_config(), SOURCE, seed=3)
    images = to_unit(digits.train_images[:200])
    for index in range(2):
        x = stack.below(images, index)
        for start in range(0, 200, 40):
            labels = digits.train_labels[start : start + 40] if index == 1 else None
            stack.layer(index).partial_fit(x[start : start + 40], labels)
    return stack.eval()


def test_outputs_are_the_layers_by_hand(trained: Stack, digits: Dataset) -> None:
    x = to_unit(digits.test_images[:7])
    first, second = trained.layer(0), trained.layer(1)
    pooled = F.avg_pool2d(first(x), 2)  # 8 × 8 to 4 × 4
    activities = second(pooled)
    # means over 2 × 2 windows by another routine: a rounding or two
    torch.testing.assert_close(trained(x), activities, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained.features(x), activities.flatten(1), rtol=1e-5, atol=1e-5)
    distance = torch.cdist(activities.flatten(1), second.label.T)
    # scores differ from −½ distance² by a constant per row: same order, same winner
    assert torch.equal(trained.decode(x).argmax(dim=1), distance.argmin(dim=1))


def test_pooled_activities_are_raised_to_the_configured_power(trained: Stack, digits: Dataset) -> None:
    """For the layer above, for readouts and in the exported graph."""
    first, second = trained.config.layers
    config = ModelConfig(layers=(first.model_copy(update={"power": 0.5}), second), features="all")
    rooted = Stack(config, SOURCE)
    rooted.load_state_dict(trained.state_dict())
    x = to_unit(digits.test_images[:5])
    roots = F.avg_pool2d(rooted.layer(0)(x), 2).sqrt()
    torch.testing.assert_close(rooted.below(x, 1), roots, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rooted(x), rooted.layer(1)(roots), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rooted.features(x)[:, : roots[0].numel()], roots.flatten(1), rtol=1e-5, atol=1e-5)
    graph = torch.export.export(Outputs(rooted.eval()), (x,)).module()
    torch.testing.assert_close(graph(x)["features"], rooted.features(x), rtol=1e-4, atol=1e-4)


def test_a_readout_may_see_smaller_maps_than_the_layer_above(trained: Stack, digits: Dataset) -> None:
    first, second = trained.config.layers
    for power in (1.0, 0.5):
        layers = (first.model_copy(update={"power": power}), second)
        stack = Stack(ModelConfig(layers=layers, features="all", feature_pool=2), SOURCE)
        stack.load_state_dict(trained.state_dict())
        x = to_unit(digits.test_images[:5])
        small = F.avg_pool2d(stack.layer(0)(x), 4).pow(power).flatten(1)  # 8 × 8 to 2 × 2
        expected = torch.cat([small, stack(x).flatten(1)], dim=1)  # the dense layer's 1 × 1 is smaller already
        torch.testing.assert_close(stack.features(x), expected, rtol=1e-4, atol=1e-5)


def test_all_features_stand_side_by_side(trained: Stack, digits: Dataset) -> None:
    both = Stack(model_config("all"), SOURCE)
    both.load_state_dict(trained.state_dict())
    x = to_unit(digits.test_images[:5])
    expected = torch.cat([F.avg_pool2d(trained.layer(0)(x), 2).flatten(1), trained.features(x)], dim=1)
    torch.testing.assert_close(both.features(x), expected, rtol=1e-5, atol=1e-5)


def test_unsupervised_features_are_those_of_the_layers_without_labels(trained: Stack, digits: Dataset) -> None:
    first = Stack(model_config("unsupervised"), SOURCE)
    first.load_state_dict(trained.state_dict())
    x = to_unit(digits.test_images[:5])
    expected = F.avg_pool2d(trained.layer(0)(x), 2).flatten(1)
    torch.testing.assert_close(first.features(x), expected, rtol=1e-5, atol=1e-5)
    layers = [{"out_channels": 3, "kernel_size": 2, "supervised": True}]
    with pytest.raises(ConfigError, match="expected a layer without labels"):
        parse(ModelConfig, {"layers": layers, "features": "unsupervised"})


def test_a_saved_model_is_the_same_model(trained: Stack, digits: Dataset, tmp_path: Path) -> None:
    save_model(trained, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    names = {"feedforward", "lateral", "label", "whitening", "whitening_mean"}
    assert set(tensors) == {f"layers.{index}.{name}" for index in (0, 1) for name in names}
    loaded = simmatch.load_model(tmp_path / "model")
    x = to_unit(digits.test_images[:11])
    original = copy.deepcopy(trained)
    for index in (0, 1):
        original.layer(index).recertify()  # the file leaves out what was known of λmax(M)
    for name in ("features", "decode"):
        assert torch.equal(getattr(loaded, name)(x), getattr(original, name)(x))
    assert not loaded.training


def test_the_exported_graph_equals_the_model_at_any_batch(trained: Stack, digits: Dataset) -> None:
    example = to_unit(digits.test_images[:3])
    program = torch.export.export(Outputs(trained), (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    for batch in (1, 2, 5):
        x = to_unit(digits.test_images[:batch])
        exported = program.module()(x)
        assert set(exported) == {"features", "scores"}
        for name, value in trained.outputs(x).items():
            # float32, 12 iterations per layer summed in another order; V is a few units long
            torch.testing.assert_close(exported[name], value, rtol=1e-4, atol=1e-4)


def test_the_folder_of_a_run_is_told_from_that_of_its_model(trained: Stack, tmp_path: Path) -> None:
    save_model(trained, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("name: run\n")
    with pytest.raises(ConfigError, match=r"run: expected the folder of a model, got that of a run; .*run/model$"):
        load_model(tmp_path / "run")


def test_decode_needs_labels() -> None:
    stack = Stack(ModelConfig(layers=(LayerConfig(out_channels=4, kernel_size=3),)), SOURCE)
    with pytest.raises(ValueError, match="expected a supervised last layer"):
        stack.decode(torch.rand(1, 1, 8, 8))


def test_inputs_of_every_layer_are_known_beforehand(trained: Stack) -> None:
    assert layer_inputs(trained.config, SOURCE) == [(1, (8, 8)), (6, (4, 4))]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerConfig(out_channels=4, kernel_size=9), r"model.layers.0.kernel_size: expected at most 8.*got 9"),
        (LayerConfig(out_channels=4, kernel_size=3, pool=7), r"model.layers.0.pool: expected at most 6.*got 7"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(layer: LayerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_inputs(ModelConfig(layers=(layer,)), SOURCE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("layers.1.label"), r"layers.1.label: expected a tensor of shape.*got nothing"),
        (lambda tensors: tensors.update({"layers.0.lateral": torch.eye(5)}), r"layers.0.lateral: .*\[6, 6\], got"),
        (lambda tensors: tensors["layers.0.lateral"].fill_(torch.nan), r"layers.0.lateral: expected finite values"),
        (lambda tensors: tensors["layers.0.lateral"][0, 1].add_(1.0), r"layers.0.lateral: expected a symmetric matrix"),
        (lambda tensors: tensors["layers.1.lateral"].sub_(9.0), r"layers.1.lateral: expected a positive diagonal"),
        (lambda tensors: tensors["layers.0.lateral"].fill_(9).fill_diagonal_(1), r"layers.0.lateral: .*semidefinite"),
    ],
)
def test_a_damaged_model_is_refused(trained: Stack, tmp_path: Path, damage: object, message: str) -> None:
    save_model(trained, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)  # type: ignore[operator]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


def test_an_unknown_key_of_a_models_configuration_is_named(trained: Stack, tmp_path: Path) -> None:
    save_model(trained, tmp_path)
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    values["model"]["layers"][0]["kernel"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"model.layers.0.kernel: unknown key.*did you mean 'kernel_size'"):
        load_model(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path)
