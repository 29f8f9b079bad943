"""How far a record is from what was seen lately: a score, a threshold of a stated rate of false alarms, and weights.

    score       s = min_j ‖g − g_j‖, g = f / ‖f‖^½, g_j in a memory of earlier records
    threshold   t = the k-th smallest of the last n scores, k = ⌈(1 − a)(n + 1)⌉, without those beyond the far fence
    far fence   log s > q₃ + 3 (q₃ − q₁), quartiles of the logarithms of the last n scores
    weight      1 where s ≤ t, (t / s)^`slope` above, 0 beyond the far fence

f are the features of a record. The length of g is the root of that of f: distances of f itself, and angles, tell
held-out classes less well (`LOG.md`), and moments of f, of any kind, far less.

*What the threshold promises.* If the last n scores and the next one are exchangeable and none is beyond the fence, the
next one is above t with a probability of at most a, for any n and any distribution (split conformal prediction). Scores
of a stream are not quite exchangeable: memory and features change, and neighbouring windows resemble each other. Scores
between t and the fence that come from outliers only raise t, so there are fewer false alarms and fewer finds.

The memory holds records up to the threshold; each takes the place of a random one, so that what is held is `memory`
records old on average. Where most of the last records are above the threshold, they are the new normal: they weigh 1
and are remembered. So threshold and memory follow a drift, and not outliers. A new kind of record of which some are
below the threshold is known after some tens of them.

Sources: Vovk, Gammerman & Shafer, "Algorithmic learning in a random world" (2005), for the threshold; Tukey,
"Exploratory data analysis" (1977), for the fence.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from simmatch.config import Frozen, NonNegativeFloat, PositiveInt
from simmatch.online.state import State
from simmatch.seeding import folded, stream, uniform

Share = Annotated[float, Field(gt=0, lt=1)]

FAR = 3.0
"""Interquartile ranges above the upper quartile beyond which a score is far out, in Tukey's words."""

CLOSE = 0.03
"""Score, in lengths of the record's own g, below which it is computed in float64: ‖a‖² + ‖b‖² − 2 aᵀb loses digits."""

LATEST = 100
"""Scores among which those above the threshold may be the majority."""


class NoveltyConfig(Frozen):
    """How novel records are told.

    >>> NoveltyConfig(false_alarm_rate=0.001).calibration
    1000
    """

    memory: PositiveInt = 1000
    """Records whose features are held to compare with: 4 · memory · F bytes."""

    false_alarm_rate: Share = 0.01
    """a, the share of ordinary records that may be above the threshold."""

    calibration: PositiveInt = 1000
    """n, the last scores that give the threshold. It needs at least 1/a − 1 of them."""

    slope: NonNegativeFloat = 1.0
    """Weight (t / s)^slope of a record with a score s above the threshold t. 0: only those beyond the fence weigh
    less."""

    majority: Share = 0.5
    """Share of the last 100 records above the threshold from which on they are the new normal."""

    seed: int = 0
    """Of the places in the memory."""


class NoveltyDetector:
    """Scores records, calibrates the threshold, weighs what is to be learnt.

    Parameters
    ----------
    features: F, values of the features of a record.
    config: its settings.

    Attributes
    ----------
    far: records so far that weighed less than 1.

    Per batch: `score`, then `weights` of the scores, then `learn`.

    >>> generator = torch.Generator().manual_seed(0)
    >>> detector = NoveltyDetector(3, NoveltyConfig())
    >>> for _ in range(10):
    ...     usual = torch.tensor([1.0, 1.0, 0.0]) + 0.2 * torch.rand(50, 3, generator=generator)
    ...     detector.learn(usual, detector.score(usual))
    >>> scores = detector.score(torch.tensor([[1.1, 1.1, 0.1], [0.0, 0.0, 1.0]]))
    >>> (scores > detector.threshold).tolist(), detector.weights(scores).tolist()
    ([False, True], [1.0, 0.0])
    """

    def __init__(self, features: int, config: NoveltyConfig) -> None:
        self.config = config
        self.far = 0
        self._memory = torch.zeros(config.memory, features)
        self._remembered = 0
        self._scores = torch.zeros(0, dtype=torch.float64)  # the last ones, oldest first
        self._calibrate()

    def score(self, features: Tensor) -> Tensor:
        """Scores s ≥ 0 [B] of records with features [B, F], float64; NaN before anything is remembered.

        >>> NoveltyDetector(3, NoveltyConfig()).score(torch.rand(2, 3))
        tensor([nan, nan], dtype=torch.float64)
        """
        held = self._memory[: min(self._remembered, self.config.memory)]
        if len(held) == 0:
            return torch.full((len(features),), math.nan, dtype=torch.float64)
        shortened = _shortened(features)
        scores = torch.cdist(shortened, held).amin(dim=1).double()
        close = scores < CLOSE * torch.linalg.vector_norm(shortened, dim=1)
        if bool(close.any()):
            scores[close] = torch.cdist(shortened[close].double(), held.double()).amin(dim=1)
        return scores

    @property
    def threshold(self) -> float | None:
        """t, above which a record is novel; None before there are enough scores.

        >>> NoveltyDetector(3, NoveltyConfig()).threshold is None
        True
        """
        return self._threshold

    def weights(self, scores: Tensor) -> Tensor:
        """How much each record counts where others learn, [B] in [0, 1], float32.

        >>> NoveltyDetector(3, NoveltyConfig()).weights(torch.tensor([0.5]))
        tensor([1.])
        """
        if self._threshold is None or self._majority:
            return torch.ones(len(scores))
        weights = (self._threshold / scores.clamp(min=self._threshold)) ** self.config.slope
        weights = torch.where(scores > self._fence, torch.zeros_like(weights), weights)
        return weights.nan_to_num(1.0).float()

    def learn(self, features: Tensor, scores: Tensor) -> None:
        """Remember what is not novel, and calibrate the threshold.

        Parameters
        ----------
        features: [B, F], of a batch.
        scores: [B], what `score` gave for it.
        """
        known = torch.ones(len(scores), dtype=torch.bool)
        if self._threshold is not None and not self._majority:
            known = ~(scores > self._threshold)
            self.far += int((self.weights(scores) < 1).sum())
        shortened = _shortened(features[known.to(features.device)])
        self._remember(shortened[shortened.isfinite().all(dim=1)])
        scores = scores[scores.isfinite()].double().cpu()
        self._scores = torch.cat([self._scores, scores])[-self.config.calibration :]
        self._calibrate()

    def _remember(self, shortened: Tensor) -> None:
        if len(shortened) == 0:
            return
        size, numbers = self.config.memory, self._remembered + torch.arange(len(shortened))
        drawn = (uniform(folded(stream("novelty", self.config.seed), numbers)) * size).long()
        places = torch.where(numbers < size, numbers, drawn)
        last = {int(place): row for row, place in enumerate(places)}  # of two in one place the later one stays
        self._memory[list(last)] = shortened[list(last.values())]
        self._remembered += len(shortened)

    def _calibrate(self) -> None:
        """Threshold, fence, and whether most of the last records are novel: functions of the last scores."""
        self._threshold: float | None = None
        self._fence, self._majority = math.inf, False
        scores, rate = self._scores, self.config.false_alarm_rate
        if math.ceil((1 - rate) * (len(scores) + 1)) > len(scores):
            return
        logs = scores.clamp(min=torch.finfo(torch.float32).eps).log()
        first, third = torch.quantile(logs, torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
        limit = third + FAR * (third - first)
        inside = scores[logs <= limit].sort().values  # never empty, which exp(limit) could be by rounding
        place = min(math.ceil((1 - rate) * (len(inside) + 1)), len(inside))
        self._threshold = float(inside[place - 1])
        self._fence = max(math.exp(limit), self._threshold)
        self._majority = float((scores[-LATEST:] > self._threshold).double().mean()) > self.config.majority

    @property
    def nbytes(self) -> int:
        """Bytes held.

        >>> NoveltyDetector(3, NoveltyConfig()).nbytes
        12000
        """
        return self._memory.nbytes + self._scores.nbytes

    def state(self) -> State:
        """Everything that changes.

        >>> sorted(NoveltyDetector(3, NoveltyConfig()).state())
        ['far', 'memory', 'remembered', 'scores']
        """
        held = self._memory[: min(self._remembered, self.config.memory)].clone()
        counts = {"far": torch.tensor(self.far), "remembered": torch.tensor(self._remembered)}
        return {"memory": held, "scores": self._scores.clone()} | counts

    def restore(self, state: State) -> None:
        """Set what `state` gave.

        Raises
        ------
        ValueError
            It is of more records or another number of features than this memory has.

        >>> detector = NoveltyDetector(3, NoveltyConfig())
        >>> detector.restore(NoveltyDetector(3, NoveltyConfig()).state())
        """
        (most, size), given = self._memory.shape, list(state["memory"].shape)
        if given[0] > most or given[1] != size:
            raise ValueError(f"memory: expected at most {most} records of {size} features, got {given} in the state")
        self._memory[: given[0]] = state["memory"]
        self._scores = state["scores"].clone()
        self.far, self._remembered = int(state["far"]), int(state["remembered"])
        self._calibrate()


def _shortened(features: Tensor) -> Tensor:
    """g = f / ‖f‖^½ of features f [B, F], in float32 on the host; zero stays zero."""
    f = features.float().cpu()
    length: Tensor = torch.linalg.vector_norm(f, dim=1, keepdim=True)
    return f / length.sqrt().clamp(min=1e-12)
