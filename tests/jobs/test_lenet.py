"""LeNet-5 against counts by hand, explicit patches and textbook order; its training against closed forms and digits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluation.backprop import (
    CANDIDATES,
    TrainSettings,
    batches,
    candidates,
    compare,
    dropping,
    predict,
    schedule,
    train,
)
from jobs.evaluation.lenet import ContrastConv2d, LeNet, LeNetSizes, initialise
from jobs.evaluation.material import Labelled
from simmatch.data.order import stratified_subset
from simmatch.data.sources import Dataset, to_unit
from simmatch.geometry import explicit, prepare
from simmatch.readout import accuracy
from simmatch.seeding import seeded

SHORT = TrainSettings(lr=4e-3, epochs=10, dropout=0.1)
"""About 16 steps on 50 digits, 400 on all."""


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: values.detach().clone() for name, values in net.named_parameters()}


@pytest.fixture
def few(digits: Dataset) -> Labelled:
    """10 digits per class."""
    found = stratified_subset(digits.train_labels, 10, seed=0)
    return Labelled(to_unit(digits.train_images)[found], digits.train_labels[found])


@pytest.fixture
def held_out(digits: Dataset) -> Labelled:
    last = slice(len(digits.train_labels) - 143, None)
    return Labelled(to_unit(digits.train_images)[last], digits.train_labels[last])


# -- the network -------------------------------------------------------------------------------------------------------


def test_parameters_and_operations_of_the_classic_network() -> None:
    cost = LeNet(1, (28, 28), 10).cost()
    # 6 · 26 + 16 · 151 + 401 · 120 + 121 · 84 + 85 · 10
    assert cost.trained == cost.inference == 61_706
    # 28² positions of 6 × 25, 10² of 16 × 150, dense 400 × 120, 120 × 84, 84 × 10
    assert cost.operations == 117_600 + 240_000 + 48_000 + 10_080 + 840
    frozen = LeNet(1, (28, 28), 10).cost(frozen=True)
    assert (frozen.trained, frozen.inference) == (61_706 - 156 - 2416, 61_706)
    contrast = LeNet(1, (28, 28), 10, contrast=True).cost()
    assert contrast == cost  # normalisation is counted for nobody


@pytest.mark.parametrize("image_size", [(8, 8), (9, 11), (15, 40), (16, 16), (17, 28), (32, 32), (28, 8)])
@pytest.mark.parametrize("contrast", [False, True])
def test_sizes_are_derived(image_size: tuple[int, int], contrast: bool) -> None:
    """Any size, channels and classes; multiply–adds as counted from the sizes that really occur."""
    net = LeNet(3, image_size, 7, channels=(5, 9), contrast=contrast)
    counted = []

    def count(layer: Any, _: Any, out: Tensor) -> None:
        counted.append(out[0].numel() * layer.weight[0].numel())

    for layer in (*net.convolutions, *net.dense):
        layer.register_forward_hook(count)
    assert net(torch.rand(2, 3, *image_size)).shape == (2, 7)
    assert net.cost().operations == sum(counted)


@pytest.mark.parametrize("image_size", [(7, 8), (28, 7), (1, 1)])
def test_images_too_small_are_refused(image_size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"expected at least 8 × 8, got {image_size[0]} × {image_size[1]}"):
        LeNetSizes.of(image_size)


def test_pooling_before_relu_is_the_textbook_network() -> None:
    net, images = LeNet(1, (28, 28), 10, seed=3), torch.rand(4, 1, 28, 28, generator=seeded("images"))
    (one, two), (three, four, five) = net.convolutions, net.dense
    values = F.max_pool2d(F.relu(F.conv2d(images, one.weight, one.bias, padding=2)), 2)  # type: ignore[arg-type]
    values = F.max_pool2d(F.relu(F.conv2d(values, two.weight, two.bias)), 2).flatten(1)  # type: ignore[arg-type]
    expected = five(F.relu(four(F.relu(three(values)))))
    torch.testing.assert_close(net(images), expected)
    torch.testing.assert_close(predict(net, images), expected)


@pytest.mark.parametrize(("channels", "kernel", "padding"), [(1, 5, 2), (3, 3, 1), (2, 4, 0)])
def test_contrast_convolution_is_a_product_with_explicit_patches(channels: int, kernel: int, padding: int) -> None:
    """In float64, values and gradients; images with flat and faint regions, where the floor acts."""
    layer = ContrastConv2d(channels, 4, kernel, padding).double()
    images = torch.rand(3, channels, 9, 8, generator=seeded("images"), dtype=torch.float64)
    images[0] = 0.7
    images[1] *= 0.05
    patches = prepare(images, layer.patch)
    matrix = explicit(patches)
    expected = (matrix @ layer.weight.flatten(1).T + layer.bias).unflatten(0, (3, *patches.map_size)).movedim(-1, 1)
    found = layer(images)
    torch.testing.assert_close(found, expected)
    upstream = torch.rand(found.shape, generator=seeded("upstream"), dtype=torch.float64)
    gradients = [torch.autograd.grad((out * upstream).sum(), list(layer.parameters())) for out in (found, expected)]
    for own, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(own, reference)


def test_contrast_makes_scores_blind_to_brightness_and_contrast() -> None:
    """Without padding's edge: interior activities of a·x + b are those of x, as long as patches exceed the floor."""
    layer = ContrastConv2d(1, 4, 5)
    images = torch.rand(3, 1, 12, 12, generator=seeded("images"))  # deviation 0.29, after halving 0.14
    torch.testing.assert_close(layer(0.5 * images + 0.3), layer(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contrast", [False, True])
def test_initial_weights_depend_on_the_seed_alone(contrast: bool) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        torch.rand(1)  # the global generator has no part in it
        return weights(LeNet(1, (28, 28), 10, channels=(32, 64), contrast=contrast, seed=seed))

    one, again, other = drawn(0), drawn(0), drawn(1)
    for name, values in one.items():
        assert torch.equal(values, again[name])
        if values.ndim > 1:
            assert not torch.equal(values, other[name])
            variance = (1 / 3 if contrast else 2) / values[0].numel()
            assert float(values.var()) == pytest.approx(variance, rel=0.2)


def test_filters_can_be_given() -> None:
    net, source = LeNet(1, (28, 28), 10), LeNet(1, (28, 28), 10, seed=1)
    before = weights(net)
    first, second = [(layer.weight.detach(), layer.bias.detach()) for layer in source.convolutions]
    initialise(net, [first])
    assert torch.equal(net.convolutions[0].weight, first[0])
    assert all(torch.equal(values, before[name]) for name, values in weights(net).items() if "ions.0" not in name)
    initialise(net, [first, second])
    images = torch.rand(2, 1, 28, 28, generator=seeded("images"))
    assert torch.equal(net.features(images), source.features(images))
    assert all(torch.equal(values, before[name]) for name, values in weights(net).items() if "dense" in name)


def test_filters_of_another_shape_are_refused() -> None:
    net = LeNet(1, (28, 28), 10)
    before = weights(net)
    fitting = (torch.zeros(6, 1, 5, 5), torch.zeros(6))
    with pytest.raises(ValueError, match=r"filters.0.weight: expected \[6, 1, 5, 5\], got \[6, 1, 3, 3\]"):
        initialise(net, [(torch.zeros(6, 1, 3, 3), torch.zeros(6))])
    with pytest.raises(ValueError, match=r"filters.1.bias: expected \[16\], got \[6\]"):
        initialise(net, [fitting, (torch.zeros(16, 6, 5, 5), torch.zeros(6))])
    for filters in ([], [fitting] * 3):
        with pytest.raises(ValueError, match=f"of 1 to 2 convolutions, got {len(filters)}"):
            initialise(net, filters)
    assert all(torch.equal(values, before[name]) for name, values in weights(net).items())


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", [False, True])
def test_training_learns_the_digits(digits: Dataset, contrast: bool) -> None:
    net = LeNet(1, (8, 8), 10, contrast=contrast)
    train(net, to_unit(digits.train_images), digits.train_labels, SHORT, seed=0)
    found = accuracy(predict(net, to_unit(digits.test_images)), digits.test_labels)
    assert found > 0.9  # chance is 0.1, a linear classifier reaches 0.95


@pytest.mark.parametrize("frozen", [False, True])
def test_training_repeats_bit_by_bit(few: Labelled, frozen: bool) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        torch.rand(1)
        net = LeNet(1, (8, 8), 10, contrast=True)
        train(net, few.images, few.labels, SHORT, seed, frozen)
        return weights(net)

    one, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(values, again[name]) for name, values in one.items())
    assert not torch.equal(one["dense.2.weight"], other["dense.2.weight"])


def test_frozen_convolutions_stay_and_the_rest_learns_as_it_would(few: Labelled) -> None:
    """Against training of everything whose convolutions are put back after every step: a step at a time."""
    net, reference = LeNet(1, (8, 8), 10), LeNet(1, (8, 8), 10)
    before = weights(net)
    settings = TrainSettings(lr=1e-3, batch_size=100, epochs=1)  # one step, of all images
    for seed in range(3):
        train(net, few.images, few.labels, settings, seed, frozen=True)
        train(reference, few.images, few.labels, settings, seed)
        initialise(reference, [(before[f"convolutions.{i}.weight"], before[f"convolutions.{i}.bias"]) for i in (0, 1)])
    after, expected = weights(net), weights(reference)
    for name, values in after.items():
        if name.startswith("convolutions"):
            assert torch.equal(values, before[name])
        else:
            assert not torch.equal(values, before[name])
            torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-6)


def test_the_first_step_is_adamw(few: Labelled) -> None:
    """In closed form: w (1 − lr · decay) − lr · g / (|g| + 1e-8), biases without decay; steps and rate as said."""
    net, smoothing = LeNet(1, (8, 8), 10), 0.2
    before = weights(net)
    scores = F.log_softmax(net(few.images), dim=1)
    targets = (1 - smoothing) * F.one_hot(few.labels, 10) + smoothing / 10
    loss = -(targets * scores).sum(dim=1).mean()
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    settings = TrainSettings(lr=1e-2, weight_decay=0.5, batch_size=200, epochs=1, label_smoothing=smoothing)
    train(net, few.images, few.labels, settings, seed=0)
    for (name, values), gradient in zip(net.named_parameters(), gradients, strict=True):
        decay = 0.5 if values.ndim > 1 else 0.0
        # signs of gradients near the sums' rounding may differ: leave those out
        clear = gradient.abs() > 1e-6
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(values.detach()[clear], expected[clear], rtol=1e-3, atol=1e-5)


def test_images_need_labels(few: Labelled) -> None:
    net = LeNet(1, (8, 8), 10)
    for images, labels in ((few.images, few.labels[:-1]), (few.images[:0], few.labels[:0])):
        with pytest.raises(ValueError, match=f"got {len(images)} images and {len(labels)} labels"):
            train(net, images, labels, SHORT, seed=0)


def test_every_image_is_seen_once_before_any_is_seen_again() -> None:
    seen = torch.cat(list(batches(10, 4, 10, seeded("batches"))))
    assert len(seen) == 40
    for epoch in seen.split(10):
        assert torch.equal(epoch.sort().values, torch.arange(10))
    assert not torch.equal(seen[:10], seen[10:20])
    assert [len(part) for part in batches(3, 100, 2, seeded("batches"))] == [3, 3]


def test_rate_of_learning() -> None:
    found = [schedule(step, 20) for step in range(20)]
    assert found[:3] == [0.5, 1.0, pytest.approx(0.5 * (1 + math.cos(math.pi / 19)))]
    assert found[1:] == sorted(found[1:], reverse=True)
    assert 0 < found[-1] < 0.01
    assert schedule(0, 1) == 1.0


def test_dropout_keeps_the_mean() -> None:
    found = dropping(0.3, seeded("dropout"))(torch.ones(1000, 100))
    # 100,000 draws: deviation of the share is 0.0014
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(found.unique(), torch.tensor([0.0, 1 / 0.7]))


# -- choosing ----------------------------------------------------------------------------------------------------------


def planted(place: int) -> list[TrainSettings]:
    """Settings that learn nothing, and one that learns."""
    return [SHORT if index == place else dataclasses.replace(SHORT, lr=1e-9) for index in range(4)]


@pytest.mark.parametrize("place", [0, 2])
def test_the_best_settings_are_chosen(few: Labelled, held_out: Labelled, place: int) -> None:
    def make() -> LeNet:
        return LeNet(1, (8, 8), 10)

    found = compare(make, few, held_out, planted(place), seed=0)
    net = make()
    train(net, few.images, few.labels, SHORT, seed=0)
    assert found[place] == accuracy(predict(net, held_out.images), held_out.labels) > 0.5
    untrained = accuracy(predict(make(), held_out.images), held_out.labels)
    assert [value for index, value in enumerate(found) if index != place] == pytest.approx([untrained] * 3, abs=0.02)
    shortened = compare(make, few, held_out, [each.shortened(0.5) for each in planted(place)], seed=0)
    assert max(shortened) == shortened[place] > max(untrained, 0.4)


def test_every_budget_has_four_settings() -> None:
    assert {len(set(settings)) for settings in CANDIDATES.values()} == {4}
    assert {candidates(budget) for budget in (10, 50, 100, 1000, None)} == set(CANDIDATES.values())


def test_steps_of_settings() -> None:
    settings = TrainSettings(lr=1e-3, batch_size=32, epochs=4, least_steps=100)
    assert [settings.steps(images) for images in (10, 100, 3200, 3201)] == [100, 100, 400, 401]
    assert [settings.shortened(0.25).steps(images) for images in (100, 3200)] == [25, 100]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lr", 0.0), ("lr", math.nan), ("weight_decay", -1.0), ("batch_size", 0), ("epochs", math.inf)),
        *(("least_steps", 0), ("dropout", 1.0), ("label_smoothing", -0.1)),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    make: Callable[..., TrainSettings] = TrainSettings
    with pytest.raises(ValueError, match=f"{key}: expected .*, got {value}"):
        make(**({"lr": 1e-3} | {key: value}))
