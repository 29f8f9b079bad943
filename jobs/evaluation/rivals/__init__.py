"""Learners of features that similarity matching is compared with; all satisfy `jobs.evaluation.learners.Learner`.

To add one write a class with four `candidates` for its settings, and an entry of `RIVALS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from jobs.evaluation.learners import Learner, Shape
from jobs.evaluation.rivals.autoencoder import Autoencoder
from jobs.evaluation.rivals.hebbian_wta import HebbianWTA
from jobs.evaluation.rivals.kmeans import KMeans
from jobs.evaluation.rivals.nmf import NMF
from jobs.evaluation.rivals.pynsm import Pynsm
from jobs.evaluation.rivals.random_filters import Exemplars, Gaussian, Random
from jobs.evaluation.rivals.sparse import SparseExemplars, SparseHebbian, SparseKMeans


class Rival(Learner, Protocol):
    """A class of learners with the settings that are tried.

    Parameters
    ----------
    shape: geometry that all share.
    settings: one of `candidates`, or another of their class.
    seed: of every random draw.
    """

    candidates: ClassVar[tuple[Any, ...]]

    def __init__(self, shape: Shape, settings: Any, seed: int) -> None: ...


RIVALS: Mapping[str, type[Rival]] = MappingProxyType(
    {
        rival.name: rival
        for rival in (
            Autoencoder,
            NMF,
            KMeans,
            HebbianWTA,
            Random,
            Gaussian,
            Exemplars,
            SparseKMeans,
            SparseHebbian,
            SparseExemplars,
            Pynsm,
        )
    }
)
"""Rows of the comparison by name."""
