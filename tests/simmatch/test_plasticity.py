"""The learning rules against pynsm's gradient step, closed forms and what they promise to keep."""

from __future__ import annotations

from dataclasses import replace

import pynsm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.plasticity import Statistics, Weights, class_frequency_change, learning_rate, similarity_matching
from simmatch.sharding.rows import split_rows
from tests.reference import random_lateral

K, CLASSES = 6, 3


def random_statistics(seed: int, columns: int = 40) -> tuple[Statistics, Tensor, Tensor, Tensor]:
    """Statistics of random columns, with the y [K, N], x [P, N] and z [classes, N] they sum over."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(K, columns, generator=generator, dtype=torch.float64).clamp(min=0.0)
    x = torch.randn(4, columns, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, CLASSES, (columns,), generator=generator)  # -1: unlabelled
    z = (labels == torch.arange(CLASSES).unsqueeze(1)).double()
    return Statistics((y @ x.T).reshape(K, 1, 2, 2), y @ y.T, y @ z.T, z @ z.T, columns), y, x, z


def random_weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return Weights(
        torch.randn(K, 1, 2, 2, generator=generator, dtype=torch.float64),
        random_lateral(K, seed),
        torch.rand(K, CLASSES, generator=generator, dtype=torch.float64),
    )


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "tau"), [(0.3, 0.25), (0.05, 0.1)])
def test_one_update_equals_the_authors_gradient_step(rate: float, tau: float) -> None:
    """One step of pynsm 1.0.1 with SGD at rate ρ, through autograd.

    Their loss is, with a mean over K·N entries and regularisers that are divided by K,

        [2 Σ yᵀMy − 4 Σ yᵀWx] / (K N) − ‖M‖²/K + 2 ‖W‖²/K,

    so −ρ ∂/∂W = (4ρ/K)(⟨y xᵀ⟩ − W), and a hook turns M's gradient into −1/τ' of it: ρ/τ' · (2/K)(⟨y yᵀ⟩ − M).
    Ours is η (⟨y xᵀ⟩ − W) and (η/τ)(⟨y yᵀ⟩ − M): η = 4ρ/K and τ = 2τ'.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 2, 6, 7, generator=generator, dtype=torch.float64)
    feedforward = torch.randn(K, 2, 3, 3, generator=generator, dtype=torch.float64) / 3
    lateral = random_lateral(K, 1, condition=20.0, largest=1.5)

    encoder = nn.Conv2d(2, K, 3, bias=False, dtype=torch.float64)
    authors = pynsm.SimilarityMatching(
        encoder=encoder, out_channels=K, tau=tau, iteration_projection=torch.nn.functional.relu, max_iterations=40
    ).double()
    with torch.no_grad():
        encoder.weight.copy_(feedforward)
        authors.competitor.weight.copy_(lateral)
    optimiser = torch.optim.SGD(authors.parameters(), lr=rate)
    y = authors(images)
    optimiser.zero_grad()
    authors.loss(images, y).backward()
    optimiser.step()

    layer = SimilarityMatchingConv2d(
        2,
        K,
        3,
        dynamics=DynamicsConfig(solver="projected_gradient", step=1.0, tolerance=0, max_iterations=40, ridge=0),
        plasticity=PlasticityConfig(lr=4 * rate / K, tau=2 * tau),
        dtype=torch.float64,
    )
    layer.feedforward.copy_(feedforward)
    layer.lateral.copy_(lateral)
    layer.recertify()
    solution = layer.partial_fit(images)
    torch.testing.assert_close(solution.y, y.transpose(0, 1).flatten(1), rtol=1e-11, atol=1e-11)
    assert (encoder.weight - feedforward).abs().amax() > 1e-3  # something was learnt
    # the same sums in another order, float64
    torch.testing.assert_close(layer.feedforward, encoder.weight.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.lateral, authors.competitor.weight.detach(), rtol=1e-11, atol=1e-11)


def test_changes_equal_the_formulas_written_with_columns() -> None:
    statistics, y, x, z = random_statistics(2)
    weights = random_weights(3)
    frequency = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    config = PlasticityConfig(lr=0.2, tau=0.4)
    change = similarity_matching(weights, statistics, frequency, 0.2, config)
    columns, labelled = y.shape[1], int(z.sum())
    assert 0 < labelled < columns
    hebbian = sum(torch.outer(y[:, n], x[:, n]) for n in range(columns)) / columns
    lateral = sum(torch.outer(y[:, n], y[:, n]) for n in range(columns)) / columns
    label = sum(torch.outer(y[:, n] - weights.label @ z[:, n], z[:, n]) for n in range(columns)) / labelled
    present = z.sum(dim=1) / labelled
    rate = torch.minimum(0.2 / frequency, 1.0 / present)
    torch.testing.assert_close(change.feedforward.flatten(1), 0.2 * (hebbian - weights.feedforward.flatten(1)))
    torch.testing.assert_close(change.lateral, 0.2 / 0.4 * (lateral - weights.lateral))
    torch.testing.assert_close(change.label, label * rate)


@settings(derandomize=True, deadline=None, database=None, max_examples=20)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 39))
def test_statistics_of_parts_add_up(seed: int, cut: int) -> None:
    """Any cut of a batch: the change from the sum is the change from the whole, however uneven the parts."""
    whole, y, x, z = random_statistics(seed)
    weights, frequency = random_weights(seed), torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)

    def part(columns: slice) -> Statistics:
        ys, xs, zs = y[:, columns], x[:, columns], z[:, columns]
        return Statistics((ys @ xs.T).reshape(K, 1, 2, 2), ys @ ys.T, ys @ zs.T, zs @ zs.T, ys.shape[1])

    added = part(slice(cut)) + part(slice(cut, None))
    assert added.count == whole.count
    config = PlasticityConfig()
    one, other = (similarity_matching(weights, sums, frequency, 0.1, config) for sums in (whole, added))
    for name in ("feedforward", "lateral", "label"):
        # sums of 40 float64 terms in another order
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        class_frequency_change(added, frequency, 0.1), class_frequency_change(whole, frequency, 0.1)
    )


def test_half_batches_of_a_layer_add_up(digits: Dataset) -> None:
    """Images, positions and labels included."""
    images, labels = to_unit(digits.train_images[:30], torch.float64), digits.train_labels[:30].clone()
    labels[::4] = -1
    options = {"num_classes": 10, "normalize": "contrast", "whiten": True, "dtype": torch.float64}
    whole, halves = (SimilarityMatchingConv2d(1, 8, 3, stride=2, padding=1, **options) for _ in range(2))
    for layer in (whole, halves):
        layer.calibrate(images)
    y = whole.solve(images, labels).y
    parts = [halves.statistics(images[part], y[part], labels[part]) for part in (slice(11), slice(11, None))]
    halves.update(parts[0] + parts[1])
    whole.update(whole.statistics(images, y, labels))
    for name in ("feedforward", "lateral", "label", "class_frequency"):
        # sums over 480 columns in another order
        torch.testing.assert_close(halves.get_buffer(name), whole.get_buffer(name), rtol=1e-12, atol=1e-12)


# -- labels ------------------------------------------------------------------------------------------------------------


def labelled_statistics(means: Tensor, counts: list[int], unlabelled: int = 0) -> Statistics:
    """A batch in which every column of a class has that class's mean activity."""
    numbers = torch.tensor(counts, dtype=torch.float64)
    total = int(numbers.sum()) + unlabelled
    nothing = torch.zeros(K, 1, 2, 2, dtype=torch.float64)
    return Statistics(nothing, torch.zeros(K, K, dtype=torch.float64), means * numbers, torch.diag(numbers), total)


@pytest.mark.parametrize("unlabelled", [0, 100])
def test_label_weights_reach_class_means_at_one_rate(unlabelled: int) -> None:
    """Classes of 70, 25 and 5 %: V_t = (1 − (1 − η)^t) · class mean for all of them, whatever else is in the batch."""
    means = torch.rand(K, CLASSES, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    statistics = labelled_statistics(means, [70, 25, 5], unlabelled)
    frequency = torch.tensor([0.70, 0.25, 0.05], dtype=torch.float64)
    weights = Weights(statistics.yx, statistics.yy, torch.zeros(K, CLASSES, dtype=torch.float64))
    for update in range(1, 401):
        change = similarity_matching(weights, statistics, frequency, 0.1, PlasticityConfig())
        weights = Weights(weights.feedforward, weights.lateral, weights.label + change.label)
        if update in (1, 5, 50):
            torch.testing.assert_close(weights.label, (1 - 0.9**update) * means, rtol=1e-12, atol=0)
    # 0.9^400 = 5e-19
    torch.testing.assert_close(weights.label, means, rtol=1e-12, atol=0)


def test_a_batch_of_labelled_images_alone_changes_v_as_a_mean_over_its_columns_in_every_bit() -> None:
    """In float32, 27 images of 49 positions: what was learnt with all labels is learnt again to the bit."""
    generator = torch.Generator().manual_seed(8)
    y = torch.rand(K, 27, generator=generator)
    z = torch.nn.functional.one_hot(torch.randint(0, CLASSES, (27,), generator=generator), CLASSES).float().T
    nothing = torch.zeros(K, 1, 2, 2)
    statistics = Statistics(nothing, torch.zeros(K, K), 49 * (y @ z.T), 49 * (z @ z.T), 27 * 49)
    before, frequency = torch.rand(K, CLASSES, generator=generator), torch.rand(CLASSES, generator=generator)
    change = similarity_matching(
        Weights(nothing, torch.zeros(K, K), before), statistics, frequency, 0.03, PlasticityConfig()
    )
    count = statistics.count
    rate = torch.minimum(0.03 / frequency, 1.0 / (statistics.zz.diagonal() / count))
    assert torch.equal(change.label, (statistics.yz - before @ statistics.zz) / count * rate)


@settings(derandomize=True, deadline=None, database=None, max_examples=10)
@given(
    seed=st.integers(0, 10_000),
    unlabelled=st.integers(1, 40),
    rate=st.sampled_from([0.01, 0.1, 1.0]),
    gain=st.sampled_from([0.0, 0.5]),
)
def test_unlabelled_images_change_nothing_in_v(seed: int, unlabelled: int, rate: float, gain: float) -> None:
    """A batch and unlabelled images beside it: V and p̂ change as by the labelled images alone."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(5 + unlabelled, 2, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.full((5 + unlabelled,), -1)
    known = torch.randperm(5 + unlabelled, generator=generator)[:5].sort().values
    labels[known] = torch.randint(0, CLASSES, (5,), generator=generator)
    mixed, alone = (
        SimilarityMatchingConv2d(
            2,
            K,
            3,
            num_classes=CLASSES,
            label_gain=gain,
            plasticity=PlasticityConfig(lr=rate, tau=1.0, revive=False),  # a revived channel has no label weights
            dynamics=DynamicsConfig(tolerance=1e-10),
            dtype=torch.float64,
        )
        for _ in range(2)
    )
    for layer in (mixed, alone):
        layer.calibrate(images)
        layer.label.copy_(torch.rand(K, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    before = alone.label.clone()
    mixed.partial_fit(images, labels)
    alone.partial_fit(images[known], labels[known])
    assert not torch.equal(alone.label, before)
    # sums of the same terms in another order, and zeros
    torch.testing.assert_close(mixed.label, alone.label, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mixed.class_frequency, alone.class_frequency, rtol=1e-14, atol=0)


def test_a_batch_of_one_class_does_not_overshoot() -> None:
    """η/p̂ = 10 here: the step is cut so that V lands on the mean, and the other classes stay where they are."""
    means = torch.rand(K, CLASSES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    frequency = torch.tensor([0.98, 0.01, 0.01], dtype=torch.float64)
    before = torch.full((K, CLASSES), 0.5, dtype=torch.float64)
    weights = Weights(torch.zeros(K, 1, 2, 2).double(), torch.zeros(K, K).double(), before)
    change = similarity_matching(weights, labelled_statistics(means, [0, 8, 0]), frequency, 0.1, PlasticityConfig())
    after = before + change.label
    torch.testing.assert_close(after[:, 1], means[:, 1], rtol=1e-14, atol=0)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])


def test_class_frequency_follows_the_labelled_columns() -> None:
    frequency = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
    means = torch.ones(K, CLASSES, dtype=torch.float64)
    expected = torch.tensor([0.70, 0.25, 0.05], dtype=torch.float64)
    for update in range(1, 11):
        frequency = frequency + class_frequency_change(labelled_statistics(means, [14, 5, 1], 380), frequency, 0.2)
        closed_form = expected + (1 / CLASSES - expected) * 0.8**update
        torch.testing.assert_close(frequency, closed_form, rtol=1e-13, atol=0)
    assert class_frequency_change(labelled_statistics(means, [0, 0, 0], 9), frequency, 0.2).count_nonzero() == 0


@pytest.mark.parametrize("unlabelled", [0, 1])
def test_a_class_never_seen_stays_finite(unlabelled: int) -> None:
    """Thousands of batches without class 2: p̂ underflows in float32, then the class appears."""
    layer = SimilarityMatchingConv2d(
        1, K, 2, num_classes=CLASSES, plasticity=PlasticityConfig(lr=0.5), dynamics=DynamicsConfig(max_iterations=10)
    )
    layer.class_frequency.copy_(torch.tensor([1.0, 0.0, 0.0]))
    images = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(6))
    layer.partial_fit(images, torch.tensor([0, 0, 0, -unlabelled]))
    assert layer.label.isfinite().all()
    assert layer.label[:, 1:].count_nonzero() == 0
    solution = layer.partial_fit(images, torch.tensor([0, 2, 2, 0]))
    # rate min(η/0, 1/p) = 1/p: V's column is the class mean at once; float32
    torch.testing.assert_close(layer.label[:, 2], solution.y[:, 1:3].mean(dim=1), rtol=1e-5, atol=1e-6)


# -- rates -------------------------------------------------------------------------------------------------------------


def test_learning_rate_decays_as_documented() -> None:
    config = PlasticityConfig(lr=0.2, lr_decay_steps=50)
    assert [learning_rate(config, update) for update in (0, 50, 150)] == pytest.approx([0.2, 0.1, 0.05], rel=1e-15)
    assert learning_rate(PlasticityConfig(lr=0.2), 10_000) == 0.2


def test_learning_rate_of_a_tensor_has_the_bits_of_a_number() -> None:
    for steps in (7, 100, 333):
        config = PlasticityConfig(lr=0.1, lr_decay_steps=steps)
        for update in range(300):
            assert float(learning_rate(config, torch.tensor(update))) == learning_rate(config, update)


def test_a_layer_uses_the_decayed_rate(digits: Dataset) -> None:
    """From the weights before and after each update: ΔM = (η_t/τ)(⟨y yᵀ⟩ − M), solved for η_t."""
    images = to_unit(digits.train_images[:80], torch.float64)
    layer = SimilarityMatchingConv2d(
        1, K, 4, plasticity=PlasticityConfig(lr=0.4, tau=0.8, lr_decay_steps=2), dtype=torch.float64
    )
    for update in range(4):
        before = layer.lateral.clone()
        y = layer.partial_fit(images[20 * update : 20 * update + 20]).y
        pull = y @ y.T / y.shape[1] - before
        rate = float(((layer.lateral - before) * pull).sum() / pull.square().sum()) * 0.8
        assert rate == pytest.approx(0.4 / (1 + update / 2), rel=1e-12)


# -- invariants of M ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.02, 0.5, 1.0])
def test_rule_keeps_lateral_semidefinite_and_nonnegative(rate: float) -> None:
    """Up to η/τ = 1, from statistics of rank 1 whose size varies over eight orders of magnitude."""
    weights, largest = random_weights(7), 1.0
    for update in range(200):
        statistics, *_ = random_statistics(update, columns=1)
        statistics = replace(statistics, yy=statistics.yy * 10.0 ** (update % 9 - 4))
        frequency = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
        change = similarity_matching(weights, statistics, frequency, rate, PlasticityConfig(lr=1.0, tau=1.0))
        weights = replace(weights, lateral=weights.lateral + change.lateral)
        largest = max(largest, float(weights.lateral.amax()))
        assert torch.equal(weights.lateral, weights.lateral.T)
        assert (weights.lateral >= 0).all()
        # rounding relative to the largest M that was: at η/τ = 1 a large M is subtracted to leave a small one
        assert torch.linalg.eigvalsh(weights.lateral)[0] >= -1e-14 * largest


@pytest.mark.filterwarnings("ignore:the relative objective is above 1")  # at these rates it is
@pytest.mark.parametrize(("lr", "tau"), [(0.1, 0.5), (0.3, 0.4)])
def test_lateral_stays_symmetric_semidefinite_and_nonnegative(lr: float, tau: float, digits: Dataset) -> None:
    """200 updates of a layer at high rates, with channels that die and are revived on the way."""
    images, labels = to_unit(digits.train_images[:1000], torch.float64), digits.train_labels[:1000]
    layer = SimilarityMatchingConv2d(
        1,
        10,
        4,
        stride=2,
        num_classes=10,
        label_gain=0.3,
        plasticity=PlasticityConfig(lr=lr, tau=tau, dead_after=3),
        dtype=torch.float64,
    )
    largest = 1.0
    for update in range(200):
        if update % 40 == 10:
            layer.feedforward[update % 7] = -5.0
        start = update * 5 % 1000
        layer.partial_fit(images[start : start + 5], labels[start : start + 5])
        eigenvalues = torch.linalg.eigvalsh(layer.lateral)
        largest = max(largest, float(eigenvalues[-1]))
        # rounding, relative to the largest M that was
        assert (layer.lateral - layer.lateral.T).abs().amax() <= 1e-14 * largest
        assert eigenvalues[0] >= -1e-14 * largest
        assert (layer.lateral >= 0).all()  # exact: subtraction is monotonic in floating point too
        assert layer.bound.value >= eigenvalues[-1]
    assert layer.revived >= 3


# -- revival -----------------------------------------------------------------------------------------------------------


def silence(layer: SimilarityMatchingConv2d, channels: list[int]) -> None:
    """Images are nonnegative: weights of −5 never see a positive drive, and they decay towards 0 from below."""
    layer.feedforward[channels] = -5.0
    layer.lateral[channels, channels] = 40.0
    layer.recertify()


def test_dead_channels_are_counted(digits: Dataset) -> None:
    images = to_unit(digits.train_images[:60])
    layer = SimilarityMatchingConv2d(1, 8, 4, plasticity=PlasticityConfig(dead_after=4, revive=False))
    silence(layer, [2, 5])
    counts = []
    for update in range(6):
        layer.partial_fit(images[10 * update : 10 * update + 10])
        counts.append(layer.dead_channels)
    assert counts == [0, 0, 0, 2, 2, 2]
    assert layer.silent.tolist() == [6 if channel in (2, 5) else 0 for channel in range(8)]
    assert layer.revived == 0


def test_dead_channels_are_revived_and_become_active(digits: Dataset) -> None:
    images, labels = to_unit(digits.train_images[:100]), digits.train_labels[:100]
    layer = SimilarityMatchingConv2d(1, 8, 4, num_classes=10, plasticity=PlasticityConfig(dead_after=4))
    silence(layer, [2, 5])
    for update in range(4):
        assert layer.revived == 0
        batch = slice(10 * update, 10 * update + 10)
        solution = layer.partial_fit(images[batch], labels[batch])
        assert solution.y[[2, 5]].count_nonzero() == 0
    # the fourth silent update revives them: unit weights, M_ii = 1 and nothing else, no label weights
    assert layer.revived == 2
    assert layer.silent[[2, 5]].tolist() == [0, 0]
    assert torch.equal(layer.lateral[[2, 5]], torch.eye(8)[[2, 5]])
    assert torch.equal(layer.lateral[:, [2, 5]], torch.eye(8)[:, [2, 5]])
    assert layer.label[[2, 5]].count_nonzero() == 0
    assert layer.label[[0, 1]].count_nonzero() > 0
    assert not torch.equal(layer.feedforward[2], layer.feedforward[5])
    # entries are Gaussian with variance 1/P: the squared norm is 1 with deviation √(2/16) = 0.35
    assert ((layer.feedforward[[2, 5]].square().sum(dim=(1, 2, 3)) - 1).abs() < 1).all()
    assert layer.bound.value >= torch.linalg.eigvalsh(layer.lateral)[-1]
    for update in range(4, 10):
        solution = layer.partial_fit(images[10 * update : 10 * update + 10])
    assert (solution.y[[2, 5]].amax(dim=1) > 0).all()
    assert layer.revived == 2
    assert layer.dead_channels == 0


def test_a_state_saved_after_a_revival_goes_on_bit_by_bit(digits: Dataset) -> None:
    """The bound is that of the revived M, although the vector that it comes from was known before the revival."""
    images = to_unit(digits.train_images[:50])
    options = {"plasticity": PlasticityConfig(dead_after=4), "dynamics": DynamicsConfig(solver="accelerated")}
    layer, loaded = (SimilarityMatchingConv2d(1, 8, 4, **options) for _ in range(2))
    silence(layer, [2, 5])
    for update in range(4):
        layer.partial_fit(images[10 * update : 10 * update + 10])
    assert layer.revived == 2
    loaded.load_state_dict(layer.state_dict())
    loaded.certify()
    assert (loaded.bound.value, loaded.bound.ridge) == (layer.bound.value, layer.bound.ridge)
    for each in (layer, loaded):
        each.partial_fit(images[40:])
    for name, tensor in layer.state_dict().items():
        assert torch.equal(loaded.get_buffer(name), tensor), name


@pytest.mark.parametrize("solver", ["auto", "accelerated", "projected_gradient"])
@pytest.mark.parametrize("revive", [True, False])
def test_a_silent_batch_at_full_rate_leaves_a_layer_that_learns_on(digits: Dataset, solver: str, revive: bool) -> None:
    plasticity = PlasticityConfig(lr=1.0, revive=revive)
    layer = SimilarityMatchingConv2d(1, 8, 4, plasticity=plasticity, dynamics=DynamicsConfig(solver=solver))
    images = to_unit(digits.train_images[:20])
    layer.partial_fit(torch.zeros_like(images))  # η/τ = 1: M forgets all but this batch, of which y yᵀ is 0
    assert layer.dead_channels == 8
    assert torch.equal(layer.lateral, torch.eye(8) if revive else torch.zeros(8, 8))
    solution = layer.partial_fit(images)
    assert solution.y.isfinite().all()
    assert bool(solution.y.count_nonzero() > 0) == revive


@pytest.mark.parametrize("parts", [2, 3])
def test_draws_do_not_depend_on_the_sharding(parts: int) -> None:
    full = SimilarityMatchingConv2d(2, 10, 3, seed=7)
    shards = [SimilarityMatchingConv2d(2, 10, 3, seed=7, rows=rows) for rows in split_rows(10, parts)]
    assert torch.equal(torch.cat([shard.feedforward for shard in shards]), full.feedforward)
    assert torch.equal(torch.cat([shard.lateral for shard in shards]), torch.eye(10))
    other = SimilarityMatchingConv2d(2, 10, 3, seed=8)
    assert (other.feedforward - full.feedforward).abs().amax(dim=(1, 2, 3)).min() > 0.1  # every row is another
    # 180 Gaussian entries of variance 1/18: their mean square is 1/18 with relative deviation √(2/180) = 0.1
    assert float(full.feedforward.square().mean()) * 18 == pytest.approx(1.0, abs=0.4)
