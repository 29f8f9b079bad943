"""What the constructor of a layer refuses."""

from __future__ import annotations

import math


def check_arguments(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int,
    padding: int,
    num_classes: int,
    label_gain: float,
    normalize: str,
) -> None:
    """Raise ValueError, naming the argument, for values of `SimilarityMatchingConv2d` that make no layer."""
    positive = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": kernel_size,
        "stride": stride,
    }
    for name, value in positive.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    for name, value in {"padding": padding, "num_classes": num_classes}.items():
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected a nonnegative integer, got {value!r}")
    if not (math.isfinite(label_gain) and label_gain >= 0):
        raise ValueError(f"label_gain: expected a finite nonnegative number, got {label_gain!r}")
    if label_gain > 0 and num_classes == 0:
        raise ValueError(f"num_classes: expected at least 1 with label_gain={label_gain:g}, got 0")
    if normalize not in ("none", "contrast"):
        raise ValueError(f"normalize: expected 'none' or 'contrast', got {normalize!r}")
