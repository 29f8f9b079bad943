"""Ridge and logistic readouts against oracles, their choice, and the neighbours' vote."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as ScikitRidge
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from jobs.evaluation.readouts import (
    PENALTIES,
    accuracy_of,
    choose,
    choose_ridge,
    logistic_path,
    neighbours_accuracy,
    ridge_path,
    scaling_of,
)
from simmatch.data import Dataset, to_unit


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
        accuracy_of(each.scores(held_out[0]), held_out[1])
        for power in (1.0, 0.5)
        for each in ridge_path(*train, 4, power=power)
    ]
    assert right == max(every) > min(every)
    assert right == accuracy_of(readout.scores(held_out[0]), held_out[1])
    assert readout.penalty in PENALTIES
    assert readout.parameters == 30 * 4 + 4


def test_of_equals_the_stronger_penalty_is_taken() -> None:
    features = torch.eye(4, dtype=torch.float64)
    readout, right = choose_ridge((features, torch.arange(4)), (features, torch.arange(4)), 4)
    assert right == 1.0
    assert readout.penalty == max(PENALTIES)


def test_a_label_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="expected classes 0 to 3"):
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
    assert accuracy_of(readout.scores(features), labels + 1) > 0.8


def test_a_logistic_readout_asks_for_three_classes() -> None:
    with pytest.raises(ValueError, match=r"expected at least 3 classes, got \[0, 2\]"):
        logistic_path(torch.eye(4), torch.tensor([0, 2, 0, 2]), 3, scaling_of(torch.eye(4), 1.0), penalties=(1.0,))


def test_of_readouts_the_best_on_held_out_images_is_chosen() -> None:
    train, held_out = problem(40), problem(300)
    path = ridge_path(*train, 4)
    best, right = choose(path, held_out)
    assert right == max(accuracy_of(each.scores(held_out[0]), held_out[1]) for each in path)
    assert any(best is each for each in path)


def test_neighbours_vote_as_scikit_learns(digits: Dataset) -> None:
    images = to_unit(digits.train_images, torch.float64).flatten(1)
    test = to_unit(digits.test_images, torch.float64).flatten(1)
    found = neighbours_accuracy((images, digits.train_labels), (test, digits.test_labels), 10, count=5)
    scaling = scaling_of(images, 0.5)
    oracle = KNeighborsClassifier(5, metric="cosine").fit(scaling(images).numpy(), digits.train_labels.numpy())
    expected = oracle.score(scaling(test).numpy(), digits.test_labels.numpy())
    assert found == pytest.approx(expected, abs=2 / len(test))  # ties of votes may be broken otherwise
    assert found > 0.9
