"""The similarity-matching layer of signals: a signal [B, C, T] is a map of height 1, [B, C, 1, T].

There is no other implementation: geometry, dynamics, kernels, plasticity, exchanges and files are those of
`simmatch.layer`. Buffers keep their shape there, W is [K, C, 1, k], so that every reader of a layer's tensors reads
these, and a 1-D layer and a 2-D one with kernels 1 × k load each other's state. A stack for signals, as a configuration
describes it (`kernel_size: [1, k]`), holds 2-D layers and takes [B, C, 1, T].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from simmatch.extent import Extent
from simmatch.layer import SimilarityMatchingConv2d


class SimilarityMatchingConv1d(SimilarityMatchingConv2d):
    """Convolutional nonnegative similarity matching over multichannel signals [B, C, T].

    It learns by the rules of `SimilarityMatchingConv2d`, from patches of k samples instead of k × k pixels. All methods
    take signals [B, C, T] (or maps [B, C, 1, T]) and return activities [B, K, T'] with
    T' = (T + 2 padding − k) // stride + 1; of positions, t replaces h · W' + w.

    Parameters
    ----------
    in_channels: C, the number of channels of the signals.
    out_channels: K, the number of channels of the activities.
    kernel_size, stride, padding: patches of k samples, taken every `stride` samples from signals padded with zeros; or
        (1, k), (1, stride) and (0, padding), as for a layer of maps.
    options: as for `SimilarityMatchingConv2d`.

    Raises
    ------
    ConfigError
        An argument is invalid; the message names it.

    Attributes: see `Synapses`; `feedforward` is [K, C, 1, k].

    >>> layer = SimilarityMatchingConv1d(in_channels=3, out_channels=16, kernel_size=32, stride=8)
    >>> x = torch.rand(10, 3, 256)
    >>> solution = layer.partial_fit(x)  # solve, statistics, update
    >>> solution.y.shape, layer(x).shape, layer.solve(x).residual.shape
    (torch.Size([16, 290]), torch.Size([10, 16, 29]), torch.Size([10, 29]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extent,
        *,
        stride: Extent = 1,
        padding: Extent = 0,
        **options: Any,
    ) -> None:
        across = {"stride": _across(stride, 1), "padding": _across(padding, 0)}
        super().__init__(in_channels, out_channels, _across(kernel_size, 1), **across, **options)
        (tall, _), (above, _) = self.patch.kernel, self.patch.convolution.margins
        if (tall, above) != (1, 0):
            given = f"kernel_size {kernel_size} and padding {padding}"
            raise ValueError(f"kernel_size: expected (1, k) with padding (0, n), got {given}")

    def as_images(self, x: Tensor) -> Tensor:
        """Signals [B, C, T] as maps [B, C, 1, T].

        Raises
        ------
        ValueError
            A tensor of another shape.
        """
        if not isinstance(x, Tensor) or (x.ndim == 4 and x.shape[2] == 1):
            return x
        if x.ndim != 3:
            raise ValueError(f"signals: expected [B, {self.in_channels}, T], got {list(x.shape)}")
        return x.unsqueeze(2)

    def of_maps(self, maps: Tensor) -> Tensor:
        """Maps [B, K, 1, T'] as signals [B, K, T']."""
        return maps.squeeze(2)


def _across(extent: Extent, down: int) -> Any:
    """(down, n) of a number n."""
    return extent if isinstance(extent, (tuple, list)) else (down, extent)
