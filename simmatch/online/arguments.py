"""Checks of what a stack of a stream is given, before it does anything with it."""

from __future__ import annotations

import torch
from torch import Tensor

from simmatch.arguments import check_weights
from simmatch.config import ConfigError, ModelConfig
from simmatch.labels import UNLABELLED, check_labels
from simmatch.model import InputConfig
from simmatch.online.rate import RateConfig


def streaming(model: ModelConfig, rate: RateConfig) -> ModelConfig:
    """The model with the rates of its layers set, if it can learn from a stream.

    Raises
    ------
    ConfigError
        Several layers without `schedule: together`, or a layer with a falling rate of its own.

    >>> from simmatch.config import LayerConfig
    >>> layer = LayerConfig(out_channels=4, kernel_size=3)
    >>> streaming(ModelConfig(layers=(layer, layer)), RateConfig())
    Traceback (most recent call last):
    simmatch.config.ConfigError: model.schedule: expected together for a stream, got greedy
    """
    if len(model.layers) > 1 and model.schedule != "together":
        raise ConfigError(f"model.schedule: expected together for a stream, got {model.schedule}")
    return rate.applied(model)


def check_uncalibrated(calibrated: bool) -> None:
    """Raise RuntimeError if a stack that is to be calibrated has been.

    >>> check_uncalibrated(True)
    Traceback (most recent call last):
    RuntimeError: calibrate: expected one call, got another; what is measured first stays
    """
    if calibrated:
        raise RuntimeError("calibrate: expected one call, got another; what is measured first stays")


def check_calibrated(calibrated: bool) -> None:
    """Raise RuntimeError unless a stack that is to encode has been calibrated.

    >>> check_calibrated(False)
    Traceback (most recent call last):
    RuntimeError: encode: expected a calibrated stack; call calibrate() with the first records
    """
    if not calibrated:
        raise RuntimeError("encode: expected a calibrated stack; call calibrate() with the first records")


def check_records(x: Tensor, source: InputConfig) -> None:
    """Raise ValueError unless x is [B, C, H, W] as the source gives them, B ≥ 1.

    >>> check_records(torch.rand(0, 1, 1, 32), InputConfig(in_channels=1, height=1, width=32, num_classes=0))
    Traceback (most recent call last):
    ValueError: x: expected [B, 1, 1, 32], got [0, 1, 1, 32]
    """
    expected = [source.in_channels, source.height, source.width]
    if not isinstance(x, Tensor) or x.ndim != 4 or list(x.shape[1:]) != expected or len(x) == 0:
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected [B, {', '.join(map(str, expected))}], got {given}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"x: expected uint8 or floating-point records, got {x.dtype}")


def learnable_labels(model: ModelConfig, source: InputConfig, count: int, labels: Tensor | None) -> Tensor | None:
    """The labels of so many records if there are any, and some layer learns from them.

    Raises
    ------
    ValueError
        They do not match the records, or are of other classes.

    >>> from simmatch.config import LayerConfig
    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3),))
    >>> source = InputConfig(in_channels=1, height=8, width=8, num_classes=2)
    >>> learnable_labels(model, source, 2, torch.tensor([0, 1])) is None
    True
    """
    if labels is None or not any(layer.supervised for layer in model.layers):
        return None
    check_labels(labels, source.num_classes, count)
    return labels if bool((labels != UNLABELLED).any()) else None


def learnable(
    model: ModelConfig, source: InputConfig, count: int, labels: Tensor | None, weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """Labels and weights of so many records as an update uses them: each None where it makes no difference. None where
    all weights are 0: there is nothing to learn.

    Raises
    ------
    ValueError
        They do not match the records, or are out of their ranges.

    >>> from simmatch.config import LayerConfig
    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3),))
    >>> source = InputConfig(in_channels=1, height=8, width=8, num_classes=2)
    >>> learnable(model, source, 2, None, torch.ones(2)), learnable(model, source, 2, None, torch.zeros(2))
    ((None, None), None)
    """
    known = learnable_labels(model, source, count, labels)
    if weights is not None:
        if isinstance(weights, Tensor) and weights.shape == (count,) and not bool(weights.any()):
            return None
        check_weights(weights, count)
        weights = None if bool((weights == 1).all()) else weights
    return known, weights
