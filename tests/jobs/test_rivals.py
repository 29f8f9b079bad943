"""The rivals: each against the formula of its encoding, its learning against what is known of it, costs counted."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import sklearn.cluster
import sklearn.decomposition
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jobs.evaluation.learners import Shape
from jobs.evaluation.nonnegative import NonnegativeCodes
from jobs.evaluation.rivals import RIVALS, Rival, autoencoder, convolutional, nmf, patches, pynsm
from jobs.evaluation.rivals.autoencoder import Autoencoder, AutoencoderSettings, Coder
from jobs.evaluation.rivals.convolutional import Convolutional
from jobs.evaluation.rivals.hebbian_wta import HebbianSettings, HebbianWTA, soft_competition
from jobs.evaluation.rivals.kmeans import KMeans, KMeansSettings
from jobs.evaluation.rivals.nmf import NMF, NMFSettings
from jobs.evaluation.rivals.pynsm import Pynsm, PynsmSettings
from jobs.evaluation.rivals.random_filters import Exemplars, Random, RandomSettings
from jobs.evaluation.rivals.sparse import Sparse, SparseExemplars, SparseHebbian, SparseKMeans, SparseSettings
from jobs.evaluation.rivals.visits import Visits
from jobs.pynsm import RATE, TAU
from jobs.reporting import MissingError
from simmatch.data.order import epoch_order
from simmatch.data.sources import Dataset, to_unit
from simmatch.geometry import PatchConfig
from tests.reference import (
    inverse_root,
    nnls_columns,
    normalised,
    patch_matrix,
    projected_gradient,
    relative_residual,
)

SHAPE = Shape(channels=6, kernel_size=3, stride=2, padding=1, pool=2)
MAP = (4, 4)
RAW = {"contrast": False, "whiten": False}


@pytest.fixture(scope="module")
def images(digits: Dataset) -> Tensor:
    """[40, 1, 8, 8]."""
    return to_unit(digits.train_images[:40])


@pytest.fixture(scope="module")
def fitted(images: Tensor) -> Callable[[str, int], Any]:
    """(name, candidate) → a learner that has learnt from the images; each learns once."""
    known: dict[tuple[str, int], Any] = {}

    def learner(name: str, candidate: int) -> Any:
        if (name, candidate) not in known:
            known[name, candidate] = made(RIVALS[name], candidate, seed=3)
            known[name, candidate].fit(images)
        return known[name, candidate]

    return learner


def made(rival: type[Rival], candidate: int, seed: int) -> Rival:
    return rival(SHAPE, rival.candidates[candidate], seed)


def seen(images: Tensor, floor: float | None = 0.1) -> Tensor:
    """x [N, P], float64: all patches, normalised, not whitened."""
    return normalised(patch_matrix(images.double(), SHAPE.kernel_size, SHAPE.stride, SHAPE.padding), floor)


def whitening(x: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Π [P, P] and μ [P] by the statistics of x [N, P]."""
    mean = x.mean(dim=0)
    covariance = ((x - mean).T @ (x - mean) / len(x)).numpy()
    level = ridge * np.trace(covariance) / len(covariance)
    return torch.from_numpy(inverse_root(covariance + level * np.eye(len(covariance)))), mean


def columns(maps: Tensor) -> Tensor:
    """[B, K, H, W] → [K, N]."""
    return maps.double().transpose(0, 1).flatten(1)


# -- what all have in common -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(RIVALS))
def test_the_search_budget_is_the_same_for_all(name: str) -> None:
    rival = RIVALS[name]
    assert rival.name == name
    assert len(rival.candidates) == 4
    assert len({str(candidate) for candidate in rival.candidates}) == 4
    for candidate in rival.candidates:
        assert type(candidate).__dataclass_params__.frozen
        said = dict(part.split("=") for part in str(candidate).split(", ") if part != "default")
        defaults = dataclasses.asdict(type(candidate)())
        given = dataclasses.asdict(candidate)
        assert said == {key: str(value) for key, value in given.items() if value != defaults[key]}


@pytest.mark.parametrize(("name", "candidate"), list(itertools.product(RIVALS, range(4))))
def test_maps(name: str, candidate: int, images: Tensor, fitted: Callable[[str, int], Any]) -> None:
    learner = fitted(name, candidate)
    maps = learner.maps(images)
    assert maps.shape == (len(images), SHAPE.channels, *MAP)
    assert maps.dtype == torch.float32
    assert bool(maps.isfinite().all())
    assert float(maps.amin()) == 0.0
    assert not maps.requires_grad
    assert float(columns(maps).std(dim=1).median()) > 1e-3  # most channels say something
    in_parts = torch.cat([learner.maps(part) for part in torch.split(images, 7)])
    torch.testing.assert_close(in_parts, maps, rtol=1e-4, atol=1e-5)
    assert learner.maps(images[:0]).shape == (0, SHAPE.channels, *MAP)


@pytest.mark.parametrize("name", list(RIVALS))
def test_learning_is_a_function_of_the_seed(name: str, images: Tensor, fitted: Callable[[str, int], Any]) -> None:
    expected = fitted(name, 1).maps(images)
    for seed, same in ((3, True), (4, False)):
        again = made(RIVALS[name], 1, seed)
        torch.manual_seed(seed)  # nobody draws from the global generator
        again.fit(images)
        assert torch.equal(again.maps(images), expected) == same


@pytest.mark.parametrize("name", list(RIVALS))
def test_learning_does_not_change_the_images(name: str, images: Tensor) -> None:
    given = images[:20].clone()
    learner = made(RIVALS[name], 1, seed=0)
    learner.fit(given)
    learner.maps(given)
    assert torch.equal(given, images[:20])


@pytest.mark.parametrize("name", list(RIVALS))
def test_colours_and_a_kernel_that_covers_the_image(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(40, 3, 5, 5, generator=generator)
    learner = RIVALS[name](Shape(channels=4, kernel_size=5), RIVALS[name].candidates[1], 0)
    learner.fit(colours)
    assert learner.maps(colours).shape == (40, 4, 1, 1)
    assert learner.cost((5, 5)).operations >= 4 * 75


@pytest.mark.parametrize("name", list(RIVALS))
def test_before_learning_there_is_nothing(name: str, images: Tensor) -> None:
    learner = made(RIVALS[name], 0, seed=0)
    for use in (lambda: learner.maps(images), lambda: learner.cost((8, 8))):
        with pytest.raises(ValueError, match=f"^{name}: expected fit"):
            use()


def test_encoding_takes_a_few_images_at_a_time(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PatchConfig(1, 3, 2, 1)
    monkeypatch.setattr(patches, "CHUNK_VALUES", 10 * 16 * 7)
    sizes = []

    def code(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part[:, 0, ::2, ::2].reshape(1, -1)  # 16 values of an image

    maps = patches.encoded(images, config, 10, code)
    assert torch.equal(maps, images[:, :, ::2, ::2])
    assert sizes == [7] * 5 + [5]
    patches.encoded(images[:2], config, 1000, code)  # one image has more than the limit
    assert sizes[-2:] == [1, 1]


def test_visits() -> None:
    batches = Visits(images=4, columns=100, updates=5, passes=9).batches(10, positions=30, seed=1)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1, 3]  # 3 × 30 columns; five updates
    assert torch.equal(torch.cat(batches[:4]), epoch_order(10, seed=1, epoch=0))  # as our layers
    batches = Visits(images=4, columns=100, updates=99, passes=3).batches(10, positions=1, seed=1)
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    passes = torch.cat(batches).view(3, 10)
    assert torch.equal(passes.sort(dim=1).values, torch.arange(10).expand(3, 10))
    assert not torch.equal(passes[1], passes[2])
    assert len(Visits(images=4, columns=1, updates=2, passes=1).batches(10, positions=30, seed=1)[0]) == 1


# -- costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "trained", "inference", "per_position"),
    [
        # K = 6, P = 9; a whitening has P² + P = 90; filters with an offset 6 · 10
        ("autoencoder", 60 + 54 + 1 + 90, 60, 54),
        ("kmeans", 54 + 90, 15 * 10, 15 * 9),  # K + P filters
        ("hebbian_wta", 54 + 90, 60, 54),
        ("random", 90, 60, 54),
        ("gaussian", 90, 60, 54),
        ("exemplars", 90, 60, 54),
    ],
)
def test_cost_of_convolutions(
    name: str, trained: int, inference: int, per_position: int, images: Tensor, fitted: Callable[[str, int], Any]
) -> None:
    learner = fitted(name, 1)
    cost = learner.cost((8, 8))
    assert (cost.trained, cost.inference, cost.operations) == (trained, inference, 16 * per_position)
    assert learner.cost((28, 21)).operations == 14 * 11 * per_position
    stored = [learner.encoder.weight, learner.encoder.offset]
    assert cost.inference == sum(part.numel() for part in stored)
    with FlopCounterMode(display=False) as counter:
        learner.maps(images[:5])
    extra = 15 if name == "kmeans" else 0  # written out as patches with a row of ones, where P ≤ the filters
    assert counter.get_total_flops() == 5 * 2 * 16 * (per_position + extra)


@pytest.mark.parametrize(("candidate", "size"), [(0, 9), (2, 18)])
def test_cost_of_nmf(candidate: int, size: int, images: Tensor, fitted: Callable[[str, int], Any]) -> None:
    learner = fitted("nmf", candidate)
    cost = learner.cost((8, 8))
    assert cost.trained == learner.components.numel() == 6 * size
    assert cost.inference == learner.components.numel() + learner.lateral.numel() == 6 * size + 36
    # between none and a few products with H Hᵀ for a column
    assert 16 * 6 * size <= cost.operations <= 16 * (6 * size + 5 * 36)


@pytest.mark.parametrize(
    ("name", "trained"), [("pynsm", 54 + 36 + 90), ("kmeans_sparse", 54 + 90), ("exemplars_sparse", 90)]
)
def test_cost_of_dynamics(name: str, trained: int, fitted: Callable[[str, int], Any]) -> None:
    learner = fitted(name, 3)
    cost = learner.cost((8, 8))
    assert cost.trained == trained
    assert cost.inference == learner.encoder.weight.numel() + 6 + learner.learnt.lateral.numel() == 54 + 6 + 36
    assert 16 * 54 < cost.operations <= 16 * (54 + 5 * 36)


def test_iterations_are_the_mean_over_columns() -> None:
    lateral = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    silent, alone, both = [-1.0, -1.0], [1.0, -1.0], [1.0, 1.0]
    # no move; one move, which is half a product and rounded up; at 0.9 two channels take turns again and again
    codes = NonnegativeCodes(lateral, 2.0**-10)
    counts = [codes.mean_iterations(torch.tensor([each]).T) for each in (silent, alone, both)]
    assert counts[:2] == [0.0, 1.0]
    assert counts[2] > 1
    drive = torch.tensor([silent, alone, both, alone]).T
    assert codes.mean_iterations(drive) == pytest.approx((counts[0] + 2 * counts[1] + counts[2]) / 4)


# -- k-means -----------------------------------------------------------------------------------------------------------


def test_kmeans_is_the_naive_triangle(images: Tensor) -> None:
    learner = KMeans(SHAPE, KMeansSettings(contrast_floor=0.05, whiten_ridge=0.2), 0)
    learner.fit(images)
    x = seen(images, floor=0.05)
    matrix, mean = whitening(x, ridge=0.2)
    whitened = (x - mean) @ matrix
    filters = learner.encoder.weight[: SHAPE.channels].flatten(1).double()  # −2 c Π
    centroids = -filters @ torch.linalg.inv(matrix) / 2
    z = torch.cdist(whitened, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    expected = (z.mean(dim=1, keepdim=True) - z).clamp(min=0.0).T
    torch.testing.assert_close(columns(learner.maps(images)), expected, rtol=1e-3, atol=1e-3)
    # as tight as scikit-learn's own best of ten, on all patches at once
    best = sklearn.cluster.KMeans(SHAPE.channels, n_init=10, random_state=0).fit(whitened.numpy())
    assert float(z.amin(dim=1).square().sum()) < 1.1 * best.inertia_


# -- NMF ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are solved to more than the usual residual."""
    monkeypatch.setattr(nmf, "RESIDUAL", 2.0**-20)


@pytest.mark.usefixtures("solved")
def test_nmf_codes_are_nonnegative_least_squares(images: Tensor) -> None:
    learner = NMF(SHAPE, NMFSettings(**RAW), 0)
    learner.fit(images)
    assert learner.components is not None
    factor = learner.components.double().numpy().T
    expected = np.stack([scipy.optimize.nnls(factor, patch.numpy())[0] for patch in seen(images, None)], axis=1)
    found = columns(learner.maps(images)).numpy()
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    # as near to the patches as scikit-learn's coordinate descent on all of them at once
    patches = seen(images, None).numpy()
    best = sklearn.decomposition.NMF(SHAPE.channels, init="nndsvda", max_iter=2000, random_state=0).fit(patches)
    assert np.linalg.norm(factor @ expected - patches.T) < 1.1 * best.reconstruction_err_


@pytest.mark.usefixtures("solved")
def test_nmf_codes_of_split_patches_with_a_penalty(images: Tensor) -> None:
    sparsity = 2e-3
    codes = {}
    for penalty in (0.0, sparsity):
        learner = NMF(SHAPE, NMFSettings(sparsity=penalty, contrast_floor=0.05, whiten_ridge=0.2), 0)
        learner.fit(images)
        assert learner.components is not None
        components = learner.components.double()
        x = seen(images, floor=0.05)
        matrix, mean = whitening(x, ridge=0.2)
        whitened = (x - mean) @ matrix
        split = torch.cat([whitened.clamp(min=0.0), (-whitened).clamp(min=0.0)], dim=1)
        assert components.shape == (SHAPE.channels, split.shape[1])
        expected = nnls_columns(components @ split.T - penalty * split.shape[1], components @ components.T)
        codes[penalty] = columns(learner.maps(images))
        assert float((codes[penalty] - expected).norm()) <= 1e-3 * float(expected.norm())
    assert float((codes[sparsity] > 0).double().mean()) < float((codes[0.0] > 0).double().mean())


# -- autoencoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [((8, 8), 2, 1), ((9, 7), 3, 1), ((8, 9), 1, 0), ((8, 8), 4, 0)]
)
def test_the_decoder_is_a_transposed_convolution(size: tuple[int, int], stride: int, padding: int) -> None:
    config = PatchConfig(2, 3, stride, padding)
    coder = Coder(5, config, size, torch.Generator().manual_seed(0))
    x = torch.rand(4, 2, *size, generator=torch.Generator().manual_seed(1))
    height, width = config.map_size(size)
    unfolded = F.unfold(x, 3, stride=stride, padding=padding)
    found, y = coder(unfolded.transpose(0, 1).flatten(1))
    maps = F.relu(F.conv2d(x, coder.filters.view(5, 2, 3, 3), coder.bias, stride, padding))
    torch.testing.assert_close(y.view(5, 4, height, width).transpose(0, 1), maps)
    left = [(extent + 2 * padding - 3) % stride for extent in size]

    def transposed(maps: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(maps, weight.view(-1, 2, 3, 3), None, stride, padding, output_padding=left)

    coverage = transposed(torch.ones(1, 1, height, width), torch.ones(1, 18))
    expected = transposed(maps, coder.decoder) / coverage.clamp(min=1) + coder.decoder_bias.view(2, 1, 1)
    torch.testing.assert_close(found, expected)
    # raw patches, put together again, are the image where they cover it
    joined = coder.joined(unfolded.transpose(0, 1).flatten(1))
    torch.testing.assert_close(joined, x * (coverage > 0))


@pytest.fixture
def longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """More updates than few images give."""
    monkeypatch.setattr(autoencoder, "VISITS", Visits(images=20, columns=10_000, updates=120, passes=120))


@pytest.mark.usefixtures("longer")
def test_the_autoencoder_learns(images: Tensor, digits: Dataset) -> None:
    learner = Autoencoder(Shape(channels=16, kernel_size=3, padding=1), AutoencoderSettings(lr=1e-2, **RAW), 0)
    learner.fit(to_unit(digits.train_images[:400]))
    assert learner.coder is not None
    variance = float(images.var(dim=0).mean())
    assert learner.losses[0] > variance
    assert np.mean(learner.losses[-5:]) < 0.05 * variance
    # what it is worth on images it has not seen, and the codes are the encoder's
    unseen = to_unit(digits.test_images[:50])
    patches_ = F.unfold(unseen, 3, padding=1).transpose(0, 1).flatten(1)
    assert float((learner.coder(patches_)[0] - unseen).square().mean()) < 0.1 * variance
    expected = F.relu(F.conv2d(unseen, learner.coder.filters.view(16, 1, 3, 3), learner.coder.bias, padding=1))
    torch.testing.assert_close(learner.maps(unseen), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("longer")
def test_noise_and_sparsity_act(images: Tensor) -> None:
    def codes(**values: float) -> Tensor:
        learner = Autoencoder(SHAPE, AutoencoderSettings(lr=1e-2, **values), 0)
        learner.fit(images)
        return learner.maps(images)

    plain = codes()
    assert float(codes(sparsity=1.0).mean()) < 0.8 * float(plain.mean())
    assert not torch.equal(codes(noise=0.5), plain)


# -- random ------------------------------------------------------------------------------------------------------------


def test_random_filters_are_drawn_and_rectified(images: Tensor) -> None:
    x = seen(images)
    matrix, mean = whitening(x, ridge=0.1)
    whitened = (x - mean) @ matrix
    for source in ("gaussian", "patches"):
        learner = Random(SHAPE, RandomSettings(source, threshold=0.3), 5)
        learner.fit(images)
        filters = learner.encoder.weight.flatten(1).double() @ torch.linalg.inv(matrix)
        torch.testing.assert_close(filters.norm(dim=1), torch.ones(6).double(), rtol=1e-3, atol=0.0)
        expected = (filters @ whitened.T - 0.3).clamp(min=0.0)
        torch.testing.assert_close(columns(learner.maps(images)), expected, rtol=1e-3, atol=1e-3)
        likeness = (filters @ F.normalize(whitened, dim=1).T).amax(dim=1)
        assert bool((likeness > 0.9999).all()) == (source == "patches")


# -- Hebbian -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anti_hebbian", [False, True])
def test_soft_competition_in_loops(anti_hebbian: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, x = torch.randn(4, 5, generator=generator), torch.randn(7, 5, generator=generator)
    expected, amount = torch.zeros(4, 5), torch.zeros(4)
    for patch in x:
        u = [float(row @ patch) for row in weights]
        total = sum(np.exp(value / 0.7) for value in u)
        for k in range(4):
            y = np.exp(u[k] / 0.7) / total
            sign = -1 if anti_hebbian and u[k] < max(u) else 1
            expected[k] += sign * y * (patch - u[k] * weights[k])
            amount[k] += y
    torch.testing.assert_close(soft_competition(weights, x, 0.7, anti_hebbian), expected / amount.unsqueeze(1))


def test_winners_take_all_finds_planted_clusters() -> None:
    """Four orthogonal directions, one in each image: every one has a filter, and no filter answers to two."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.kron(torch.eye(4), torch.full((4,), 0.5))  # [4, 16], norm 1
    which = torch.randint(4, (1500,), generator=generator)
    length = 0.8 + 0.8 * torch.rand(1500, 1, generator=generator)
    noise = 0.05 * torch.rand(1500, 16, generator=generator)
    planted = (directions[which] * length + noise).view(-1, 1, 4, 4)
    learner = HebbianWTA(Shape(channels=8, kernel_size=4), HebbianSettings(temperature=0.1, **RAW), 0)
    learner.fit(planted)
    likeness = directions @ learner.encoder.weight.flatten(1).T
    assert float(likeness.amax(dim=1).amin()) > 0.99
    winners = learner.maps(planted).flatten(1).argmax(dim=1)
    assert torch.equal(likeness.argmax(dim=0)[winners], which)


def test_the_triangle_of_a_hebbian_layer(images: Tensor) -> None:
    maps = {}
    for activation in ("relu", "triangle"):
        learner = HebbianWTA(SHAPE, HebbianSettings(0.1, activation), 0)
        learner.fit(images)
        maps[activation] = learner.maps(images)
        u = learner.encoder.columns(images).double()
        level = u.mean(dim=0) if activation == "triangle" else 0.0
        torch.testing.assert_close(columns(maps[activation]), (u - level).clamp(min=0.0), rtol=1e-4, atol=1e-5)
    assert not torch.equal(maps["relu"], maps["triangle"])


# -- sparse codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparse", "rival"),
    [
        (SparseKMeans, KMeans(SHAPE, KMeansSettings(), 5)),
        (SparseHebbian, HebbianWTA(SHAPE, HebbianSettings(), 5)),
        (SparseExemplars, Exemplars(SHAPE, RandomSettings("patches"), 5)),
    ],
    ids=lambda each: each.name,
)
def test_sparse_codes_by_the_filters_of_a_rival(
    sparse: type[Sparse], rival: Convolutional[Any], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracles: the rival itself for the filters, scikit-learn's coordinate descent for the codes."""
    monkeypatch.setattr(convolutional, "RESIDUAL", 2.0**-20)
    penalty = 0.4
    learner = sparse(SHAPE, SparseSettings(penalty=penalty), 5)
    for each in (learner, rival):
        each.fit(images)
    assert learner.learnt is not None
    assert rival.learnt is not None
    dictionary = learner.learnt.filters
    torch.testing.assert_close(dictionary, F.normalize(rival.learnt.filters, dim=1), rtol=0.0, atol=0.0)
    x = seen(images)
    matrix, mean = whitening(x, ridge=0.1)
    expected = sklearn.decomposition.sparse_encode(
        ((x - mean) @ matrix).numpy(),
        dictionary.double().numpy(),
        algorithm="lasso_cd",
        alpha=penalty,
        positive=True,
        max_iter=20_000,
    )
    found = columns(learner.maps(images))
    assert float((found - torch.from_numpy(expected).T).norm()) <= 1e-3 * np.linalg.norm(expected)
    assert 0.05 < float((found > 0).double().mean()) < 0.95


# -- pynsm -------------------------------------------------------------------------------------------------------------


def test_pynsm_learns_as_published(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One update against its formula: forty steps of projected gradient, then η and η/τ of ours."""
    states = {}
    for updates in (0, 1):
        monkeypatch.setattr(pynsm, "VISITS", Visits(images=10, columns=10_000, updates=updates, passes=1))
        learner = Pynsm(SHAPE, PynsmSettings(step=0.7, **RAW), 0)
        learner.fit(images)
        assert learner.learnt is not None
        assert learner.learnt.lateral is not None
        states[updates] = (learner.encoder.weight.flatten(1).double(), learner.learnt.lateral.double())
    (w, m), after = states[0], states[1]
    assert torch.equal(m, torch.eye(6).double())
    x = seen(images[epoch_order(len(images), seed=0, epoch=0)[:10]], None).T
    y = projected_gradient(w @ x, m, step=0.7, iterations=40)
    lr, tau = 4 * RATE / 50, 2 * TAU
    torch.testing.assert_close(after[0], w + lr * (y @ x.T / x.shape[1] - w), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after[1], m + lr / tau * (y @ y.T / y.shape[1] - m), rtol=1e-4, atol=1e-6)


def test_pynsm_codes_are_solved(images: Tensor, fitted: Callable[[str, int], Any]) -> None:
    learner = fitted("pynsm", 1)
    drive = learner.encoder.weight.flatten(1).double() @ seen(images, None).T
    residual = relative_residual(drive, learner.learnt.lateral, columns(learner.maps(images)))
    assert float(residual.amax()) <= 1e-2
    assert float((learner.learnt.lateral - torch.eye(6)).norm()) > 1e-3  # it has learnt


def test_without_pynsm(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynsm", None)
    with pytest.raises(MissingError, match=r"^pynsm is not installed: .*$"):
        made(RIVALS["pynsm"], 0, seed=0).fit(images)
