"""float32 means float32: torch's default for convolutions on CUDA is TF32, which keeps 10 bits of the fraction."""

from __future__ import annotations

import torch


def exact_float32() -> None:
    """Products and convolutions of this process in full float32 from now on; for whoever owns the process.

    By the older of torch's two interfaces: where convolutions alone are set by the newer one, whatever saves and
    restores cuDNN's flags raises, `torch.export` among others (torch 2.11 to 2.14).
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
