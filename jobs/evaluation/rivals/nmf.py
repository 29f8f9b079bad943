"""Nonnegative matrix factorisation of patches, encoded by nonnegative least squares.

    X ≈ Y H with Y, H ≥ 0;  encoding  y* = argmin over y ≥ 0 of ½ ‖x − Hᵀ y‖² + λ Σ y
                                         = argmin over y ≥ 0 of ½ yᵀ (H Hᵀ) y − yᵀ (H x − λ)

which is the dynamics of our layers with M = H Hᵀ, so the same solver solves it, to a residual. Patches are nonnegative:
raw, or normalised as for the other learners and split into positive and negative parts, x = [x̃⁺, x̃⁻] of length 2P.

Sources: Lee & Seung (1999); online: Lefèvre, Bach & Févotte (2011), scikit-learn's `MiniBatchNMF`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jobs.evaluation.learners import Cost, Shape
from jobs.evaluation.material import UnitImages
from jobs.evaluation.nonnegative import COUNTED_IMAGES, NonnegativeCodes
from jobs.evaluation.rivals.patches import PATCHES, PatchView, Preprocessing, draw_seed, encoded, fitted
from jobs.evaluation.rivals.visits import enough_passes
from simmatch.seeding import seeded

BATCH, PASSES, UPDATES = 1024, 10, 200

RESIDUAL = 2.0**-10
"""To which codes are solved; a power of two is the same number in every dtype."""


@dataclass(frozen=True)
class NMFSettings(Preprocessing):
    """Settings to choose from.

    Attributes
    ----------
    sparsity: λ over the number of values in x, scikit-learn's `alpha_W`: L1 penalty of codes, and of H in learning.
    """

    sparsity: float = 0.0


class NMF:
    """Learns H from `PATCHES` patches in `PASSES` passes, or `UPDATES` multiplicative updates.

    Attributes
    ----------
    components: [K, P or 2P], H; None before learning.
    lateral: [K, K], H Hᵀ; None before learning.
    """

    name = "nmf"
    candidates: ClassVar[tuple[NMFSettings, ...]] = (
        NMFSettings(contrast=False, whiten=False),
        NMFSettings(contrast_floor=0.1, whiten=False),
        NMFSettings(contrast_floor=0.03, whiten=False),
        NMFSettings(contrast_floor=0.03, whiten=False, sparsity=3e-4),
    )

    def __init__(self, shape: Shape, settings: NMFSettings, seed: int) -> None:
        self.shape, self.settings, self.seed = shape, settings, seed
        self.components: Tensor | None = None
        self.lateral: Tensor | None = None
        self._view: PatchView | None = None
        self._codes: NonnegativeCodes | None = None
        self._iterations = 0.0

    def fit(self, images: UnitImages) -> None:
        from sklearn.decomposition import MiniBatchNMF

        generator = seeded("nmf", self.seed)
        self._view = view = PatchView.of(images, self.shape, self.settings, generator)
        patches = self._nonnegative(view.sample(images, PATCHES, generator))
        model = MiniBatchNMF(
            self.shape.channels,
            init="random",
            batch_size=BATCH,
            max_iter=enough_passes(len(patches), BATCH, PASSES, UPDATES),
            tol=0.0,
            max_no_improvement=None,
            alpha_W=self.settings.sparsity,
            l1_ratio=1.0,
            random_state=draw_seed(generator),
        ).fit(patches.numpy())
        self.components = torch.from_numpy(model.components_).to(patches)
        self.lateral = self.components @ self.components.T
        few = self._drive(images[:COUNTED_IMAGES])
        self._codes = NonnegativeCodes(self.lateral, RESIDUAL)
        self._iterations = self._codes.mean_iterations(few)

    def _nonnegative(self, patches: Tensor) -> Tensor:
        """x̃ [n, P] → x: itself, or [n, 2P]."""
        if self.settings.raw:
            return patches
        return torch.cat([patches.clamp(min=0.0), patches.neg().clamp_(min=0.0)], dim=1)

    def _drive(self, images: Tensor) -> Tensor:
        """H x − λ, [K, N]."""
        view, components = fitted(self._view, self.name), fitted(self.components, self.name)
        penalty = self.settings.sparsity * components.shape[1]
        return (components @ self._nonnegative(view.all(images)).T).sub_(penalty)

    def maps(self, images: Tensor) -> Tensor:
        view, components = fitted(self._view, self.name), fitted(self.components, self.name)
        codes = fitted(self._codes, self.name)
        return encoded(images, view.config, sum(components.shape), lambda part: codes(self._drive(part)))

    def cost(self, image_size: tuple[int, int]) -> Cost:
        """The solver's work is what it was, per column, on the first images learnt from."""
        view, components = fitted(self._view, self.name), fitted(self.components, self.name)
        lateral = fitted(self.lateral, self.name)
        height, width = view.config.map_size(image_size)
        whitening = 0 if view.whitening is None else view.whitening.matrix.numel()
        per_column = whitening + components.numel() + self._iterations * lateral.numel()
        return Cost(
            trained=components.numel() + view.parameters,
            inference=components.numel() + lateral.numel() + view.parameters,
            operations=round(height * width * per_column),
        )
