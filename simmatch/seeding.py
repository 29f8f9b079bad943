"""Random numbers that are a pure function of what they are for: no global state, the same on every rank."""

from __future__ import annotations

import hashlib

import torch


def seeded(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator of its own for each purpose and numbers, far from those of neighbouring numbers."""
    digest = hashlib.sha256(repr((purpose, *numbers)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
