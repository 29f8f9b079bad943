"""Faults of one rank at every phase of an update."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding import sharing

WEIGHTS = ("feedforward", "lateral", "label")


class InjectedError(RuntimeError):
    """What an owner meets on purpose."""


def fail(*_: Any, **__: Any) -> Any:
    raise InjectedError("injected")


FUNCTIONS = ("batch_drive", "batch_statistics", "with_totals")


def fail_in_this_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A function that sharing calls fails for the owner of this thread alone."""
    original, guilty = getattr(sharing, name), threading.get_ident()

    def function(*arguments: Any, **options: Any) -> Any:
        return (fail if threading.get_ident() == guilty else original)(*arguments, **options)

    monkeypatch.setattr(sharing, name, function)


def damage(
    layer: SimilarityMatchingConv2d, kind: str, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let this owner alone fail at one phase of its next update."""
    if kind in WEIGHTS:
        layer.get_buffer(kind)[-1].view(-1)[0] = torch.nan
    elif kind == "images":
        images.fill_(torch.nan)
    elif kind == "labels":
        labels.fill_(77)
    elif kind == "solver":
        layer.sharing._solver.solve = fail
    elif kind == "learn":
        layer._learnt = fail  # type: ignore[method-assign]
    else:
        fail_in_this_thread(monkeypatch, kind)
