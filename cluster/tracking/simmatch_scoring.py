"""How MLflow scores images with a logged model: `mlflow models serve`, `mlflow models predict`, `mlflow.pyfunc`.

A copy of this file travels with every logged model: loading one takes torch and mlflow, and nothing of this project.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn


class Scorer:
    """A module with one input and named outputs, for arrays.

    Parameters
    ----------
    module: `[B, C, H, W]` in [0, 1] → a dictionary of tensors, such as `features` `[B, F]` and `scores` `[B, classes]`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._dtype = dtype_of(module)

    def predict(self, images: NDArray[Any], params: dict[str, Any] | None = None) -> dict[str, NDArray[Any]]:
        """Outputs by name for images `[B, C, H, W]` of any floating dtype; MLflow has compared their shape already.

        params: of MLflow's interface; there are none.
        """
        with torch.no_grad():
            outputs = self._module(torch.from_numpy(np.ascontiguousarray(images)).to(self._dtype))
        return {name: values.numpy() for name, values in outputs.items()}


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of a module's floating weights: the first one's."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def _load_pyfunc(path: str) -> Scorer:
    """What MLflow calls; `path` is the folder `data` of the logged model.

    MLflow's own loader refuses an archive that holds a pickle.
    """
    import mlflow.pytorch

    return Scorer(mlflow.pytorch.load_model(Path(path).absolute().parent.as_uri()))
