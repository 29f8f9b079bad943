"""Readouts that learn online: after every record they are what a fit to all records so far would be.

Both are solved from the same sums, of `simmatch.moments.ClassMoments`: counts n_c and means μ_c of classes, and the
scatter W within classes, with weights γ^(labelled records since). With n = Σ n_c, m the mean of all, S = W + Σ n_c
(μ_c − m)(μ_c − m)ᵀ, D the deviations of the features, and means and features standardised by m and D:

    discriminant   (D⁻¹ W D⁻¹ / n + λ I) A = [μ_c],   score_c = A_cᵀ φ − ½ A_cᵀ μ_c + log p_c
    ridge          (D⁻¹ S D⁻¹ / n + λ I) A = [2 n_c μ_c / n],   score_c = A_cᵀ φ + 2 n_c / n − 1   (`fit_ridge`)

with λ = penalty + initial_penalty · F / n: it is what counts while there are few labels. p_c is the share of a class
after `PRIOR` records of each. A softmax of the scores of the discriminant estimates probabilities.

*Exact*: sums, weights, forgetting, new classes. Neither needs anything of the records before the first of a class (of
the ridge: their target is −1, which adds nothing to sums of centred targets).
*Lazy*: D and λ n, which set the penalty alone, are those at the last factorisation; numbers of records say when it is
made. Between two of them, records are rows Z added to a factorised G = L Lᵀ, by the Woodbury identity:

    (g G + ZᵀZ)⁻¹ = L⁻ᵀ (I − Y (g I + YᵀY)⁻¹ Yᵀ) L⁻¹ / g,   Y = L⁻¹ Zᵀ,   g = γ^(labelled records since)

so that a record costs F² operations and a factorisation F³ / 3. Nothing is updated in place for long: rounding errors
do not add up.

Source: ridge: Hoerl & Kennard (1970). Discriminant: Fisher (1936); with a penalty Friedman, "Regularized discriminant
analysis" (1989); online Pang, Ozawa & Kasabov, "Incremental linear discriminant analysis for classification of data
streams" (2005). Woodbury (1950).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.linalg import solve_triangular

from simmatch.config import Frozen, NonNegativeFloat, NonNegativeInt, PositiveFloat
from simmatch.labels import UNLABELLED
from simmatch.moments import ClassMoments
from simmatch.online.reservoir import Reservoir
from simmatch.online.state import State
from simmatch.readout import LinearClassifier

MOST_PENDING = 128
"""Most rows that wait for the next factorisation."""

PRIOR = 10.0
"""Records of each class that are taken to have been seen, in the share of a class."""

NEVER = -1e6
"""Score of a class without records."""

ENCODED = 500
"""Inputs that are encoded at a time."""


class ReadoutConfig(Frozen):
    """How a readout learns online.

    >>> ReadoutConfig(forgetting=0.999).kind
    'discriminant'
    """

    kind: Literal["discriminant", "ridge"] = "discriminant"
    """`discriminant`: linear discriminant analysis. `ridge`: least squares on ±1 targets."""

    penalty: PositiveFloat = 0.001
    """Part of λ, for standardised features, that stays."""

    initial_penalty: NonNegativeFloat = 0.1
    """Part of λ that falls: times F / n, features over labelled records."""

    forgetting: float = Field(default=1.0, gt=0, le=1)
    """γ, the factor by which a labelled record makes all earlier ones count less. 1: none is forgotten."""

    reservoir: NonNegativeInt = 0
    """Records kept, a sample of all labelled ones that is balanced over classes, to compute the sums anew once features
    have moved."""


class OnlineReadout:
    """Class scores of features, learnt from labelled records as they come.

    Parameters
    ----------
    features: F.
    config: how it learns.
    seed: of the reservoir.

    >>> readout = OnlineReadout(2, ReadoutConfig())
    >>> readout.learn(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.1, 1.0]]), torch.tensor([0, 1, 0]))
    >>> readout.classes, readout.scores(torch.tensor([[0.0, 1.0], [0.9, 0.0]])).argmax(dim=1).tolist()
    (2, [0, 1])
    >>> readout.learn(torch.tensor([[5.0, 5.0]]), torch.tensor([2]))  # a new class
    >>> readout.scores(torch.tensor([[5.0, 5.0]])).argmax(dim=1).tolist()
    [2]
    """

    def __init__(self, features: int, config: ReadoutConfig, *, seed: int = 0) -> None:
        self.config = config
        self.features = features
        self.reservoir = Reservoir(config.reservoir, seed)
        self._forget()

    def _forget(self) -> None:
        self._moments = ClassMoments(self.features)  # whose scatter lacks the pending rows
        self._pending = torch.zeros(0, self.features, dtype=torch.float64)  # Z, not standardised
        self._solved = self._pending  # Yᵀ
        self._factor = torch.zeros(0, 0, dtype=torch.float64)  # L
        self._deviation = torch.ones(self.features, dtype=torch.float64)  # D
        self._count = 0.0  # n at the last factorisation
        self._kept = 1.0  # g
        self._classifier: LinearClassifier | None = None

    @property
    def classes(self) -> int:
        """Number of classes so far."""
        return len(self._moments.counts)

    @property
    def classifier(self) -> LinearClassifier | None:
        """What gives the scores, a new object whenever it changes; None before there are two classes."""
        if self._classifier is None and self.classes > 1:
            self._classifier = self._solution()
        return self._classifier

    def scores(self, features: Tensor) -> Tensor | None:
        """Scores [B, classes] of features [B, F], in float64; None before there are two classes."""
        return None if self.classifier is None else self.classifier.scores(features.cpu())

    def learn(
        self, features: Tensor, labels: Tensor, weights: Tensor | None = None, inputs: Tensor | None = None
    ) -> None:
        """Learn from records in their order.

        Parameters
        ----------
        features: [B, F].
        labels: [B], integers; rows that are `UNLABELLED` are ignored.
        weights: [B], ≥ 0, of the records; None: 1 each. A record of weight 0 is ignored.
        inputs: [B, …], what `recompute` encodes; needed where there is a reservoir.

        Raises
        ------
        ValueError
            Shapes do not agree, values are not finite, a weight is negative, or a reservoir gets no inputs; nothing has
            been learnt.
        """
        features, labels = features.cpu(), labels.cpu()
        self._check(features, len(labels))
        if self.config.reservoir and (inputs is None or len(inputs) != len(labels)):
            given = "None" if inputs is None else str(list(inputs.shape))
            raise ValueError(
                f"inputs: expected those of the features, [{len(labels)}, …], for the reservoir, got {given}"
            )
        known = labels != UNLABELLED
        if weights is not None:
            _check_weights(weights.cpu(), len(labels))
            known &= weights.cpu() > 0
        if not bool(known.any()):
            return
        labels, weights = labels[known].long(), None if weights is None else weights.cpu()[known]
        if int(labels.min()) < 0:
            raise ValueError(f"labels: expected classes from 0 or {UNLABELLED}, got {int(labels.min())}")
        if self.config.reservoir and inputs is not None:
            self.reservoir.add(inputs.cpu()[known], labels, weights)
        if self.config.forgetting < 1:
            self._fade(self.config.forgetting ** len(labels))
            weights = self._remembered(torch.arange(len(labels) - 1, -1, -1), weights)
        self._add(features[known], labels, weights)

    def _check(self, features: Tensor, count: int) -> None:
        if features.shape != (count, self.features):
            raise ValueError(f"features: expected {[count, self.features]}, got {list(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError("features: expected finite values, got others")

    def _remembered(self, ages: Tensor, weights: Tensor | None) -> Tensor:
        """Weights of records after `ages` [n] others: float64."""
        left = self.config.forgetting ** ages.double()
        return left if weights is None else left * weights.double()

    def _add(self, features: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        self._classifier = None
        # rows may wait for a quarter of the records factorised, so that the penalty keeps up with their number
        if len(self._pending) + len(labels) <= min(self._count / 4, MOST_PENDING, self.features / 8):
            rows = self._moments.join(features, labels, weights)
            scaled = rows / (self._deviation * self._count**0.5)
            self._pending = torch.cat([self._pending, rows])
            self._solved = torch.cat([self._solved, solve_triangular(self._factor, scaled.T, upper=False).T])
        else:
            self._moments.scatter.addmm_(self._pending.T, self._pending)
            self._moments.add(features, labels, weights)
            self._factorise()

    def _fade(self, kept: float) -> None:
        self._moments.fade(kept)
        self._pending = self._pending * kept**0.5
        self._solved = self._solved * kept**0.5
        self._kept *= kept

    def _factorise(self) -> None:
        count, mean = self._moments.count, self._moments.mean
        between = self._moments.counts @ (self._moments.means - mean).square()
        deviation = ((self._moments.scatter.diagonal() + between) / count).sqrt()
        self._deviation = torch.where(deviation > 0, deviation, 1.0)
        gram = self._moments.scatter / (self._deviation * count)
        gram /= self._deviation[:, None]
        gram.diagonal().add_(self.config.penalty + self.config.initial_penalty * self.features / count)
        self._factor = torch.linalg.cholesky(gram).contiguous()  # in the order of a state that has been loaded
        self._count, self._kept = count, 1.0
        self._pending, self._solved = self._pending[:0], self._solved[:0]

    def _solution(self) -> LinearClassifier:
        counts, count, mean = self._moments.counts, self._moments.count, self._moments.mean
        means = torch.where(counts[:, None] > 0, self._moments.means - mean, 0.0) / self._deviation
        half, rows = solve_triangular(self._factor, means.T, upper=False), self._solved
        if self.config.kind == "ridge":  # S instead of W
            rows = torch.cat([rows, (half * (counts / self._count).sqrt()).T])
        inner = rows @ rows.T
        inner.diagonal().add_(self._kept)
        matrix = solve_triangular(self._factor.T, half - rows.T @ torch.linalg.solve(inner, rows @ half), upper=True)
        matrix /= self._kept
        if self.config.kind == "ridge":
            matrix = matrix * (2 * counts / self._count)
            bias = 2 * counts / count - 1
        else:
            matrix = matrix * (count / self._count)
            prior = ((counts + PRIOR) / (counts + PRIOR).sum()).log()
            bias = torch.where(counts > 0, prior - 0.5 * (means.T * matrix).sum(dim=0), NEVER)
        return LinearClassifier(torch.arange(self.classes), mean, self._deviation, matrix, bias)

    def recompute(self, encode: Callable[[Tensor], Tensor]) -> None:
        """Forget all sums, and learn from the reservoir as `encode`, inputs → features, sees it now.

        Its records count by their weights, and by their ages as forgetting has it: the newest one held is of age 0.

        >>> readout, x = OnlineReadout(2, ReadoutConfig(reservoir=10)), torch.rand(30, 2)
        >>> readout.learn(x, torch.arange(30) % 3, inputs=x)
        >>> readout.recompute(lambda inputs: 2 * inputs)
        >>> readout.classes
        3
        """
        inputs, labels, classes = self.reservoir.inputs, self.reservoir.labels, self.classes
        if inputs is None:
            return
        order = self.reservoir.numbers.argsort()  # oldest first
        features = torch.cat([encode(part).cpu() for part in torch.split(inputs[order], ENCODED)])
        self._check(features, len(order))
        self._forget()
        self._moments.grow(classes)
        ages = self.reservoir.ages - self.reservoir.ages.min()  # γ to the power of all ages may be 0
        self._add(features, labels[order], self._remembered(ages, self.reservoir.weights)[order])

    @property
    def nbytes(self) -> int:
        """Bytes of state: at most 8 (2 F² + 256 F + classes F) for F features, and those of the reservoir."""
        return sum(value.nbytes for value in self._tensors().values()) + self.reservoir.nbytes

    def state(self) -> State:
        """Everything that changes, in tensors of its own."""
        numbers = {"count": self._count, "kept": self._kept}
        state = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        state |= {name: value.clone() for name, value in self._tensors().items()}
        return state | {f"reservoir.{name}": value for name, value in self.reservoir.state().items()}

    def _tensors(self) -> State:
        return {
            "counts": self._moments.counts,
            "means": self._moments.means,
            "scatter": self._moments.scatter,
            "pending": self._pending,
            "solved": self._solved,
            "factor": self._factor,
            "deviation": self._deviation,
        }

    def restore(self, state: State) -> None:
        """Set what `state` gave: from then on the same bits.

        Raises
        ------
        ValueError
            It is of another number of features.
        """
        if (given := state["scatter"].shape[0]) != self.features:
            raise ValueError(f"scatter: expected {self.features} features, got {given} in the state")
        self._moments.counts, self._moments.means = state["counts"].clone(), state["means"].clone()
        self._moments.scatter = state["scatter"].clone()
        self._pending, self._solved = state["pending"].clone(), state["solved"].clone()
        self._factor, self._deviation = state["factor"].clone(), state["deviation"].clone()
        self._count, self._kept, self._classifier = float(state["count"]), float(state["kept"]), None
        prefix = "reservoir."
        kept = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        self.reservoir.restore(kept)


def _check_weights(weights: Tensor, count: int) -> None:
    if weights.shape != (count,):
        raise ValueError(f"weights: expected {[count]}, one per record, got {list(weights.shape)}")
    valid = weights.isfinite() & (weights >= 0)
    if not bool(valid.all()):
        raise ValueError(f"weights: expected finite numbers from 0 on, got {float(weights[~valid][0]):g}")
