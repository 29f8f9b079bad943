"""The layer: what it refuses, what its parts add up to, and shards of it against the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch.config import DynamicsConfig, LayerConfig, PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.labels import UNLABELLED
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import split_rows
from tests.exchanges import ThreadExchange, results, run_owners
from tests.reference import nnls_columns, normalised, patch_matrix, random_lateral

BUFFERS = ("feedforward", "lateral", "label", "class_frequency", "perron")


def batches(digits: Dataset, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of float64 images in [0, 1] with their labels."""
    images = to_unit(digits.train_images[: count * size], torch.float64)
    labels = digits.train_labels[: count * size]
    return [(images[start : start + size], labels[start : start + size]) for start in range(0, count * size, size)]


def of_all(shards: list[SimilarityMatchingConv2d], name: str) -> Tensor:
    """A buffer that is split over the owners, whole again."""
    return torch.cat([shard.get_buffer(name) for shard in shards])


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4, 3), {}, "in_channels: expected greater than 0, got 0"),
        ((1, -4, 3), {}, "out_channels: expected greater than 0, got -4"),
        ((1, 4, 2.5), {}, r"kernel_size: expected an integer or \[height, width\], got 2\.5"),
        ((1, 4, 3), {"stride": 0}, "stride: expected greater than 0, got 0"),
        ((1, 4, 3), {"padding": -1}, "padding: expected greater than or equal to 0, got -1"),
        ((1, 4, 3), {"num_classes": -1}, "num_classes: expected greater than or equal to 0, got -1"),
        (
            (1, 4, 3),
            {"num_classes": 2, "label_gain": -0.5},
            r"label_gain: expected greater than or equal to 0, got -0\.5",
        ),
        ((1, 4, 3), {"num_classes": 2, "label_gain": float("nan")}, "label_gain: expected a finite.*got nan"),
        ((1, 4, 3), {"label_gain": 0.5}, r"num_classes: expected at least 1 with label_gain=0\.5, got 0"),
        ((1, 4, 3), {"normalize": "l2"}, "normalize: expected 'none' or 'contrast', got 'l2'"),
    ],
)
def test_the_constructor_names_what_it_refuses(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SimilarityMatchingConv2d(*arguments, **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.4, "tau": 0.3}, "expected lr / tau at most 1, got lr=0.4 with tau=0.3"),
        ({"lr": 0.0}, "greater than 0"),
        ({"dead_after": 0}, "greater than 0"),
    ],
)
def test_rates_that_break_the_lateral_matrix_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlasticityConfig(**values)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 8, 8), (8, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    layer = SimilarityMatchingConv2d(1, 4, 3)
    for method in (layer, layer.solve, layer.partial_fit):
        with pytest.raises(ValueError, match=r"images: expected \[B, 1, H, W\], got \["):
            method(torch.zeros(shape))


@pytest.mark.parametrize("worst", [3, -2, 255])
@pytest.mark.parametrize("label_gain", [0.0, 0.5])
def test_labels_out_of_range_are_named_and_change_nothing(worst: int, label_gain: float) -> None:
    layer = SimilarityMatchingConv2d(1, 4, 3, num_classes=3, label_gain=label_gain)
    images, labels = torch.rand(4, 1, 5, 5), torch.tensor([0, 1, worst, 2])
    message = f"labels: expected classes 0 … 2 or {UNLABELLED}, got {worst}"
    before = [layer.get_buffer(name).clone() for name in BUFFERS]
    with pytest.raises(ValueError, match=message):
        layer.statistics(images, layer(images), labels)
    # while learning it is a fault of this owner, which all owners raise: the reason is its cause
    with pytest.raises((ValueError, SharedFault)) as caught:
        layer.partial_fit(images, labels)
    assert message in f"{caught.value} {caught.value.__cause__}"
    for name, value in zip(BUFFERS, before, strict=True):
        assert torch.equal(layer.get_buffer(name), value)
    assert layer.updates == 0


def test_patches_of_another_layer_are_refused() -> None:
    """Equal shapes, another normalisation or whitening: silently wrong numbers otherwise."""
    images = torch.rand(4, 1, 6, 6)
    plain, contrast = SimilarityMatchingConv2d(1, 4, 3), SimilarityMatchingConv2d(1, 4, 3, normalize="contrast")
    white, other = (SimilarityMatchingConv2d(1, 4, 3, whiten=True) for _ in range(2))
    for layer, stranger in ((plain, contrast), (contrast, plain), (white, other), (white, plain), (plain, white)):
        patches = stranger.prepare(images)
        for call in (layer, layer.solve, layer.partial_fit, layer.drive):
            with pytest.raises(
                ValueError, match=r"^patches: expected patches prepared by this layer, with PatchConfig"
            ):
                call(patches)
        assert layer.updates == 0
    white.calibrate(images)
    white.partial_fit(white.prepare(images))


def test_a_parent_applies_a_function_to_its_layers() -> None:
    """`torch.nn.Module.apply` calls the layers' own: nothing of theirs may stand in its way."""
    layer = SimilarityMatchingConv2d(1, 4, 3)
    visited: list[torch.nn.Module] = []
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.Sequential(layer, torch.nn.ReLU()))
    assert network.apply(visited.append) is network
    assert layer in visited
    assert layer.apply(lambda module: module.eval()) is layer
    assert not layer.training


def test_a_layer_is_built_from_its_configuration() -> None:
    """As by the constructor, argument by argument; a layer that is not supervised has no classes."""
    options: dict[str, Any] = {
        "stride": 2,
        "padding": 1,
        "normalize": "contrast",
        "contrast_floor": 0.2,
        "whiten": True,
        "whiten_ridge": 0.3,
        "label_gain": 0.7,
        "dynamics": DynamicsConfig(tolerance=0.5),
        "plasticity": PlasticityConfig(lr=0.05),
    }
    config = LayerConfig(out_channels=5, kernel_size=3, supervised=True, **options)
    layer = SimilarityMatchingConv2d.from_config(config, 2, (9, 8), num_classes=4, seed=3, dtype=torch.float64)
    expected = SimilarityMatchingConv2d(2, 5, 3, num_classes=4, seed=3, dtype=torch.float64, **options)
    assert layer.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in layer.state_dict().items())
    for name in ("patch", "dynamics", "plasticity", "label_gain", "whiten_ridge", "num_classes", "seed"):
        assert getattr(layer, name) == getattr(expected, name)
    dense = LayerConfig(out_channels=5, kernel_size="full")
    assert SimilarityMatchingConv2d.from_config(dense, 2, (7, 7), num_classes=4).label.shape == (5, 0)
    assert SimilarityMatchingConv2d.from_config(dense, 2, (7, 7)).patch.kernel_size == 7
    assert SimilarityMatchingConv2d.from_config(dense, 2, (7, 8)).feedforward.shape == (5, 2, 7, 8)
    with pytest.raises(
        ValueError, match=r"^kernel_size: expected at most 2 for images of 2 × 2 with padding 0, got 3$"
    ):
        SimilarityMatchingConv2d.from_config(LayerConfig(out_channels=5, kernel_size=3), 2, (2, 2))


def test_a_bound_is_read_only_where_it_is_that_of_m() -> None:
    layer = SimilarityMatchingConv2d(1, 4, 3)
    with pytest.raises(RuntimeError, match=r"call certify\(\) or recertify\(\) on all owners"):
        _ = layer.bound
    layer(torch.rand(2, 1, 5, 5))
    before = layer.bound.value
    layer.lateral.mul_(3.0)
    with pytest.raises(RuntimeError, match="lateral: expected the rows for which the bound was last certified"):
        _ = layer.bound
    layer.certify()
    assert layer.bound.value == pytest.approx(3 * before, rel=1e-5)
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="no bound yet"):
        _ = layer.bound


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_activities_solve_the_problem_of_the_explicit_patches(digits: Dataset) -> None:
    """From images to activities against a patch matrix and NNLS, label drive included."""
    (images, labels), (probe, probe_labels) = batches(digits, 2, 12)
    layer = SimilarityMatchingConv2d(
        1,
        6,
        3,
        stride=2,
        padding=1,
        num_classes=10,
        label_gain=0.7,
        normalize="contrast",
        dynamics=DynamicsConfig(tolerance=1e-12, max_iterations=20_000, ridge=0),
        dtype=torch.float64,
    )
    layer.partial_fit(images, labels)
    patches = normalised(patch_matrix(images, 3, 2, 1), 0.1)
    power = patches.square().sum(dim=1).mean()  # calibrated on the first batch
    alpha = 0.7 * power / 9  # label_gain · tr C_x / P
    columns = layer.feedforward.flatten(1) @ normalised(patch_matrix(probe, 3, 2, 1), 0.1).T
    columns = columns + alpha * layer.label[:, probe_labels].repeat_interleave(16, dim=1)
    solution = layer.solve(probe, probe_labels)
    expected = nnls_columns(columns, layer.lateral).reshape(6, 12, 4, 4).transpose(0, 1)
    assert solution.residual.shape == (12, 4, 4)
    # M after one update is 0.8 I + 0.2 ⟨y yᵀ⟩: its condition is below 100
    torch.testing.assert_close(solution.y, expected, rtol=1e-8, atol=1e-8)


def test_partial_fit_is_solve_statistics_apply(digits: Dataset) -> None:
    options = {"stride": 2, "num_classes": 10, "label_gain": 0.5, "dtype": torch.float64}
    whole, parts = (SimilarityMatchingConv2d(1, 7, 3, **options) for _ in range(2))
    for images, labels in batches(digits, 5, 8):
        if not parts.calibrated:
            parts.calibrate(images)
        solution = whole.partial_fit(images, labels)
        y = parts.solve(images, labels)
        assert torch.equal(solution.y, y.y.transpose(0, 1).flatten(1))
        parts.update(parts.statistics(images, y.y, labels))
        for name in (*BUFFERS, "updates", "silent"):
            assert torch.equal(whole.get_buffer(name), parts.get_buffer(name))
    assert whole.updates == 5


def test_forward_is_label_free_with_fixed_iterations(digits: Dataset) -> None:
    """What the next layer sees: the activities after `encode_iterations`, whatever the settings of learning."""
    ((images, labels),) = batches(digits, 1, 10)
    lateral = random_lateral(7, 8, condition=1e3, largest=4.0)  # 25 iterations do not solve this
    layers = []
    for gain, tolerance, limit in ((0.5, 1e-1, 9), (0.0, 0.0, 25)):
        settings = DynamicsConfig(solver="accelerated", tolerance=tolerance, encode_iterations=25, max_iterations=limit)
        layer = SimilarityMatchingConv2d(
            1, 7, 3, num_classes=10, label_gain=gain, dynamics=settings, dtype=torch.float64
        )
        layer.lateral.copy_(lateral)
        layer.label.fill_(0.3)
        layer.calibrate(images)
        layers.append(layer)
    learning, fixed = layers
    learnt, expected = learning.solve(images), fixed.solve(images)
    assert expected.num_iters == 25
    assert learnt.num_iters == 9
    assert torch.equal(learning(images), expected.y)
    # the settings and the labels do change what is learnt from
    assert (learnt.y - expected.y).norm() > 1e-2 * expected.y.norm()
    assert (learning.solve(images, labels).y - learnt.y).norm() > 1e-2 * expected.y.norm()


def test_a_loaded_layer_goes_on_as_the_saved_one(digits: Dataset) -> None:
    """Bit by bit: the state determines the next update completely, including the bound of λmax(M)."""
    options = {"num_classes": 10, "label_gain": 0.5, "whiten": True, "dtype": torch.float64}
    options["dynamics"] = DynamicsConfig(solver="accelerated")  # its step is the bound's
    first, *later = batches(digits, 6, 10)
    layer, loaded = (SimilarityMatchingConv2d(1, 7, 4, **options) for _ in range(2))
    layer.partial_fit(*first)
    assert loaded(first[0]).isfinite().all()  # its bound was that of the M before loading
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(first[0]), layer(first[0]))
    for images, labels in later:
        layer.partial_fit(images, labels)
        loaded.partial_fit(images, labels)
    for name in BUFFERS:
        assert torch.equal(loaded.get_buffer(name), layer.get_buffer(name)), name


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [10.0, 255.0])
def test_label_gain_does_not_depend_on_the_units_of_the_input(factor: float, digits: Dataset) -> None:
    """x → c x sends W to c² W and V to c V, as their means do; tr C_x grows by c²: both drives grow by c³."""
    ((images, labels),) = batches(digits, 1, 20)
    # solved far below what is compared: early stops of different bounds would differ by the tolerance
    options = {"num_classes": 10, "label_gain": 0.5, "dtype": torch.float64}
    options["dynamics"] = DynamicsConfig(tolerance=1e-12, max_iterations=5_000)
    plain, scaled = (SimilarityMatchingConv2d(1, 7, 3, **options) for _ in range(2))
    plain.partial_fit(images, labels)
    scaled.calibrate(images * factor)
    for name, power in {"feedforward": 2, "lateral": 2, "label": 1}.items():
        scaled.get_buffer(name).copy_(plain.get_buffer(name) * factor**power)
    scaled.class_frequency.copy_(plain.class_frequency)
    scaled.recertify()
    for given in (None, labels):
        result, expected = scaled.drive(images * factor, given), plain.drive(images, given)
        # a few roundings of float64
        torch.testing.assert_close(result, expected * factor**3, rtol=1e-11, atol=1e-11 * factor**3)
    assert (plain.drive(images, labels) - plain.drive(images)).abs().amax() > 1e-3  # labels do act
    # and so the activities scale, and the next update keeps the relation
    plain.partial_fit(images, labels)
    scaled.partial_fit(images * factor, labels)
    for name, power in {"feedforward": 2, "lateral": 2, "label": 1}.items():
        expected = plain.get_buffer(name) * factor**power
        torch.testing.assert_close(scaled.get_buffer(name), expected, rtol=1e-8, atol=1e-8 * factor**power)


@pytest.mark.parametrize("whiten", [False, True])
def test_calibration_measures_the_input(whiten: bool, digits: Dataset) -> None:
    """tr C_x of the patches as the neurons see them; whitened ones have Σ λ/(λ + ρ)."""
    ((images, _),) = batches(digits, 1, 30)
    layer = SimilarityMatchingConv2d(
        1, 4, 3, padding=1, normalize="contrast", whiten=whiten, whiten_ridge=0.2, dtype=torch.float64
    )
    assert not layer.calibrated
    layer.calibrate(images)
    patches = normalised(patch_matrix(images, 3, 1, 1), 0.1)
    if whiten:
        eigenvalues = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0))
        expected = (eigenvalues / (eigenvalues + 0.2 * eigenvalues.mean())).sum()
    else:
        expected = patches.square().sum(dim=1).mean()
    assert float(layer.input_power) == pytest.approx(float(expected), rel=1e-10)


def test_unlabelled_images_are_as_if_no_label_was_given(digits: Dataset) -> None:
    options = {"num_classes": 10, "label_gain": 0.5, "dtype": torch.float64}
    (first, labels), (images, _) = batches(digits, 2, 10)
    marked, without = (SimilarityMatchingConv2d(1, 7, 3, **options) for _ in range(2))
    for layer in (marked, without):
        layer.partial_fit(first, labels)
    before = marked.label.clone(), marked.class_frequency.clone()
    assert before[0].count_nonzero() > 0
    marked.partial_fit(images, torch.full((10,), UNLABELLED))
    without.partial_fit(images)
    for name in BUFFERS:
        assert torch.equal(marked.get_buffer(name), without.get_buffer(name))
    assert torch.equal(marked.label, before[0])
    assert torch.equal(marked.class_frequency, before[1])


def test_partly_labelled_batch_learns_from_the_labelled_part(digits: Dataset) -> None:
    """V moves towards the mean over the labelled columns, as if there were no others."""
    ((images, labels),) = batches(digits, 1, 12)
    labels = torch.where(torch.arange(12) < 4, 3, UNLABELLED)
    layer = SimilarityMatchingConv2d(1, 7, 3, num_classes=10, dtype=torch.float64)
    y = layer.partial_fit(images, labels).y.reshape(7, 12, 36)
    # p̂ = 1/10 before, p = 4/4: rate min(0.1/0.1, 1) = 1
    torch.testing.assert_close(layer.label[:, 3], y[:, :4].mean(dim=(1, 2)), rtol=1e-12, atol=1e-12)
    assert layer.label[:, [c for c in range(10) if c != 3]].count_nonzero() == 0


# -- several owners ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervised", [False, True])
def test_sharded_learning_equals_a_single_owner(supervised: bool, digits: Dataset) -> None:
    """50 updates of 10 channels on 1, 2 and 3 owners, with channels that die and are revived on the way."""
    work = batches(digits, 50, 4)

    def learn(exchange: ThreadExchange) -> tuple[SimilarityMatchingConv2d, Tensor]:
        layer = SimilarityMatchingConv2d(
            1,
            10,
            4,
            stride=2,
            num_classes=10 if supervised else 0,
            label_gain=0.5 if supervised else 0.0,
            normalize="contrast",
            whiten=supervised,
            dynamics=DynamicsConfig(tolerance=0, max_iterations=12, tile_columns=64),
            plasticity=PlasticityConfig(dead_after=5),
            dtype=torch.float64,
            rows=split_rows(10, exchange.world_size)[exchange.rank],
            mesh=Mesh.of_owners(exchange),
        )
        for update, (images, labels) in enumerate(work):
            if update in (0, 20) and layer.rows.start <= 6 < layer.rows.stop:
                layer.feedforward[6 - layer.rows.start] = 0.0  # no drive: silent without labels
                layer.label[6 - layer.rows.start] = 0.0
            solution = layer.partial_fit(images, labels if supervised else None)
        return layer, solution.y

    ((single, y),) = results(run_owners(1, learn))
    assert single.revived >= 1
    for world_size in (2, 3):
        outcomes = results(run_owners(world_size, learn))
        shards = [layer for layer, _ in outcomes]
        for name in ("feedforward", "lateral", "label", "silent"):
            # rounding of sums split in other blocks, 50 updates of a contracting average: values near 1
            torch.testing.assert_close(of_all(shards, name), single.get_buffer(name), rtol=0, atol=1e-10)
        for shard, (_, own_y) in zip(shards, outcomes, strict=True):
            assert shard.revived == single.revived
            assert shard.dead_channels == single.dead_channels
            torch.testing.assert_close(own_y, y, rtol=0, atol=1e-10)
            assert shard.bound.value == pytest.approx(single.bound.value, rel=1e-10)


@pytest.mark.parametrize("guilty", [0, 2])
@pytest.mark.parametrize("kind", ["labels", "weights"])
def test_a_fault_of_one_owner_while_learning_is_raised_by_all(kind: str, guilty: int, digits: Dataset) -> None:
    """Invalid labels or damaged weights of a single owner: no owner waits forever, and none learns from them."""
    (images, labels), (later, later_labels) = batches(digits, 2, 6)

    def learn(exchange: ThreadExchange) -> None:
        layer = SimilarityMatchingConv2d(
            1,
            10,
            4,
            num_classes=10,
            dtype=torch.float64,
            rows=split_rows(10, 3)[exchange.rank],
            mesh=Mesh.of_owners(exchange),
        )
        layer.partial_fit(images, labels)
        bad = later_labels.clone()
        if exchange.rank == guilty and kind == "labels":
            bad[1] = 77
        elif exchange.rank == guilty:
            layer.lateral[1, 1] = torch.nan
        layer.partial_fit(later, bad)

    outcomes = run_owners(3, learn)
    assert [type(outcome) for outcome in outcomes] == [SharedFault] * 3
    assert [outcome.ranks for outcome in outcomes] == [[guilty]] * 3
    if kind == "labels":
        assert "got 77" in str(outcomes[guilty].__cause__)


# -- CUDA --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", ["none", "contrast"])
def test_learning_on_cuda_equals_cpu(normalize: str, cuda: torch.device, digits: Dataset) -> None:
    """Float64 and fixed iterations, so that only rounding differs; 10 updates."""
    layers = [
        SimilarityMatchingConv2d(
            1,
            10,
            4,
            num_classes=10,
            label_gain=0.5,
            normalize=normalize,
            whiten=True,
            dynamics=DynamicsConfig(tolerance=0, max_iterations=25),
            dtype=torch.float64,
            device=device,
        )
        for device in (torch.device("cpu"), cuda)
    ]
    first = to_unit(digits.train_images[:100], torch.float64)
    for layer in layers:
        layer.calibrate(first.to(layer.lateral.device))
    for images, labels in batches(digits, 10, 8):
        for layer in layers:
            layer.partial_fit(images.to(layer.lateral.device), labels.to(layer.lateral.device))
    for name in BUFFERS:
        expected, moved = (layer.get_buffer(name) for layer in layers)
        assert moved.device.type == "cuda"
        torch.testing.assert_close(moved.cpu(), expected, rtol=1e-8, atol=1e-8)
