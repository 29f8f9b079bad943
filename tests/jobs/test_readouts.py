"""Ridge and logistic readouts against oracles, their choice, and the neighbours' vote."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge as ScikitRidge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from jobs.evaluation import kernel_readout
from jobs.evaluation.kernel_readout import choose_kernel, kernel_path
from jobs.evaluation.readouts import (
    PENALTIES,
    choose,
    choose_ridge,
    logistic_path,
    neighbours_accuracy,
    ridge_path,
    scaling_of,
)
from simmatch.data.sources import Dataset, to_unit
from simmatch.readout import accuracy


def problem(images: int, size: int = 30, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Nonnegative features of classes that overlap, float64."""
    generator = torch.Generator().manual_seed(images)
    labels = torch.randint(classes, (images,), generator=generator)
    centres = torch.rand((classes, size), generator=generator, dtype=torch.float64)
    noise = torch.rand((images, size), generator=generator, dtype=torch.float64)
    return (centres[labels] + 1.5 * noise).clamp(min=0.0), labels


@pytest.mark.parametrize("images", [12, 200], ids=["by the kernel", "by sums"])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_ridge_is_scikit_learns(images: int, power: float) -> None:
    features, labels = problem(images)
    unseen, _ = problem(50)
    scaling = scaling_of(features, power)
    assert float(scaling(features).square().sum(dim=1).mean()) == pytest.approx(1.0)
    for found in ridge_path(features, labels, 4, power=power, penalties=(1e-3, 1e-1)):
        oracle = ScikitRidge(alpha=found.penalty * images, solver="svd")
        oracle.fit(scaling(features).numpy(), np.eye(4)[labels.numpy()])
        np.testing.assert_allclose(
            found.scores(unseen).numpy(), oracle.predict(scaling(unseen).numpy()), rtol=1e-8, atol=1e-9
        )


def test_the_choice_is_the_best_on_held_out_images() -> None:
    train, held_out = problem(40), problem(300)
    readout, right = choose_ridge(train, held_out, 4)
    every = [
        accuracy(each.scores(held_out[0]), held_out[1])
        for power in (1.0, 0.5)
        for each in ridge_path(*train, 4, power=power)
    ]
    assert right == max(every) > min(every)
    assert right == accuracy(readout.scores(held_out[0]), held_out[1])
    assert readout.penalty in PENALTIES
    assert readout.parameters == 30 * 4 + 4


def test_of_equals_the_stronger_penalty_is_taken() -> None:
    features = torch.eye(4, dtype=torch.float64)
    readout, right = choose_ridge((features, torch.arange(4)), (features, torch.arange(4)), 4)
    assert right == 1.0
    assert readout.penalty == max(PENALTIES)


def test_a_label_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="expected classes 0 … 3 or -1, got 4"):
        ridge_path(torch.ones(2, 3), torch.tensor([0, 4]), 4)


def test_a_logistic_readout_is_where_its_objective_is_flat() -> None:
    features, labels = problem(200)
    scaling = scaling_of(features, 1.0)
    found = logistic_path(features, labels, 4, scaling, penalties=(1e-2, 1e-3))
    assert [each.penalty for each in found] == [1e-2, 1e-3]
    for each in found:
        matrix, bias = each.matrix.clone().requires_grad_(), each.bias.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(scaling(features) @ matrix + bias, labels)
        objective = loss + each.penalty / 2 * matrix.square().sum()
        slopes = torch.autograd.grad(objective, (matrix, bias))
        assert max(float(slope.abs().max()) for slope in slopes) < 2e-5  # of scores of order 1
        at_zero = torch.autograd.grad(
            torch.nn.functional.cross_entropy(
                scaling(features) @ (m := torch.zeros_like(matrix).requires_grad_()), labels
            ),
            m,
        )[0]
        assert float(at_zero.abs().max()) > 1e-2
    assert float(found[1].matrix.norm()) > 1.5 * float(found[0].matrix.norm())


def test_a_logistic_readout_never_answers_a_class_without_images() -> None:
    features, labels = problem(60, classes=3)
    readout = logistic_path(features, labels + 1, 5, scaling_of(features, 1.0), penalties=(1e-3,))[0]
    answers = readout.scores(features).argmax(dim=1)
    assert set(answers.tolist()) == {1, 2, 3}
    assert accuracy(readout.scores(features), labels + 1) > 0.8


def test_a_logistic_readout_asks_for_three_classes() -> None:
    with pytest.raises(ValueError, match=r"expected at least 3 classes, got \[0, 2\]"):
        logistic_path(torch.eye(4), torch.tensor([0, 2, 0, 2]), 3, scaling_of(torch.eye(4), 1.0), penalties=(1.0,))


def test_of_readouts_the_best_on_held_out_images_is_chosen() -> None:
    train, held_out = problem(40), problem(300)
    path = ridge_path(*train, 4)
    best, right = choose(path, held_out)
    assert right == max(accuracy(each.scores(held_out[0]), held_out[1]) for each in path)
    assert any(best is each for each in path)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_kernel_readout_with_all_landmarks_is_scikit_learns(power: float) -> None:
    features, labels = problem(200)
    unseen, _ = problem(50)
    scaling = scaling_of(features, power)
    scaled, targets = scaling(features).numpy(), np.eye(4)[labels.numpy()]
    found = kernel_path((features, labels), 4, scaling, width=1.5, penalties=(1.0, 1e-3))
    rate = 1.5 / np.median(pdist(scaled, "sqeuclidean"))
    assert [each.penalty for each in found] == [1.0, 1e-3]
    for each in found:
        assert each.rate == pytest.approx(rate, rel=1e-3)  # of an even number of distances torch takes the lower middle
        oracle = KernelRidge(alpha=each.penalty, kernel="rbf", gamma=each.rate).fit(scaled, targets - targets.mean(0))
        expected = oracle.predict(scaling(unseen).numpy()) + targets.mean(0)
        np.testing.assert_allclose(each.scores(unseen).numpy(), expected, rtol=1e-9, atol=1e-10)
        assert each.parameters == 200 * 30 + 200 * 4 + 4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-4), (torch.float32, 1e-3)])
def test_a_kernel_readout_with_few_landmarks_solves_its_normal_equations(dtype: torch.dtype, tolerance: float) -> None:
    features, labels = problem(400)
    unseen, _ = problem(50)
    targets = np.eye(4)[labels.numpy()]
    for each in kernel_path((features.to(dtype), labels), 4, scaling_of(features.to(dtype), 0.5), 1.0, most=80):
        landmarks = each.landmarks.double().numpy()
        assert landmarks.shape == (80, 30)
        kernel = rbf_kernel(each.scaling(features).numpy(), landmarks, gamma=each.rate)
        square = rbf_kernel(landmarks, landmarks, gamma=each.rate)
        right = kernel.T @ (targets - targets.mean(0))
        weights = np.linalg.solve(kernel.T @ kernel + each.penalty * square, right)
        expected = rbf_kernel(each.scaling(unseen).numpy(), landmarks, gamma=each.rate) @ weights + targets.mean(0)
        # the residual of conjugate gradients is 1e-4, scores are of order 1
        np.testing.assert_allclose(each.scores(unseen.to(dtype)).numpy(), expected, atol=tolerance)


def test_a_kernel_readout_stands_equal_images() -> None:
    features, labels = problem(40)
    twice, both = features.repeat(3, 1), labels.repeat(3)
    for most in (200, 60):
        for each in kernel_path((twice.float(), both), 4, scaling_of(twice.float(), 1.0), 1.0, most=most):
            assert accuracy(each.scores(features.float()), labels) > 0.9
    same = torch.ones(5, 3)
    alone = kernel_path((same, torch.zeros(5, dtype=torch.int64)), 2, scaling_of(same, 1.0), 1.0)
    assert all(accuracy(each.scores(same), torch.zeros(5, dtype=torch.int64)) == 1.0 for each in alone)


def test_an_unfinished_kernel_readout_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_readout, "ITERATIONS", 1)
    features, labels = problem(400)
    with pytest.warns(UserWarning, match="kernel readout: relative residual .* after 1 iterations"):
        kernel_path((features, labels), 4, scaling_of(features, 0.5), 1.0, most=80)


def test_the_kernel_is_chosen_on_held_out_images() -> None:
    train, held_out = problem(60), problem(300)
    scaling = scaling_of(train[0], 0.5)
    readout, right = choose_kernel(train, held_out, 4, scaling)
    paths = [kernel_path(train, 4, scaling, width) for width in kernel_readout.WIDTHS]
    every = [accuracy(each.scores(held_out[0]), held_out[1]) for path in paths for each in path]
    assert right == max(every) > min(every)
    assert right == accuracy(readout.scores(held_out[0]), held_out[1])
    assert readout.width in kernel_readout.WIDTHS


def test_a_kernel_reads_what_no_plane_divides() -> None:
    """Four clusters at the corners of a square, opposite ones of one class."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(2, (200, 2), generator=generator).double()
    labels = (corners[:, 0] != corners[:, 1]).long()
    features = corners + 0.3 * torch.rand((200, 2), generator=generator, dtype=torch.float64)
    assert accuracy(ridge_path(features, labels, 2)[0].scores(features), labels) < 0.8
    readout, right = choose_kernel((features, labels), (features, labels), 2, scaling_of(features, 1.0))
    assert right == accuracy(readout.scores(features), labels) == 1.0


def test_neighbours_vote_as_scikit_learns(digits: Dataset) -> None:
    images = to_unit(digits.train_images, torch.float64).flatten(1)
    test = to_unit(digits.test_images, torch.float64).flatten(1)
    found = neighbours_accuracy((images, digits.train_labels), (test, digits.test_labels), 10, count=5)
    scaling = scaling_of(images, 0.5)
    oracle = KNeighborsClassifier(5, metric="cosine").fit(scaling(images).numpy(), digits.train_labels.numpy())
    expected = oracle.score(scaling(test).numpy(), digits.test_labels.numpy())
    assert found == pytest.approx(expected, abs=2 / len(test))  # ties of votes may be broken otherwise
    assert found > 0.9
