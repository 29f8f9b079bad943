"""1-D layers: against torch's conv1d, against a loop in plain Python, and against the 2-D layer on maps of height 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simmatch import (
    ConfigError,
    DynamicsConfig,
    LayerConfig,
    ModelConfig,
    PlasticityConfig,
    SimilarityMatchingConv1d,
    SimilarityMatchingConv2d,
    feedforward_encoder,
    fit_stack,
    load_model,
    save_model,
)
from simmatch.config import TrainConfig, parse
from simmatch.model import InputConfig, layer_inputs
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import split_rows
from tests.exchanges import meshes, results, run_meshes

EXACT = DynamicsConfig(tolerance=1e-9, max_iterations=20_000)


def signals(count: int = 6, channels: int = 2, samples: int = 40) -> Tensor:
    """Signals with structure in time, float64."""
    time = torch.arange(samples, dtype=torch.float64)
    phase = torch.rand(count, channels, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 6
    return 0.5 + 0.3 * torch.sin(time / 3 + phase) + 0.1 * torch.sin(time * phase)


def layer_of(**options: object) -> SimilarityMatchingConv1d:
    defaults = {"stride": 3, "dynamics": EXACT, "dtype": torch.float64, "seed": 5}
    return SimilarityMatchingConv1d(2, 4, 7, **(defaults | options))  # type: ignore[arg-type]


def test_the_drive_is_torchs_conv1d() -> None:
    layer, x = layer_of(padding=2), signals()
    expected = F.conv1d(x, layer.feedforward[:, :, 0], stride=3, padding=2)
    drive = layer.drive(x).view(4, 6, -1).transpose(0, 1)
    torch.testing.assert_close(drive, expected, rtol=0, atol=1e-12)  # sums of 14 products near 1
    assert layer(x).shape == expected.shape == layer.solve(x).y.shape


def test_a_step_is_that_of_a_loop_over_windows() -> None:
    """ΔW = η (⟨y xᵀ⟩ − W), ΔM = (η/τ)(⟨y yᵀ⟩ − M): means over windows that numpy cuts, one after the other."""
    layer, x = layer_of(plasticity=PlasticityConfig(lr=0.3, tau=0.7)), signals()
    before, lateral = layer.feedforward.flatten(1).numpy().copy(), layer.lateral.numpy().copy()
    y = layer.solve(x).y
    windows = np.lib.stride_tricks.sliding_window_view(x.numpy(), 7, axis=2)[:, :, ::3]  # [B, C, T', k]
    yx, yy, count = np.zeros_like(before), np.zeros_like(lateral), 0
    for signal in range(windows.shape[0]):
        for place in range(windows.shape[2]):
            code = y[signal, :, place].numpy()
            yx += np.outer(code, windows[signal, :, place].ravel())
            yy += np.outer(code, code)
            count += 1
    layer.partial_fit(x)
    np.testing.assert_allclose(layer.feedforward.flatten(1), before + 0.3 * (yx / count - before), atol=1e-10)
    np.testing.assert_allclose(layer.lateral, lateral + 0.3 / 0.7 * (yy / count - lateral), atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 3, "normalize": "contrast"}, {"whiten": True, "normalize": "contrast"}, {"num_classes": 3}],
    ids=str,
)
def test_it_is_the_2d_layer_on_maps_of_height_1(options: dict[str, object]) -> None:
    """The same bits after ten updates, at drawn positions too; and state that each loads from the other."""
    flat, x = layer_of(**options), signals()
    shaped = {"stride": (1, 3), "dynamics": EXACT, "dtype": torch.float64, "seed": 5} | options
    if "padding" in options:
        shaped["padding"] = (0, options["padding"])
    maps = SimilarityMatchingConv2d(2, 4, (1, 7), **shaped)  # type: ignore[arg-type]
    labels = torch.arange(6) % 3 if "num_classes" in options else None
    for layer, images in ((flat, x), (maps, x.unsqueeze(2))):
        layer.calibrate(images)
        for update in range(10):
            layer.partial_fit(layer.prepare(images, 5 if update % 2 else None), labels)
    state = maps.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in flat.state_dict().items())
    assert torch.equal(flat(x), maps(x.unsqueeze(2)).squeeze(2))
    other = layer_of(**options | {"seed": 9})
    other.load_state_dict(state)
    assert torch.equal(other(x), flat(x))


def test_statistics_update_and_encoder_take_signals() -> None:
    layer, twin, x = layer_of(), layer_of(), signals()
    layer.partial_fit(x)
    twin.update(twin.statistics(x, twin.solve(x).y))
    torch.testing.assert_close(layer.feedforward, twin.feedforward, rtol=0, atol=1e-9)
    encoder = feedforward_encoder(layer, x)
    expected = encoder.weight[:, :, 0], encoder.bias
    by_torch = F.conv1d(x, *expected, stride=3).clamp(min=0)
    torch.testing.assert_close(encoder(layer.as_images(x)).squeeze(2), by_torch, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exchange", ["every_iteration", "block", "gather_state"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_learn_what_one_does(exchange: str, ranks: int) -> None:
    dynamics = DynamicsConfig(tolerance=1e-10, max_iterations=20_000, exchange=exchange)  # type: ignore[arg-type]
    x, one = signals(), layer_of(dynamics=dynamics, normalize="contrast")
    for _ in range(3):
        one.partial_fit(x)

    def learn(mesh: Mesh) -> SimilarityMatchingConv1d:
        rows = split_rows(4, ranks)[mesh.owners.rank]
        layer = layer_of(dynamics=dynamics, normalize="contrast", mesh=mesh, rows=rows)
        for _ in range(3):
            layer.partial_fit(x)
        return layer

    shards = results(run_meshes(meshes(owners=ranks), learn))
    together = torch.cat([shard.feedforward for shard in shards])
    # codes to a residual of 1e-10, times a condition of M below 1e3
    torch.testing.assert_close(together, one.feedforward, rtol=0, atol=1e-7)


def test_a_stack_of_signals_is_saved_and_loaded(tmp_path: Path) -> None:
    first = LayerConfig(
        out_channels=8, kernel_size=(1, 9), stride=(1, 2), padding=(0, 4), pool=(1, 5), train=TrainConfig(batch_size=10)
    )
    last = LayerConfig(out_channels=6, kernel_size="full", whiten=True, supervised=True, label_gain=10.0)
    model = ModelConfig(layers=(first, last), features="all", feature_pool=3)
    x, labels = signals(30).float().unsqueeze(2), torch.arange(30) % 3
    stack = fit_stack(model, x, labels)
    assert stack(x).shape == (30, 6, 1, 1)
    assert stack.features(x).shape == (30, 8 * 3 + 6)
    assert stack.decode(x).shape == (30, 3)
    means = F.adaptive_avg_pool1d(stack.layer(0)(x).squeeze(2), 5)
    torch.testing.assert_close(stack.below(x, 1).squeeze(2), means)
    save_model(stack, tmp_path)
    assert torch.equal(load_model(tmp_path).features(x), stack.features(x))


SIGNAL = InputConfig(in_channels=1, height=1, width=64, num_classes=2)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"kernel_size": 8}, r"kernel_size: expected at most 1 for images of 1 × 64 .*got 8; \[1, 8\] for signals$"),
        ({"kernel_size": (1, 65)}, r"kernel_size: expected at most 1 × 64 for images of 1 × 64 .*got 1 × 65$"),
        ({"kernel_size": (1, 8), "pool": 4}, r"pool: expected at most 1, .*got 4 × 4; \[1, 4\] for signals$"),
        ({"kernel_size": (1, 8), "pool": (1, 58)}, r"pool: expected at most 1 × 57, .*got 1 × 58$"),
        ({"kernel_size": (1, 8), "padding": 2}, r"padding: expected \[0, 2\] for signals, got 2$"),
    ],
)
def test_a_configuration_for_images_is_told_how_signals_are_written(layer: dict[str, object], message: str) -> None:
    model = ModelConfig.model_validate({"layers": [{"out_channels": 4, **layer}]})
    with pytest.raises(ConfigError, match=r"^model.layers.0." + message):
        layer_inputs(model, SIGNAL)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 0], r"expected \[height, width\] of at least 1 each, got \[1, 0\]"),
        ([1, 2, 3], r"expected \[height, width\] of at least 1 each, got \[1, 2, 3\]"),
        ("whole", r"expected an integer or \[height, width\] or 'full', got 'whole'"),
        (True, r"expected an integer or \[height, width\] or 'full', got True"),
    ],
)
def test_a_wrong_kernel_is_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerConfig.model_validate({"out_channels": 4, "kernel_size": value})


@pytest.mark.parametrize("value", ["half", None])
def test_a_wrong_layer_is_one_fault(value: object) -> None:
    """pydantic adds that the list of layers is too short without it."""
    with pytest.raises(ConfigError) as caught:
        parse(ModelConfig, {"layers": [{"out_channels": 4, "kernel_size": value}]})
    expected = "expected an integer or [height, width] or 'full'"
    assert str(caught.value) == f"layers.0.kernel_size: {expected}, got {value!r}"


def test_shapes_that_are_no_signals_are_refused() -> None:
    layer = layer_of()
    with pytest.raises(ValueError, match=r"^signals: expected \[B, 2, T\], got \[2, 40\]$"):
        layer(torch.zeros(2, 40, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^images: expected \[B, 2, H, W\], got \[6, 3, 1, 40\]$"):
        layer(torch.zeros(6, 3, 40, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^kernel_size: expected \(1, k\) with padding \(0, n\), got "):
        SimilarityMatchingConv1d(1, 4, (2, 3))
