"""What both kernels of accelerated projected gradient compute elementwise; inlined into them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_below(largest):
    """The power of two at or below a positive float; 1 for what is 0 or nearly."""
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(largest > 1e-37, power, 1.0)


@triton.jit
def advance(y, g, w_prev, step, beta):
    """The gradient step w = y − s g, and the move relu(w + β (w − w_prev)) − y: (w, move)."""
    w = y - step * g
    return w, tl.maximum(w + beta * (w - w_prev), 0.0) - y


@triton.jit
def shortened(values):
    """float16, rounded towards zero."""
    return values.to(tl.float16, fp_downcast_rounding="rtz")
