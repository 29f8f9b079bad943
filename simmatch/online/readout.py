"""A ridge readout that learns online: after every record it is the ridge regression of all records so far.

With S the scatter of features and R that with their targets (`simmatch.moments`), both with weights γ^(labelled records
since), and D the deviations of the features, the scores are those of `simmatch.readout.ridge_of_moments`:

    A = (D⁻¹ S D⁻¹ / n + λ I)⁻¹ D⁻¹ R / n

*Exact*: sums, weights, forgetting, new classes. The target of a class is −1 for all records before its first, which
adds nothing to S and R, and a mean of −1: so nothing of earlier records is needed.
*Lazy*: D and n, which set the penalty λ n D² alone, are those at the last factorisation; when that is made depends on
numbers of records. Between two of them, records are rows Z added to a factorised G, by the Woodbury identity:

    (g G + ZᵀZ)⁻¹ = (G⁻¹ − U (g I + Z U)⁻¹ Uᵀ) / g,   U = G⁻¹ Zᵀ,   g = γ^(labelled records since)

so that a record costs F² operations and a factorisation F³ / 3. Nothing is updated in place for long: rounding errors
do not add up.

Source: Hoerl & Kennard (1970); Woodbury (1950); forgetting as in recursive least squares (Haykin, "Adaptive filter
theory").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from simmatch.config import Frozen, NonNegativeInt, PositiveFloat
from simmatch.labels import UNLABELLED
from simmatch.moments import Moments
from simmatch.online.reservoir import Reservoir, State
from simmatch.readout import RIDGE, LinearClassifier, standardised

MOST_PENDING = 256
"""Most rows that wait for the next factorisation."""


class ReadoutConfig(Frozen):
    """How a readout learns online.

    >>> ReadoutConfig(forgetting=0.999).reservoir
    0
    """

    penalty: PositiveFloat = RIDGE
    """λ, for standardised features."""

    forgetting: float = Field(default=1.0, gt=0, le=1)
    """γ, the factor by which a labelled record makes all earlier ones count less. 1: none is forgotten."""

    reservoir: NonNegativeInt = 0
    """Records kept, a random sample of all labelled ones, to compute the sums anew once features have moved."""


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
        features = self.features
        self._moments = Moments(features)  # of features and targets; its scatter lacks the pending rows
        self._pending = self._moments.mean.new_zeros(0, features)  # Z
        self._solved = self._moments.mean.new_zeros(features, 0)  # U
        self._factor = self._moments.mean.new_zeros(0, 0)
        self._matrix = self._moments.mean.new_zeros(features, 0)  # A of the last factorisation
        self._deviation = self._moments.mean.new_ones(features)
        self._count = 0.0  # n at the last factorisation
        self._kept = 1.0  # g
        self._classifier: LinearClassifier | None = None

    @property
    def classes(self) -> int:
        """Number of classes so far."""
        return len(self._moments.mean) - self.features

    def scores(self, features: Tensor) -> Tensor | None:
        """Scores [B, classes] of features [B, F], in float64; None before there are two classes."""
        if self.classes < 2:
            return None
        if self._classifier is None:
            self._classifier = self._solution()
        return self._classifier.scores(features)

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
            Shapes do not agree, or a reservoir gets no inputs.
        """
        if features.shape != (len(labels), self.features):
            raise ValueError(f"features: expected {[len(labels), self.features]}, got {list(features.shape)}")
        if self.config.reservoir and inputs is None:
            raise ValueError("inputs: expected those of the features, for the reservoir, got None")
        known = labels != UNLABELLED if weights is None else (labels != UNLABELLED) & (weights > 0)
        if not bool(known.any()):
            return
        labels = labels[known].long()
        self._add(features[known], labels, None if weights is None else weights[known])
        if self.config.reservoir and inputs is not None:
            self.reservoir.add(inputs[known], labels)

    def _add(self, features: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        self._classifier = None
        if (more := int(labels.max()) + 1 - self.classes) > 0:
            self._moments.widen(more, -1.0)
            self._pending = torch.nn.functional.pad(self._pending, (0, more), value=0.0)
            self._matrix = torch.nn.functional.pad(self._matrix, (0, more))
        rows = torch.cat([features.double(), 2.0 * torch.nn.functional.one_hot(labels, self.classes) - 1.0], dim=1)
        kept = self.config.forgetting ** len(rows)
        if kept < 1:
            ages = torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64)
            weights = self.config.forgetting**ages * (1.0 if weights is None else weights.double())
        self._fade(kept)
        if len(self._pending) + len(rows) < self._room:
            self._wait(self._moments.join(rows, weights))
        else:
            self._moments.scatter.addmm_(self._pending.T, self._pending)
            self._moments.add(rows, weights)
            self._factorise()

    @property
    def _room(self) -> float:
        """Rows that may wait: a quarter of the records factorised, so that the penalty keeps up with their number."""
        return min(self._count / 4, MOST_PENDING, self.features / 4)

    def _fade(self, kept: float) -> None:
        if kept < 1:
            self._moments.fade(kept)
            self._pending *= kept**0.5
            self._solved *= kept**0.5
            self._kept *= kept

    def _wait(self, rows: Tensor) -> None:
        scaled = rows[:, : self.features] / (self._deviation * self._count**0.5)
        self._pending = torch.cat([self._pending, rows])
        self._solved = torch.cat([self._solved, torch.cholesky_solve(scaled.T, self._factor)], dim=1)

    def _factorise(self) -> None:
        gram, right, self._deviation = standardised(self._moments.copy(), self.features)
        gram.diagonal().add_(self.config.penalty)
        self._factor = torch.linalg.cholesky(gram)
        self._matrix = torch.cholesky_solve(right, self._factor)
        self._count, self._kept = self._moments.count, 1.0
        self._pending, self._solved = self._pending[:0], self._solved[:, :0]

    def _solution(self) -> LinearClassifier:
        size = self.features
        matrix = self._matrix
        if len(self._pending):
            pending, targets = self._pending[:, :size] / self._deviation, self._pending[:, size:] / self._count**0.5
            pending = pending / self._count**0.5
            kept = self._kept
            matrix = kept * matrix + self._solved @ targets
            inner = pending @ self._solved
            inner.diagonal().add_(kept)
            matrix = (matrix - self._solved @ torch.linalg.solve(inner, pending @ matrix)) / kept
        mean = self._moments.mean
        return LinearClassifier(torch.arange(self.classes), mean[:size], self._deviation, matrix, mean[size:])

    def recompute(self, encode: Callable[[Tensor], Tensor]) -> None:
        """Forget all sums, and learn from the reservoir as `encode`, inputs → features, sees it now."""
        inputs, labels, classes = self.reservoir.inputs, self.reservoir.labels, self.classes
        if inputs is None:
            return
        self._forget()
        self._moments.widen(classes, -1.0)
        self._matrix = torch.nn.functional.pad(self._matrix, (0, classes))
        self._pending = torch.nn.functional.pad(self._pending, (0, classes))
        self._add(torch.cat([encode(part) for part in torch.split(inputs, 500)]), labels, None)

    @property
    def nbytes(self) -> int:
        """Bytes of state: at most 8 (2 F² + 512 F) for F features, and those of the reservoir."""
        return sum(value.nbytes for value in self.state().values())

    def state(self) -> State:
        """Everything that changes, as tensors."""
        numbers = {"moments.count": self._moments.count, "count": self._count, "kept": self._kept}
        tensors = {
            "moments.mean": self._moments.mean,
            "moments.scatter": self._moments.scatter,
            "pending": self._pending,
            "solved": self._solved,
            "factor": self._factor,
            "matrix": self._matrix,
            "deviation": self._deviation,
        }
        kept = {f"reservoir.{name}": value for name, value in self.reservoir.state().items()}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()} | tensors | kept

    def restore(self, state: State) -> None:
        """Set what `state` gave: from then on the same bits."""
        self._moments.count = float(state["moments.count"])
        self._moments.mean, self._moments.scatter = state["moments.mean"].clone(), state["moments.scatter"].clone()
        self._pending, self._solved = state["pending"].clone(), state["solved"].clone()
        self._factor, self._matrix = state["factor"].clone(), state["matrix"].clone()
        self._deviation, self._classifier = state["deviation"].clone(), None
        self._count, self._kept = float(state["count"]), float(state["kept"])
        prefix = "reservoir."
        kept = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        self.reservoir.restore(kept)
